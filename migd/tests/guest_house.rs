//! A process from here moved into a house over the home file system, in one process: the whole chain
//! but for the connection. Needs root and `/dev/fuse`; without them the test says so and is skipped.

mod homefs_support;

use checkpoint::dump::{self, DumpError};
use checkpoint::image::{FileKind, MappedFile, ProcessImage};
use checkpoint::restore::{self, FileSource, Rebuild, RebuildOptions, RestoreError};
use checkpoint::sys::fd::{pidfd_getfd, pidfd_open};
use checkpoint::tracee::Tracee;
use homefs_support::{TOKEN, join_by_calls, unavailable};
use migd::homefs::host::NoHooks;
use migd::homefs::{HandleKind, HomeView, HostView};
use migd::shepherd::guest_init::{GuestHouse, HouseEvent, Setup};
use migd::shepherd::session::{IdentityQuestion, Reply};
use migd::shepherd::supervisor::{self, Supervisor, SupervisorHooks};
use migd::shepherd::terminal;
use nix::fcntl::OFlag;
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::stat::Mode;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Home, as the guest's questions find it.
struct Home {
    view: Arc<HomeView>,
    deputy: i32,
    retreats: Mutex<Sender<String>>,
}

impl SupervisorHooks for Home {
    fn identity(&self, _: IdentityQuestion) -> io::Result<i64> {
        Ok(i64::from(std::process::id()))
    }

    fn terminal(&self, handle: u64, request: u64, value: u64, bytes: &[u8]) -> io::Result<Reply> {
        let file = self.view.handle_file(handle).ok_or(io::ErrorKind::NotFound)?;
        Ok(terminal::answer(file.as_fd(), self.deputy, request, value, bytes))
    }

    fn retreat(&self, reason: String) {
        let _ = self.retreats.lock().expect("no panic holds it").send(reason);
    }
}

/// A Python on a terminal of ours, which prints what the lines that it reads come to.
struct Victim {
    child: Child,
    master: File,
    slave: OwnedFd,
    path: Vec<u8>,
}

impl Victim {
    fn start() -> Victim {
        // Not with openpty(): other programs started here would inherit it.
        let master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC).expect("a pty");
        grantpt(&master).and_then(|()| unlockpt(&master)).expect("unlocked");
        let path = ptsname_r(&master).expect("its name");
        let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
        let slave = nix::fcntl::open(path.as_str(), flags, Mode::empty()).expect("opens");
        let code = "import os,sys,threading,time\nsys.ps=open('/etc/hostname')\n\
                    for line in sys.stdin:\n  try: print('=',eval(line),flush=True)\n  except Exception as e: print('=',repr(e),flush=True)";
        let end = || Stdio::from(slave.try_clone().expect("a copy"));
        let mut command = Command::new("setsid");
        command.args(["-c", "python3", "-c", code]).stdin(end()).stdout(end()).stderr(end());
        let child = command.spawn().expect("setsid starts");
        let master = File::from(OwnedFd::from(master));
        let mut victim = Victim { child, master, slave, path: path.into_bytes() };
        assert_eq!(victim.ask("1+1"), "2");
        victim
    }

    fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// The line that answers; what the terminal echoes is skipped.
    #[track_caller]
    fn ask(&mut self, line: &str) -> String {
        self.master.write_all(format!("{line}\n").as_bytes()).expect("the terminal takes it");
        self.answer().unwrap_or_else(|got| panic!("no answer to {line}, but {got:?}"))
    }

    fn answer(&mut self) -> Result<String, String> {
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut text = String::new();
        while Instant::now() < deadline {
            let mut ready = [nix::poll::PollFd::new(self.master.as_fd(), nix::poll::PollFlags::POLLIN)];
            if nix::poll::poll(&mut ready, 100u8).expect("polls") == 0 {
                continue;
            }
            let mut bytes = [0; 4096];
            let n = self.master.read(&mut bytes).expect("the terminal gives");
            text.push_str(&String::from_utf8_lossy(&bytes[..n]));
            if let Some((_, answer)) = text.split_once("= ")
                && let Some((answer, _)) = answer.split_once("\r\n")
            {
                return Ok(answer.to_string());
            }
        }
        Err(text)
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct ByPath;

impl FileSource for ByPath {
    fn open_mapped(
        &mut self,
        t: &mut Tracee,
        file: &MappedFile,
        writable: bool,
    ) -> Result<i32, RestoreError> {
        restore::open_inside(t, &file.path, writable)
    }
}

/// Everything of a guest that has been built.
struct Guest {
    // In this order: the supervisor must outlive the house's last call.
    house: GuestHouse,
    supervisor: Supervisor,
    host: Arc<HostView>,
    pid: i32,
    home_pid: i32,
    retreats: Receiver<String>,
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.host.stop();
    }
}

