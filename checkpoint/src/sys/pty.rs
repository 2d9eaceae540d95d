//! Pseudo-terminals (pty(7), ioctl_tty(2)).

use super::fd::own;
use nix::errno::Errno;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

/// `struct termios2` (asm-generic/termbits.h), bytes.
pub const TERMIOS: usize = 44;
/// `struct winsize`, bytes.
pub const WINDOW: usize = 8;

fn get<const N: usize>(fd: BorrowedFd<'_>, request: libc::c_ulong) -> Result<[u8; N], Errno> {
    let mut value = [0u8; N];
    // SAFETY: only called with requests that write exactly N bytes.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), request, value.as_mut_ptr()) })?;
    Ok(value)
}

fn set<const N: usize>(fd: BorrowedFd<'_>, request: libc::c_ulong, value: &[u8; N]) -> Result<(), Errno> {
    // SAFETY: only called with requests that read exactly N bytes.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), request, value.as_ptr()) }).map(drop)
}

/// Its number, of a master.
pub fn index(master: BorrowedFd<'_>) -> Result<u32, Errno> {
    get::<4>(master, libc::TIOCGPTN).map(u32::from_ne_bytes)
}

/// The slave of a master, opened with these flags (`TIOCGPTPEER`).
pub fn peer(master: BorrowedFd<'_>, flags: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: no pointers.
    let got = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) };
    Errno::result(got).map(own)
}

/// `TCGETS2`; of a master that of its slave.
pub fn termios(fd: BorrowedFd<'_>) -> Result<[u8; TERMIOS], Errno> {
    get(fd, libc::TCGETS2)
}

/// `TCSETS2`.
pub fn set_termios(fd: BorrowedFd<'_>, value: &[u8; TERMIOS]) -> Result<(), Errno> {
    set(fd, libc::TCSETS2, value)
}

/// `TIOCGWINSZ`.
pub fn window(fd: BorrowedFd<'_>) -> Result<[u8; WINDOW], Errno> {
    get(fd, libc::TIOCGWINSZ)
}

/// `TIOCSWINSZ`.
pub fn set_window(fd: BorrowedFd<'_>, value: &[u8; WINDOW]) -> Result<(), Errno> {
    set(fd, libc::TIOCSWINSZ, value)
}

/// Packet mode, lock, of a master; exclusive, of a slave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Switch {
    /// `TIOCPKT`.
    Packet,
    /// `TIOCSPTLCK`.
    Lock,
    /// `TIOCEXCL`.
    Exclusive,
}

/// Whether it is on.
pub fn is_on(fd: BorrowedFd<'_>, which: Switch) -> Result<bool, Errno> {
    let request = match which {
        Switch::Packet => libc::TIOCGPKT,
        Switch::Lock => libc::TIOCGPTLCK,
        Switch::Exclusive => libc::TIOCGEXCL,
    };
    get::<4>(fd, request).map(|value| i32::from_ne_bytes(value) != 0)
}

/// Turns it on or off.
pub fn turn(fd: BorrowedFd<'_>, which: Switch, on: bool) -> Result<(), Errno> {
    let request = match (which, on) {
        (Switch::Packet, _) => libc::TIOCPKT,
        (Switch::Lock, _) => libc::TIOCSPTLCK,
        (Switch::Exclusive, true) => libc::TIOCEXCL,
        (Switch::Exclusive, false) => libc::TIOCNXCL,
    };
    set(fd, request, &i32::from(on).to_ne_bytes())
}

/// Session and foreground process group; of a master those of its slave. 0: none.
pub fn session(fd: BorrowedFd<'_>) -> (i32, i32) {
    let number = |request| get::<4>(fd, request).map_or(0, i32::from_ne_bytes);
    (number(libc::TIOCGSID), number(libc::TIOCGPGRP))
}

/// Makes it the controlling terminal of the calling session leader (`TIOCSCTTY`).
pub fn control(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: no pointers.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCSCTTY, 0) }).map(drop)
}

/// Opens `/dev/tty` as the leader of a new session that this terminal controls, and gives both up again
/// (`TIOCNOTTY`, which does not hang up a pseudo-terminal). For a child that ends then.
pub fn open_as_controlling(fd: BorrowedFd<'_>, flags: i32) -> Result<i32, Errno> {
    use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None)?;
    nix::unistd::setsid()?;
    control(fd)?;
    // SAFETY: a string with its NUL.
    let opened = Errno::result(unsafe { libc::open(c"/dev/tty".as_ptr(), flags) })?;
    // SAFETY: no pointers.
    Errno::result(unsafe { libc::ioctl(opened, libc::TIOCNOTTY, 0) })?;
    Ok(opened)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn what_a_master_tells_of_its_slave() {
        let pty = nix::pty::openpty(None, None).expect("a pty");
        let (master, slave) = (pty.master.as_fd(), pty.slave.as_fd());
        let link = std::fs::read_link(format!("/proc/self/fd/{}", slave.as_raw_fd())).expect("a link");
        assert_eq!(link.to_str(), Some(format!("/dev/pts/{}", index(master).expect("told")).as_str()));
        let mut changed = termios(slave).expect("told");
        changed[0] ^= 1;
        set_termios(slave, &changed).expect("set");
        assert_eq!(termios(master), Ok(changed));
        set_window(master, &[9; 8]).expect("set");
        assert_eq!(window(slave), Ok([9; 8]));
        turn(master, Switch::Packet, true).expect("set");
        assert_eq!(is_on(master, Switch::Packet), Ok(true));
        assert_eq!(session(master), (0, 0));
    }
}
