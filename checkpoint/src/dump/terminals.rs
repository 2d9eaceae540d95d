//! Pseudo-terminals of frozen processes.
//!
//! The kernel shows how much waits on either side, but not what: that is taken out and put back, while
//! nobody runs, in the way in which it will be put into a new pair. Half a line is not even counted as
//! long as the terminal works line by line.

use super::DumpError;
use crate::image::terminals::TerminalImage;
use crate::image::{FileKind, ProcessImage};
use crate::inventory::terminals::{mark, masters};
use crate::restore::terminals::{by_lines, put, raw};
use crate::sys::fd::{pidfd_getfd, pidfd_open};
use crate::sys::pty::{self, Switch, TERMIOS};
use crate::sys::socket;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

/// More than either side of a terminal holds, bytes.
const MAX_WAITING: usize = 1 << 20;

/// Reads those whose masters the processes have into the first image, and marks their slaves.
pub fn read(pids: &[i32], images: &mut [ProcessImage]) -> Result<(), DumpError> {
    let tables: Vec<_> = pids.iter().copied().zip(images.iter().map(|image| &image.files)).collect();
    let masters = masters(&tables);
    for (image, &pid) in images.iter_mut().zip(pids) {
        mark(pid, &mut image.files, &masters);
    }
    let mut found = Vec::with_capacity(masters.len());
    for (&index, &(pid, fd)) in &masters {
        let failed = |errno: Errno| DumpError::Proc { what: "a terminal", pid, source: errno.into() };
        let master = pidfd_open(pid).and_then(|pidfd| pidfd_getfd(pidfd.as_fd(), fd)).map_err(failed)?;
        let slave = slave_of(index, pids, images).map_err(failed)?;
        match read_one(index, master.as_fd(), slave) {
            Ok(terminal) => found.push(terminal),
            Err(Unreadable::Kernel(errno)) => return Err(failed(errno)),
            Err(Unreadable::What(why)) => refuse(index, why, images),
        }
    }
    images[0].files.terminals = found;
    Ok(())
}

fn refuse(index: u32, why: &str, images: &mut [ProcessImage]) {
    for file in images.iter_mut().flat_map(|image| &mut image.files.files) {
        if file.kind == (FileKind::PtyMaster { index }) {
            file.kind = FileKind::Unsupported { what: format!("the terminal /dev/pts/{index}, {why}") };
        }
    }
}

