//! The durable record of where a process runs: what a commit is.

use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::PathBuf;

/// Where it runs, since which epoch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// PID at home.
    pub pid: i32,
    /// The epoch of the last commit.
    pub epoch: u64,
    /// Where it runs since then.
    pub node: String,
}

fn path(pid: i32) -> PathBuf {
    let dir = std::env::var_os("MIGD_RUN_DIR").map_or(PathBuf::from("/run/migd"), PathBuf::from);
    dir.join("away").join(format!("{pid}.json"))
}

/// Writes the record; when this returns, the move is committed.
pub fn commit(record: &Record) -> io::Result<()> {
    let path = path(record.pid);
    let dir = path.parent().expect("the path has a directory");
    fs::create_dir_all(dir)?;
    let fresh = path.with_extension("new");
    let mut file = File::create(&fresh)?;
    file.write_all(&serde_json::to_vec(record)?)?;
    file.sync_data()?;
    fs::rename(&fresh, &path)
}

/// It is home, or has ended.
pub fn remove(pid: i32) {
    let _ = fs::remove_file(path(pid));
}
