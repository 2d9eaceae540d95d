//! What becomes of a process whose home shepherd has died without a word (killed, or out of memory).
//!
//! Its host sees the link end, stops the guest and throws it away within its limits. So, once that time
//! is over, nobody but this node has anything of the process, and the record of its last commit says
//! what that is worth: the process itself, frozen in the middle of a move, which is let go; or the
//! deputy of a guest that is gone, which is ended, so that whoever waits for it learns of it.

use super::Daemon;
use crate::shepherd::home::record::{self, Record};
use crate::shepherd::host::{LEASE_LIMIT, SILENCE_LIMIT};
use checkpoint::tracee::{Recovered, TraceeError, recover};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::sync::Arc;
use std::time::Instant;

/// What is left to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Finding {
    /// It runs here.
    Runs,
    /// What it was is lost.
    Lost,
}

/// Lets the process go, or ends what is left of it.
pub async fn rescue(daemon: Arc<Daemon>, pid: i32) {
    let path = record::path(&daemon.config.run_dir, pid);
    let record = record::read(&path);
    let here = daemon.config.name.clone();
    tracing::error!(pid, ?record, "its shepherd has died");
    if record.as_ref().is_some_and(|record| record.node != here) {
        tokio::time::sleep(SILENCE_LIMIT + LEASE_LIMIT).await;
    }
    let home = here.clone();
    let task = tokio::task::spawn_blocking(move || settle(pid, record.as_ref(), &home));
    let what = match task.await {
        Ok(Ok(Finding::Runs)) => {
            tracing::info!(pid, "it runs on, here");
            daemon.lock().jobs.arrived(pid, &here, None, Instant::now());
            record::remove(&path);
            daemon.save_now.notify_one();
            return;
        }
        Ok(Ok(Finding::Lost)) => {
            record::remove(&path);
            "its guest went with its shepherd; it is ended".to_string()
        }
        // It has ended already.
        Ok(Err(TraceeError::Died { .. })) => return record::remove(&path),
        Ok(Err(error)) => error.to_string(),
        Err(error) => error.to_string(),
    };
    tracing::error!(pid, what, "a process was lost");
    if let Some(process) = daemon.lock().jobs.processes.get_mut(&pid) {
        process.cantmove = Some("it was lost with its shepherd; see the log of migd".into());
    }
}

fn settle(pid: i32, record: Option<&Record>, here: &str) -> Result<Finding, TraceeError> {
    // What stands here is the process, unless it ran elsewhere and its deputy was used already.
    let deputy = record.is_some_and(|record| record.node != here && record.refilling);
    if !deputy && recover(pid)? != Recovered::Parked {
        return Ok(Finding::Runs);
    }
    // It may have ended by itself.
    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    Ok(Finding::Lost)
}
