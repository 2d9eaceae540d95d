//! Removing what a lab has left, with or without its keeper's help.

use super::cgroup::{self, CpuController};
use super::identity::ProcessId;
use super::place::{self, Place};
use super::state::LabState;
use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill as send};
use nix::unistd::Pid;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long a killed process may take to be gone.
const DEATH_PATIENCE: Duration = Duration::from_secs(10);

/// Kills a process if it still is that one, and waits until it is gone.
pub fn kill(process: ProcessId) {
    let until = Instant::now() + DEATH_PATIENCE;
    if !process.alive() {
        return;
    }
    // It may end by itself in between.
    let _ = send(Pid::from_raw(process.pid), Signal::SIGKILL);
    while process.alive() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Ends what is left of a lab whose keeper is gone, or does not answer.
pub fn sweep(place: &Place) -> Result<()> {
    let state = LabState::load(place).unwrap_or_default();
    let mut groups = Vec::new();
    if let Some(state) = &state {
        kill(state.keeper);
        state.nodes.iter().filter_map(|node| node.init).for_each(kill);
        groups.extend(state.cgroups.iter().cloned());
    }
    // Made before the state said so, or the state is lost.
    groups.extend(CpuController::find().map(|cpu| cpu.lab_dir(place.name())));
    for group in groups.iter().filter(|group| group.exists()) {
        for pid in cgroup::members(group) {
            ProcessId::of(pid).into_iter().for_each(kill);
        }
        cgroup::remove(group)?;
    }
    remove_files(place)
}

/// Removes the lab's folders.
pub fn remove_files(place: &Place) -> Result<()> {
    remove_tree(&place.files_dir())?;
    remove_tree(&place.run_dir())
}

fn remove_tree(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("{} cannot be removed", dir.display()))
        }
        _ => Ok(()),
    }
}

/// Whether a lab has left anything.
pub fn anything_left(place: &Place) -> bool {
    place.run_dir().exists()
        || place.files_dir().exists()
        || CpuController::find().is_some_and(|cpu| cpu.lab_dir(place.name()).exists())
}

/// Takes the lock and sweeps; used by `up` before and `down` after.
pub fn sweep_locked(place: &Place) -> Result<()> {
    let _lock = place::lock()?;
    sweep(place)?;
    place::remove_empty_parents();
    Ok(())
}
