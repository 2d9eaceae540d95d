//! A look at a node's daemon from outside: its snapshot, and the end of its log.

use anyhow::{Result, bail};
use migd::api::{DEFAULT_SOCKET, Request, Response, Snapshot};
use migd::client::Client;
use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// How much of a log is quoted in an error.
const TAIL_BYTES: i64 = 1500;

/// A node's API socket, reached through the root folder of its PID 1.
pub fn socket(init: i32) -> PathBuf {
    PathBuf::from(format!("/proc/{init}/root{DEFAULT_SOCKET}"))
}

/// All that the daemon of the node with this PID 1 knows.
pub fn snapshot(init: i32) -> Result<Snapshot> {
    match Client::connect(Some(&socket(init)))?.call(&Request::Snapshot)? {
        Response::Snapshot(snapshot) => Ok(snapshot),
        other => bail!("the daemon answered something else: {other:?}"),
    }
}

/// The last lines of a log; empty if there is none.
pub fn tail(log: &Path) -> String {
    let mut text = Vec::new();
    if let Ok(mut file) = fs::File::open(log) {
        // Shorter than that: from the start.
        let _ = file.seek(SeekFrom::End(-TAIL_BYTES));
        let _ = file.read_to_end(&mut text);
    }
    String::from_utf8_lossy(&text).into_owned()
}