enum Unreadable {
    What(&'static str),
    Kernel(Errno),
}

impl From<Errno> for Unreadable {
    fn from(errno: Errno) -> Unreadable {
        Unreadable::Kernel(errno)
    }
}

/// A copy of a slave that can be read and written, if a process has one.
fn slave_of(index: u32, pids: &[i32], images: &[ProcessImage]) -> Result<Option<OwnedFd>, Errno> {
    let both = |flags: u32| flags as i32 & libc::O_ACCMODE == libc::O_RDWR;
    for (image, &pid) in images.iter().zip(pids) {
        for fd in &image.files.fds {
            let file = image.files.files.get(fd.file as usize);
            if file.is_some_and(|file| file.kind == FileKind::PtySlave { index } && both(file.flags)) {
                return pidfd_open(pid).and_then(|pidfd| pidfd_getfd(pidfd.as_fd(), fd.fd)).map(Some);
            }
        }
    }
    Ok(None)
}

fn read_one(index: u32, master: BorrowedFd<'_>, slave: Option<OwnedFd>) -> Result<TerminalImage, Unreadable> {
    let mut asked = [PollFd::new(master, PollFlags::empty())];
    poll(&mut asked, PollTimeout::ZERO)?;
    let hung_up = asked[0].revents().is_some_and(|told| told.contains(PollFlags::POLLHUP));
    let termios = pty::termios(master)?;
    let packet = pty::is_on(master, Switch::Packet)?;
    let locked = pty::is_on(master, Switch::Lock)?;
    let exclusive = slave.as_ref().map_or(Ok(false), |slave| pty::is_on(slave.as_fd(), Switch::Exclusive))?;
    let waits = socket::queued(master, false)?;
    if packet && waits > 0 {
        return Err(Unreadable::What("which is in packet mode and has output that nobody has read"));
    }
    let slave = match slave {
        None if waits > 0 && locked => return Err(Unreadable::What("which is locked and has unread output")),
        // Closed again, it is as it was: nobody has it open.
        None if waits > 0 => Some(pty::peer(master, libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC)?),
        other => other,
    };
    let (input, output) = match &slave {
        Some(slave) => {
            let (input, output, taken) = take(master, slave.as_fd(), &termios);
            // Whatever went wrong, what was taken goes back.
            put(master, slave.as_fd(), &termios, &input, &output)?;
            taken?;
            (input, output)
        }
        None => (Vec::new(), Vec::new()),
    };
    let meta = std::fs::metadata(format!("/dev/pts/{index}"));
    Ok(TerminalImage {
        index,
        termios: termios.to_vec(),
        window: pty::window(master)?.to_vec(),
        packet,
        locked,
        exclusive,
        hung_up,
        session: pty::session(master),
        mode: meta.map_or((0, 0, 0), |meta| (meta.mode(), meta.uid(), meta.gid())),
        input,
        output,
    })
}

/// Empties both sides; gives also what was taken before a failure.
fn take(
    master: BorrowedFd<'_>,
    slave: BorrowedFd<'_>,
    termios: &[u8; TERMIOS],
) -> (Vec<u8>, Vec<u8>, Result<(), Errno>) {
    let (mut input, mut output) = (Vec::new(), Vec::new());
    let mut all = || {
        drain(master, &mut output)?;
        if socket::queued(slave, false)? == 0 && !by_lines(termios) {
            return Ok(());
        }
        pty::set_termios(master, &raw(termios))?;
        let done = drain(slave, &mut input);
        pty::set_termios(master, termios).and(done)
    };
    let done = all();
    (input, output, done)
}

fn drain(side: BorrowedFd<'_>, out: &mut Vec<u8>) -> Result<(), Errno> {
    loop {
        let waits = socket::queued(side, false)?;
        if waits == 0 || out.len() > MAX_WAITING {
            return Ok(());
        }
        let mut buffer = vec![0; waits];
        let got = nix::unistd::read(side, &mut buffer)?;
        out.extend_from_slice(&buffer[..got]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(canonical: bool, echo: bool) -> (nix::pty::OpenptyResult, [u8; TERMIOS]) {
        let pair = nix::pty::openpty(None, None).expect("a pty");
        let mut modes = nix::sys::termios::tcgetattr(&pair.slave).expect("modes");
        use nix::sys::termios::LocalFlags;
        modes.local_flags.set(LocalFlags::ICANON, canonical);
        modes.local_flags.set(LocalFlags::ECHO, echo);
        nix::sys::termios::tcsetattr(&pair.slave, nix::sys::termios::SetArg::TCSANOW, &modes).expect("set");
        let termios = pty::termios(pair.slave.as_fd()).expect("told");
        (pair, termios)
    }

    fn read_now(file: &OwnedFd) -> String {
        let mut buffer = [0; 4096];
        let flags = nix::fcntl::OFlag::O_NONBLOCK;
        nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_SETFL(flags)).expect("set");
        let got = nix::unistd::read(file, &mut buffer).unwrap_or(0);
        String::from_utf8_lossy(&buffer[..got]).into_owned()
    }

    #[test]
    fn what_waits_is_seen_and_stays() {
        for canonical in [true, false] {
            let (pair, termios) = lines(canonical, true);
            nix::unistd::write(&pair.master, b"one\rtwo\x04three\rpart").expect("writes");
            nix::unistd::write(&pair.slave, b"out\n").expect("writes");
            std::thread::sleep(std::time::Duration::from_millis(50));
            let copy = || pair.slave.try_clone().expect("copies");
            let first = read_one(0, pair.master.as_fd(), Some(copy())).ok().expect("read");
            let second = read_one(0, pair.master.as_fd(), Some(copy())).ok().expect("read");
            assert_eq!((&first.input, &first.output), (&second.input, &second.output));
            assert_eq!(pty::termios(pair.slave.as_fd()), Ok(termios));
            match canonical {
                true => {
                    assert_eq!(first.input, b"one\ntwo\0three\npart");
                    let got: Vec<String> = (0..4).map(|_| read_now(&pair.slave)).collect();
                    assert_eq!(got, ["one\n", "two", "three\n", ""]);
                    nix::unistd::write(&pair.master, b"ial\r").expect("writes");
                    std::thread::sleep(std::time::Duration::from_millis(50));
                    assert_eq!(read_now(&pair.slave), "partial\n");
                }
                false => assert_eq!(read_now(&pair.slave), "one\ntwo\x04three\npart"),
            }
            assert!(read_now(&pair.master).contains("out\r\n"));
        }
    }
}
