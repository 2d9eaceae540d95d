//! Reading frozen processes on the live kernel: what is read is right, and nothing is left behind.

#[path = "roundtrip/harness.rs"]
#[allow(dead_code, reason = "the other tests use the rest")]
mod harness;
mod victim;

use checkpoint::dump::{DumpError, Run, Waits, for_each_run, read_state};
use checkpoint::image::{Backing, FileKind, ProcessImage};
use checkpoint::tracee::Tracee;
use std::collections::BTreeMap;
use std::fs;
use victim::Victim;

fn read(pid: i32) -> ProcessImage {
    let mut tracee = Tracee::freeze(pid).expect("freezes");
    let image = read_state(&mut tracee, &mut Waits::default()).expect("reads");
    tracee.thaw().expect("thaws");
    image
}

/// State and all pages, by address.
fn read_all(pid: i32) -> (ProcessImage, BTreeMap<u64, Vec<u8>>) {
    let mut tracee = Tracee::freeze(pid).expect("freezes");
    let image = read_state(&mut tracee, &mut Waits::default()).expect("reads");
    let mut pages = BTreeMap::new();
    for_each_run(&tracee, &image.mm, |run| -> Result<(), DumpError> {
        match run {
            Run::Data { addr, bytes } => {
                for (at, page) in (addr..).step_by(4096).zip(bytes.chunks(4096)) {
                    assert!(pages.insert(at, page.to_vec()).is_none(), "given twice: {at:#x}");
                }
            }
            Run::Same { addr, .. } => panic!("{addr:#x} of a parent that is not looked at"),
            Run::Zero { addr, len } => {
                for at in (addr..addr + len).step_by(4096) {
                    pages.insert(at, vec![0; 4096]);
                }
            }
        }
        Ok(())
    })
    .expect("reads memory");
    tracee.thaw().expect("thaws");
    (image, pages)
}

#[test]
fn leaves_everything_as_it_was() {
    let victim = Victim::python(
        "import threading\n\
         threading.Thread(target=lambda: [time.sleep(0.001) for _ in iter(int, 1)], daemon=True).start()\n\
         f = open('/proc/self/exe', 'rb'); f.seek(77)\n\
         tell('ready')\n\
         n = 0\n\
         while True:\n\
         \x20   n += 1; tell(n); time.sleep(0.01)\n",
    );
    assert_eq!(victim.line(), "ready");
    let before = (victim.maps(), victim.descriptors(), victim.status("SigBlk"), victim.status("SigPnd"));
    for _ in 0..30 {
        let image = read(victim.pid());
        assert_eq!(image.threads.len(), 2);
    }
    let after = (victim.maps(), victim.descriptors(), victim.status("SigBlk"), victim.status("SigPnd"));
    assert_eq!(before, after);
    assert_eq!(victim.status("TracerPid"), "0");
    assert_eq!(victim.status("Seccomp"), "0");
    let mut last = 0;
    for _ in 0..20 {
        let n: u64 = victim.line().parse().expect("a number");
        assert!(n == last + 1, "{n} after {last}");
        last = n;
    }
}

