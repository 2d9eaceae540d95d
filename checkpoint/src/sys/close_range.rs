//! close_range(2).

use nix::errno::Errno;

/// Closes every descriptor from `first` to `last`, both included.
///
/// For a process that is about to give up all it has: an owner of one of these numbers must not use
/// it afterwards.
pub fn close_range(first: u32, last: u32) -> Result<(), Errno> {
    // SAFETY: no pointers; what becomes of owners of the numbers is the caller's, as told above.
    let got = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    Errno::result(got).map(drop)
}

/// dup3(2) to a number that nobody owns (or whose owner is done with it).
pub fn place(from: i32, to: i32, cloexec: bool) -> Result<(), Errno> {
    let flags = if cloexec { libc::O_CLOEXEC } else { 0 };
    // SAFETY: no pointers.
    let got = unsafe { libc::dup3(from, to, flags) };
    Errno::result(got).map(drop)
}
