//! A home view and a host view joined in one process, mounted in a mount namespace of the test's own.
//!
//! The namespace belongs to the test's thread and the programs it starts, so when they are gone the
//! mount is, whatever happened. Needs root and `/dev/fuse`; without them a test says so and is
//! skipped.
#![allow(dead_code)]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
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
        command.arg(format!("cd {} || exit 99; {script}", directory.display()));
        command.stdin(Stdio::null());
        command.output().expect("chroot runs")
    }
}

/// As [`Mounted::chroot`], but at home.
pub fn native(directory: &Path, script: &str) -> Output {
    let script = format!("cd {} || exit 99; {script}", directory.display());
    Command::new("/bin/bash").args(["-c", &script]).stdin(Stdio::null()).output().expect("bash runs")
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

/// Mounts `root` in a thread and mount namespace of its own and runs `test` there.
pub fn mounted_with(
    root: &Path,
    join: Join,
    hooks: Arc<dyn HostHooks>,
    test: impl FnOnce(&Mounted) + Send + 'static,
) {
    if let Some(why) = unavailable() {
        eprintln!("skipped: {why}");
        return;
    }
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let tree: OwnedFd = nix::fcntl::open(root, flags, Mode::empty()).expect("root opens");
    let home = HomeView::new(tree, vec![], TOKEN).expect("home view");
    let at = tempfile::tempdir().expect("temporary directory");
    let place = at.path().to_path_buf();
    let done = std::thread::spawn(move || {
        nix::sched::unshare(CloneFlags::CLONE_NEWNS).expect("own mount namespace");
        let none = None::<&str>;
        nix::mount::mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("private");
        let device = HostView::open_device().expect("/dev/fuse");
        HostView::mount(device.as_fd(), &place).expect("mount");
        let (host, connection) = match join {
            Join::Memory => join_by_calls(&home, device, hooks),
            Join::Tcp => join_by_tcp(&home, device, hooks),
        };
        let _ = HostView::raise_read_ahead(&place);
        let mounted = Mounted { home, host, connection, at: place };
        let _guard = Unmount(&mounted);
        test(&mounted);
    })
    .join();
    let left = std::fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    assert!(!left.contains(at.path().to_str().expect("UTF-8")), "still mounted");
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
pub fn mounted(root: &Path, join: Join, test: impl FnOnce(&Mounted) + Send + 'static) {
    mounted_with(root, join, Arc::new(migd::homefs::host::NoHooks), test);
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
    let at = tempfile::tempdir().expect("temporary directory");
    let device = HostView::open_device().expect("/dev/fuse");
    HostView::mount(device.as_fd(), at.path()).expect("mount");
    let (host, connection) = join_by_calls(&m.home, device, Arc::new(migd::homefs::host::NoHooks));
    let other = Mounted { home: Arc::clone(&m.home), host, connection, at: at.path().to_path_buf() };
    let _guard = Unmount(&other);
    test(&other);
}
