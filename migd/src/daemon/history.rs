//! Migrations that have ended: one JSON object a line in the state directory, bounded.

use crate::api::MigrationInfo;
use std::collections::VecDeque;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Kept at most; the file may hold twice as many before it is written anew.
const LIMIT: usize = 5000;
const FILE: &str = "history.jsonl";

/// See the module.
#[derive(Debug)]
pub struct History {
    path: PathBuf,
    ended: VecDeque<MigrationInfo>,
    lines: usize,
}

impl History {
    /// Reads what there is; lines that are not readable (a write cut short) are passed over.
    pub fn load(state_dir: &Path) -> History {
        let path = state_dir.join(FILE);
        let text = fs::read(&path).unwrap_or_default();
        let lines: Vec<&[u8]> = text.split(|b| *b == b'\n').filter(|line| !line.is_empty()).collect();
        let skip = lines.len().saturating_sub(LIMIT);
        let ended = lines[skip..].iter().filter_map(|line| serde_json::from_slice(line).ok()).collect();
        History { path, ended, lines: lines.len() }
    }

    /// The largest number given so far.
    pub fn last_id(&self) -> u64 {
        self.ended.iter().map(|migration| migration.id).max().unwrap_or(0)
    }

    /// Adds one.
    pub fn add(&mut self, migration: MigrationInfo) {
        if self.ended.len() == LIMIT {
            self.ended.pop_front();
        }
        let written =
            if self.lines >= 2 * LIMIT { self.rewrite(&migration) } else { self.append(&migration) };
        if let Err(error) = written {
            tracing::warn!(%error, path = %self.path.display(), "the history could not be written");
        }
        self.ended.push_back(migration);
    }

    fn append(&mut self, migration: &MigrationInfo) -> std::io::Result<()> {
        let mut line = serde_json::to_vec(migration)?;
        line.push(b'\n');
        self.lines += 1;
        OpenOptions::new().create(true).append(true).open(&self.path)?.write_all(&line)
    }

    fn rewrite(&mut self, last: &MigrationInfo) -> std::io::Result<()> {
        let mut text = Vec::new();
        for migration in self.ended.iter().chain([last]) {
            serde_json::to_writer(&mut text, migration)?;
            text.push(b'\n');
        }
        self.lines = self.ended.len() + 1;
        let new = self.path.with_extension("new");
        fs::write(&new, text)?;
        fs::rename(&new, &self.path)
    }

    /// The newest, newest first.
    pub fn newest(&self, count: usize) -> impl Iterator<Item = &MigrationInfo> {
        self.ended.iter().rev().take(count)
    }

    /// Those that ended at or after this time, oldest first.
    pub fn since(&self, unix_ms: u64) -> Vec<MigrationInfo> {
        self.ended.iter().filter(|migration| migration.ended_unix_ms >= unix_ms).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_outlives_the_daemon_and_stays_bounded() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut history = History::load(folder.path());
        for id in 1..=10_002 {
            history.add(MigrationInfo { id, ended_unix_ms: id, ..MigrationInfo::default() });
        }
        fs::write(folder.path().join("x"), "").expect("written");
        OpenOptions::new()
            .append(true)
            .open(folder.path().join(FILE))
            .and_then(|mut file| file.write_all(b"{\"id\": 3"))
            .expect("a torn line");
        let again = History::load(folder.path());
        assert_eq!(again.last_id(), 10_002);
        assert!(again.lines <= LIMIT + 3, "{} lines", again.lines);
        assert_eq!(again.since(10_001).len(), 2);
        assert_eq!(again.newest(1).next().map(|m| m.id), Some(10_002));
    }
}
