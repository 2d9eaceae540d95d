//! Taking ownership of descriptors that a kernel interface hands out as numbers.

use nix::errno::Errno;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Owns a descriptor that a system call has just returned to this very caller.
pub fn own(raw: i32) -> OwnedFd {
    // SAFETY: by the contract above the number is open and nobody else's.
    unsafe { OwnedFd::from_raw_fd(raw) }
}

/// pidfd_open(2), of a thread too.
pub fn pidfd_open(pid: i32) -> Result<OwnedFd, Errno> {
    /// `PIDFD_THREAD`, Linux 6.9 on.
    const THREAD: u32 = libc::O_EXCL as u32;
    pidfd_open_with(pid, 0).or_else(|errno| match errno {
        // The number is no process', but perhaps that of a thread.
        Errno::EINVAL | Errno::ENOENT => pidfd_open_with(pid, THREAD).map_err(|_| errno),
        errno => Err(errno),
    })
}

/// The same with flags (`PIDFD_NONBLOCK`, `PIDFD_THREAD`).
pub fn pidfd_open_with(pid: i32, flags: u32) -> Result<OwnedFd, Errno> {
    // SAFETY: no pointers.
    let got = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, flags) };
    Errno::result(got).map(|raw| own(raw as i32))
}

/// pidfd_getfd(2): a copy of descriptor `fd` of that process.
pub fn pidfd_getfd(pidfd: BorrowedFd<'_>, fd: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: no pointers.
    let got = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) };
    Errno::result(got).map(|raw| own(raw as i32))
}
