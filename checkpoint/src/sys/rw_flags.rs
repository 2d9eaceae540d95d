//! Reads and writes with per-call flags: preadv2(2) and pwritev2(2).
//!
//! An offset of -1 means the open file's own position, which is also right for pipes and terminals.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Do not wait; `EOPNOTSUPP` from files that cannot promise that.
pub const NOWAIT: i32 = 0x8;
/// Write where told even if the file is open for appending (Linux 6.9).
pub const NOAPPEND: i32 = 0x20;

/// Reads at `offset`.
pub fn read(fd: BorrowedFd<'_>, out: &mut [u8], offset: i64, flags: i32) -> io::Result<usize> {
    let part = libc::iovec { iov_base: out.as_mut_ptr().cast(), iov_len: out.len() };
    // SAFETY: one iovec over a live, writable slice; the kernel writes at most its length.
    let got = unsafe { libc::preadv2(fd.as_raw_fd(), &part, 1, offset, flags) };
    usize::try_from(got).map_err(|_| io::Error::last_os_error())
}

/// Writes at `offset`.
pub fn write(fd: BorrowedFd<'_>, data: &[u8], offset: i64, flags: i32) -> io::Result<usize> {
    let part = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
    // SAFETY: one iovec over a live slice; the kernel only reads from it.
    let put = unsafe { libc::pwritev2(fd.as_raw_fd(), &part, 1, offset, flags) };
    usize::try_from(put).map_err(|_| io::Error::last_os_error())
}

/// Copies up to `length` bytes between two files without moving their positions
/// (copy_file_range(2)).
pub fn copy_range(
    from: BorrowedFd<'_>,
    offset_in: i64,
    to: BorrowedFd<'_>,
    offset_out: i64,
    length: usize,
) -> io::Result<usize> {
    let (mut offset_in, mut offset_out) = (offset_in, offset_out);
    // SAFETY: both offsets are live and writable for the call, the descriptors are open.
    let copied = unsafe {
        libc::copy_file_range(from.as_raw_fd(), &mut offset_in, to.as_raw_fd(), &mut offset_out, length, 0)
    };
    usize::try_from(copied).map_err(|_| io::Error::last_os_error())
}
