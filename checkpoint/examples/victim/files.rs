//! Descriptors: what they share, their flags, and the kinds that the kernel makes.

use crate::calls::ok;
use crate::{Meeting, fail, same};
use std::ffi::CString;
use std::mem::zeroed;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr::null_mut;

fn open(path: &Path, flags: i32) -> i32 {
    let path = CString::new(path.as_os_str().as_bytes()).expect("no NUL in the path");
    // SAFETY: a NUL-terminated string.
    ok("open", unsafe { libc::open(path.as_ptr(), flags, 0o600) })
}

fn write(fd: i32, bytes: &[u8]) -> isize {
    // SAFETY: the buffer has the length given.
    unsafe { libc::write(fd, bytes.as_ptr().cast(), bytes.len()) }
}

fn read(fd: i32, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    // SAFETY: the buffer has the length given.
    let n = unsafe { libc::read(fd, bytes.as_mut_ptr().cast(), length) };
    bytes.truncate(n.max(0) as usize);
    bytes
}

fn position(fd: i32) -> i64 {
    // SAFETY: no pointers.
    unsafe { libc::lseek(fd, 0, libc::SEEK_CUR) }
}

fn flags(fd: i32) -> (i32, i32) {
    // SAFETY: no pointers.
    unsafe { (libc::fcntl(fd, libc::F_GETFL), libc::fcntl(fd, libc::F_GETFD)) }
}

fn word(fd: i32) -> u64 {
    read(fd, 8).try_into().map(u64::from_ne_bytes).unwrap_or(u64::MAX)
}

/// Events that are ready on an epoll: data of each, sorted.
fn ready(epoll: i32) -> Vec<u64> {
    let mut events = [libc::epoll_event { events: 0, u64: 0 }; 8];
    // SAFETY: the array has the length given.
    let n = ok("epoll_wait", unsafe { libc::epoll_wait(epoll, events.as_mut_ptr(), 8, 0) });
    let mut found: Vec<u64> = events[..n as usize].iter().map(|event| event.u64).collect();
    found.sort_unstable();
    found
}

fn watch(epoll: i32, fd: i32, data: u64) {
    let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: data };
    // SAFETY: `event` outlives the call.
    ok("epoll_ctl", unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, fd, &raw mut event) });
}

fn dup_to(fd: i32, number: i32, flags: i32) -> i32 {
    // SAFETY: the number is not in use.
    ok("dup3", unsafe { libc::dup3(fd, number, flags) })
}

fn pipe(flags: i32) -> [i32; 2] {
    let mut ends = [0; 2];
    // SAFETY: room for two.
    ok("pipe2", unsafe { libc::pipe2(ends.as_mut_ptr(), flags) });
    ends
}

fn timer_fd(first_ms: i64, interval_ms: i64) -> i32 {
    let time = |ms: i64| libc::timespec { tv_sec: ms / 1000, tv_nsec: ms % 1000 * 1_000_000 };
    let spec = libc::itimerspec { it_interval: time(interval_ms), it_value: time(first_ms) };
    // SAFETY: `spec` outlives the call.
    unsafe {
        let fd = ok("timerfd_create", libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_NONBLOCK));
        ok("timerfd_settime", libc::timerfd_settime(fd, 0, &raw const spec, null_mut()));
        fd
    }
}

struct Kernel {
    count: i32,
    semaphore: i32,
    soon: i32,
    expired: i32,
    signals: i32,
    small: [i32; 2],
    full: [i32; 2],
    orphan: i32,
    epoll: i32,
    outer: i32,
}

const USR1: i32 = libc::SIGUSR1;

