//! Whether compression pays: where what is written goes away faster than the codec works, it loses.
//!
//! Both are measured as they come. A destination with a buffer seems fast until that is full, and data is
//! not alike everywhere: so the past counts less and less.

use std::time::Duration;

/// What counts of the past when something new is measured.
const KEPT: f64 = 0.75;
/// After so many pieces that were not compressed, a sample is.
const SAMPLE_EVERY: u32 = 16;
/// Length of a sample, bytes.
pub const SAMPLE: usize = 64 << 10;

/// Something done so far, weighed by age.
#[derive(Debug, Clone, Copy, Default)]
struct Measured {
    amount: f64,
    seconds: f64,
}

impl Measured {
    fn add(&mut self, amount: usize, took: Duration) {
        self.amount = self.amount * KEPT + amount as f64;
        self.seconds = self.seconds * KEPT + took.as_secs_f64();
    }

    fn seconds_each(&self) -> f64 {
        self.seconds / self.amount
    }
}

/// What to do with a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Write it as it is.
    Plain,
    /// Compress a sample, tell what came of it, and ask again.
    Sample,
    /// Compress it.
    Compress,
}

/// Remembers how fast both were.
#[derive(Debug, Default)]
pub struct Judge {
    written: Measured,
    coded: Measured,
    /// Bytes after compression and before, of what was compressed.
    ratio: (f64, f64),
    plain_in_a_row: u32,
}

impl Judge {
    /// What to do with the next piece.
    pub fn verdict(&self) -> Verdict {
        if self.written.amount == 0.0 {
            // Nothing is known about the destination before something has gone there.
            return Verdict::Plain;
        }
        if self.coded.amount == 0.0 || self.plain_in_a_row >= SAMPLE_EVERY {
            return Verdict::Sample;
        }
        if self.pays() { Verdict::Compress } else { Verdict::Plain }
    }

    /// Whether to compress takes less time than to write what it would save; if it saves a twentieth.
    pub fn pays(&self) -> bool {
        let ratio = self.ratio.0 / self.ratio.1;
        ratio < 0.95 && self.coded.seconds_each() < self.written.seconds_each() * (1.0 - ratio)
    }

    /// So many bytes were written.
    pub fn wrote(&mut self, bytes: usize, took: Duration) {
        self.written.add(bytes, took);
    }

    /// A piece or a sample was compressed.
    pub fn coded(&mut self, before: usize, after: usize, took: Duration) {
        self.coded.add(before, took);
        self.ratio = (self.ratio.0 * KEPT + after as f64, self.ratio.1 * KEPT + before as f64);
        self.plain_in_a_row = 0;
    }

    /// A piece was not compressed.
    pub fn left_plain(&mut self) {
        self.plain_in_a_row += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PIECE: usize = 1 << 20;

    fn at(mib_per_sec: f64) -> Duration {
        Duration::from_secs_f64(1.0 / mib_per_sec)
    }

    /// What is done with each of so many pieces, the destination and the codec being so fast.
    fn compressed(judge: &mut Judge, pieces: usize, writes: f64, codes: f64, ratio: f64) -> usize {
        let mut compressed = 0;
        for _ in 0..pieces {
            let after = (PIECE as f64 * ratio) as usize;
            if judge.verdict() == Verdict::Sample {
                judge.coded(SAMPLE, (SAMPLE as f64 * ratio) as usize, at(codes * 16.0));
            }
            if judge.verdict() == Verdict::Compress {
                judge.coded(PIECE, after, at(codes));
                judge.wrote(after, at(writes / ratio));
                compressed += 1;
            } else {
                judge.left_plain();
                judge.wrote(PIECE, at(writes));
            }
        }
        compressed
    }

    #[test]
    fn a_slow_link_gets_less_and_a_fast_one_gets_it_plain() {
        assert_eq!(compressed(&mut Judge::default(), 50, 100.0, 400.0, 0.2), 49);
        assert_eq!(compressed(&mut Judge::default(), 50, 2000.0, 400.0, 0.2), 0);
        assert_eq!(compressed(&mut Judge::default(), 50, 100.0, 3000.0, 1.0), 0);
    }

    #[test]
    fn it_changes_its_mind() {
        let mut judge = Judge::default();
        // A buffer takes the beginning, then the link shows.
        assert_eq!(compressed(&mut judge, 8, 5000.0, 400.0, 0.2), 0);
        assert!(compressed(&mut judge, 50, 50.0, 400.0, 0.2) > 40);
        // Data that does not compress, and some more that does.
        assert!(compressed(&mut judge, 50, 50.0, 3000.0, 1.0) < 25);
        assert!(compressed(&mut judge, 100, 50.0, 400.0, 0.2) > 50);
    }
}
