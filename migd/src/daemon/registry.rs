//! What the daemon remembers of jobs across its own restart: a file in the runtime directory, which
//! does not outlive the kernel that its PIDs belong to.

use super::jobs::Saved;
use super::{Daemon, files, processes};
use std::fs;

const FILE: &str = "jobs.json";

/// Takes in what was saved.
pub fn restore(daemon: &Daemon) {
    let path = daemon.config.run_dir.join(FILE);
    let Ok(text) = fs::read_to_string(&path) else { return };
    let saved = match serde_json::from_str::<Saved>(&text) {
        Ok(saved) => saved,
        Err(error) => {
            return tracing::warn!(%error, path = %path.display(), "the saved jobs are not readable");
        }
    };
    match processes::scan(daemon.units) {
        Ok(stats) => daemon.lock().jobs.restore(&daemon.config.name, saved, &stats),
        Err(error) => tracing::warn!(%error, "/proc cannot be read"),
    }
}

/// Saves the jobs if anything has changed.
pub fn save(daemon: &Daemon) {
    let Some(saved) = daemon.lock().jobs.take_unsaved() else { return };
    let path = daemon.config.run_dir.join(FILE);
    if let Err(error) = files::write_json(&path, &saved) {
        tracing::warn!(%error, path = %path.display(), "the jobs could not be saved");
    }
}
