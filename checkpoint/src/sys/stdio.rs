//! Which of the standard descriptors were closed when the program started.
//!
//! The Rust runtime opens `/dev/null` in the place of closed ones before `main` (so that a file opened
//! later is not taken for standard output); a program that only execs another must hand on what it was
//! given. The loader runs what is in `.init_array` before that.

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU8, Ordering};

/// One bit a descriptor.
static CLOSED: AtomicU8 = AtomicU8::new(0);

#[used]
#[unsafe(link_section = ".init_array")]
static RECORD: extern "C" fn() = record;

extern "C" fn record() {
    for fd in 0..3 {
        // SAFETY: F_GETFD takes any number and changes nothing (fcntl(2)); a closed one gives EBADF.
        if unsafe { libc::fcntl(fd, libc::F_GETFD) } == -1 {
            CLOSED.fetch_or(1 << fd, Ordering::Relaxed);
        }
    }
}

/// Closes, at the next exec and not before, what was closed when the program started.
pub fn close_again_at_exec() {
    let closed = CLOSED.load(Ordering::Relaxed);
    for fd in (0..3 as RawFd).filter(|fd| closed & (1 << fd) != 0) {
        // SAFETY: sets a flag of the runtime's own `/dev/null`; nobody relies on its being absent.
        unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    }
    // Keeps the record from being left out of the program.
    let _ = std::hint::black_box(&RECORD);
}
