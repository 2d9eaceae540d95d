//! The source of a live migration: rounds from a [`Tracker`] into a stream, while the process runs.
//!
//! After the last look the target has all of [`Sent::carried`]: of these ranges the image that follows, with the state
//! of the frozen process, needs no page, and may name them as *same*.

use super::convergence::{Costs, Measured, Rule, Verdict};
use super::stream::SectionWriter;
use super::{Change, LiveError, Round, Tracker};
use crate::image::stream::{Options, StreamError, StreamStats};
use std::io::Write;
use std::time::Instant;

/// Why a round could not be sent. The process runs on, or stands as its caller has frozen it.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// It cannot be tracked.
    #[error(transparent)]
    Live(#[from] LiveError),
    /// It cannot be sent.
    #[error("sending a round failed: {0}")]
    Stream(#[from] StreamError),
}

/// One round, sent.
#[derive(Debug)]
pub struct Sent {
    /// What it was; the time is until all of it was written.
    pub round: Round,
    /// What was written.
    pub stats: StreamStats,
}

impl Sent {
    /// Ranges that the target has.
    pub fn carried(&self) -> &[(u64, u64)] {
        &self.round.carried
    }
}

/// Sends the memory of one process.
pub struct Source<W: Write> {
    tracker: Tracker,
    out: W,
    options: Options,
    rounds: Vec<Measured>,
    wire_bytes: u64,
}

impl<W: Write> Source<W> {
    /// Begins to track a process. Nothing is written yet.
    pub fn start(pid: i32, out: W, options: Options) -> Result<Source<W>, LiveError> {
        Ok(Source { tracker: Tracker::start(pid)?, out, options, rounds: Vec::new(), wire_bytes: 0 })
    }

    /// Sends one round, with the process running. An error ends the stream.
    pub fn round(&mut self) -> Result<Sent, SourceError> {
        let sent = self.send(false)?;
        self.rounds.push(sent.round.measured());
        Ok(sent)
    }

    /// Sends what is still missing. The process is frozen by the caller, and stays so.
    pub fn last(&mut self) -> Result<Sent, SourceError> {
        self.send(true)
    }

    /// What to do after the rounds so far.
    pub fn judge(&self, rule: &Rule, costs: &Costs) -> Verdict {
        rule.judge(&self.rounds, costs)
    }

    /// Bytes of all rounds so far, to measure the link by.
    pub fn wire_bytes(&self) -> u64 {
        self.wire_bytes
    }

    /// Gives the process up as it is, running: nothing is left in it.
    pub fn stop(self) -> W {
        self.tracker.stop();
        self.out
    }

    fn send(&mut self, last: bool) -> Result<Sent, SourceError> {
        let begun = Instant::now();
        let number = self.tracker.rounds() + 1;
        let mut section = SectionWriter::new(&mut self.out, number, last, self.options);
        let each = |change: Change<'_>| section.change(&change).map_err(SourceError::from);
        let mut round = if last { self.tracker.last(each)? } else { self.tracker.round(each)? };
        let stats = section.finish()?;
        round.took = begun.elapsed();
        self.wire_bytes += stats.wire_bytes;
        Ok(Sent { round, stats })
    }
}
