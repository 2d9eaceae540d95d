//! What the daemon remembers of jobs across its own restart: a file in the runtime directory, which
//! does not outlive the kernel that its PIDs belong to.

use super::jobs::Saved;
use super::{Daemon, files, processes};
use std::fs;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

const FILE: &str = "jobs.json";
/// Changes that come together are written together.
const GATHER: Duration = Duration::from_millis(20);

/// Saves soon after every change that is announced by [`Daemon::save_now`].
pub async fn run(daemon: Arc<Daemon>) {
    loop {
        daemon.save_now.notified().await;
        tokio::time::sleep(GATHER).await;
        let daemon = Arc::clone(&daemon);
        if let Err(error) = tokio::task::spawn_blocking(move || save(&daemon)).await {
            tracing::error!(%error, "saving the jobs has failed");
        }
    }
}

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
    // Two at once would write the same new file.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(saved) = daemon.lock().jobs.take_unsaved() else { return };
    let path = daemon.config.run_dir.join(FILE);
    if let Err(error) = files::write_json(&path, &saved) {
        tracing::warn!(%error, path = %path.display(), "the jobs could not be saved");
    }
}
