//! ioctl(2) with an argument that is only carried: of terminals, on behalf of a guest.

use nix::errno::Errno;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Room behind any argument, so that a request that writes more than the caller thought stays inside.
const ROOM: usize = 4096;

/// Calls it with `bytes` as the argument's target, or with `value` if there are none.
pub fn call(file: BorrowedFd<'_>, request: u64, value: u64, bytes: &mut [u8]) -> Result<i64, Errno> {
    if bytes.is_empty() {
        // SAFETY: only for requests whose argument is a number (the table of the supervisor).
        let got = unsafe { libc::ioctl(file.as_raw_fd(), request, value) };
        return Errno::result(got).map(i64::from);
    }
    let mut room = vec![0u8; ROOM.max(bytes.len())];
    room[..bytes.len()].copy_from_slice(bytes);
    // SAFETY: the argument points to `room`, which is larger than any terminal request's argument.
    let got = unsafe { libc::ioctl(file.as_raw_fd(), request, room.as_mut_ptr()) };
    bytes.copy_from_slice(&room[..bytes.len()]);
    Errno::result(got).map(i64::from)
}
