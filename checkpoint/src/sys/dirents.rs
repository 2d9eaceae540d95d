//! Raw directory entries: getdents64(2), with the file system's own positions.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Fills `out` with `struct linux_dirent64` records; 0 at the end.
pub fn read(dir: BorrowedFd<'_>, out: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the kernel writes at most `out.len()` bytes to a live, writable slice.
    let got = unsafe { libc::syscall(libc::SYS_getdents64, dir.as_raw_fd(), out.as_mut_ptr(), out.len()) };
    usize::try_from(got).map_err(|_| io::Error::last_os_error())
}
