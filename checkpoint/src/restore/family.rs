//! The empty processes of a tree, each made by its parent, with their sessions and groups.
//!
//! A process makes its children before it gives up what they inherit from it (the descriptors that
//! several of them share), and before or after it makes its session, as they are members of the old
//! one or the new. Each dies with its parent until it is filled, so that a failure leaves none.

use super::RestoreError;
use super::shell::{self, fork_as};
use super::standalone::Standalone;
use super::table::{self, SharedFiles};
use crate::image::{ProcessImage, ZombieImage};
use crate::inventory::relations::{Relation, is_older_than_its_parents_session};
use crate::sys::fork::{Side, die_of, exit_now};
use crate::tracee::Tracee;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::{Pid, getpgid, getsid, setpgid, setsid};

/// What all of them are made from.
pub(super) struct Family<'a> {
    pub images: &'a [ProcessImage],
    pub shared: &'a SharedFiles,
    /// A descriptor number above those of all tables.
    pub base: i32,
    pub how: Standalone,
    /// What the root does about its session and group.
    pub join: &'a dyn Fn() -> Result<(), RestoreError>,
}

impl Family<'_> {
    /// Makes process `who` and its descendants; gives its PID.
    pub fn spawn(&self, who: usize) -> Result<i32, RestoreError> {
        shell::spawn(self.images[who].pid, self.base, |keep| self.set_up(who, keep))
    }

    /// Runs in the new process.
    fn set_up(&self, who: usize, keep: i32) -> Result<(), RestoreError> {
        let image = &self.images[who];
        let failed = |what: &'static str| move |errno| RestoreError::file(what, errno);
        set_pdeathsig(Signal::SIGKILL).map_err(failed("PR_SET_PDEATHSIG"))?;
        table::raise_limit();
        for zombie in &image.zombies {
            leave_zombie(zombie)?;
        }
        let me = relation(image);
        let (older, younger): (Vec<usize>, Vec<usize>) = (who + 1..self.images.len())
            .filter(|&child| self.images[child].ppid == image.pid)
            .partition(|&child| is_older_than_its_parents_session(&relation(&self.images[child]), &me));
        for child in older {
            self.spawn(child)?;
        }
        match who {
            0 => (self.join)()?,
            _ if image.sid == image.pid => setsid().map(drop).map_err(failed("making a session"))?,
            _ => {}
        }
        for child in younger {
            self.spawn(child)?;
        }
        // What the image has pending comes from the image.
        forget_ends_of_children().map_err(failed("taking SIGCHLD"))?;
        table::build(&image.files, &self.shared.given[who], self.how.no_input, keep)
    }
}

fn relation(image: &ProcessImage) -> Relation {
    Relation { pid: image.pid, ppid: image.ppid, pgid: image.pgid, sid: image.sid }
}

/// Makes a child that ends as the zombie has ended, and waits until it has.
fn leave_zombie(zombie: &ZombieImage) -> Result<(), RestoreError> {
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
fn forget_ends_of_children() -> nix::Result<()> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGCHLD);
    let ends = SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
    // Only one is ever pending (signal(7)).
    ends.read_signal().map(drop)
}

/// Puts each process into its group, the leaders first, and sees that all are in the sessions and
/// groups that the image says. The root stays where it is, and with it who was in its group.
pub(super) fn join_groups(images: &[ProcessImage], tracees: &mut [Tracee]) -> Result<(), RestoreError> {
    let Some(root) = images.first() else { return Ok(()) };
    let member = |image: &ProcessImage| image.sid != image.pid && image.pgid != root.pgid;
    for leaders in [true, false] {
        for (image, tracee) in images.iter().zip(tracees.iter_mut()).skip(1) {
            if member(image) && leaders == (image.pgid == image.pid) {
                let args = [0, image.pgid as u64, 0, 0, 0, 0];
                tracee.must(0, "joining its process group", libc::SYS_setpgid, args)?;
            }
        }
    }
    let unfit = |what: &str, image: &ProcessImage| {
        RestoreError::Unfit(format!("process {} could not be put into its {what}", image.pid))
    };
    let of = |image: &ProcessImage| Some(Pid::from_raw(image.pid));
    let at_root = (getsid(of(root)), getpgid(of(root)));
    for image in &images[1..] {
        let session = if image.sid == root.sid { at_root.0 } else { Ok(Pid::from_raw(image.sid)) };
        if getsid(of(image)) != session {
            return Err(unfit("session", image));
        }
        let group = if image.pgid == root.pgid { at_root.1 } else { Ok(Pid::from_raw(image.pgid)) };
        if getpgid(of(image)) != group {
            return Err(unfit("process group", image));
        }
    }
    Ok(())
}
