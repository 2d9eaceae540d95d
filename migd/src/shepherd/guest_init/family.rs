//! The guests' processes, each made by its parent, with their sessions and groups.
//!
//! What several of them share is opened before they are made, by PID 1, and inherited: so it is one open
//! file description, with one position. A process makes its children before it gives up what they
//! inherit, and before or after it makes its session, as they are members of the old one or the new.

use super::files::{self, Given, Objects, Sources};
use super::protocol::{Member, Setup};
use anyhow::{Context, Result, bail};
use checkpoint::image::ProcessImage;
use checkpoint::inventory::relations::{Relation, is_older_than_its_parents_session};
use checkpoint::restore::shell::{forget_ends_of_children, leave_zombie};
use checkpoint::sys::fork::{Side, exit_now, fork};
use checkpoint::sys::{fd, wait};
use checkpoint::tracee::Tracee;
use nix::fcntl::OFlag;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::unistd::{Pid, pause, pipe2, setpgid, setsid};
use std::convert::Infallible;
use std::fs::File;
use std::io::{Read, Write};

/// Longest text of a child's failure, bytes.
const MAX_TEXT: u64 = 8 << 10;
/// What the child says when it and its descendants are made.
const MADE: &[u8] = b"made";

/// Makes all of them; gives the PIDs of those that are our children.
pub fn make(members: &[Member], setup: &Setup, objects: &Objects) -> Result<Vec<i32>> {
    let sources = Sources { setup, objects };
    for (index, member) in members.iter().enumerate() {
        let known = member.ppid == 0 || members[..index].iter().any(|other| other.pid == member.ppid);
        if member.pid <= 1 || !known {
            bail!("the image is not consistent: a process without a parent");
        }
    }
    let base = members.iter().map(|member| files::above(&member.files)).collect::<Result<Vec<_>>>()?;
    let base = base.into_iter().max().unwrap_or(3);
    let given = files::open_shared(members, sources, base)?;
    let family = Family { members, sources, given: &given, base };
    let tops: Result<Vec<i32>> =
        (0..members.len()).filter(|&who| members[who].ppid == 0).map(|who| family.spawn(who)).collect();
    files::close_shared(given);
    tops
}

struct Family<'a> {
    members: &'a [Member],
    sources: Sources<'a>,
    given: &'a Given,
    /// A descriptor number above those of all tables.
    base: i32,
}

impl Family<'_> {
    /// Makes process `who` and its descendants.
    fn spawn(&self, who: usize) -> Result<i32> {
        let pid = self.members[who].pid;
        let (ours, theirs) = pipe2(OFlag::O_CLOEXEC).context("cannot make a pipe")?;
        match fork(0, Some(pid)).with_context(|| format!("cannot make a process with PID {pid}"))? {
            Side::Child => {
                drop(ours);
                let Err(error) = self.become_leader(who, theirs);
                tracing::error!("{error:#}");
                exit_now(1)
            }
            Side::Parent(child) => {
                drop(theirs);
                let mut text = Vec::new();
                let read = File::from(ours).take(MAX_TEXT).read_to_end(&mut text);
                if read.is_ok() && text == MADE {
                    return Ok(child);
                }
                let _ = wait::kill(child, libc::SIGKILL);
                let _ = wait::child(child);
                read.context("cannot hear a guest's process")?;
                match text.is_empty() {
                    true => bail!("the guest's process died while its files were opened"),
                    false => bail!("{}", String::from_utf8_lossy(&text)),
                }
            }
        }
    }

    /// In the new process: makes its children and its descriptors, tells, and waits to be filled.
    fn become_leader(&self, who: usize, told: std::os::fd::OwnedFd) -> Result<Infallible> {
        let told = files::lift(told, self.base)?;
        let mut tell = File::from(fd::own(told));
        if let Err(error) = self.prepare(who, told) {
            let text = format!("{error:#}");
            tell.write_all(&text.as_bytes()[..text.len().min(MAX_TEXT as usize)])?;
            return Err(error);
        }
        tell.write_all(MADE)?;
        drop(tell);
        loop {
            pause();
        }
    }

    fn prepare(&self, who: usize, keep: i32) -> Result<()> {
        let member = &self.members[who];
        // Until it is filled it dies with its parent.
        set_pdeathsig(Signal::SIGKILL).context("cannot ask to die with the parent")?;
        // What it is sent before it is filled has to wait.
        sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None).context("cannot block signals")?;
        for zombie in &member.zombies {
            leave_zombie(zombie)?;
        }
        let me = relation(member);
        let (older, younger): (Vec<usize>, Vec<usize>) = (who + 1..self.members.len())
            .filter(|&child| self.members[child].ppid == member.pid)
            .partition(|&child| is_older_than_its_parents_session(&relation(&self.members[child]), &me));
        for child in older {
            self.spawn(child)?;
        }
        if member.ppid == 0 {
            // PID 1 is in its session and outside of its group: the group is not orphaned, and
            // SIGTSTP stops it (setpgid(2)).
            setpgid(Pid::from_raw(0), Pid::from_raw(0)).context("cannot make a process group")?;
        } else if member.sid == member.pid {
            setsid().context("cannot make a session")?;
        }
        for child in younger {
            self.spawn(child)?;
        }
        // What it has pending comes from the image.
        forget_ends_of_children().context("cannot take SIGCHLD")?;
        files::build(&member.files, &self.given.of[who], self.sources, self.base, keep)
    }
}

fn relation(member: &Member) -> Relation {
    Relation { pid: member.pid, ppid: member.ppid, pgid: member.pgid, sid: member.sid, ended: false }
}

/// Puts the guests into their groups, the leaders first. Groups whose leader is not in the house are
/// stood in for by their first member's that is. Best effort: home has the truth, and answers for it;
/// here it matters for wait(2) by group only.
pub fn join_groups(images: &[ProcessImage], tracees: &mut [Tracee]) {
    let stand_in = |image: &ProcessImage| {
        let leads = images.iter().any(|other| other.pid == image.pgid);
        let first = images.iter().find(|other| other.pgid == image.pgid && other.sid == image.sid);
        if leads { image.pgid } else { first.map_or(image.pid, |first| first.pid) }
    };
    for leaders in [true, false] {
        for (image, tracee) in images.iter().zip(tracees.iter_mut()) {
            let group = stand_in(image);
            if image.sid == image.pid && image.ppid != 0 || leaders != (group == image.pid) {
                continue;
            }
            let args = [0, group as u64, 0, 0, 0, 0];
            if let Err(error) = tracee.must(0, "joining its process group", libc::SYS_setpgid, args) {
                tracing::warn!(pid = image.pid, group, %error, "a guest is not in its process group");
            }
        }
    }
}
