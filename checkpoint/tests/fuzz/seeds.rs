//! Images by the engine's own hand, of everything that one can have in it: what is to be broken.

use crate::harness::{Case, Running, descendants, migckpt, victim};
use crate::huge_pool::Pool;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Images, and the folders whose files they name.
pub struct Seeds {
    /// One process each, or a tree.
    pub images: Vec<Vec<u8>>,
    /// What those with huge pages are restored from, all of it free.
    pub huge_pages: Option<Pool>,
    _folders: Vec<Case>,
}

/// What a program of its own tells: it has prepared all, and waits.
const SOCKETS: &str = r#"
import os, socket, struct, array, fcntl, select, time, signal
from socket import AF_UNIX, AF_INET6, SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET, SOL_SOCKET
keep = []
a, b = socket.socketpair(); c, d = socket.socketpair(AF_UNIX, SOCK_SEQPACKET); e, f = socket.socketpair(AF_UNIX, SOCK_DGRAM)
reading, writing = os.pipe(); os.write(writing, b"in the pipe"); fcntl.fcntl(writing, 1031, 8192)
deleted = os.open("gone", os.O_RDWR | os.O_CREAT); os.write(deleted, b"deleted"); os.unlink("gone")
memfd = os.memfd_create("mem", os.MFD_ALLOW_SEALING); os.write(memfd, b"x" * 5000); fcntl.fcntl(memfd, 1033, 2)
def send(s, data, *fds): s.sendmsg([data], [(SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
flying = socket.socketpair()
send(a, b"with files", reading, memfd, flying[0].fileno()); flying[0].close(); send(flying[1], b"round", flying[1].fileno())
a.send(b"more"); c.send(b"a record"); e.send(b"a datagram"); e.send(b"")
listening = socket.socket(AF_UNIX); listening.bind("name"); listening.listen(3)
client = socket.socket(AF_UNIX); client.connect("name"); served, _ = listening.accept(); client.send(b"to the served")
waiting = socket.socket(AF_UNIX); waiting.connect("name")
hidden = socket.socket(AF_UNIX, SOCK_DGRAM); hidden.bind("\0fuzz-%d" % os.getpid()); sender = socket.socket(AF_UNIX, SOCK_DGRAM); sender.connect(hidden.getsockname()); sender.send(b"abstract")
half = socket.socketpair(); half[0].send(b"last"); half[0].close()
tcp = socket.socket(); tcp.bind(("127.0.0.1", 0)); tcp.listen(4)
near = socket.create_connection(tcp.getsockname()); far, _ = tcp.accept(); near.send(b"over tcp"); far.send(b"answer")
shut = socket.create_connection(tcp.getsockname()); shut_far, _ = tcp.accept(); shut.send(b"end"); shut.shutdown(socket.SHUT_WR)
left = socket.create_connection(tcp.getsockname()); left_far, _ = tcp.accept(); left.send(b"left"); left.close()
unaccepted = socket.create_connection(tcp.getsockname())
udp = socket.socket(type=SOCK_DGRAM); udp.bind(("127.0.0.1", 0)); other = socket.socket(type=SOCK_DGRAM); other.connect(udp.getsockname()); other.send(b"datagram"); other.send(b"second")
six = socket.socket(AF_INET6, SOCK_DGRAM); six.bind(("::1", 0)); six.sendto(b"to itself", six.getsockname())
ep = select.epoll(); ep.register(a, select.EPOLLIN); ep.register(tcp, select.EPOLLIN | select.EPOLLET); ep.register(reading, select.EPOLLIN | select.EPOLLONESHOT)
inner = select.epoll(); inner.register(ep, select.EPOLLIN)
locked = os.open("locked", os.O_RDWR | os.O_CREAT); fcntl.lockf(locked, fcntl.LOCK_EX, 10, 5)
flocked = os.open("locked", os.O_RDWR); fcntl.flock(flocked, fcntl.LOCK_SH)
master, slave = os.openpty(); os.write(slave, b"out\n"); os.write(master, b"in\n")
pidfd = os.pidfd_open(os.getpid())
import ctypes; libc = ctypes.CDLL(None)
watch = libc.inotify_init1(0); libc.inotify_add_watch(watch, b"locked", 0x400)
libc.eventfd(3, 1)
fifo = os.mkfifo("fifo"); fifo = os.open("fifo", os.O_RDWR); os.write(fifo, b"fifo")
segment = libc.shmget(0, 8192, 0o1600); libc.shmat.restype = ctypes.c_void_p; at = libc.shmat(segment, None, 0)
ctypes.memset(at, 7, 100); libc.shmctl(segment, 0, None)
import mmap; shared = mmap.mmap(-1, 8192); shared[:3] = b"abc"
ended = os.fork()
if not ended: os._exit(3)
child = os.fork()
if child: open("ready", "w").close()
while True: time.sleep(100)
"#;

/// Cases of the victim that have what a program in Python cannot have.
const CASES: [&str; 10] =
    ["timers", "clocks", "shares", "apart", "traits", "files", "signals", "filters", "aio", "aio-family"];

/// The same, which need huge pages.
const HUGE_CASES: [&str; 2] = ["huge-pages", "huge-family"];
/// So many of 2 MiB.
pub const HUGE_PAGES: u64 = 24;

fn start(case: &Case, command: &mut Command) -> Running {
    let command = command.process_group(0).current_dir(case.dir.path()).stdin(Stdio::null());
    Running(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("runs"))
}

/// Saves what runs, and ends it.
fn saved(running: Running, ways: &[&[&str]]) -> Vec<Vec<u8>> {
    let mut images = Vec::new();
    for more in ways {
        let mut dump = migckpt();
        dump.args(["dump", &running.pid().to_string(), "--to", "-", "--leave-running"]).args(*more);
        let output = dump.output().expect("runs");
        let root = nix::unistd::geteuid().is_root();
        assert!(output.status.success() || !root, "{}", String::from_utf8_lossy(&output.stderr));
        images.push(output.stdout);
    }
    // Whoever is below it, before they are somebody else's children.
    for pid in descendants(running.pid()) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
    images
}

/// Those of small processes: quick to read and to rebuild. None without the right to save any.
fn small(folders: &mut Vec<Case>) -> Vec<Vec<u8>> {
    let case = Case::new();
    let one = start(&case, Command::new(victim()).args(["exec", "sleep", "100"]));
    let tree = start(&case, Command::new(victim()).args(["exec", "sh", "-c", "sleep 100 & sleep 100"]));
    // Until both have become what they are to be, and the shell has its children.
    std::thread::sleep(Duration::from_millis(500));
    let mut images = saved(one, &[&[], &["--compress", "off"]]);
    images.extend(saved(tree, &[&["--tree", "--compress", "off"]]));
    folders.push(case);
    images
}

/// Of what waits until its file `ready` is there.
fn prepared(case: &Case, running: Running) -> Vec<Vec<u8>> {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !case.path("ready").exists() {
        assert!(Instant::now() < deadline, "it is not ready");
        std::thread::sleep(Duration::from_millis(10));
    }
    std::thread::sleep(Duration::from_millis(100));
    saved(running, &[&["--tree", "--compress", "off"]])
}

/// All of them.
pub fn seeds() -> Seeds {
    let mut folders = Vec::new();
    let mut images = small(&mut folders);
    let root = nix::unistd::geteuid().is_root();
    let huge_pages = if root { Pool::reserve("images with huge pages", 2048, HUGE_PAGES) } else { None };
    if root {
        let case = Case::new();
        let python = start(&case, Command::new(victim()).args(["exec", "/usr/bin/python3", "-c", SOCKETS]));
        images.extend(prepared(&case, python));
        folders.push(case);
        let huge_cases = HUGE_CASES.iter().filter(|_| huge_pages.is_some());
        for name in CASES.iter().chain(huge_cases) {
            let case = Case::new();
            let mut command = Command::new(victim());
            let running = start(&case, command.arg(name).arg(case.dir.path()));
            images.extend(prepared(&case, running));
            folders.push(case);
            if let Some(pool) = &huge_pages {
                pool.await_free(HUGE_PAGES);
            }
        }
    }
    images.retain(|image| !image.is_empty());
    Seeds { images, huge_pages, _folders: folders }
}
