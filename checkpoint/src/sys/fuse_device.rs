//! One private ioctl of the home file system, asked of any file under its mount.
//!
//! The host's view answers it itself (see `migd::homefs`), without a round trip. FUSE hands
//! "restricted" ioctls, whose size and direction are in the command word, to the server with their
//! data (`fs/fuse/ioctl.c`, `fuse_do_ioctl`); `_IOR` brings eight bytes back.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

mod raw {
    nix::ioctl_read!(handle_of, b'm', 1, u64);
}

/// The command word, as it appears in a FUSE_IOCTL request.
pub const HANDLE_OF: u32 = nix::request_code_read!(b'm', 1, std::mem::size_of::<u64>()) as u32;

/// The home handle behind an open file of the home file system; `ENOTTY` for any other file.
pub fn handle_of(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let mut handle = 0u64;
    // SAFETY: the command is `_IOR('m', 1, u64)`, so the kernel writes at most eight bytes to the
    // pointer, which is to a live u64 of our own; the descriptor is open for the call's length.
    unsafe { raw::handle_of(fd.as_raw_fd(), &mut handle) }?;
    Ok(handle)
}
