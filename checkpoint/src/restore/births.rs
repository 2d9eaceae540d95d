//! Children, each made by its parent (or a sibling) in the session that it needs; those that have
//! ended, and leaders that are gone, are made too, and end when the groups stand.

use super::family::{Family, Member, Memory, Surroundings};
use super::shell::{ZOMBIE_LIMIT, is_zombie, taken};
use super::{RestoreError, threads};
use crate::image::{ProcessImage, ZombieImage};
use crate::inventory::relations::{self, Birth};
use crate::inventory::shares;
use crate::sys::ptrace::{self, Stop};
use crate::sys::wait;
use crate::tracee::{Call, Offspring, Tracee, TraceeError};
use nix::errno::Errno;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// How long one that is to end may take.
const END_LIMIT: Duration = Duration::from_secs(5);

/// A process that is there only until the others are.
pub(super) struct Passing {
    pub tracee: Tracee,
    /// PID in the image.
    pub pid: i32,
    /// Who has it as a child, by its place among the images; a passing one has no children.
    pub parent: usize,
    /// It stays as a zombie.
    pub zombie: Option<ZombieImage>,
}

/// How all are born, and who of them is there only for a while.
#[derive(Default)]
pub(super) struct Births {
    living: Vec<Birth>,
    /// Of each process its zombies'.
    zombies: Vec<Vec<Birth>>,
    pub passing: Vec<Passing>,
}

/// Who is to be made.
#[derive(Clone, Copy)]
enum Who {
    Living(usize),
    /// Of this process this zombie.
    Zombie(usize, usize),
}

/// Who makes it.
#[derive(Clone, Copy)]
enum Maker {
    Member(usize),
    Passing(usize),
}

impl Births {
    pub fn plan(images: &[ProcessImage]) -> Births {
        let mut all = relations::births(&relations::of_images(images)).into_iter();
        let mut births = Births::default();
        for image in images {
            births.living.extend(all.next());
            births.zombies.push(all.by_ref().take(image.zombies.len()).collect());
        }
        births.living = shares::births(images, &births.living);
        births
    }

    /// Nobody is to be made.
    pub fn is_empty(&self) -> bool {
        self.living.is_empty()
    }

    /// Who of the children of `parent` is born so, in the images' order.
    fn of(&self, images: &[ProcessImage], parent: usize, is: impl Fn(Birth) -> bool) -> Vec<Who> {
        let pid = images[parent].pid;
        let zombies = self.zombies.get(parent).into_iter().flatten().enumerate();
        let zombies = zombies.filter(|(_, birth)| is(**birth)).map(|(n, _)| Who::Zombie(parent, n));
        let living = self.living.iter().enumerate().skip(parent + 1);
        let living = living.filter(|&(who, &birth)| images[who].ppid == pid && is(birth));
        zombies.chain(living.map(|(who, _)| Who::Living(who))).collect()
    }
}

