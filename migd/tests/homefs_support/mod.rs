//! A home view and a host view joined in one process, mounted in a mount namespace of the test's own.
//!
//! The namespace belongs to the test's thread and the programs it starts, so when they are gone the
//! mount is, whatever happened. Needs root and `/dev/fuse`; without them a test says so and is
//! skipped.
//!
//! What is served is this machine's own tree, to a test that is root. So it is served from a mount
//! namespace in which everything but the test's scratch directory is read-only: no mistake of a test
//! or of the code under test can change the machine. Directories to mount on are only ever removed
//! with rmdir, which cannot reach into a mount.
#![allow(dead_code)]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, Weak};

use migd::homefs::{HomeView, HostHooks, HostView, Wire};
use nix::fcntl::OFlag;
use nix::mount::MsFlags;
use nix::sched::CloneFlags;
use nix::sys::stat::Mode;

/// The token of every view here.
pub const TOKEN: [u8; 16] = *b"0123456789abcdef";

/// How the two views are joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Join {
    /// By calls.
    Memory,
    /// By a TCP connection over loopback.
    Tcp,
}

struct ToHome {
    home: Arc<HomeView>,
    connection: OnceLock<u64>,
}

impl Wire for ToHome {
    fn send(&self, frame: &[u8]) -> std::io::Result<()> {
        self.home.deliver(*self.connection.get().expect("connected"), frame);
        Ok(())
    }
}

#[derive(Default)]
struct ToHost(OnceLock<Weak<HostView>>);

impl Wire for ToHost {
    fn send(&self, frame: &[u8]) -> std::io::Result<()> {
        match self.0.get().and_then(Weak::upgrade) {
            Some(host) => host.deliver(frame),
            None => Err(std::io::ErrorKind::NotConnected.into()),
        }
    }
}

struct ToSocket(Mutex<TcpStream>);

impl Wire for ToSocket {
    fn send(&self, frame: &[u8]) -> std::io::Result<()> {
        self.0.lock().expect("no panic holds it").write_all(frame)
    }
}

/// Both kinds of frame begin with their length.
fn pump(mut from: TcpStream, to: impl Fn(&[u8])) {
    let mut frame = vec![0u8; 4];
    loop {
        frame.resize(4, 0);
        if from.read_exact(&mut frame).is_err() {
            return;
        }
        let len = u32::from_le_bytes([frame[0], frame[1], frame[2], frame[3]]) as usize;
        assert!((16..3 << 20).contains(&len), "frame of {len} bytes");
        frame.resize(len, 0);
        if from.read_exact(&mut frame[4..]).is_err() {
            return;
        }
        to(&frame);
    }
}

/// A mounted home file system.
pub struct Mounted {
    pub home: Arc<HomeView>,
    pub host: Arc<HostView>,
    pub connection: u64,
    /// Where the home file system is mounted.
    pub at: PathBuf,
    /// The only directory of home that can be written.
    pub scratch: PathBuf,
}

impl Mounted {
    /// A path of home as seen through the mount.
    pub fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        self.at.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// Runs a program with the mount as its root.
    pub fn chroot(&self, directory: &Path, script: &str) -> Output {
        let mut command = Command::new("chroot");
        command.arg(&self.at).args(["/bin/bash", "-c"]);
        command.arg(script_in(directory, script));
        command.stdin(Stdio::null());
        command.output().expect("chroot runs")
    }
}

fn script_in(directory: &Path, script: &str) -> String {
    let tmp = directory.parent().unwrap_or(directory).display();
    format!("cd {} || exit 99; export TMPDIR={tmp}; {script}", directory.display())
}

/// As [`Mounted::chroot`], but at home.
pub fn native(directory: &Path, script: &str) -> Output {
    Command::new("/bin/bash")
        .args(["-c", &script_in(directory, script)])
        .stdin(Stdio::null())
        .output()
        .expect("bash runs")
}

/// Output of a program that must have succeeded.
#[track_caller]
pub fn text(output: Output) -> String {
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{:?}\n{out}\n{err}", output.status);
    out
}

/// Why these tests cannot run here, if they cannot.
pub fn unavailable() -> Option<&'static str> {
    if !nix::unistd::geteuid().is_root() {
        return Some("needs root");
    }
    HostView::open_device().is_err().then_some("needs /dev/fuse")
}

const NONE: Option<&str> = None;

/// A directory to mount on.
struct Place(PathBuf);

