//! The process that is moved: a block of memory, and a look at the clock every millisecond.
//!
//! Its output has a line `ready` when the memory is filled, then one line `gap MS` whenever its
//! `CLOCK_REALTIME` jumped by more than [`GAP`]. (The monotonic clock is shifted on the host node so
//! that it does not jump; it would hide what is measured here.)

use anyhow::{Context, Result};
use clap::ValueEnum;
use serde::Serialize;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, SystemTime};

/// What counts as a gap; shorter ones are the scheduler's.
const GAP: Duration = Duration::from_millis(15);

/// What the memory holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Incompressible.
    Random,
    /// Lines of text with numbers.
    Text,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Kind::Random => "random",
            Kind::Text => "text",
        })
    }
}

/// `moslab __victim MIB KIND`
#[derive(Debug, clap::Args)]
pub struct Victim {
    mib: u64,
    kind: Kind,
}

/// So many bytes of that kind, all of them touched.
pub fn fill(bytes: usize, kind: Kind) -> Vec<u8> {
    let mut memory = Vec::with_capacity(bytes);
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    while memory.len() < bytes {
        let number = next();
        match kind {
            Kind::Random => memory.extend_from_slice(&number.to_le_bytes()),
            Kind::Text => {
                // Writing to memory cannot fail.
                let _ = writeln!(memory, "record {} of user{:03}: ok", memory.len(), number % 500);
            }
        }
    }
    memory.truncate(bytes);
    memory
}

/// Runs until a signal ends it, or its memory is not what it was.
pub fn victim(arguments: &Victim) -> Result<u8> {
    let memory = fill((arguments.mib << 20) as usize, arguments.kind);
    let sum = checksum(&memory);
    let mut out = std::io::stdout().lock();
    writeln!(out, "ready")?;
    out.flush()?;
    let mut last = SystemTime::now();
    loop {
        std::thread::sleep(Duration::from_millis(1));
        let now = SystemTime::now();
        let gap = now.duration_since(last).unwrap_or_default();
        last = now;
        if gap > GAP {
            if checksum(&memory) != sum {
                writeln!(out, "corrupt")?;
                return Ok(1);
            }
            writeln!(out, "gap {}", gap.as_secs_f64() * 1e3)?;
            out.flush()?;
            // The check and the note have taken time of their own.
            last = SystemTime::now();
        }
    }
}

fn checksum(memory: &[u8]) -> u64 {
    let words = memory.chunks_exact(8).filter_map(|word| word.try_into().ok().map(u64::from_le_bytes));
    words.fold(0, |sum, word| sum.rotate_left(1) ^ word)
}

/// Whether a victim with this output has filled its memory.
pub fn is_ready(output: &Path) -> Result<bool> {
    Ok(fs::read_to_string(output)?.starts_with("ready\n"))
}

/// The gaps noted so far, milliseconds.
pub fn gaps(output: &Path) -> Result<Vec<f64>> {
    let text = fs::read_to_string(output)?;
    if text.contains("corrupt") {
        anyhow::bail!("the victim's memory has changed by the move");
    }
    text.lines()
        .filter_map(|line| line.strip_prefix("gap "))
        .map(|number| number.parse().with_context(|| format!("{number:?} is no gap")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_as_long_as_asked_and_always_the_same() {
        for kind in [Kind::Random, Kind::Text] {
            let memory = fill(10_001, kind);
            assert_eq!(memory.len(), 10_001);
            assert_eq!(memory, fill(10_001, kind));
        }
    }
}
