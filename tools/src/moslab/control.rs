//! Orders to a lab's keeper: one JSON line over its socket, one JSON line back.

use super::place::Place;
use super::state::LabState;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Longest line of either side.
const MAX_LINE: u64 = 1 << 20;
/// The keeper does one thing at a time; a restart waits for a daemon.
const ANSWER_PATIENCE: Duration = Duration::from_secs(120);

/// What a keeper can be told.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "snake_case")]
pub enum Order {
    /// Kill everything in a node at once, as a power cut would.
    Kill {
        /// Which.
        node: String,
    },
    /// Cut these nodes off from the rest (not from each other).
    Partition {
        /// Which.
        nodes: Vec<String>,
    },
    /// Undo all partitions.
    Heal,
    /// Bring a node up again with its files; one that runs is killed first.
    Restart {
        /// Which.
        node: String,
        /// Only its daemon, with SIGKILL; everything else in the node stays.
        daemon_only: bool,
    },
    /// End of the lab.
    Down,
}

/// What the keeper says to it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Answer {
    /// Why it was not done.
    pub error: Option<String>,
}

/// Gives an order and waits until it has been carried out.
pub fn order(place: &Place, order: &Order) -> Result<()> {
    LabState::of_running(place)?;
    let stream = UnixStream::connect(place.control_socket())
        .with_context(|| format!("the keeper of lab {:?} cannot be reached", place.name()))?;
    stream.set_read_timeout(Some(ANSWER_PATIENCE))?;
    write_line(&stream, order)?;
    let answer: Answer = read_line(&stream).context("the lab's keeper did not answer")?;
    match answer.error {
        None => Ok(()),
        Some(error) => bail!("{error}"),
    }
}

/// Sends one line.
pub fn write_line<T: Serialize>(mut stream: &UnixStream, value: &T) -> Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    Ok(stream.write_all(&line)?)
}

/// Receives one line.
pub fn read_line<T: for<'a> Deserialize<'a>>(stream: &UnixStream) -> Result<T> {
    let mut line = Vec::new();
    BufReader::new(stream.take(MAX_LINE)).read_until(b'\n', &mut line)?;
    Ok(serde_json::from_slice(&line)?)
}