impl Kernel {
    fn make() -> Kernel {
        // SAFETY: no pointers but to a set that outlives the calls.
        let (count, semaphore, signals) = unsafe {
            let mut set: libc::sigset_t = zeroed();
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, USR1);
            libc::sigaddset(&raw mut set, libc::SIGRTMIN() + 5);
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, null_mut());
            (
                ok("eventfd", libc::eventfd(7, libc::EFD_NONBLOCK)),
                ok("eventfd", libc::eventfd(3, libc::EFD_SEMAPHORE | libc::EFD_NONBLOCK)),
                ok("signalfd", libc::signalfd(-1, &raw const set, libc::SFD_NONBLOCK)),
            )
        };
        // SAFETY: to ourselves.
        unsafe { libc::raise(USR1) };
        let (small, full) = (pipe(libc::O_NONBLOCK), pipe(libc::O_NONBLOCK | libc::O_CLOEXEC));
        // SAFETY: no pointers.
        ok("F_SETPIPE_SZ", unsafe { libc::fcntl(full[1], libc::F_SETPIPE_SZ, 256 << 10) });
        write(small[1], b"in the pipe");
        while write(full[1], &[b'x'; 4096]) > 0 {}
        let [orphan, writer] = pipe(libc::O_NONBLOCK);
        write(writer, b"left");
        // SAFETY: ours. Its reader must see the end of the file.
        unsafe { libc::close(writer) };
        // SAFETY: no pointers.
        let (epoll, outer) = unsafe {
            (ok("epoll", libc::epoll_create1(libc::EPOLL_CLOEXEC)), ok("epoll", libc::epoll_create1(0)))
        };
        let (soon, expired) = (timer_fd(2_500, 0), timer_fd(1, 1));
        watch(epoll, small[0], 11);
        watch(epoll, soon, 12);
        watch(epoll, signals, 13);
        watch(outer, epoll, 21);
        std::thread::sleep(std::time::Duration::from_millis(50));
        Kernel { count, semaphore, soon, expired, signals, small, full, orphan, epoll, outer }
    }

    fn check(&self) {
        same("an epoll in an epoll", ready(self.outer), vec![21]);
        same("an epoll", ready(self.epoll), vec![11, 13]);
        same("a pipe", read(self.small[0], 100), b"in the pipe".to_vec());
        same("an eventfd", word(self.count), 7);
        same("a semaphore", [word(self.semaphore), word(self.semaphore)], [1, 1]);
        if word(self.expired) < 10 {
            fail("a timerfd has lost expirations");
        }
        same("a signalfd", read(self.signals, 128).first().copied(), Some(USR1 as u8));
        // SAFETY: to ourselves.
        unsafe { libc::raise(libc::SIGRTMIN() + 5) };
        same("a signalfd later", read(self.signals, 128).first().copied(), Some(libc::SIGRTMIN() as u8 + 5));
        same("an epoll later", ready(self.epoll), vec![]);
        // SAFETY: no pointers.
        same("a pipe's size", unsafe { libc::fcntl(self.full[0], libc::F_GETPIPE_SZ) }, 256 << 10);
        let all: usize = std::iter::from_fn(|| Some(read(self.full[0], 4096).len()).filter(|&n| n > 0)).sum();
        same("a full pipe", all, 256 << 10);
        same(
            "a pipe without writer",
            [read(self.orphan, 9), read(self.orphan, 9)],
            [b"left".to_vec(), vec![]],
        );
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(6);
        while ready(self.epoll) != [12] && std::time::Instant::now() < deadline {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        same("a timerfd", word(self.soon), 1);
    }
}

pub fn run(meeting: &Meeting) {
    let path = meeting.dir.join("file");
    std::fs::write(&path, b"0123456789").expect("writes");
    let first = open(&path, libc::O_RDWR | libc::O_CLOEXEC);
    let copy = dup_to(first, 500, 0);
    let other = open(&path, libc::O_RDONLY);
    let append = open(&path, libc::O_WRONLY | libc::O_APPEND);
    let directory = open(&meeting.dir, libc::O_RDONLY | libc::O_DIRECTORY);
    let named = open(&path, libc::O_PATH);
    let null = open(Path::new("/dev/null"), libc::O_RDWR);
    let random = open(Path::new("/dev/urandom"), libc::O_RDONLY);
    read(first, 4);
    read(other, 7);
    let kernel = Kernel::make();
    let all = [
        first,
        copy,
        other,
        append,
        directory,
        named,
        null,
        random,
        kernel.small[0],
        kernel.full[0],
        kernel.epoll,
    ];
    let before = all.map(flags);
    meeting.pause();
    same("flags", all.map(flags), before);
    same("positions", [position(first), position(copy), position(other)], [4, 4, 7]);
    same("a copy reads on", read(copy, 2), b"45".to_vec());
    same("the position is shared", position(first), 6);
    write(append, b"end");
    same("the end", read(other, 100), b"789end".to_vec());
    same("a directory", open_at(directory, "file"), b"0123456789end".to_vec());
    same("null and urandom", (read(null, 4).len(), read(random, 4).len(), write(null, b"x")), (0, 4, 1));
    kernel.check();
}

fn open_at(directory: i32, name: &str) -> Vec<u8> {
    let name = CString::new(name).expect("no NUL");
    // SAFETY: a NUL-terminated string; the descriptor is closed again.
    unsafe {
        let fd = ok("openat", libc::openat(directory, name.as_ptr(), libc::O_RDONLY));
        let bytes = read(fd, 100);
        libc::close(fd);
        bytes
    }
}
