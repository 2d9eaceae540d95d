//! The demo's table, and what has to be true for it to succeed.

use super::jobs::{BY_HAND, Line, PINNED, TRAVELLER};
use super::watch::Seen;
use anyhow::Result;
use serde::Serialize;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

/// One job's row.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// The job.
    pub job: String,
    /// Home first, then wherever it went.
    pub nodes_visited: Vec<String>,
    /// How often it moved.
    pub migrations: usize,
    /// Memory bytes carried, all moves together.
    pub bytes: u64,
    /// Time of all moves together, milliseconds.
    pub total_ms: f64,
    /// Time frozen in all moves together, milliseconds.
    pub freeze_ms: f64,
    /// Whether the output of its command line is that of an unmigrated run.
    pub output_identical: bool,
}

/// The whole result.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// One row a job.
    pub jobs: Vec<Row>,
    /// What was promised and is not true; empty: all is well.
    pub failures: Vec<String>,
    /// The demo's own time without its clean-up, seconds.
    pub seconds: f64,
}

/// The rows, and the failures they show. `dir` holds `plain/` and `moved/`.
pub fn rows(seen: &Seen, lines: &[Line], dir: &Path) -> (Vec<Row>, Vec<String>) {
    let (mut rows, mut failures) = (Vec::new(), Vec::new());
    for line in lines {
        let identical =
            same(&dir.join("plain").join(line.output), &dir.join("moved").join(line.output)).unwrap_or(false);
        if !identical {
            failures.push(format!("{}: differs from the unmigrated run's", line.output));
        }
        for job in &line.jobs {
            let moves = seen.moves(job);
            if seen.job(job).is_none() {
                failures.push(format!("job {job} was never seen by node 1's daemon"));
            }
            rows.push(Row {
                job: (*job).to_string(),
                nodes_visited: seen.visited(job),
                migrations: moves.len(),
                bytes: moves.iter().map(|m| m.bytes).sum(),
                total_ms: moves.iter().fold(0.0, |sum, m| sum + m.total_ms),
                freeze_ms: moves.iter().fold(0.0, |sum, m| sum + m.freeze_ms),
                output_identical: identical,
            });
        }
    }
    (rows, failures)
}

/// The promises about single jobs. `pinned_on` is where the pinned one was to stay.
pub fn promises(seen: &Seen, nodes: &[String], pinned_on: &str) -> Vec<String> {
    let mut failures = Vec::new();
    let away: Vec<&String> = nodes.iter().skip(1).collect();
    let balanced = seen.balanced_to();
    for node in &away {
        if !balanced.contains(node) {
            failures.push(format!("the balancer has sent nothing to {node}"));
        }
    }
    if !seen.moved_by_hand(BY_HAND) {
        failures.push(format!("job {BY_HAND} was not moved by hand"));
    }
    if seen.visited(PINNED).last().map(String::as_str) != Some(pinned_on) {
        failures.push(format!("job {PINNED} was pinned on {pinned_on} and did not stay there"));
    }
    let visited = seen.visited(TRAVELLER);
    let last_away = visited.iter().rposition(|node| Some(node) != nodes.first());
    let everywhere = away.iter().all(|node| visited.contains(node));
    let came_home = visited.iter().skip(1).any(|node| Some(node) == nodes.first());
    if !everywhere || !came_home || last_away.is_none() {
        failures
            .push(format!("job {TRAVELLER} has not visited every node and come home: {}", path(&visited)));
    }
    failures
}

/// Whether two files hold the same bytes (and any at all).
fn same(a: &Path, b: &Path) -> Result<bool> {
    let (a, b) = (File::open(a)?, File::open(b)?);
    let length = a.metadata()?.len();
    if length == 0 || length != b.metadata()?.len() {
        return Ok(false);
    }
    let (mut a, mut b) = (BufReader::new(a), BufReader::new(b));
    let (mut of_a, mut of_b) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    let mut left = length;
    while left > 0 {
        let count = left.min(1 << 16) as usize;
        a.read_exact(&mut of_a[..count])?;
        b.read_exact(&mut of_b[..count])?;
        if of_a[..count] != of_b[..count] {
            return Ok(false);
        }
        left -= count as u64;
    }
    Ok(true)
}

/// A path for people: `node1 > node2 > node1`.
fn path(nodes: &[String]) -> String {
    nodes.join(" > ")
}

/// The table for people.
pub fn table(rows: &[Row]) -> String {
    let visited = |row: &Row| path(&row.nodes_visited);
    let width = rows.iter().map(|row| visited(row).len()).max().unwrap_or(0).max(13);
    let mut text = format!(
        "{:9} {:width$} {:>10} {:>12} {:>9} {:>10}  output identical\n",
        "job", "nodes visited", "migrations", "bytes", "total ms", "freeze ms"
    );
    for row in rows {
        text.push_str(&format!(
            "{:9} {:width$} {:>10} {:>12} {:>9.0} {:>10.1}  {}\n",
            row.job,
            visited(row),
            row.migrations,
            row.bytes,
            row.total_ms,
            row.freeze_ms,
            if row.output_identical { "yes" } else { "NO" }
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_compared_to_the_last_byte_and_empty_ones_prove_nothing() {
        let dir = tempfile::tempdir().expect("a folder");
        let file = |name: &str, bytes: &[u8]| {
            std::fs::write(dir.path().join(name), bytes).expect("written");
            dir.path().join(name)
        };
        let long = vec![7u8; 200_000];
        let mut other = long.clone();
        other[199_999] = 8;
        let (a, b, c) = (file("a", &long), file("b", &long), file("c", &other));
        assert!(same(&a, &b).expect("compared"));
        assert!(!same(&a, &c).expect("compared"));
        let (empty, none) = (file("d", b""), file("e", b""));
        assert!(!same(&empty, &none).expect("compared"));
    }
}
