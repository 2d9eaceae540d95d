//! What guests write into mapped files goes home within about a second, so that whoever reads the files there is not
//! far behind; the kernel by itself takes half a minute.
//!
//! It is done by a thread of PID 1. It waits for home's answers in a way that no signal ends (folio_wait_writeback),
//! and the shepherd, which alone has `/dev/fuse` open, must be able to die at any time: that ends such waits.

use std::fs::File;
use std::io;
use std::thread;
use std::time::Duration;

/// From the end of one writing to the next.
const PAUSE: Duration = Duration::from_secs(1);

/// Starts it, when all threads of the guests have their numbers: it takes one that is free.
pub fn start() -> io::Result<()> {
    let root = File::open("/")?;
    let run = move || {
        loop {
            thread::sleep(PAUSE);
            // What could not be written is told to the guest by its msync(2), and to home by that of a move.
            if let Err(error) = nix::unistd::syncfs(&root) {
                tracing::debug!(%error, "not all that guests have written into mapped files is at home");
            }
        }
    };
    thread::Builder::new().name("write-back".into()).spawn(run).map(drop)
}