impl Family<'_> {
    /// Makes the children of process `who`, whose memory is there, and its session.
    pub(super) fn bear_children(
        &mut self,
        who: usize,
        surroundings: &mut dyn Surroundings,
    ) -> Result<(), RestoreError> {
        if self.births.is_empty() {
            return Ok(());
        }
        let image = &self.images[who];
        let born = |family: &Self, birth: Birth| family.births.of(family.images, who, |one| one == birth);
        for child in born(self, Birth::Early) {
            self.bear(Maker::Member(who), child, 0)?;
        }
        if who > 0 && image.sid == image.pid {
            // A sibling may need it before its own turn comes.
            self.make_session(Maker::Member(who))?;
            surroundings.session_made(image.sid, self.tracee(Maker::Member(who))?)?;
        }
        for child in born(self, Birth::Late) {
            self.bear(Maker::Member(who), child, 0)?;
        }
        if let Some(parent) = self.place_of(image.ppid) {
            for sibling in self.births.of(self.images, parent, |one| one == Birth::Sibling(image.pid)) {
                self.bear(Maker::Member(who), sibling, libc::CLONE_PARENT as u64)?;
            }
        }
        let lost = self.births.of(self.images, who, |one| matches!(one, Birth::Lost(_)));
        let sessions: BTreeSet<i32> = lost.iter().filter_map(|&one| self.lost_session(one)).collect();
        for session in sessions {
            let leader = self.lost_leader(who, session)?;
            for &child in
                lost.iter().filter(|&&one| self.lost_session(one) == Some(session)).collect::<Vec<_>>()
            {
                self.bear(Maker::Passing(leader), child, libc::CLONE_PARENT as u64)?;
            }
        }
        Ok(())
    }

    fn lost_session(&self, who: Who) -> Option<i32> {
        let birth = match who {
            Who::Living(who) => self.births.living[who],
            Who::Zombie(parent, n) => self.births.zombies[parent][n],
        };
        match birth {
            Birth::Lost(session) => Some(session),
            _ => None,
        }
    }

    /// The leader of a session without one: a zombie of `parent` with that number, or one made for it.
    fn lost_leader(&mut self, parent: usize, session: i32) -> Result<usize, RestoreError> {
        if let Some(found) = self.births.passing.iter().position(|one| one.pid == session) {
            return Ok(found);
        }
        let leader = self.make_passing(Maker::Member(parent), parent, session, 0, libc::SIGCHLD, None)?;
        self.make_session(Maker::Passing(leader))?;
        Ok(leader)
    }

    fn tracee(&mut self, maker: Maker) -> Result<&mut Tracee, RestoreError> {
        let found = match maker {
            Maker::Member(who) => self.members[who].as_mut().map(|member| &mut member.tracee),
            Maker::Passing(n) => self.births.passing.get_mut(n).map(|one| &mut one.tracee),
        };
        found.ok_or_else(|| RestoreError::Unfit("a process is to be made by one that is not there".into()))
    }

    fn thread_of(&mut self, maker: Maker, parent_tid: i32) -> Result<usize, RestoreError> {
        let Maker::Member(who) = maker else { return Ok(0) };
        let image = &self.images[who];
        let Some(member) = &mut self.members[who] else { return Ok(0) };
        match image.threads.iter().position(|thread| thread.tid == parent_tid) {
            Some(at) if at > 0 => Ok(threads::order(&mut member.tracee, image)?[at]),
            // An ended leader has no children.
            _ if image.threads[0].apart.ended.is_some() => Ok(threads::order(&mut member.tracee, image)?[1]),
            _ => Ok(0),
        }
    }

    fn make_session(&mut self, who: Maker) -> Result<(), RestoreError> {
        self.tracee(who)?.must(0, "making a session", libc::SYS_setsid, [0; 6])?;
        Ok(())
    }

    fn bear(&mut self, maker: Maker, who: Who, flags: u64) -> Result<(), RestoreError> {
        match who {
            Who::Living(child) => {
                let image = &self.images[child];
                let shared = image.shares.each().into_iter().filter(|&(with, ..)| with != 0);
                let flags = shared.fold(flags, |flags, (_, flag, _)| flags | flag);
                let made = self.make(maker, image.pid, flags, (image.exit_signal, image.parent_tid))?;
                let memory = match maker {
                    _ if image.shares.memory != 0 => Memory::Shared,
                    // Before it is filled, that of a passing one is its parent's.
                    Maker::Passing(_) => Memory::Parents,
                    Maker::Member(who) if self.images[who].pid == image.ppid => Memory::Parents,
                    Maker::Member(_) => Memory::Anothers,
                };
                self.members[child] = Some(Member::born(made, memory));
                Ok(())
            }
            Who::Zombie(parent, n) => {
                let zombie = self.images[parent].zombies[n];
                let leader = zombie.sid == zombie.pid;
                let exit_signal = zombie.exit_signal;
                let made = self.make_passing(maker, parent, zombie.pid, flags, exit_signal, Some(zombie))?;
                if leader {
                    self.make_session(Maker::Passing(made))?;
                }
                Ok(())
            }
        }
    }

    fn make_passing(
        &mut self,
        maker: Maker,
        parent: usize,
        pid: i32,
        flags: u64,
        exit_signal: i32,
        zombie: Option<ZombieImage>,
    ) -> Result<usize, RestoreError> {
        let parent_tid = zombie.map_or(0, |zombie| zombie.parent_tid);
        let tracee = self.make(maker, pid, flags, (exit_signal, parent_tid))?;
        self.births.passing.push(Passing { tracee, pid, parent, zombie });
        Ok(self.births.passing.len() - 1)
    }

    /// `parent_tid`: which thread of who makes it has it as a child.
    fn make(
        &mut self,
        maker: Maker,
        pid: i32,
        flags: u64,
        (exit_signal, parent_tid): (i32, i32),
    ) -> Result<Tracee, RestoreError> {
        let offspring = Offspring { pid, flags, exit_signal };
        let thread = self.thread_of(maker, parent_tid)?;
        let tracee = self.tracee(maker)?;
        let deadline = Instant::now() + ZOMBIE_LIMIT;
        loop {
            match tracee.make_child(thread, offspring) {
                Ok(made) => return Ok(made),
                Err(TraceeError::Inside { errno: Errno::EEXIST, .. })
                    if is_zombie(pid) && Instant::now() < deadline =>
                {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(TraceeError::Inside { errno: Errno::EEXIST, .. }) => return Err(taken(pid)),
                Err(TraceeError::Inside { errno, .. }) => return Err(RestoreError::Fork { pid, errno }),
                Err(other) => return Err(other.into()),
            }
        }
    }

    /// A process of group `group`, whose leader is gone, bears a leader for it.
    pub(super) fn lost_group(&mut self, member: i32, group: i32) -> Result<(), RestoreError> {
        let passing = self.births.passing.iter().position(|one| one.pid == member);
        let (maker, parent) = match (self.place_of(member), passing) {
            (Some(who), _) => (Maker::Member(who), who),
            // It has no children that it could wait for: its parent's then, in the same session.
            (None, Some(n)) => (Maker::Passing(n), self.births.passing[n].parent),
            (None, None) => return Err(RestoreError::Unfit("a group without members".into())),
        };
        let flags = match maker {
            Maker::Member(_) => 0,
            Maker::Passing(_) => libc::CLONE_PARENT as u64,
        };
        let leader = self.make_passing(maker, parent, group, flags, libc::SIGCHLD, None)?;
        self.births.passing[leader].tracee.must(0, "making a group", libc::SYS_setpgid, [0; 6])?;
        Ok(())
    }

    /// Those that are there only for a while end, as they have ended; their parents hear of the
    /// zombies only, and by no signal.
    pub(super) fn end_the_ended(&mut self) -> Result<(), RestoreError> {
        let mut bereaved: BTreeMap<usize, u64> = BTreeMap::new();
        while let Some(one) = self.births.passing.pop() {
            let Passing { tracee, pid, parent, zombie } = one;
            finish_off(tracee, zombie.map_or(0, |zombie| zombie.status))?;
            let signal = zombie.map_or(libc::SIGCHLD, |zombie| zombie.exit_signal);
            *bereaved.entry(parent).or_default() |= 1u64.checked_shl(signal as u32).unwrap_or(0) >> 1;
            if zombie.is_none() {
                let args = [pid as u64, 0, libc::__WALL as u64, 0, 0, 0];
                self.tracee(Maker::Member(parent))?.must(0, "waiting for a child", libc::SYS_wait4, args)?;
            }
        }
        for (parent, signals) in bereaved {
            forget_signals(self.tracee(Maker::Member(parent))?, signals)?;
        }
        Ok(())
    }
}

