//! Waiting for what comes within microseconds, mostly: looking again and again, with pauses.
//!
//! sched_yield(2) is no such pause: where others compute, who yields waits for a whole slice of theirs.
//! A sleep, however short, is paid back by the scheduler with an early turn.

use std::time::Duration;

/// Looks without a pause: the other task runs on another CPU, and needs no longer than this.
const EAGER: u32 = 30;
/// Then so many short pauses.
const SHORT: u32 = 400;
const SHORT_PAUSE: Duration = Duration::from_micros(5);
const LONG_PAUSE: Duration = Duration::from_micros(50);

/// How often one has looked in vain.
#[derive(Debug, Default)]
pub struct Naps(u32);

impl Naps {
    /// Pauses before the next look.
    pub fn nap(&mut self) {
        self.0 = self.0.saturating_add(1);
        match self.0 {
            0..=EAGER => std::hint::spin_loop(),
            _ if self.0 <= EAGER + SHORT => exactly(SHORT_PAUSE),
            _ => std::thread::sleep(LONG_PAUSE),
        }
    }
}

/// Sleeps without the slack that the kernel allows itself (50 µs; `PR_SET_TIMERSLACK`, prctl(2)). It is
/// given back at once, as a child has what its parent has.
fn exactly(pause: Duration) {
    use nix::sys::prctl::{get_timerslack, set_timerslack};
    let slack = get_timerslack().unwrap_or(0);
    let exact = slack > 1 && set_timerslack(1).is_ok();
    std::thread::sleep(pause);
    if exact {
        // It was allowed a moment ago.
        let _ = set_timerslack(slack as u64);
    }
}
