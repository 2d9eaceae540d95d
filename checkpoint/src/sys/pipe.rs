//! What is in a pipe, without taking it out: tee(2), splice(2).

use nix::errno::Errno;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Size of a pipe's buffer, bytes (`F_GETPIPE_SZ`).
pub fn capacity(pipe: BorrowedFd<'_>) -> Result<u32, Errno> {
    // SAFETY: no pointers.
    let got = unsafe { libc::fcntl(pipe.as_raw_fd(), libc::F_GETPIPE_SZ) };
    Errno::result(got).map(|size| size as u32)
}

/// Sets it.
pub fn set_capacity(pipe: BorrowedFd<'_>, size: u32) -> Result<(), Errno> {
    let size = i32::try_from(size).map_err(|_| Errno::EINVAL)?;
    // SAFETY: no pointers.
    Errno::result(unsafe { libc::fcntl(pipe.as_raw_fd(), libc::F_SETPIPE_SZ, size) }).map(drop)
}

/// Bytes that can be read now (`FIONREAD`).
pub fn filled(pipe: BorrowedFd<'_>) -> Result<usize, Errno> {
    let mut count: i32 = 0;
    // SAFETY: `count` outlives the call and has the size that the request tells.
    let got = unsafe { libc::ioctl(pipe.as_raw_fd(), libc::FIONREAD, &raw mut count) };
    Errno::result(got).map(|_| count.max(0) as usize)
}

/// Duplicates up to `length` bytes from one pipe into another; the first keeps them.
pub fn tee(from: BorrowedFd<'_>, to: BorrowedFd<'_>, length: usize) -> Result<usize, Errno> {
    // SAFETY: no pointers.
    let got = unsafe { libc::tee(from.as_raw_fd(), to.as_raw_fd(), length, libc::SPLICE_F_NONBLOCK) };
    Errno::result(got).map(|n| n as usize)
}

/// Moves up to `length` bytes from one pipe into another, whole pieces as they are.
pub fn splice(from: BorrowedFd<'_>, to: BorrowedFd<'_>, length: usize) -> Result<usize, Errno> {
    let none = std::ptr::null_mut();
    // SAFETY: null offsets are what pipes take.
    let got = unsafe {
        libc::splice(from.as_raw_fd(), none, to.as_raw_fd(), none, length, libc::SPLICE_F_NONBLOCK)
    };
    Errno::result(got).map(|n| n as usize)
}