#[test]
fn reads_identity() {
    let victim = Victim::python(
        "import resource, os\n\
         os.umask(0o027); os.chdir('/usr'); os.nice(3)\n\
         resource.setrlimit(resource.RLIMIT_CORE, (4096, 8192))\n\
         libc.prctl(15, b'a new name', 0, 0, 0)\n\
         libc.prctl(1, 10, 0, 0, 0)\n\
         libc.prctl(29, 70000, 0, 0, 0)\n\
         tell('ready'); time.sleep(60)\n",
    );
    assert_eq!(victim.line(), "ready");
    let image = read(victim.pid());
    assert_eq!(image.pid, victim.pid());
    assert_eq!((image.fs.cwd.as_slice(), image.fs.umask), (&b"/usr"[..], 0o027));
    assert_eq!(image.threads[0].comm, b"a new name");
    assert_eq!((image.threads[0].pdeathsig, image.threads[0].timer_slack_ns), (10, 70_000));
    // Nice value: the fifth word of `struct sched_attr`.
    assert_eq!(image.threads[0].sched[16], 3);
    assert!(image.limits.contains(&(4, 4096, 8192)), "{:?}", image.limits);
    let exe = fs::read_link(format!("/proc/{}/exe", victim.pid())).expect("exe");
    assert_eq!(image.mm.exe, exe.as_os_str().as_encoded_bytes());
    let auxv = fs::read(format!("/proc/{}/auxv", victim.pid())).expect("auxv");
    assert_eq!(image.mm.auxv, auxv);
    let heap = victim.maps().lines().find(|line| line.ends_with("[heap]")).expect("a heap").to_string();
    let end = heap.split(['-', ' ']).nth(1).expect("an end");
    assert_eq!(format!("{:x}", image.mm.layout[5].next_multiple_of(4096)), end.trim_start_matches('0'));
    assert_eq!(image.misc.utsname.0, nix::unistd::gethostname().expect("a name").as_encoded_bytes());
}

#[test]
fn reads_signals() {
    let victim = Victim::python(
        "import signal, os, threading\n\
         signal.signal(signal.SIGUSR1, lambda *a: None)\n\
         signal.signal(signal.SIGUSR2, signal.SIG_IGN)\n\
         signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, 40, signal.SIGHUP])\n\
         os.kill(os.getpid(), signal.SIGTERM)\n\
         for value in (7, 8, 9): libc.sigqueue(os.getpid(), 40, ctypes.c_void_p(value))\n\
         signal.pthread_kill(threading.get_ident(), signal.SIGHUP)\n\
         tell('ready'); time.sleep(60)\n",
    );
    assert_eq!(victim.line(), "ready");
    for _ in 0..3 {
        let image = read(victim.pid());
        let handler = |signal: usize| image.signals.actions[signal - 1][0];
        assert!(handler(10) > 1);
        assert_eq!((handler(12), handler(15)), (1, 0));
        let masked = |signal: u64| image.threads[0].sigmask >> (signal - 1) & 1 == 1;
        assert!(masked(15) && masked(40) && masked(1) && !masked(2));
        let number = |info: &Vec<u8>| i32::from_le_bytes(info[..4].try_into().expect("four"));
        let value = |info: &Vec<u8>| u64::from_le_bytes(info[24..32].try_into().expect("eight"));
        let shared: Vec<i32> = image.signals.pending.iter().map(number).collect();
        assert_eq!(shared, [15, 40, 40, 40]);
        let values: Vec<u64> = image.signals.pending[1..].iter().map(value).collect();
        assert_eq!(values, [7, 8, 9]);
        let own: Vec<i32> = image.threads[0].pending.iter().map(number).collect();
        assert_eq!(own, [1]);
    }
}

#[test]
fn reads_timers() {
    let victim = Victim::python(
        "import signal\n\
         signal.signal(signal.SIGALRM, lambda *a: None)\n\
         signal.signal(signal.SIGUSR1, lambda *a: None)\n\
         signal.setitimer(signal.ITIMER_REAL, 100, 7)\n\
         class Event(ctypes.Structure):\n\
         \x20   _fields_ = [('value', ctypes.c_void_p), ('signo', ctypes.c_int), ('notify', ctypes.c_int), ('pad', ctypes.c_int * 12)]\n\
         event = Event(0x1234, 10, 0)\n\
         timer = ctypes.c_void_p()\n\
         assert libc.timer_create(1, ctypes.byref(event), ctypes.byref(timer)) == 0\n\
         spec = (ctypes.c_long * 4)(3, 500, 200, 0)\n\
         assert libc.timer_settime(timer, 0, spec, None) == 0\n\
         tell('ready'); time.sleep(60)\n",
    );
    assert_eq!(victim.line(), "ready");
    let image = read(victim.pid());
    let (interval, left) = image.timers.itimers[0];
    assert_eq!(interval, 7_000_000);
    assert!((90_000_000..=100_000_000).contains(&left), "{left}");
    assert_eq!(image.timers.posix.len(), 1);
    let timer = &image.timers.posix[0];
    assert_eq!((timer.clock, timer.signo, timer.value), (1, 10, 0x1234));
    assert_eq!(timer.interval_ns, 3_000_000_500);
    assert!((190_000_000_000..=200_000_000_000).contains(&timer.value_ns), "{}", timer.value_ns);
}

