//! The empty process that an image is rebuilt in: a child under a wanted PID, with the image's
//! descriptors, all signals blocked, waiting to be adopted.
//!
//! Whoever makes one must have a single thread ([`crate::sys::fork`]); programs with more of them use
//! a helper process.

use super::RestoreError;
use super::table::lift;
use crate::image::ZombieImage;
use crate::proc::status::Status;
use crate::sys::fork::{Side, die_of, exit_now, fork};
use crate::sys::{fd, wait};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::{Pid, pause, pipe2, setpgid, setsid};
use std::collections::BTreeSet;
use std::convert::Infallible;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// Longest text of a child's failure, bytes.
const MAX_TEXT: u64 = 8 << 10;
/// What the child says when it is ready.
const READY: &[u8] = b"ready";
/// How long the parent of a process that was saved may take to notice its end: for descendants that is the
/// first process of the system, with all of them at once.
pub(super) const ZOMBIE_LIMIT: Duration = Duration::from_secs(10);

/// Starts a child under PID `pid`; runs `setup` in it with the one descriptor number that it must
/// leave open, which is at least `base`. Gives the child's PID as this process knows it.
pub fn spawn(
    pid: i32,
    base: i32,
    setup: impl FnOnce(i32) -> Result<(), RestoreError>,
) -> Result<i32, RestoreError> {
    start(|| fork_as(pid), base, setup)
}

fn start(
    fork: impl FnOnce() -> Result<Side, RestoreError>,
    base: i32,
    setup: impl FnOnce(i32) -> Result<(), RestoreError>,
) -> Result<i32, RestoreError> {
    let (ours, theirs) =
        pipe2(OFlag::O_CLOEXEC).map_err(|errno| RestoreError::file("making a pipe", errno))?;
    match fork()? {
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

/// A process that has built a table of descriptors for another one to take. Dropped, it ends.
pub struct Helper {
    pid: i32,
}

/// Forks tried for one that has no number that is needed.
const HELPER_TRIES: usize = 64;

impl Helper {
    /// Starts one whose PID is none of `avoid`; `setup` is as of [`spawn`].
    pub fn start(
        avoid: &BTreeSet<i32>,
        base: i32,
        setup: impl Fn(i32) -> Result<(), RestoreError>,
    ) -> Result<Helper, RestoreError> {
        let mut unfit = Vec::new();
        for _ in 0..HELPER_TRIES {
            let fork = || fork(0, None).map_err(|errno| RestoreError::Fork { pid: 0, errno });
            let prepared = |keep| {
                // It ends with us whatever becomes of us.
                set_pdeathsig(Signal::SIGKILL)
                    .map_err(|errno| RestoreError::file("PR_SET_PDEATHSIG", errno))?;
                setup(keep)
            };
            let helper = Helper { pid: start(fork, base, prepared)? };
            if !avoid.contains(&helper.pid) {
                return Ok(helper);
            }
            // Kept until there is a better one, or it would come again.
            unfit.push(helper);
        }
        Err(RestoreError::Unfit("no process could be started with a number that is not needed".into()))
    }

    /// Its PID.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether it has this descriptor.
    pub fn has(&self, fd: i32) -> bool {
        std::fs::symlink_metadata(format!("/proc/{}/fd/{fd}", self.pid)).is_ok()
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = wait::kill(self.pid, libc::SIGKILL);
        let _ = wait::child(self.pid);
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

/// The same for what only acts under a PID for a moment: gives what the other call gives.
pub(super) fn act_under<T>(pid: i32, act: impl Fn() -> Result<T, Errno>) -> Result<T, Errno> {
    let deadline = Instant::now() + ZOMBIE_LIMIT;
    loop {
        match act() {
            Err(Errno::EEXIST) if is_zombie(pid) && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            other => return other,
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

/// Makes a child that ends as the zombie has ended, and waits until it has.
pub fn leave_zombie(zombie: &ZombieImage) -> Result<(), RestoreError> {
    match fork_as(zombie.pid)? {
        Side::Child => {
            let own = Pid::from_raw(0);
            // It was its leader, or it did not matter; what fails shows in nothing but ps.
            let _ = match (zombie.sid == zombie.pid, zombie.pgid == zombie.pid) {
                (true, _) => setsid().map(drop),
                (_, true) => setpgid(own, own),
                _ => Ok(()),
            };
            if libc::WIFEXITED(zombie.status) {
                exit_now(libc::WEXITSTATUS(zombie.status));
            }
            die_of(libc::WTERMSIG(zombie.status))
        }
        Side::Parent(pid) => waitid(Id::Pid(Pid::from_raw(pid)), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT)
            .map(drop)
            .map_err(|errno| RestoreError::file("waiting for a child that ends", errno)),
    }
}

/// All signals are blocked here, so that the end of a child stays pending.
pub fn forget_ends_of_children() -> nix::Result<()> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGCHLD);
    let ends = SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
    // Only one is ever pending (signal(7)).
    ends.read_signal().map(drop)
}
