//! The durable record of where a process runs: what a commit is.

use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Where it runs, since which epoch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// PID at home.
    pub pid: i32,
    /// The epoch of the last commit.
    pub epoch: u64,
    /// Where it runs since then.
    pub node: String,
    /// It is on its way home: what stands here of it is no longer what it was before it left.
    #[serde(default)]
    pub refilling: bool,
    /// It and its descendants that are with it.
    #[serde(default)]
    pub pids: Vec<i32>,
}

/// Where a daemon with this runtime directory keeps the record of a process.
pub fn path(run_dir: &Path, pid: i32) -> PathBuf {
    run_dir.join("away").join(format!("{pid}.json"))
}

/// Writes the record; when this returns, the move is committed.
pub fn commit(path: &Path, record: &Record) -> io::Result<()> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    let fresh = path.with_extension("new");
    let mut file = File::create(&fresh)?;
    file.write_all(&serde_json::to_vec(record)?)?;
    file.sync_data()?;
    fs::rename(&fresh, path)
}

/// The record of a process, if it has one.
pub fn read(path: &Path) -> Option<Record> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// It is home, or has ended.
pub fn remove(path: &Path) {
    let _ = fs::remove_file(path);
}