#[test]
fn reads_files() {
    let place = tempfile::tempdir().expect("a directory");
    let victim = Victim::python(&format!(
        "import os, select, signal\n\
         os.chdir('{}')\n\
         a = os.open('a', os.O_RDWR | os.O_CREAT, 0o600); os.write(a, b'0123456789'); os.lseek(a, 4, 0)\n\
         b = os.dup(a); c = os.open('a', os.O_RDONLY); os.lseek(c, 4, 0)\n\
         os.set_inheritable(b, True)\n\
         gone = os.open('gone', os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600); os.unlink('gone')\n\
         odd = os.open(b'x (deleted)', os.O_RDWR | os.O_CREAT, 0o600)\n\
         raw = os.open(b'\\xff\\n\\xfe', os.O_RDWR | os.O_CREAT, 0o600)\n\
         event = libc.eventfd(5, 0)\n\
         r, w = os.pipe()\n\
         poll = select.epoll(); poll.register(r, select.EPOLLIN)\n\
         timer = libc.timerfd_create(1, 0)\n\
         libc.timerfd_settime(timer, 0, (ctypes.c_long * 4)(2, 0, 300, 0), None)\n\
         mask = ctypes.c_ulong(1 << 9); sig = libc.signalfd(-1, ctypes.byref(mask), 0)\n\
         folder = os.open('.', os.O_RDONLY)\n\
         tell(a, b, c, gone, odd, raw, event, r, w, poll.fileno(), timer, sig, folder); time.sleep(60)\n",
        place.path().display()
    ));
    let numbers: Vec<i32> = victim.line().split(' ').map(|word| word.parse().expect("a number")).collect();
    let [a, b, c, gone, odd, raw, event, r, w, poll, timer, sig, folder] = numbers[..] else { panic!() };
    let image = read(victim.pid());
    let fd = |number: i32| image.files.fds.iter().find(|fd| fd.fd == number).expect("the descriptor");
    let file = |number: i32| &image.files.files[fd(number).file as usize];
    assert_eq!(fd(a).file, fd(b).file);
    assert_ne!(fd(a).file, fd(c).file);
    assert_eq!((fd(a).cloexec, fd(b).cloexec), (true, false));
    assert_eq!((file(a).pos, file(c).pos), (4, 4));
    assert_eq!(file(a).kind, FileKind::Regular { deleted: false });
    assert_eq!(file(gone).kind, FileKind::Regular { deleted: true });
    assert_eq!(file(gone).flags & libc::O_APPEND as u32, libc::O_APPEND as u32);
    assert_eq!(file(odd).kind, FileKind::Regular { deleted: false });
    assert_eq!(file(raw).kind, FileKind::Regular { deleted: false });
    assert!(file(raw).link.ends_with(b"/\xff\n\xfe"));
    assert_eq!(file(event).kind, FileKind::EventFd { count: 5, semaphore: false });
    assert_eq!(file(r).kind, FileKind::Pipe { internal: true });
    assert_eq!(file(w).kind, FileKind::Pipe { internal: true });
    assert_eq!(file(1).kind, FileKind::Pipe { internal: false });
    assert_eq!(file(0).kind, FileKind::LocalDevice);
    let FileKind::Epoll { targets } = &file(poll).kind else { panic!("an epoll") };
    assert_eq!(targets.iter().map(|target| (target.fd, target.events & 1)).collect::<Vec<_>>(), [(r, 1)]);
    let FileKind::TimerFd { clock: 1, value_ns, interval_ns: 2_000_000_000, .. } = file(timer).kind else {
        panic!("{:?}", file(timer).kind)
    };
    assert!(value_ns > 290_000_000_000);
    assert_eq!(file(sig).kind, FileKind::SignalFd { mask: 1 << 9 });
    assert_eq!(file(folder).kind, FileKind::Directory);
}

