//! Home's side of a guest's terminal requests: they are made on the open file that home holds, as
//! the deputy would have made them.
//!
//! The kernel looks at the *calling* process for what concerns job control, and the shepherd is
//! outside of the job's session; so that part is answered from the deputy's place in it.

use super::session::Reply;
use checkpoint::sys::terminal_ioctl;
use checkpoint::sys::wait::kill;
use nix::errno::Errno;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd};

/// Set in a request's number, above the kernel's 32 bits: the thread has SIGTTOU blocked or ignored,
/// so that being in the background does not hold it up.
pub const DESPITE_BACKGROUND: u64 = 1 << 32;
/// Result for a request that was refused with a SIGTTOU to the whole group, on its way to the guest:
/// the call is repeated when that has been dealt with (`-ERESTARTSYS`, include/linux/errno.h).
pub const IN_BACKGROUND: i64 = -512;

const TIOCGPGRP: u32 = 0x540f;
const TIOCGSID: u32 = 0x5429;

/// Makes the request on `file` for the process whose deputy is `deputy`.
pub fn answer(file: BorrowedFd<'_>, deputy: i32, request: u64, value: u64, bytes: &[u8]) -> Reply {
    let despite = request & DESPITE_BACKGROUND != 0;
    match make(file, deputy, request as u32, despite, value, bytes) {
        Ok((result, bytes)) => Reply { result, bytes },
        Err(errno) => Reply { result: -i64::from(errno as i32), bytes: Vec::new() },
    }
}

fn make(
    file: BorrowedFd<'_>,
    deputy: i32,
    request: u32,
    despite_background: bool,
    value: u64,
    bytes: &[u8],
) -> Result<(i64, Vec<u8>), Errno> {
    let place = Place::of(deputy).filter(|place| place.controls(file));
    match (request, place) {
        (TIOCGPGRP, Some(place)) => Ok((0, place.foreground.max(0).to_le_bytes().to_vec())),
        (TIOCGSID, Some(place)) => Ok((0, place.session.to_le_bytes().to_vec())),
        (_, Some(place))
            if terminal_ioctl::needs_foreground(request) && !despite_background && place.in_background() =>
        {
            kill(-place.group, libc::SIGTTOU)?;
            Ok((IN_BACKGROUND, Vec::new()))
        }
        _ => terminal_ioctl::call(file, request, value, bytes),
    }
}

/// A process' place in its session (`/proc/PID/stat`, proc(5)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    group: i32,
    session: i32,
    terminal: u64,
    foreground: i32,
}

impl Place {
    fn of(pid: i32) -> Option<Place> {
        Place::parse(&fs::read(format!("/proc/{pid}/stat")).ok()?)
    }

    fn parse(stat: &[u8]) -> Option<Place> {
        // The name in parentheses may contain anything.
        let after = stat.iter().rposition(|&byte| byte == b')')?;
        let rest = std::str::from_utf8(&stat[after + 1..]).ok()?;
        let field = |n: usize| rest.split_ascii_whitespace().nth(n)?.parse::<i32>().ok();
        Some(Place {
            group: field(2)?,
            session: field(3)?,
            terminal: u64::from(field(4)? as u32),
            foreground: field(5)?,
        })
    }

    fn in_background(&self) -> bool {
        self.foreground > 0 && self.foreground != self.group
    }

    /// Whether `file` is its controlling terminal.
    fn controls(&self, file: BorrowedFd<'_>) -> bool {
        let Ok(stat) = nix::sys::stat::fstat(file.as_fd()) else { return false };
        let (major, minor) = (nix::sys::stat::major(stat.st_rdev), nix::sys::stat::minor(stat.st_rdev));
        // new_encode_dev() (include/linux/kdev_t.h).
        let number = (minor & 0xff) | major << 8 | (minor & !0xff) << 12;
        let character = stat.st_mode & libc::S_IFMT == libc::S_IFCHR;
        character && self.terminal != 0 && number == self.terminal
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_read_whatever_the_name() {
        let stat = b"77 (a) b) S 1 70 60 34819 71 4194304 0 0";
        let place = Place { group: 70, session: 60, terminal: 34819, foreground: 71 };
        assert_eq!(Place::parse(stat), Some(place));
        assert!(place.in_background());
        assert_eq!(Place::parse(b"77 (a"), None);
    }

    #[test]
    fn a_foreign_terminal_is_asked_itself() {
        let pty = nix::pty::openpty(None, None).expect("a pty");
        let own = std::process::id() as i32;
        let reply = answer(pty.slave.as_fd(), own, 0x5413, 0, &[]);
        assert_eq!((reply.result, reply.bytes.len()), (0, 8));
        // Not our controlling terminal: who is in its foreground is not ours to know.
        let reply = answer(pty.slave.as_fd(), own, TIOCGPGRP.into(), 0, &[]);
        assert_eq!(reply.result, -i64::from(libc::ENOTTY));
    }
}
