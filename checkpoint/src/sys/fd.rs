//! Taking ownership of descriptors that a kernel interface hands out as numbers.

use nix::errno::Errno;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Owns a descriptor that a system call has just returned to this very caller.
pub fn own(raw: i32) -> OwnedFd {
    // SAFETY: by the contract above the number is open and nobody else's.
    unsafe { OwnedFd::from_raw_fd(raw) }
}

/// pidfd_open(2).
pub fn pidfd_open(pid: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: no pointers.
    let got = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    Errno::result(got).map(|raw| own(raw as i32))
}

/// pidfd_getfd(2): a copy of descriptor `fd` of that process.
pub fn pidfd_getfd(pidfd: BorrowedFd<'_>, fd: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: no pointers.
    let got = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) };
    Errno::result(got).map(|raw| own(raw as i32))
}
