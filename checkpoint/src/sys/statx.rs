//! statx(2).

use std::ffi::CStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};

pub use libc::statx as Statx;

/// All the basic fields, the time of birth and the mount.
pub const MASK: u32 = libc::STATX_BASIC_STATS | libc::STATX_BTIME | libc::STATX_MNT_ID;

/// What `path` under `dir` is; an empty path with `AT_EMPTY_PATH` in `flags` asks of `dir` itself.
pub fn statx(dir: BorrowedFd<'_>, path: &CStr, flags: i32, mask: u32) -> io::Result<Statx> {
    let mut out = MaybeUninit::<Statx>::zeroed();
    // SAFETY: `path` ends in a NUL, `out` is writable and of the size the kernel fills; both
    // outlive the call.
    let done = unsafe { libc::statx(dir.as_raw_fd(), path.as_ptr(), flags, mask, out.as_mut_ptr()) };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: plain integers, zeroed before and filled by the kernel.
    Ok(unsafe { out.assume_init() })
}

/// What the open file `fd` (`O_PATH` will do) is.
pub fn statx_fd(fd: BorrowedFd<'_>, flags: i32) -> io::Result<Statx> {
    statx(fd, c"", flags | libc::AT_EMPTY_PATH, MASK)
}