impl Place {
    fn new(beside: &Path) -> Place {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::SeqCst);
        let path = beside.with_extension(format!("mount{number}"));
        std::fs::create_dir(&path).expect("mkdir");
        Place(path)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// This machine's tree, read-only but for `scratch`, as an `O_PATH` descriptor that is good until the
/// sender is dropped.
fn read_only_home(scratch: &Path) -> (OwnedFd, Sender<()>) {
    let (give, take) = channel();
    let (end, wait) = channel::<()>();
    let scratch = scratch.to_path_buf();
    std::thread::spawn(move || {
        nix::sched::unshare(CloneFlags::CLONE_NEWNS).expect("own mount namespace");
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        nix::mount::mount(NONE, "/", NONE, private, NONE).expect("private");
        nix::mount::mount(Some(&scratch), &scratch, NONE, MsFlags::MS_BIND, NONE).expect("bind");
        let mounts = std::fs::read_to_string("/proc/thread-self/mountinfo").expect("mountinfo");
        let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
        for at in mounts.lines().filter_map(|line| line.split(' ').nth(4)) {
            if Path::new(at) != scratch {
                let done = nix::mount::mount(NONE, at, NONE, read_only, NONE);
                // A mount hidden by another is out of reach anyway.
                assert!(done.is_ok() || at != "/", "the root cannot be made read-only: {done:?}");
            }
        }
        let probe = std::fs::create_dir("/.migd-test-must-not-be");
        assert!(probe.is_err(), "home is writable");
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let root = nix::fcntl::open("/", flags, Mode::empty()).expect("root opens");
        give.send(root).expect("waited for");
        let _ = wait.recv();
    });
    (take.recv().expect("a read-only view of this machine"), end)
}

/// Mounts this machine's tree in a thread and mount namespace of its own and runs `test` there.
pub fn mounted_with(join: Join, hooks: Arc<dyn HostHooks>, test: impl FnOnce(&Mounted) + Send + 'static) {
    if let Some(why) = unavailable() {
        eprintln!("skipped: {why}");
        return;
    }
    let scratch = tempfile::tempdir().expect("temporary directory");
    let (tree, home_lives) = read_only_home(scratch.path());
    let home = HomeView::new(tree, vec![4000], TOKEN).expect("home view");
    let place = Place::new(scratch.path());
    let (at, inside) = (place.0.clone(), scratch.path().to_path_buf());
    let done = std::thread::spawn(move || {
        nix::sched::unshare(CloneFlags::CLONE_NEWNS).expect("own mount namespace");
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        nix::mount::mount(NONE, "/", NONE, private, NONE).expect("private");
        let device = HostView::open_device().expect("/dev/fuse");
        HostView::mount(device.as_fd(), &at).expect("mount");
        let (host, connection) = match join {
            Join::Memory => join_by_calls(&home, device, hooks),
            Join::Tcp => join_by_tcp(&home, device, hooks),
        };
        let mounted = Mounted { home, host, connection, at, scratch: inside };
        let _guard = Unmount(&mounted);
        test(&mounted);
    })
    .join();
    drop(home_lives);
    let left = std::fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    assert!(!left.contains(place.0.to_str().expect("UTF-8")), "still mounted");
    drop(place);
    if let Err(panic) = done {
        std::panic::resume_unwind(panic);
    }
}

struct Unmount<'a>(&'a Mounted);

impl Drop for Unmount<'_> {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0.at, nix::mount::MntFlags::MNT_DETACH);
        self.0.host.stop();
        self.0.home.disconnect(self.0.connection);
    }
}

/// [`mounted_with`] without care for interruptions.
pub fn mounted(join: Join, test: impl FnOnce(&Mounted) + Send + 'static) {
    mounted_with(join, Arc::new(migd::homefs::host::NoHooks), test);
}

pub fn join_by_calls(
    home: &Arc<HomeView>,
    device: OwnedFd,
    hooks: Arc<dyn HostHooks>,
) -> (Arc<HostView>, u64) {
    let back = Arc::new(ToHost::default());
    let connection = home.connect(back.clone());
    let there = Arc::new(ToHome { home: home.clone(), connection: OnceLock::from(connection) });
    let host = HostView::start(device, there, hooks).expect("host view");
    back.0.set(Arc::downgrade(&host)).expect("set once");
    (host, connection)
}

fn join_by_tcp(home: &Arc<HomeView>, device: OwnedFd, hooks: Arc<dyn HostHooks>) -> (Arc<HostView>, u64) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let a = TcpStream::connect(listener.local_addr().expect("address")).expect("connect");
    let b = listener.accept().expect("accept").0;
    a.set_nodelay(true).expect("nodelay");
    b.set_nodelay(true).expect("nodelay");
    let connection = home.connect(Arc::new(ToSocket(Mutex::new(b.try_clone().expect("clone")))));
    let to_home = Arc::new(ToSocket(Mutex::new(a.try_clone().expect("clone"))));
    let host = HostView::start(device, to_home, hooks).expect("host view");
    let home = Arc::downgrade(home);
    std::thread::spawn(move || {
        pump(b, |frame| {
            if let Some(home) = home.upgrade() {
                home.deliver(connection, frame);
            }
        })
    });
    let weak = Arc::downgrade(&host);
    std::thread::spawn(move || {
        pump(a, |frame| {
            if let Some(host) = weak.upgrade() {
                host.deliver(frame).expect("home's frames are good");
            }
        })
    });
    (host, connection)
}

/// Mounts the same home view a second time, as on another host.
pub fn second(m: &Mounted, test: impl FnOnce(&Mounted)) {
    let place = Place::new(&m.scratch);
    let device = HostView::open_device().expect("/dev/fuse");
    HostView::mount(device.as_fd(), &place.0).expect("mount");
    let (host, connection) = join_by_calls(&m.home, device, Arc::new(migd::homefs::host::NoHooks));
    let (home, scratch) = (Arc::clone(&m.home), m.scratch.clone());
    let other = Mounted { home, host, connection, at: place.0.clone(), scratch };
    let _guard = Unmount(&other);
    test(&other);
}
