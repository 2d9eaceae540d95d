//! What SIGPIPE was set to when the program started.
//!
//! The Rust runtime ignores SIGPIPE before `main`; a program that only execs another must hand on what
//! it was given. The loader runs what is in `.init_array` before that.

use std::sync::atomic::{AtomicBool, Ordering};

static IGNORED: AtomicBool = AtomicBool::new(false);

#[used]
#[unsafe(link_section = ".init_array")]
static RECORD: extern "C" fn() = record;

extern "C" fn record() {
    let mut old = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: `old` has the size of a sigaction and outlives the call; nothing is set.
    if unsafe { libc::sigaction(libc::SIGPIPE, std::ptr::null(), old.as_mut_ptr()) } == 0 {
        // SAFETY: the call succeeded and has filled it in.
        let old = unsafe { old.assume_init() };
        IGNORED.store(old.sa_sigaction == libc::SIG_IGN, Ordering::Relaxed);
    }
}

/// Sets SIGPIPE to what it was when the program started.
pub fn restore() {
    let action = if IGNORED.load(Ordering::Relaxed) { libc::SIG_IGN } else { libc::SIG_DFL };
    // SAFETY: neither action is a handler of ours.
    unsafe { libc::signal(libc::SIGPIPE, action) };
    // Keeps the record from being left out of the program.
    let _ = std::hint::black_box(&RECORD);
}

/// Ignores SIGPIPE, as the Rust runtime does.
pub fn ignore() {
    // SAFETY: SIG_IGN is not a handler of ours.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
}
