//! Waiting for what comes within microseconds, mostly: looking again and again, with pauses.
//!
//! sched_yield(2) is no such pause: where others compute, who yields waits for a whole slice of theirs.
//! A sleep, however short, is paid back by the scheduler with an early turn.

use std::time::Duration;

/// Looks without a pause: the other task runs on another CPU, and needs no longer than this.
const EAGER: u32 = 30;
/// Then so many short pauses. A sleep whose time is over when the timer has just been set is none: nobody else runs
/// on this CPU meanwhile, and what is waited for may have to. Setting it takes up to 10 µs in a virtual machine.
const SHORT: u32 = 100;
const SHORT_PAUSE: Duration = Duration::from_micros(20);
const LONG_PAUSE: Duration = Duration::from_micros(50);

/// How often one has looked in vain.
#[derive(Debug, Default)]
pub struct Naps(u32);

impl Naps {
    /// Whether the next look comes without a pause.
    pub fn is_eager(&self) -> bool {
        self.0 < EAGER
    }

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

#[cfg(test)]
mod tests {
    use super::{EAGER, Naps};
    use nix::sys::resource::{UsageWho, getrusage};

    #[test]
    fn a_pause_lets_others_run() {
        let switches = || getrusage(UsageWho::RUSAGE_THREAD).expect("usage").voluntary_context_switches();
        let mut naps = Naps(EAGER);
        let before = switches();
        (0..50).for_each(|_| naps.nap());
        // Now and then one is over before it has begun, when this thread was away while its timer was set.
        assert!(switches() - before >= 25, "{} of 50 pauses were none", 50 - (switches() - before));
    }
}
