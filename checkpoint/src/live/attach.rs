//! A userfaultfd for another process' memory.
//!
//! There is no way to make one from outside: it belongs to the memory of whoever calls userfaultfd(2). So the process
//! calls it, in one thread that is stopped for some 100 µs, we take a copy of the descriptor (pidfd_getfd(2)),
//! and the process closes its own. The other threads run on; one that forks in between leaves the
//! descriptor to the child, which is made to close it too ([`Stray`]).

use super::LiveError;
use crate::inventory::tree;
use crate::proc::{self, status::Stat};
use crate::sys::fd::{pidfd_getfd, pidfd_open};
use crate::sys::kcmp;
use crate::sys::userfaultfd::{TRACKING_FLAGS, Tracking};
use crate::tracee::{Tracee, TraceeError};
use nix::errno::Errno;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

/// Threads that are tried.
const TRIES: usize = 8;
/// The longest that a fork takes.
const FORK_LIMIT: Duration = Duration::from_secs(1);
/// Generations that may have been born in the moment when the descriptor was there.
const GENERATIONS: usize = 4;

/// The number under which children may have a copy of the userfaultfd.
#[derive(Debug)]
pub struct Stray {
    number: i32,
    /// Forks were under way, perhaps: a child is seen only when its memory has been copied. Until then it is
    /// looked for.
    until: Instant,
}

/// Makes one for this process.
pub fn attach(pid: i32) -> Result<(Tracking, Option<Stray>), LiveError> {
    let face = proc::face(pid);
    let tids = proc::tids(face).map_err(LiveError::proc("threads", pid))?;
    let mut refused = LiveError::Ended { pid };
    for &tid in in_order(&tids).iter().take(TRIES) {
        match take_from(face, tid) {
            Ok((uffd, number)) => {
                let set_up = Tracking::with(uffd);
                let what = "write protection by userfaultfd";
                let tracking = set_up.map_err(|errno| LiveError::Unsupported { what, errno })?;
                let stray = (tids.len() > 1).then(|| Stray { number, until: Instant::now() + FORK_LIMIT });
                return Ok((tracking, stray));
            }
            // Another one may be free.
            Err(error @ (TraceeError::WontStop { .. } | TraceeError::Died { .. })) => refused = error.into(),
            Err(error) => return Err(error.into()),
        }
    }
    Err(refused)
}

/// Those first that run: no call of theirs has to be interrupted.
fn in_order(tids: &[i32]) -> Vec<i32> {
    let waits = |&tid: &i32| {
        Stat::read(tid).map_or(2, |stat| match stat.field(3) {
            Some("R") => 0,
            Some("D") => 2,
            _ => 1,
        })
    };
    // A thousand threads are not all asked.
    let mut some: Vec<i32> = tids.iter().copied().take(8 * TRIES).collect();
    some.sort_by_cached_key(waits);
    some
}

fn take_from(pid: i32, tid: i32) -> Result<(OwnedFd, i32), TraceeError> {
    let mut tracee = Tracee::hold_one(pid, tid)?;
    let made = call(&mut tracee, "userfaultfd", libc::SYS_userfaultfd, TRACKING_FLAGS as u64)? as i32;
    let copy = pidfd_open(pid).and_then(|pidfd| pidfd_getfd(pidfd.as_fd(), made));
    call(&mut tracee, "close", libc::SYS_close, made as u64)?;
    tracee.thaw()?;
    copy.map(|fd| (fd, made)).map_err(|errno| TraceeError::kernel("pidfd_getfd", tid, errno))
}

fn call(tracee: &mut Tracee, operation: &'static str, nr: i64, argument: u64) -> Result<i64, TraceeError> {
    let got = tracee.call_without_stub(nr, [argument, 0, 0, 0, 0, 0])?;
    match got {
        0.. => Ok(got),
        _ => Err(TraceeError::Inside { operation, tid: tracee.tid(0), errno: Errno::from_raw(-got as i32) }),
    }
}

impl Stray {
    /// Takes it away from children that have it. `None` when there will be none any more.
    pub fn sweep(self, pid: i32, tracking: &Tracking) -> Option<Stray> {
        self.sweep_below(pid, tracking, GENERATIONS);
        (Instant::now() < self.until).then_some(self)
    }

    fn sweep_below(&self, pid: i32, tracking: &Tracking, generations: usize) {
        for child in tree::children(pid) {
            if generations > 0 && self.is_in(child, tracking) {
                // It may end meanwhile, which closes it too.
                let _ = close_in(child, self.number);
                self.sweep_below(child, tracking, generations - 1);
            }
        }
    }

    fn is_in(&self, child: i32, tracking: &Tracking) -> bool {
        let link = proc::link(child, &format!("fd/{}", self.number));
        link.is_ok_and(|target| target == b"anon_inode:[userfaultfd]")
            && kcmp::same_file(std::process::id() as i32, tracking.number(), child, self.number) == Ok(true)
    }
}

fn close_in(pid: i32, number: i32) -> Result<(), TraceeError> {
    let mut tracee = Tracee::hold_one(pid, proc::face(pid))?;
    call(&mut tracee, "close", libc::SYS_close, number as u64)?;
    tracee.thaw()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::live::identity;
    use std::process::{Command, Stdio};

    #[test]
    fn a_child_that_was_born_meanwhile_loses_it() {
        let Ok(tracking) = Tracking::of_this_process() else { return };
        let inherited = Stdio::from(tracking.try_clone().expect("a copy"));
        let mut child = Command::new("sleep").arg("60").stdin(inherited).spawn().expect("starts");
        let pid = child.id() as i32;
        let target = || proc::link(pid, "fd/0").ok();
        assert_eq!(target().as_deref(), Some(&b"anon_inode:[userfaultfd]"[..]));
        let stray = |until| Stray { number: 0, until };
        // Another one's stays.
        if let Ok(other) = Tracking::of_this_process() {
            stray(Instant::now() + FORK_LIMIT).sweep(std::process::id() as i32, &other);
            assert!(target().is_some());
        }
        let again = stray(Instant::now() + FORK_LIMIT).sweep(std::process::id() as i32, &tracking);
        assert!(again.is_some() && target().is_none());
        assert!(stray(Instant::now()).sweep(std::process::id() as i32, &tracking).is_none());
        assert!(identity::lives(pid), "it sleeps on");
        child.kill().and_then(|()| child.wait().map(drop)).expect("ends");
    }
}