/// Keeps the process' files open here, as handles of the view.
fn carry(view: &HomeView, image: &mut ProcessImage) {
    let pidfd = pidfd_open(image.pid).expect("pidfd");
    for (index, file) in image.files.files.iter_mut().enumerate() {
        let kind = match file.kind {
            FileKind::Regular { .. } => HandleKind::Regular { shared_position: false },
            FileKind::Directory => HandleKind::Directory,
            FileKind::Tty | FileKind::Pipe { .. } => HandleKind::Stream,
            _ => continue,
        };
        let fd = image.files.fds.iter().find(|fd| fd.file as usize == index).expect("a number");
        let copy = pidfd_getfd(pidfd.as_fd(), fd.fd).expect("a copy");
        file.kind = FileKind::Foreign { handle: view.add_handle(copy, kind).expect("a handle") };
    }
}

/// Moves the victim into a house; the original stays frozen in `original`.
fn move_in(victim: &Victim) -> (Guest, Tracee) {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let root = nix::fcntl::open("/", flags, Mode::empty()).expect("the root");
    let view = HomeView::new(root, vec![], TOKEN).expect("a home view");
    view.set_deputy(victim.pid()).expect("a deputy");

    let mut original = Tracee::freeze(victim.pid()).expect("freezes");
    let mut image = dump::read_state(&mut original, &mut dump::Waits::default()).expect("its state");
    carry(&view, &mut image);

    let device = HostView::open_device().expect("/dev/fuse");
    let copy = device.try_clone().expect("a copy");
    let (host, _) = join_by_calls(&view, copy, Arc::new(NoHooks));
    let tty =
        view.add_handle(victim.slave.try_clone().expect("a copy"), HandleKind::Stream).expect("a handle");
    let setup = Setup {
        hostname: b"a-home".to_vec(),
        domainname: b"(none)".to_vec(),
        monotonic_offset_ns: 1_000_000_000_000,
        boottime_offset_ns: 1_000_000_000_000,
        token: TOKEN,
        terminal: Some((victim.path.clone(), tty)),
        tid_base: 3_000_000,
        pid_max: 4_000_000,
    };
    let start = Instant::now();
    let mut house =
        GuestHouse::start(Path::new(env!("CARGO_BIN_EXE_migd")), device, &setup).expect("a house");
    let pid = house.spawn(std::slice::from_ref(&image)).expect("a leader")[0];
    eprintln!("house and leader: {:?}", start.elapsed());

    let mut tracee = Tracee::adopt(pid).expect("adopts");
    let avoid: Vec<(u64, u64)> = image.mm.vmas.iter().map(|vma| (vma.start, vma.end)).collect();
    tracee.install_stub(&avoid).expect("a stub");
    let mut rebuild =
        Rebuild::begin(&mut tracee, &image, &mut ByPath, RebuildOptions::guest()).expect("memory");
    dump::for_each_run(&original, &image.mm, |run| {
        match run {
            dump::Run::Data { addr, bytes } => rebuild.data(addr, bytes).expect("placed"),
            dump::Run::Zero { addr, len } => rebuild.zero(addr, len).expect("placed"),
            dump::Run::Same { addr, len } => rebuild.same(addr, len).expect("placed"),
        }
        Ok::<(), DumpError>(())
    })
    .expect("pages");
    rebuild.make_threads().expect("threads");
    let listener = supervisor::install(rebuild.tracee(), image.pid).expect("a filter");
    rebuild.finish().expect("rebuilt");
    let (sender, retreats) = channel();
    let home = Arc::new(Home { view, deputy: victim.pid(), retreats: Mutex::new(sender) });
    let supervisor = Supervisor::start(listener, pid, home).expect("a supervisor");
    tracee.release().expect("runs");
    let guest = Guest { house, supervisor, host, pid, home_pid: image.pid, retreats };
    (guest, original)
}