#[test]
fn reads_memory() {
    let place = tempfile::tempdir().expect("a directory");
    let path = place.path().join("data");
    fs::write(&path, vec![b'f'; 16 * 4096]).expect("writes");
    let victim = Victim::python(&format!(
        "import mmap, os\n\
         def address(m): return ctypes.addressof(ctypes.c_char.from_buffer(m))\n\
         own = mmap.mmap(-1, 64 * 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS); own[5*4096:5*4096+3] = b'own'\n\
         hidden = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS); hidden[:6] = b'hidden'\n\
         h = address(hidden); libc.mprotect(ctypes.c_void_p(h), 4096, 0)\n\
         big = mmap.mmap(-1, 1 << 28, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS); big[1<<27:(1<<27)+6] = b'shared'\n\
         f = os.open('{}', os.O_RDWR)\n\
         data = mmap.mmap(f, 16 * 4096, mmap.MAP_PRIVATE); data[3*4096:3*4096+3] = b'cow'; x = data[9*4096]\n\
         tell(address(own), h, address(big), address(data)); time.sleep(60)\n",
        path.display()
    ));
    let found: Vec<u64> = victim.line().split(' ').map(|word| word.parse().expect("a number")).collect();
    let [own, hidden, big, data] = found[..] else { panic!("four addresses") };
    let before = victim.status("RssShmem");
    let (image, pages) = read_all(victim.pid());
    assert_eq!(before, victim.status("RssShmem"), "reading has filled holes");
    assert!(pages[&(own + 5 * 4096)].starts_with(b"own"));
    assert!(pages[&hidden].starts_with(b"hidden"));
    assert!(pages[&(big + (1 << 27))].starts_with(b"shared"));
    let of_big = pages.range(big..big + (1 << 28)).count();
    assert!(of_big <= 512, "{of_big} pages of a sparse mapping");
    assert!(pages[&(data + 3 * 4096)].starts_with(b"cowf"));
    // The file's own pages are found at the target.
    assert!(!pages.contains_key(&(data + 9 * 4096)));
    let vma = |at: u64| image.mm.vmas.iter().find(|vma| vma.start <= at && at < vma.end).expect("a mapping");
    assert!(matches!(vma(big).backing, Backing::SharedAnon { .. }) && vma(big).shared);
    assert!(matches!(&vma(data).backing, Backing::File(file) if file.path.ends_with(b"/data")));
    assert_eq!(vma(hidden).prot, 0);
}

#[test]
fn guard_pages_are_told_and_not_read() {
    let victim = Victim::python(
        "import mmap\n\
         m = mmap.mmap(-1, 16 * 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS); m[:] = b'x' * len(m)\n\
         at = ctypes.addressof(ctypes.c_char.from_buffer(m))\n\
         tell(at, libc.madvise(ctypes.c_void_p(at + 2 * 4096), 3 * 4096, 102)); time.sleep(60)\n",
    );
    let line = victim.line();
    let (at, result) = line.split_once(' ').expect("two words");
    if result != "0" {
        eprintln!("skipped: this kernel has no MADV_GUARD_INSTALL (6.13)");
        return;
    }
    let at: u64 = at.parse().expect("an address");
    let (image, pages) = read_all(victim.pid());
    assert!(image.mm.guards.contains(&(at + 2 * 4096, at + 5 * 4096)), "{:x?}", image.mm.guards);
    assert_eq!(pages.range(at..at + 16 * 4096).count(), 13);
}

#[test]
fn a_stop_during_the_freeze_is_kept() {
    let victim = Victim::python("tell('ready'); time.sleep(60)\n");
    assert_eq!(victim.line(), "ready");
    let mut tracee = Tracee::freeze(victim.pid()).expect("freezes");
    let pid = nix::unistd::Pid::from_raw(victim.pid());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).expect("sends");
    read_state(&mut tracee, &mut Waits::default()).expect("reads");
    tracee.thaw().expect("thaws");
    victim.wait_for_state('T');
    let image = read(victim.pid());
    assert_eq!(image.signals.stopped_by, Some(19));
    victim.wait_for_state('T');
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGCONT).expect("sends");
    victim.wait_for_state('S');
}

