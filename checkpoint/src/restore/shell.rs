//! The empty process that an image is rebuilt in: a child under a wanted PID, with the image's
//! descriptors, all signals blocked, waiting to be adopted.
//!
//! Whoever makes one must have a single thread ([`crate::sys::fork`]); programs with more of them use
//! a helper process.

use super::RestoreError;
use super::table::lift;
use crate::proc::status::Status;
use crate::sys::fork::{Side, exit_now, fork};
use crate::sys::{fd, wait};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::unistd::{pause, pipe2};
use std::convert::Infallible;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// Longest text of a child's failure, bytes.
const MAX_TEXT: u64 = 8 << 10;
/// What the child says when it is ready.
const READY: &[u8] = b"ready";
/// How long the parent of the process that was saved may take to notice its end.
const ZOMBIE_LIMIT: Duration = Duration::from_secs(2);

/// Starts a child under PID `pid`; runs `setup` in it with the one descriptor number that it must
/// leave open, which is at least `base`. Gives the child's PID as this process knows it.
pub fn spawn(
    pid: i32,
    base: i32,
    setup: impl FnOnce(i32) -> Result<(), RestoreError>,
) -> Result<i32, RestoreError> {
    let (ours, theirs) =
        pipe2(OFlag::O_CLOEXEC).map_err(|errno| RestoreError::file("making a pipe", errno))?;
    match fork_as(pid)? {
        Side::Child => {
            drop(ours);
            let Err(error) = become_shell(setup, theirs, base);
            tracing::debug!("{error}");
            exit_now(1)
        }
        Side::Parent(child) => {
            drop(theirs);
            hear(child, ours)?;
            Ok(child)
        }
    }
}

/// What a child says before it waits; one that fails is reaped.
fn hear(child: i32, ours: OwnedFd) -> Result<(), RestoreError> {
    let mut text = Vec::new();
    let read = File::from(ours).take(MAX_TEXT).read_to_end(&mut text);
    if read.is_ok() && text == READY {
        return Ok(());
    }
    let _ = wait::kill(child, libc::SIGKILL);
    let _ = wait::child(child);
    Err(RestoreError::Child(match text.is_empty() {
        true => "the new process died while its files were opened".into(),
        false => String::from_utf8_lossy(&text).into_owned(),
    }))
}

/// clone3(2) with the PID; waits a little while a zombie has it.
pub(super) fn fork_as(pid: i32) -> Result<Side, RestoreError> {
    let deadline = Instant::now() + ZOMBIE_LIMIT;
    loop {
        match fork(0, Some(pid)) {
            Ok(side) => return Ok(side),
            Err(Errno::EEXIST) if is_zombie(pid) && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(Errno::EEXIST) => return Err(taken(pid)),
            Err(errno) => return Err(RestoreError::Fork { pid, errno }),
        }
    }
}

pub(super) fn is_zombie(pid: i32) -> bool {
    // Its struct may be gone a moment before the number is free.
    Status::read(pid).map_or(!std::path::Path::new(&format!("/proc/{pid}")).exists(), |s| s.state() == 'Z')
}

/// Why a PID or TID cannot be had.
pub(super) fn taken(id: i32) -> RestoreError {
    let holder = match Status::read(id) {
        Ok(status) => {
            let name = status.line("Name").unwrap_or("?").to_string();
            match (status.state(), status.decimal("Tgid")) {
                ('Z', _) => format!("{name}, which has ended, but whose parent has not waited for it"),
                (_, Some(group)) if group != id as u64 => format!("{name}, a thread of process {group}"),
                _ => name,
            }
        }
        Err(_) => "a process group or session that still has members".into(),
    };
    RestoreError::Taken { id, holder }
}

fn become_shell(
    setup: impl FnOnce(i32) -> Result<(), RestoreError>,
    told: OwnedFd,
    base: i32,
) -> Result<Infallible, std::io::Error> {
    let lifted = lift(told.as_fd(), base);
    drop(told);
    let told = match lifted {
        Ok(told) => told,
        Err(error) => return Err(std::io::Error::other(error.to_string())),
    };
    let mut tell = File::from(fd::own(told));
    // What it is sent before it is filled has to wait.
    let blocked = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None)
        .map_err(|errno| RestoreError::file("blocking signals", errno));
    if let Err(error) = blocked.and_then(|()| setup(told)) {
        let text = error.to_string();
        tell.write_all(&text.as_bytes()[..text.len().min(MAX_TEXT as usize)])?;
        return Err(std::io::Error::other(text));
    }
    tell.write_all(READY)?;
    drop(tell);
    loop {
        pause();
    }
}
