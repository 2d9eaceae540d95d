//! Terminal requests of a guest, answered at home on the real terminal (ioctl_tty(2)).

use super::preflight;
use super::session::Reply;
use checkpoint::proc::status::Stat;
use checkpoint::sys::ioctl_bytes;
use std::os::fd::BorrowedFd;

/// Answers one request of the guest whose deputy is `deputy`. `bytes`: what its argument points to,
/// as long as the request's argument is; empty if the argument is the number `value`.
pub fn answer(file: BorrowedFd<'_>, deputy: i32, request: u64, value: u64, bytes: &[u8]) -> Reply {
    // On a terminal that is not the caller's own the kernel refuses this one: the deputy's knows.
    if request == libc::TIOCGPGRP {
        let group = Stat::read(deputy).ok().and_then(|stat| stat.number(8)).unwrap_or(0) as i32;
        return Reply { result: 0, bytes: group.to_le_bytes().to_vec() };
    }
    if request == libc::TIOCGSID {
        let session = preflight::session(deputy).unwrap_or(0);
        return Reply { result: 0, bytes: session.to_le_bytes().to_vec() };
    }
    let mut bytes = bytes.to_vec();
    match ioctl_bytes::call(file, request, value, &mut bytes) {
        Ok(result) => Reply { result, bytes },
        Err(errno) => Reply { result: -i64::from(errno as i32), bytes: Vec::new() },
    }
}