/// What one of many threads can have that the others have not; each does one of these, and the first ones of
/// them nothing.
const MIXED: &str = r#"
import threading, ctypes
class Stack(ctypes.Structure):
    _fields_ = [('sp', ctypes.c_void_p), ('flags', ctypes.c_int), ('size', ctypes.c_size_t)]
PRCTL, kept = 157, []
def call(*args):
    done = libc.syscall(*[ctypes.c_long(a) for a in args])
    assert done >= 0, (args, ctypes.get_errno())
def prctl(*args):
    call(PRCTL, *args, *[0] * (5 - len(args)))
def altstack(flags):
    memory = ctypes.create_string_buffer(65536)
    kept.append(memory)
    stack = Stack(ctypes.addressof(memory), flags, 65536)
    assert libc.sigaltstack(ctypes.byref(stack), None) == 0
def capabilities():
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)(0x3f, 0x3f, 0, 0, 0, 0)
    call(126, ctypes.addressof(header), ctypes.addressof(data))
def policy():
    nodes = ctypes.c_ulong(1)
    call(238, 1, ctypes.addressof(nodes), 64)
def name(n):
    text = ctypes.create_string_buffer(b'named %d' % n)
    prctl(15, ctypes.addressof(text))
kinds = [
    lambda n: prctl(29, 7777), lambda n: prctl(29, 1 << 40), name, lambda n: altstack(0),
    lambda n: altstack(-1 << 31), lambda n: altstack(2), lambda n: prctl(1, 10), lambda n: call(135, 0x0040000),
    lambda n: policy(), lambda n: libc.prctl(53, 0, 4, 0, 0), lambda n: prctl(33, 1, 1), lambda n: libc.prctl(57, 1, 0, 0, 0),
    lambda n: call(117, 1234, 1234, 1234), lambda n: call(119, 55, 55, 55), lambda n: call(122, 77),
    lambda n: capabilities(), lambda n: prctl(28, 1 << 4 | 1 << 5), lambda n: prctl(38, 1),
    lambda n: call(218, 0), lambda n: call(141, 0, 0, 5), lambda n: call(251, 1, 0, (2 << 13) | 3),
    lambda n: call(250, 1, 0), lambda n: call(272, 0x200), lambda n: prctl(8, 1),
]
barrier = threading.Barrier(len(kinds) * 4 + 41)
def body(n):
    if n >= 40:
        kinds[(n - 40) % len(kinds)](n)
    barrier.wait()
    while True:
        libc.pause()
for n in range(len(kinds) * 4 + 40):
    threading.Thread(target=body, args=(n,), daemon=True).start()
barrier.wait()
tell('ready')
time.sleep(1000)
"#;

#[test]
fn the_kernels_structures_tell_what_threads_tell_themselves() {
    use checkpoint::sys::bpf;
    let victim = Victim::python(MIXED);
    assert_eq!(victim.line(), "ready");
    // All are in their calls.
    victim.settled();
    bpf::allow(false);
    let asked = read(victim.pid());
    bpf::allow(true);
    let seen = read(victim.pid());
    assert_eq!(asked.threads.len(), 137);
    assert!(asked.threads.iter().filter(|thread| thread.creds.is_some()).count() >= 16);
    for (asked, seen) in asked.threads.iter().zip(&seen.threads) {
        assert_eq!(asked, seen);
    }
    assert_eq!((asked.creds, asked.seccomp, asked.traits), (seen.creds, seen.seccomp, seen.traits));
    // Unless the kernel does not let itself be looked at, that was another way.
    if !bpf::prepare() {
        let why = "the kernel does not let itself be looked at (BPF, BTF)";
        harness::skip("the_kernels_structures_tell_what_threads_tell_themselves", why);
    }
}
