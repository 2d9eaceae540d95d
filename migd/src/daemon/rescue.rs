//! What becomes of a process whose home shepherd has died without a word (killed, or out of memory).
//!
//! Its host sees the link end, stops the guest and throws it away within its limits. So, once that time
//! is over, nobody but this node has anything of the process, and the record of its last commit says
//! what that is worth: the process itself, frozen in the middle of a move, which is let go; or the
//! deputy of a guest that is gone, which is ended, so that whoever waits for it learns of it.

use super::Daemon;
use crate::shepherd::home::record::{self, Record};
use crate::shepherd::host::{LEASE_LIMIT, SILENCE_LIMIT};
use checkpoint::inventory::tree::descendants;
use checkpoint::proc::status::Status;
use checkpoint::tracee::{Recovered, TraceeError, recover};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What is left to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Finding {
    /// It runs here.
    Runs,
    /// What it was is lost.
    Lost,
}

/// How long a shepherd that has died may take to be gone.
const TRACER_LIMIT: Duration = Duration::from_secs(5);

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
    let mut pids = record.as_ref().map_or_else(Vec::new, |record| record.pids.clone());
    if !pids.contains(&pid) {
        pids.insert(0, pid);
    }
    let all = pids.clone();
    let task = tokio::task::spawn_blocking(move || settle_all(&all, record.as_ref(), &home));
    let what = match task.await {
        Ok(Ok(Finding::Runs)) => {
            tracing::info!(pid, "it runs on, here");
            daemon.lock().jobs.arrived_together(&here, pid, &pids, &here, None, Instant::now());
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
    let mut state = daemon.lock();
    for pid in pids {
        if let Some(process) = state.jobs.processes.get_mut(&pid) {
            process.cantmove = Some("it was lost with its shepherd; see the log of migd".into());
        }
    }
}

/// The same of a subtree, children first: whoever waits for one that was lost hears of it. Every one of
/// them is seen to, whatever becomes of the others.
fn settle_all(pids: &[i32], record: Option<&Record>, here: &str) -> Result<Finding, TraceeError> {
    let mut pids = pids.to_vec();
    // A shepherd's connection ends a moment before it is their tracer no more (do_exit, kernel/exit.c).
    let deadline = Instant::now() + TRACER_LIMIT;
    while pids.iter().any(|&pid| is_traced(pid)) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(2));
    }
    if record.is_none_or(|record| record.node == here) {
        // It had not left, or was back: nothing says who was frozen with it. What is traced is
        // somebody else's.
        let root = pids.first().copied().unwrap_or(0);
        let fresh: Vec<i32> = descendants(root).into_iter().filter(|pid| !pids.contains(pid)).collect();
        pids.extend(
            fresh
                .into_iter()
                .filter(|&pid| Status::read(pid).is_ok_and(|status| status.decimal("TracerPid") == Some(0))),
        );
    }
    let found: Vec<_> = pids.iter().rev().map(|&pid| settle(pid, record, here)).collect();
    let mut all = Err(TraceeError::Died { tid: pids.first().copied().unwrap_or(0) });
    for finding in found {
        match (&all, finding) {
            (_, Ok(Finding::Lost)) => all = Ok(Finding::Lost),
            (Err(TraceeError::Died { .. }), finding) => all = finding,
            (Ok(_), Err(error)) if !matches!(error, TraceeError::Died { .. }) => all = Err(error),
            _ => {}
        }
    }
    all
}

fn is_traced(pid: i32) -> bool {
    Status::read(pid).is_ok_and(|status| status.decimal("TracerPid").is_some_and(|tracer| tracer != 0))
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
