//! The decayed number of runnable threads.

/// What of the old value stays after a second. openMosix' fast decay of 926 per mille an interval, of
/// which it had ten a second.
const KEEP_PER_SECOND: f64 = 0.4636;

/// A decayed average of a number that is looked at now and then.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Average {
    value: f64,
    seen: bool,
}

impl Average {
    /// Takes in what is seen now, `elapsed_secs` after the last time.
    pub fn see(&mut self, now: f64, elapsed_secs: f64) {
        let keep = if self.seen { not_seen_after(elapsed_secs) } else { 0.0 };
        self.value = self.value * keep + now * (1.0 - keep);
        self.seen = true;
    }

    /// The average.
    pub fn value(self) -> f64 {
        self.value
    }
}

/// The part of a change that an average does not show yet after so many seconds.
pub(crate) fn not_seen_after(seconds: f64) -> f64 {
    KEEP_PER_SECOND.powf(seconds.max(0.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_follows() {
        let mut average = Average::default();
        average.see(4.0, 1.0);
        assert_eq!(average.value(), 4.0);
        for _ in 0..10 {
            average.see(0.0, 0.5);
        }
        assert!(average.value() < 0.1);
    }
}
