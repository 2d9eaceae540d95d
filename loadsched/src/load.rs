//! Load as openMosix had it: a decayed count of runnable threads.

/// A decayed average.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LoadAverage {
    value: f64,
}

impl LoadAverage {
    /// Takes a new count; `keep` (0 to 1) is what stays of the old value (openMosix: 0.975 slow, 0.926
    /// fast an interval).
    pub fn sample(&mut self, runnable: f64, keep: f64) -> f64 {
        let keep = keep.clamp(0.0, 1.0);
        self.value = self.value * keep + runnable.max(0.0) * (1.0 - keep);
        self.value
    }

    /// The average now.
    pub fn value(self) -> f64 {
        self.value
    }
}

/// The speed of the standard node.
pub const STANDARD_SPEED: f64 = 10_000.0;

/// CPUs × speed ÷ standard speed.
pub fn power(cpus: f64, speed: u32) -> f64 {
    (cpus * f64::from(speed.max(1)) / STANDARD_SPEED).max(0.01)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn approaches_what_it_counts() {
        let mut load = LoadAverage::default();
        for _ in 0..50 {
            load.sample(4.0, 0.9);
        }
        assert!((load.value() - 4.0).abs() < 0.05);
    }
}
