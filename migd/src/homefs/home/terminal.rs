//! Job control of terminals, as the deputy's process group would meet it (`__tty_check_change`).
//!
//! The kernel checks the *calling* process, which at home is the shepherd, outside of the job's
//! session; so the check is made here, with the deputy's place in its session.

use std::fs;
use std::os::fd::BorrowedFd;

use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, tcgetattr};
use nix::unistd::Pid;

/// What the deputy's group does at a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wants {
    /// Read.
    Input,
    /// Write.
    Output,
}

/// The deputies' process group (the first one's, of several) if they are in the background of the
/// terminal `device`, which must be their controlling terminal, and may therefore not do what they want.
/// A request does not say which of them it is of: one in the foreground is enough.
pub fn background_group(
    deputies: &[i32],
    device: u64,
    terminal: BorrowedFd<'_>,
    wants: Wants,
) -> Option<i32> {
    if wants == Wants::Output {
        let stops = tcgetattr(terminal).is_ok_and(|t| t.local_flags.contains(LocalFlags::TOSTOP));
        if !stops {
            return None;
        }
    }
    let mut groups = Vec::new();
    for place in deputies.iter().filter_map(|&deputy| Place::of(deputy)) {
        if place.terminal == device && place.foreground > 0 {
            if place.foreground == place.group {
                return None;
            }
            groups.push(place.group);
        }
    }
    groups.first().copied()
}

/// Tells the group that it is in the background.
pub fn refuse(group: i32, wants: Wants) {
    let signal = match wants {
        Wants::Input => Signal::SIGTTIN,
        Wants::Output => Signal::SIGTTOU,
    };
    if let Err(errno) = kill(Pid::from_raw(-group), signal) {
        tracing::debug!(%errno, group, "the background group could not be signalled");
    }
}

/// Device number of the deputy's controlling terminal, as in [`super::handles::Stream::terminal`].
pub fn controlling(deputy: i32) -> Option<u64> {
    Place::of(deputy).map(|p| p.terminal).filter(|t| *t != 0)
}

struct Place {
    group: i32,
    terminal: u64,
    foreground: i32,
}

impl Place {
    fn of(pid: i32) -> Option<Place> {
        let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
        // The name, in parentheses, may hold anything; what follows the last one does not.
        let end = stat.iter().rposition(|b| *b == b')')?;
        let text = std::str::from_utf8(stat.get(end + 1..)?).ok()?;
        let mut words = text.split_ascii_whitespace().skip(2);
        let group = words.next()?.parse().ok()?;
        let _session: i32 = words.next()?.parse().ok()?;
        let terminal: u32 = words.next()?.parse::<i32>().ok()? as u32;
        let foreground = words.next()?.parse().ok()?;
        Some(Place { group, terminal: u64::from(terminal), foreground })
    }
}
