//! Bringing one thread of this process out of a blocking system call, and signals to one thread.

use std::io;
use std::sync::OnceLock;

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// The signal used: ignored by default, and by nobody here waited for.
const KICK: Signal = Signal::SIGURG;

extern "C" fn nothing(_: libc::c_int) {}

/// Makes [`kick`] work in this process: an empty handler without `SA_RESTART`, so that a blocking
/// call of the kicked thread returns `EINTR`.
pub fn prepare() -> io::Result<()> {
    static DONE: OnceLock<Result<(), nix::Error>> = OnceLock::new();
    let done = *DONE.get_or_init(|| {
        let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::empty(), SigSet::empty());
        // SAFETY: the handler does nothing, so it is async-signal-safe.
        unsafe { sigaction(KICK, &action) }.map(drop)
    });
    Ok(done?)
}

/// Lets the calling thread be kicked.
pub fn accept() -> io::Result<()> {
    let mut set = SigSet::empty();
    set.add(KICK);
    Ok(set.thread_unblock()?)
}

/// Interrupts the blocking call of thread `tid` of this process, if it is in one. A call it is just
/// about to enter is not interrupted: kick again until it says that it has noticed.
pub fn kick(tid: i32) -> io::Result<()> {
    // SAFETY: tgkill takes three integers; with our own process id it reaches only our threads.
    let done = unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, KICK as libc::c_int) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Sends `signal` to the thread `tid` of any process. Only for a thread that is known not to be
/// able to end meanwhile (its number could be another's by then).
pub fn signal_thread(tid: i32, signal: Signal) -> io::Result<()> {
    if tid <= 0 {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    // SAFETY: tkill takes two integers.
    let done = unsafe { libc::syscall(libc::SYS_tkill, tid, signal as libc::c_int) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
