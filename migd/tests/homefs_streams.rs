//! Pipes, FIFOs and terminals of home, used from a host.

mod homefs_support;

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use homefs_support::{Join, Mounted, mounted};
use migd::homefs::{HandleKind, handle_of};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::stat::Mode;
use nix::unistd::pipe2;

const SOON: Duration = Duration::from_millis(150);

fn pipe() -> (OwnedFd, OwnedFd) {
    pipe2(OFlag::O_CLOEXEC).expect("pipe")
}

/// Hands `fd` over and opens it through the mount.
fn away(m: &Mounted, fd: OwnedFd, options: &mut OpenOptions) -> File {
    let handle = m.home.add_handle(fd, HandleKind::Stream).expect("handed over");
    let file = options.open(m.path(m.home.handle_path(handle))).expect("opens on the host");
    assert_eq!(handle_of(file.as_fd()).expect("its handle"), handle);
    file
}

fn reader(m: &Mounted, fd: OwnedFd) -> File {
    away(m, fd, OpenOptions::new().read(true))
}

fn writer(m: &Mounted, fd: OwnedFd) -> File {
    away(m, fd, OpenOptions::new().write(true))
}

fn set_nonblock(file: &File, on: bool) {
    let mut flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL).expect("F_GETFL"));
    flags.set(OFlag::O_NONBLOCK, on);
    fcntl(file, FcntlArg::F_SETFL(flags)).expect("F_SETFL");
}

fn both(test: fn(&Mounted)) {
    mounted(Join::Memory, test);
    mounted(Join::Tcp, test);
}

#[test]
fn a_pipe_is_read_as_asked_and_ends() {
    both(|m| {
        let (r, w) = pipe();
        let (keep, mut w) = (r.try_clone().expect("dup"), File::from(w));
        let mut file = reader(m, r);
        w.write_all(b"hello world").expect("room");
        let mut buffer = [0; 64];
        assert_eq!(file.read(&mut buffer[..5]).expect("read"), 5);
        // What was not asked for is still at home, for whoever shares the pipe.
        assert_eq!(File::from(keep).read(&mut buffer).expect("read at home"), 6);
        let started = Instant::now();
        let later = thread::spawn(move || {
            thread::sleep(SOON);
            w.write_all(b"late").expect("room");
            thread::sleep(SOON);
        });
        assert_eq!(file.read(&mut buffer).expect("waits"), 4);
        assert!(started.elapsed() >= SOON);
        assert_eq!(file.read(&mut buffer).expect("end"), 0);
        assert!(started.elapsed() >= 2 * SOON);
        later.join().expect("writer");
    });
}

#[test]
fn the_last_close_away_is_the_end_at_home() {
    both(|m| {
        let (r, w) = pipe();
        let file = writer(m, w);
        let second = file.try_clone().expect("dup");
        drop(file);
        (&second).write_all(b"x").expect("room");
        drop(second);
        let mut all = String::new();
        File::from(r).read_to_string(&mut all).expect("ends");
        assert_eq!(all, "x");
    });
}

#[test]
fn a_full_pipe_blocks_or_says_so() {
    both(|m| {
        let (r, w) = pipe();
        let mut r = File::from(r);
        let mut file = writer(m, w);
        set_nonblock(&file, true);
        let big = vec![7u8; 300_000];
        let first = file.write(&big).expect("takes what fits");
        assert_eq!(first, 65536);
        assert_eq!(file.write(&big).expect_err("full").kind(), ErrorKind::WouldBlock);
        set_nonblock(&file, false);
        let drain = thread::spawn(move || {
            thread::sleep(SOON);
            let mut sum = 0;
            let mut buffer = vec![0; 10_000];
            loop {
                match r.read(&mut buffer).expect("read") {
                    0 => return sum,
                    n => sum += n,
                }
            }
        });
        assert_eq!(file.write(&big).expect("waits until all is written"), big.len());
        drop(file);
        assert_eq!(drain.join().expect("reader"), first + big.len());
    });
}

#[test]
fn nonblocking_reads_do_not_wait() {
    both(|m| {
        let (r, w) = pipe();
        let mut file = reader(m, r.try_clone().expect("dup"));
        set_nonblock(&file, true);
        let mut buffer = [0; 8];
        assert_eq!(file.read(&mut buffer).expect_err("empty").kind(), ErrorKind::WouldBlock);
        let shared = OFlag::from_bits_retain(fcntl(&r, FcntlArg::F_GETFL).expect("F_GETFL"));
        assert!(!shared.contains(OFlag::O_NONBLOCK), "others share that flag");
        drop(w);
        assert_eq!(file.read(&mut buffer).expect("end"), 0);
    });
}

#[test]
fn writing_to_nobody_kills_as_at_home() {
    both(|m| {
        let (r, w) = pipe();
        let file = writer(m, w);
        let mut child = Command::new("yes").stdout(Stdio::from(file)).spawn().expect("yes");
        let mut some = [0; 4096];
        File::from(r).read_exact(&mut some).expect("output");
        let status = child.wait().expect("wait");
        assert_eq!(status.signal(), Some(libc::SIGPIPE));
    });
}

