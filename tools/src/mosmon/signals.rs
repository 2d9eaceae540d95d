//! Signals, taken by a thread of their own so that they work whatever the rest is doing.
//!
//! crossterm reads a terminal that has hung up for ever (it takes the end of file for "nothing yet",
//! `event/source/unix/mio.rs`, 0.29), so a monitor whose window was closed would spin: the thread here
//! ends the program by itself if the main thread does not.

use nix::sys::signal::{SigSet, Signal, raise};
use std::io;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

/// The main thread has so long to end by itself.
const GRACE: Duration = Duration::from_millis(700);

/// Blocks the signals for this thread and those it starts from now on, and takes them.
pub fn take() -> io::Result<Receiver<Signal>> {
    let taken = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGTSTP];
    let set: SigSet = taken.into_iter().collect();
    set.thread_block()?;
    let (tell, signals) = sync_channel(4);
    let wait = move || {
        while let Ok(signal) = set.wait() {
            // A full queue means that nobody listens any more.
            let _ = tell.try_send(signal);
            if signal != Signal::SIGTSTP {
                std::thread::sleep(GRACE);
                let _ = ratatui::try_restore();
                end_by(signal);
            }
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(wait)?;
    Ok(signals)
}

/// Ends the program by the signal, so that whoever waits for it learns what has ended it.
pub fn end_by(signal: Signal) -> ! {
    let _ = SigSet::from(signal).thread_unblock().and_then(|()| raise(signal));
    // It was ignored from the start (nohup).
    std::process::exit(128 + signal as i32)
}