/// Lets a process end with a wait status.
fn finish_off(mut tracee: Tracee, status: i32) -> Result<(), RestoreError> {
    let pid = tracee.pid();
    let signal = if libc::WIFSIGNALED(status) { libc::WTERMSIG(status) } else { 0 };
    let at = |operation| move |errno| TraceeError::kernel(operation, pid, errno);
    if signal != 0 && signal != libc::SIGKILL {
        let default = Call::must("setting an action", libc::SYS_rt_sigaction, [signal as u64, 0, 0, 8, 0, 0]);
        let core = libc::RLIMIT_CORE as u64;
        let none = Call::must("setting a limit", libc::SYS_prlimit64, [0, core, 0, 0, 0, 0]);
        tracee.must_all(0, &[default.input(1, &[0; 32]), none.input(2, &[0; 16])])?;
        ptrace::set_sigmask(pid, !(1 << (signal - 1))).map_err(at("setting the signal mask"))?;
        wait::kill(pid, signal).map_err(at("kill"))?;
        ptrace::cont(pid, 0).map_err(at("PTRACE_CONT"))?;
    } else if signal != 0 {
        wait::kill(pid, signal).map_err(at("kill"))?;
    } else {
        let code = libc::WEXITSTATUS(status) as u64;
        match tracee.syscall(0, libc::SYS_exit_group, [code, 0, 0, 0, 0, 0]) {
            Err(TraceeError::Died { .. }) => {
                tracee.into_tids();
                return Ok(());
            }
            Ok(_) => return Err(TraceeError::Unfit { pid, what: "it does not exit" }.into()),
            Err(error) => return Err(error.into()),
        }
    }
    tracee.into_tids();
    let deadline = Instant::now() + END_LIMIT;
    while Instant::now() < deadline {
        match ptrace::wait(pid, false).map_err(at("waitpid"))? {
            Some(Stop::Gone(_)) => return Ok(()),
            Some(Stop::Signal(sent)) => ptrace::cont(pid, sent).map_err(at("PTRACE_CONT"))?,
            Some(_) => ptrace::cont(pid, 0).map_err(at("PTRACE_CONT"))?,
            None => std::thread::sleep(Duration::from_micros(50)),
        }
    }
    Err(TraceeError::Unfit { pid, what: "it does not end" }.into())
}

/// Takes signals that came of what was done here: what the image has pending comes from the image.
pub(super) fn forget_signals(tracee: &mut Tracee, signals: u64) -> Result<(), RestoreError> {
    // All are blocked.
    for _ in 0..ENDS {
        let call = Call::may("forgetting a signal", libc::SYS_rt_sigtimedwait, [0, 0, 0, 8, 0, 0]);
        let call = call.input(0, &signals.to_le_bytes()).input(2, &[0; 16]);
        let replies = tracee.must_all(0, &[call])?;
        if replies.first().is_none_or(|reply| reply.value < 0) {
            break;
        }
    }
    Ok(())
}

/// Most signals that are taken; each of the ends is one, and real-time signals queue.
const ENDS: usize = crate::image::MAX_PROCESSES + 64;