#[test]
fn signals_end_a_wait() {
    both(|m| {
        for signal in ["TERM", "KILL"] {
            let (r, _w) = pipe();
            let file = reader(m, r);
            let started = Instant::now();
            let status = Command::new("timeout")
                .args(["-s", signal, "0.2", "cat"])
                .stdin(Stdio::from(file))
                .status()
                .expect("timeout");
            assert!(started.elapsed() < Duration::from_secs(3), "{signal}: {status:?}");
        }
    });
}

#[test]
fn nothing_is_lost_by_an_interruption() {
    both(|m| {
        let (r, w) = pipe();
        let file = reader(m, r);
        // An alarm every 2 ms, handled and with SA_RESTART off, while data trickles in.
        let script = "import os,signal,sys\n\
            signal.signal(signal.SIGALRM,lambda *a:None)\n\
            signal.siginterrupt(signal.SIGALRM,True)\n\
            signal.setitimer(signal.ITIMER_REAL,.002,.002)\n\
            out=b''\n\
            while True:\n\
            \x20 d=os.read(0,7)\n\
            \x20 if not d: break\n\
            \x20 out+=d\n\
            signal.setitimer(signal.ITIMER_REAL,0)\n\
            sys.stdout.buffer.write(out)\n";
        let child = Command::new("python3")
            .args(["-c", script])
            .stdin(Stdio::from(file))
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3");
        let mut w = File::from(w);
        let mut sent = Vec::new();
        for n in 0..300u32 {
            let piece = n.to_string().repeat(1 + (n % 5) as usize);
            w.write_all(piece.as_bytes()).expect("room");
            sent.extend_from_slice(piece.as_bytes());
            thread::sleep(Duration::from_micros(u64::from(n % 7) * 900));
        }
        drop(w);
        let output = child.wait_with_output().expect("python3");
        assert!(output.status.success());
        assert_eq!(output.stdout, sent);
    });
}

#[test]
fn poll_and_epoll_wake() {
    both(|m| {
        let (r, w) = pipe();
        let mut w = File::from(w);
        let mut file = reader(m, r);
        let mut set = [PollFd::new(file.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut set, PollTimeout::ZERO).expect("poll"), 0);
        let mut again = w.try_clone().expect("dup");
        let later = thread::spawn(move || {
            thread::sleep(SOON);
            again.write_all(b"ab").expect("room");
        });
        let started = Instant::now();
        assert_eq!(poll(&mut set, PollTimeout::from(5000u16)).expect("poll"), 1);
        assert!(started.elapsed() >= SOON && started.elapsed() < Duration::from_secs(4));
        later.join().expect("writer");

        let mut events = [EpollEvent::empty(); 4];
        let soon = EpollTimeout::from(200u16);
        let level = Epoll::new(EpollCreateFlags::empty()).expect("epoll");
        level.add(&file, EpollEvent::new(EpollFlags::EPOLLIN, 1)).expect("add");
        assert_eq!(level.wait(&mut events, soon).expect("wait"), 1);
        assert_eq!(level.wait(&mut events, soon).expect("wait"), 1, "level stays");
        let edge = Epoll::new(EpollCreateFlags::empty()).expect("epoll");
        edge.add(&file, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 1)).expect("add");
        assert_eq!(edge.wait(&mut events, soon).expect("wait"), 1);
        while edge.wait(&mut events, soon).expect("wait") == 1 {}
        w.write_all(b"c").expect("room");
        assert_eq!(edge.wait(&mut events, soon).expect("wait"), 1, "a new edge");
        assert_eq!(edge.wait(&mut events, soon).expect("wait"), 0, "only one");
        let mut buffer = [0; 8];
        assert_eq!(file.read(&mut buffer).expect("read"), 3);
        assert_eq!(level.wait(&mut events, soon).expect("wait"), 0);
        drop(w);
        assert_eq!(edge.wait(&mut events, soon).expect("wait"), 1, "hang-up");
        assert!(events[0].events().contains(EpollFlags::EPOLLHUP));
    });
}

#[test]
fn select_finds_room_to_write() {
    both(|m| {
        let (r, w) = pipe();
        let mut file = writer(m, w);
        set_nonblock(&file, true);
        let mut set = [PollFd::new(file.as_fd(), PollFlags::POLLOUT)];
        assert_eq!(poll(&mut set, PollTimeout::ZERO).expect("poll"), 1);
        while file.write(&[0; 4096]).is_ok() {}
        let mut set = [PollFd::new(file.as_fd(), PollFlags::POLLOUT)];
        assert_eq!(poll(&mut set, PollTimeout::ZERO).expect("poll"), 0);
        let later = thread::spawn(move || {
            thread::sleep(SOON);
            let mut r = File::from(r);
            r.read_exact(&mut [0; 65536]).expect("read");
            r
        });
        assert_eq!(poll(&mut set, PollTimeout::from(5000u16)).expect("poll"), 1);
        drop(later.join().expect("reader"));
    });
}

