//! signalfd4(2) with any signals; nix knows only the named ones.

use super::fd::own;
use nix::errno::Errno;
use std::os::fd::OwnedFd;

/// Makes a signalfd for these signals (bit n−1 is signal n).
pub fn make(mask: u64, nonblocking: bool) -> Result<OwnedFd, Errno> {
    let flags = libc::SFD_CLOEXEC | if nonblocking { libc::SFD_NONBLOCK } else { 0 };
    // SAFETY: `mask` outlives the call and has the length given.
    let got = unsafe { libc::syscall(libc::SYS_signalfd4, -1, &raw const mask, 8, flags) };
    Errno::result(got).map(|raw| own(raw as i32))
}
