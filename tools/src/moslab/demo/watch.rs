//! Watching node 1's daemon while the jobs run: who is where, and every migration.

use crate::moslab::daemon;
use migd::api::{MigrationInfo, ProcessInfo};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// How often the daemon is asked.
const INTERVAL: Duration = Duration::from_millis(150);

/// All that has been seen so far.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// By PID at home; of an ended process, as it was last seen.
    pub processes: BTreeMap<i32, ProcessInfo>,
    /// By number, as last seen.
    pub migrations: BTreeMap<u64, MigrationInfo>,
}

impl Seen {
    /// The process of a job.
    pub fn job(&self, name: &str) -> Option<&ProcessInfo> {
        self.processes.values().find(|process| process.job == name)
    }

    /// A job's migrations that succeeded, in order.
    pub fn moves(&self, job: &str) -> Vec<&MigrationInfo> {
        let Some(process) = self.job(job) else { return Vec::new() };
        self.migrations.values().filter(|m| m.pid == process.pid && m.phase == "done").collect()
    }

    /// Whether somebody has moved the job with `migrate`.
    pub fn moved_by_hand(&self, job: &str) -> bool {
        self.moves(job).iter().any(|m| m.cause == "user")
    }

    /// Where a job has been, home first.
    pub fn visited(&self, job: &str) -> Vec<String> {
        let Some(process) = self.job(job) else { return Vec::new() };
        let mut nodes = vec![process.home.clone()];
        nodes.extend(self.moves(job).into_iter().map(|m| m.to.clone()));
        nodes
    }

    /// Nodes to which the balancer has moved something by itself.
    pub fn balanced_to(&self) -> Vec<String> {
        let by_itself =
            |m: &&MigrationInfo| m.phase == "done" && ["balancer", "placement"].contains(&&*m.cause);
        let mut nodes: Vec<String> =
            self.migrations.values().filter(by_itself).map(|m| m.to.clone()).collect();
        nodes.sort();
        nodes.dedup();
        nodes
    }
}

/// A thread that keeps [`Seen`] up to date, until dropped.
#[derive(Debug)]
pub struct Watch {
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Starts watching the node with this PID 1.
    pub fn start(init: i32) -> Watch {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let (shared, stopped) = (Arc::clone(&seen), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                look(init, &shared);
                std::thread::sleep(INTERVAL);
            }
        });
        Watch { seen, stop, thread: Some(thread) }
    }

    /// What has been seen so far.
    pub fn seen(&self) -> Seen {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Looks once more, now.
    pub fn look_now(&self, init: i32) -> Seen {
        look(init, &self.seen);
        self.seen()
    }
}

fn look(init: i32, seen: &Mutex<Seen>) {
    // A daemon that is busy or restarting answers the next time.
    let Ok(snapshot) = daemon::snapshot(init) else { return };
    let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
    for process in snapshot.processes {
        seen.processes.insert(process.pid, process);
    }
    for migration in snapshot.migrations {
        seen.migrations.insert(migration.id, migration);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It can only have panicked, and has said so.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn visits_are_home_and_every_successful_move() {
        let mut seen = Seen::default();
        let process =
            ProcessInfo { pid: 7, job: "data".into(), home: "node1".into(), ..ProcessInfo::default() };
        seen.processes.insert(7, process);
        let moved = |id, to: &str, phase: &str, cause: &str| MigrationInfo {
            id,
            pid: 7,
            to: to.into(),
            phase: phase.into(),
            cause: cause.into(),
            ..MigrationInfo::default()
        };
        for m in [moved(1, "node2", "done", "balancer"), moved(2, "node3", "failed", "user")] {
            seen.migrations.insert(m.id, m);
        }
        seen.migrations.insert(3, moved(3, "node1", "done", "user"));
        assert_eq!(seen.visited("data"), ["node1", "node2", "node1"]);
        assert_eq!(seen.balanced_to(), ["node2"]);
    }
}