#[test]
fn fifos_of_the_tree_meet_programs_at_home() {
    both(|m| {
        let fifo = m.scratch.join("fifo");
        nix::unistd::mkfifo(&fifo, Mode::from_bits_truncate(0o600)).expect("mkfifo");
        let at_home = fifo.clone();
        let other = thread::spawn(move || {
            thread::sleep(SOON);
            let mut w = File::create(at_home).expect("open at home");
            w.write_all(b"from home").expect("room");
        });
        let mut got = String::new();
        let started = Instant::now();
        let mut file = File::open(m.path(&fifo)).expect("opens");
        assert!(started.elapsed() >= SOON, "waits for the other end");
        file.read_to_string(&mut got).expect("read");
        assert_eq!(got, "from home");
        drop(file);
        other.join().expect("writer");
        let none = OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(m.path(&fifo));
        assert_eq!(none.expect_err("nobody reads").raw_os_error(), Some(libc::ENXIO));
        // An open that waits can be interrupted.
        let started = Instant::now();
        let script = format!("timeout 0.2 cat {}", m.path(&fifo).display());
        Command::new("sh").args(["-c", &script]).status().expect("sh");
        assert!(started.elapsed() < Duration::from_secs(3));
        assert!(std::fs::metadata(&fifo).expect("stat").file_type().is_fifo());
    });
}

#[test]
fn many_threads_wait_at_once() {
    both(|m| {
        let pipes: Vec<_> = (0..64).map(|_| pipe()).collect();
        let mut ends = Vec::new();
        let mut threads = Vec::new();
        for (r, w) in pipes {
            let mut file = reader(m, r);
            ends.push(File::from(w));
            threads.push(thread::spawn(move || {
                let mut byte = [0];
                file.read_exact(&mut byte).expect("read");
                byte[0]
            }));
        }
        // Ordinary requests are not held up by them.
        assert!(std::fs::read_dir(m.path("/usr/bin")).expect("readdir").count() > 10);
        for (n, end) in ends.iter_mut().enumerate().rev() {
            end.write_all(&[n as u8]).expect("room");
        }
        for (n, thread) in threads.into_iter().enumerate() {
            assert_eq!(thread.join().expect("thread"), n as u8);
        }
    });
}

#[test]
fn terminals() {
    both(|m| {
        let pty = nix::pty::openpty(None, None).expect("pty");
        let mut master = File::from(pty.master);
        let slave = pty.slave;
        let mut file = away(m, slave, OpenOptions::new().read(true).write(true));
        file.write_all(b"prompt> ").expect("write");
        let mut buffer = [0; 64];
        assert_eq!(master.read(&mut buffer).expect("read"), 8);
        let mut typist = master.try_clone().expect("dup");
        let later = thread::spawn(move || {
            typist.write_all(b"li").expect("type");
            thread::sleep(SOON);
            typist.write_all(b"ne\nmore\n").expect("type");
        });
        assert_eq!(file.read(&mut buffer).expect("a whole line"), 5);
        assert_eq!(&buffer[..5], b"line\n");
        assert_eq!(file.read(&mut buffer).expect("the next line"), 5);
        later.join().expect("typist");
        master.write_all(&[4]).expect("Ctrl-D");
        assert_eq!(file.read(&mut buffer).expect("end of file"), 0);
        set_nonblock(&file, true);
        assert_eq!(file.read(&mut buffer).expect_err("nothing").kind(), ErrorKind::WouldBlock);
        set_nonblock(&file, false);
        master.write_all(b"go on\n").expect("type");
        assert_eq!(file.read(&mut buffer).expect("after the end"), 6);
    });
}

#[test]
fn devices_of_the_tree() {
    both(|m| {
        let mut zero = File::open(m.path("/dev/zero")).expect("/dev/zero");
        let mut buffer = [1; 100];
        zero.read_exact(&mut buffer).expect("zeros");
        assert_eq!(buffer, [0; 100]);
        let mut null = OpenOptions::new().read(true).write(true).open(m.path("/dev/null")).expect("null");
        null.write_all(&[3; 5000]).expect("swallows");
        assert_eq!(null.read(&mut buffer).expect("end"), 0);
    });
}

#[test]
fn a_host_that_is_gone_leaves_the_data() {
    both(|m| {
        let (r, w) = pipe();
        let handle = m.home.add_handle(r, HandleKind::Stream).expect("handed over");
        let mut on_a = File::open(m.path(m.home.handle_path(handle))).expect("open");
        let waiting = thread::spawn(move || on_a.read(&mut [0; 64]).expect_err("cut off").raw_os_error());
        thread::sleep(SOON);
        let hold = m.home.hold();
        m.home.disconnect(m.connection);
        thread::sleep(SOON);
        let mut w = File::from(w);
        w.write_all(b"for the next host").expect("room");
        homefs_support::second(m, |b| {
            let mut on_b = File::open(b.path(m.home.handle_path(handle))).expect("open");
            drop(hold);
            drop(w);
            let mut all = String::new();
            on_b.read_to_string(&mut all).expect("read");
            assert_eq!(all, "for the next host");
        });
        m.host.stop();
        assert_eq!(waiting.join().expect("reader"), Some(libc::ENOTCONN));
    });
}