#[track_caller]
fn event(house: &mut GuestHouse) -> HouseEvent {
    let deadline = Instant::now() + Duration::from_secs(10);
    while Instant::now() < deadline {
        if let Some(event) = house.next_event().expect("it talks") {
            return event;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    panic!("nothing happened");
}

#[test]
fn a_process_lives_in_its_house_as_at_home() {
    if let Some(why) = unavailable() {
        eprintln!("skipped: {why}");
        return;
    }
    let mut victim = Victim::start();
    let uptime = victim.ask("time.monotonic()").parse::<f64>().expect("seconds");
    let (mut guest, original) = move_in(&victim);
    let home_pid = guest.home_pid;
    let expect =
        |victim: &mut Victim, line: &str, answer: &str| assert_eq!(victim.ask(line), answer, "{line}");

    // Who and where it is.
    expect(&mut victim, "os.getpid()", &home_pid.to_string());
    expect(&mut victim, "os.getppid()", &std::process::id().to_string());
    expect(&mut victim, "os.uname().nodename", "a-home");
    let away = victim.ask("time.monotonic()").parse::<f64>().expect("seconds");
    assert!((1000.0..1100.0).contains(&(away - uptime)), "{uptime} {away}");

    // The terminal is home's.
    expect(&mut victim, "os.isatty(0)", "True");
    expect(&mut victim, "os.tcgetpgrp(0)==os.getpid()", "True");
    victim.ask("__import__('fcntl').ioctl(0,0x5414,b'\\x21\\0\\x22\\0\\0\\0\\0\\0')");
    expect(&mut victim, "os.get_terminal_size(0)", "os.terminal_size(columns=34, lines=33)");
    let name = String::from_utf8_lossy(&victim.path).into_owned();
    expect(&mut victim, &format!("os.isatty(os.open('{name}',os.O_RDWR))"), "True");
    for _ in 0..2 {
        expect(&mut victim, "open('/dev/tty','w').write('over here\\n')", "10");
    }

    // Files are home's, the few devices are there, and nothing of the host's.
    let here = tempfile::NamedTempFile::new().expect("a file");
    fs::write(here.path(), "from home").expect("written");
    let path = here.path().display().to_string();
    expect(&mut victim, &format!("open('{path}').read()"), "from home");
    expect(&mut victim, &format!("open('{path}','w').write('from afar')"), "9");
    assert_eq!(fs::read_to_string(here.path()).expect("read"), "from afar");
    expect(&mut victim, "sys.ps.fileno()>2 and sys.ps.read()==open('/etc/hostname').read()", "True");
    expect(&mut victim, "open('/dev/zero','rb').read(3)+open('/dev/null','rb').read()", "b'\\x00\\x00\\x00'");
    expect(&mut victim, "os.path.exists('/dev/ptmx')", "False");
    expect(
        &mut victim,
        "sorted(p for p in os.listdir('/proc') if p.isdigit())",
        &format!("{:?}", {
            let mut pids = vec!["1".to_string(), home_pid.to_string()];
            pids.sort();
            pids
        })
        .replace('"', "'"),
    );
    let sysctl = victim.ask("open('/proc/sys/kernel/hostname','w')");
    assert!(sysctl.starts_with("OSError(30"), "{sysctl}");
    let mounts = victim.ask("open('/proc/self/mountinfo').read().count('\\n')");
    assert!(mounts.parse::<u32>().expect("a number") < 25, "{mounts}");

    // Threads are made there, from the numbers kept for them.
    expect(
        &mut victim,
        "[t.join() for t in [threading.Thread(target=time.sleep,args=(.01,)) for _ in range(3)] if not t.start()]",
        "[None, None, None]",
    );
    victim.ask("[sys.__setattr__('e',threading.Event()),threading.Thread(target=sys.e.wait).start()]");
    let tids = victim.ask("[int(t)>=3000000 for t in os.listdir('/proc/self/task') if int(t)!=os.getpid()]");
    assert_eq!(tids, "[True]");

    // Stop, go on.
    guest.house.kill(guest.home_pid, libc::SIGTSTP).expect("sent");
    assert_eq!(
        event(&mut guest.house),
        HouseEvent::Stopped { pid: guest.home_pid, signal: libc::SIGTSTP as u8 }
    );
    guest.house.kill(guest.home_pid, libc::SIGCONT).expect("sent");
    assert_eq!(event(&mut guest.house), HouseEvent::Continued { pid: guest.home_pid });
    expect(&mut victim, "3+4", "7");
    assert!(guest.retreats.try_recv().is_err(), "nothing so far needs home");

    // What it cannot do here it waits for; it can be frozen and killed meanwhile.
    victim.master.write_all(b"os.fork()\n").expect("written");
    assert_eq!(guest.retreats.recv_timeout(Duration::from_secs(5)).expect("a retreat"), "clone");
    guest.supervisor.freeze().expect("freezes").thaw().expect("thaws");
    assert_eq!(guest.retreats.recv_timeout(Duration::from_secs(5)).expect("again"), "clone");
    guest.house.kill(guest.home_pid, libc::SIGTERM).expect("sent");
    assert_eq!(event(&mut guest.house), HouseEvent::Ended { pid: guest.home_pid, status: libc::SIGTERM });
    drop(guest);
    drop(original.into_tids());
}

#[test]
fn a_house_ends_with_a_frozen_guest_in_it() {
    if let Some(why) = unavailable() {
        eprintln!("skipped: {why}");
        return;
    }
    let victim = Victim::start();
    let (guest, original) = move_in(&victim);
    let (pid, init) = (guest.pid, guest.house.init());
    let frozen = guest.supervisor.freeze().expect("freezes");
    drop(frozen.into_tids());
    let start = Instant::now();
    drop(guest);
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    for pid in [pid, init] {
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "{pid} is left");
    }
    drop(original.into_tids());
}

#[test]
fn a_house_that_cannot_be_says_why() {
    if let Some(why) = unavailable() {
        eprintln!("skipped: {why}");
        return;
    }
    let setup = Setup {
        hostname: vec![b'x'; 100],
        domainname: Vec::new(),
        monotonic_offset_ns: 0,
        boottime_offset_ns: 0,
        token: TOKEN,
        terminal: None,
        tid_base: 300,
        pid_max: 4_000_000,
    };
    let device = HostView::open_device().expect("/dev/fuse");
    let refused = GuestHouse::start(Path::new(env!("CARGO_BIN_EXE_migd")), device, &setup);
    let text = refused.err().expect("refused").to_string();
    assert!(text.contains("cannot set the host name"), "{text}");
}
