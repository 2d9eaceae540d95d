//! A frozen process: every thread in a ptrace stop, owned by one OS thread.
//!
//! ```mermaid
//! stateDiagram-v2
//!   [*] --> Running
//!   Running --> Frozen: freeze
//!   Frozen --> Frozen: install_stub, syscall, batch, remove_stub
//!   Frozen --> Running: thaw (as found) or release (as set)
//!   Frozen --> Parked: deputy::park
//!   Parked --> Frozen: freeze, with the stub found again
//! ```
//!
//! A `Tracee` is not `Send`: ptrace requests are accepted only from the thread that seized. Dropping
//! one without `thaw` or `release` gives the process its registers back as well as it can.
//! Never `PTRACE_O_EXITKILL`, as our death must not be the user's, but for one that is being made
//! ([`Tracee::end_with_tracer`]): half of a program must not be left.

pub mod aio;
mod batch;
mod error;
mod inject;
mod install;
mod naps;
mod new_threads;
mod offspring;
mod one_thread;
pub mod restart;
mod stops;
pub mod stub;
mod tasks;

pub use batch::{Call, Jobs, Reply, must_each_of};
pub use error::TraceeError;
pub use install::install_stubs;
pub use new_threads::NewThread;
pub use offspring::Offspring;

use crate::image::RseqImage;
use crate::sys::ptrace::{self, Regs, Stop};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::marker::PhantomData;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};
use tasks::Seized;

/// Bound on a process' threads.
pub const MAX_THREADS: usize = 16_384;
/// How long a thread may take to stop.
pub const STOP_LIMIT: Duration = Duration::from_secs(5);
/// All signals (the kernel takes KILL and STOP out by itself).
pub const ALL_SIGNALS: u64 = u64::MAX;
/// Rounds of looking for new threads before giving up on a process that makes them without end.
const FREEZE_ROUNDS: usize = 1000;

/// What a thread was found in.
#[derive(Debug, Clone)]
pub struct ThreadState {
    /// Thread id.
    pub tid: i32,
    /// Registers as found at the stop (an rseq critical section already aborted).
    pub regs: Regs,
    /// Extended state; empty of a thread that was made by injection.
    pub xstate: Vec<u8>,
    /// Blocked signals.
    pub sigmask: u64,
    /// rseq registration.
    pub rseq: RseqImage,
}

struct Thread {
    found: ThreadState,
    /// Signal mask has been set to "all" for injection.
    masked: bool,
    /// Registers were changed since the stop.
    touched: bool,
    /// It stands at an event stop: the kernel restarts what the registers given back were in.
    at_event_stop: bool,
    /// They are to be others than those at the stop: an interrupt is hidden ([`restart`]).
    amended: bool,
    set_regs: Option<Regs>,
    set_xstate: Option<Vec<u8>>,
    set_sigmask: Option<u64>,
}

/// The memory of a process, which other threads than the one that traces it may read too.
pub struct Memory {
    pid: i32,
    mem: File,
}

impl Memory {
    /// Of a process that may be traced.
    pub fn of(pid: i32) -> Result<Memory, TraceeError> {
        Ok(Memory { pid, mem: tasks::open_mem(pid)? })
    }

    /// Whose it is.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Reads it, unreadable pages too (`FOLL_FORCE`, fs/proc/base.c).
    pub fn read(&self, addr: u64, buf: &mut [u8]) -> Result<(), TraceeError> {
        self.mem.read_exact_at(buf, addr).map_err(|e| tasks::io_error("reading memory", self.pid, &e))
    }
}

/// A process with every thread in a ptrace stop.
pub struct Tracee {
    pid: i32,
    /// The PID, where that is another: its leader has ended, and `pid` is the TID of another thread.
    leader: Option<i32>,
    /// Its leader is to end when it is let go.
    leaves: bool,
    threads: Vec<Thread>,
    group_stop: Option<u8>,
    stub: Option<Stub>,
    /// A SIGSTOP came while system calls were injected: it cannot be blocked, so it is owed.
    stop_owed: bool,
    /// Options of every thread.
    options: u64,
    /// The process or thread that an injected call has made last.
    made: Option<i32>,
    mem: File,
    live: bool,
    /// Its mappings as they were when it had just been frozen, for the stub's place.
    maps: Option<Vec<u8>>,
    /// All that was set is in its threads.
    settled: bool,
    not_send: PhantomData<*const ()>,
}

#[derive(Debug, Clone, Copy)]
struct Stub {
    at: u64,
    len: u64,
    /// A `syscall` instruction in the vDSO, if it is known where that is.
    gate: Option<u64>,
}

impl Tracee {
    /// Freezes a process: no thread of it runs when this returns. Nothing in it is changed.
    ///
    /// Its parent sees nothing. A stub left by an earlier tracer is found and used again.
    pub fn freeze(pid: i32) -> Result<Tracee, TraceeError> {
        Tracee::freeze_with(pid, &mut |_| {})
    }

    /// Like [`Tracee::freeze`]; calls `interrupted` with each TID once its thread has been asked to
    /// stop, for whoever holds it up in the kernel (a seccomp notification) to let it go.
    pub fn freeze_with(pid: i32, interrupted: &mut dyn FnMut(i32)) -> Result<Tracee, TraceeError> {
        let process = pid;
        let pid = crate::proc::face(process);
        let mut tracee = Tracee::of(pid, tasks::open_mem(pid)?);
        tracee.leader = (pid != process).then_some(process);
        let mut under_way = BTreeSet::new();
        let frozen = tracee.seize_all(interrupted, &mut under_way);
        if frozen.is_err() {
            // Those that stand are let go with the tracee.
            under_way.into_iter().for_each(tasks::let_go);
        }
        frozen.map(|()| tracee)
    }

    /// Of which nothing is known yet.
    fn of(pid: i32, mem: File) -> Tracee {
        Tracee {
            pid,
            leader: None,
            leaves: false,
            threads: Vec::new(),
            group_stop: None,
            stub: None,
            stop_owed: false,
            options: ptrace::O_TRACESYSGOOD,
            made: None,
            mem,
            live: true,
            settled: false,
            maps: None,
            not_send: PhantomData,
        }
    }

    /// Seizes and stops all threads. `under_way` is left with those that are seized and do not stand yet.
    fn seize_all(
        &mut self,
        interrupted: &mut dyn FnMut(i32),
        under_way: &mut BTreeSet<i32>,
    ) -> Result<(), TraceeError> {
        let pid = self.pid;
        let mut seized: BTreeSet<i32> = BTreeSet::new();
        let mut leader_has_ended = false;
        for _ in 0..FREEZE_ROUNDS {
            let fresh = tasks::unseized(pid, &seized, self.threads.len() == seized.len())?;
            if fresh.is_empty() {
                self.threads.sort_by_key(|thread| (thread.found.tid != pid, thread.found.tid));
                let maps = self.maps_as_told()?;
                self.stub = self.find_stub(&String::from_utf8_lossy(&maps));
                self.maps = self.stub.is_none().then_some(maps);
                return Ok(());
            }
            let deadline = Instant::now() + STOP_LIMIT;
            let mut asked = Vec::with_capacity(fresh.len());
            // None of them is woken before all are seized: they share a lock with who seizes the next one.
            for tid in fresh {
                match tasks::seize(pid, tid)? {
                    Seized::Yes => {}
                    Seized::Gone => continue,
                    Seized::Ended => {
                        seized.insert(tid);
                        leader_has_ended |= tid == pid;
                        continue;
                    }
                }
                under_way.insert(tid);
                seized.insert(tid);
                asked.push(tid);
            }
            for &tid in &asked {
                ptrace::interrupt(tid).map_err(|e| TraceeError::kernel("PTRACE_INTERRUPT", tid, e))?;
                interrupted(tid);
            }
            if seized.len() > MAX_THREADS {
                return Err(TraceeError::Unfit { pid, what: "it has too many threads" });
            }
            // The leader last: its end is told when the others have been waited for.
            asked.sort_unstable_by_key(|&tid| tid == pid);
            let mut is_open = false;
            for tid in asked {
                let stopped = tasks::wait_for_stop(tid, deadline)?;
                if stopped.is_some() && !is_open {
                    // What was opened before is the memory of the program that it has left, if it was about to call
                    // execve(2). Now nobody can without ending this one.
                    self.mem = tasks::open_mem(pid)?;
                    is_open = true;
                }
                match stopped {
                    None if tid == pid => leader_has_ended = true,
                    None => {}
                    Some(group) => {
                        self.group_stop = self.group_stop.or(group);
                        // Not before: until it stands, its filters must act. Not allowed everywhere, and
                        // needed only where there are filters.
                        let options = self.options | ptrace::O_SUSPEND_SECCOMP;
                        let _ = ptrace::set_options(tid, options);
                        let found = tasks::read_thread(&self.mem, tid)?;
                        self.threads.push(Thread::new(found));
                    }
                }
                under_way.remove(&tid);
            }
            if leader_has_ended {
                // Those that end with it are ours to wait for: until then it is no zombie for its parent.
                tasks::await_ends(&seized);
                return Err(TraceeError::Died { tid: pid });
            }
        }
        Err(TraceeError::Unfit { pid, what: "it makes threads faster than they can be stopped" })
    }

    /// Freezes a process that was just made to be filled; the same as [`Tracee::freeze`].
    pub fn adopt(pid: i32) -> Result<Tracee, TraceeError> {
        Tracee::freeze(pid)
    }

    /// Its PID; where its leader has ended, the TID of another thread ([`crate::proc::face`]).
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Its PID, whether its leader lives or not.
    pub fn process(&self) -> i32 {
        self.leader.unwrap_or(self.pid)
    }

    /// Whether its leader has ended before the other threads.
    pub fn has_lost_its_leader(&self) -> bool {
        self.leader.is_some()
    }

    /// Lets its leader, thread 0, end by exit(2) when it is let go, with this status; the others live on. Its
    /// stub is not there any more.
    pub fn lose_leader(&mut self, status: i32) -> Result<(), TraceeError> {
        let at = self.vdso_syscall(&self.maps()?)?;
        let mut regs = self.threads[0].found.regs;
        regs.set_rip(at);
        regs.set_rax(libc::SYS_exit as u64);
        regs.set_orig_rax(u64::MAX);
        regs.set_rdi(libc::WEXITSTATUS(status) as u64);
        self.set_regs(0, regs);
        self.set_sigmask(0, ALL_SIGNALS);
        self.leaves = true;
        Ok(())
    }

    /// Number of threads.
    pub fn thread_count(&self) -> usize {
        self.threads.len()
    }

    /// TID of thread `i`; the leader is 0.
    pub fn tid(&self, i: usize) -> i32 {
        self.threads[i].found.tid
    }

    /// What `maps` said when the last thread stood still, if no stub was there and none has been made since.
    pub fn maps_at_freeze(&self) -> Option<&[u8]> {
        self.maps.as_deref()
    }

    /// Index of the thread with this TID.
    pub fn index_of(&self, tid: i32) -> Option<usize> {
        self.threads.iter().position(|thread| thread.found.tid == tid)
    }

    /// The signal of the group stop it was found in.
    pub fn group_stop(&self) -> Option<u8> {
        self.group_stop
    }

    /// What thread `i` was found in.
    pub fn original(&self, i: usize) -> &ThreadState {
        &self.threads[i].found
    }

    /// Keeps system-call filters from acting on the threads while they are traced.
    pub fn suspend_filters(&self) -> Result<(), TraceeError> {
        let options = self.options | ptrace::O_SUSPEND_SECCOMP;
        for thread in &self.threads {
            let tid = thread.found.tid;
            ptrace::set_options(tid, options)
                .map_err(|e| TraceeError::kernel("suspending system-call filters", tid, e))?;
        }
        Ok(())
    }

    /// Registers for [`Tracee::thaw`] other than those found.
    pub fn amend(&mut self, i: usize, regs: Regs) {
        self.threads[i].found.regs = regs;
        self.threads[i].amended = true;
    }

    /// Registers for [`Tracee::release`].
    pub fn set_regs(&mut self, i: usize, regs: Regs) {
        self.threads[i].set_regs = Some(regs);
    }

    /// Extended state for [`Tracee::release`].
    pub fn set_xstate(&mut self, i: usize, xstate: Vec<u8>) {
        self.threads[i].set_xstate = Some(xstate);
    }

    /// Blocked signals for [`Tracee::release`].
    pub fn set_sigmask(&mut self, i: usize, mask: u64) {
        self.threads[i].set_sigmask = Some(mask);
    }

    /// Reads its memory.
    pub fn read_mem(&self, addr: u64, buf: &mut [u8]) -> Result<(), TraceeError> {
        self.mem.read_exact_at(buf, addr).map_err(|e| tasks::io_error("reading memory", self.pid, &e))
    }

    /// Its memory, for another thread to read.
    pub fn memory(&self) -> Result<Memory, TraceeError> {
        let copied = self.mem.try_clone();
        let mem = copied.map_err(|e| tasks::io_error("copying a descriptor", self.pid, &e))?;
        Ok(Memory { pid: self.pid, mem })
    }

    /// Writes its memory, read-only pages too (`FOLL_FORCE`, fs/proc/base.c).
    pub fn write_mem(&self, addr: u64, buf: &[u8]) -> Result<(), TraceeError> {
        self.mem.write_all_at(buf, addr).map_err(|e| tasks::io_error("writing memory", self.pid, &e))
    }

    /// Gives everything back as found and lets it run: the kernel restarts what was interrupted.
    pub fn thaw(mut self) -> Result<(), TraceeError> {
        self.live = false;
        self.give_all_back()
    }

    /// Whatever fails on the way, all is tried, and all are let go. The first error is told.
    fn give_all_back(&mut self) -> Result<(), TraceeError> {
        let mut result = if self.stub.is_some() { self.remove_stub() } else { Ok(()) };
        for thread in &self.threads {
            result = result.and(thread.give_back());
        }
        self.deliver_owed_stop();
        for thread in &self.threads {
            result = result.and(tasks::detach(thread.found.tid));
        }
        result
    }

    /// Does all of [`Tracee::release`] but letting go, which can hardly fail and takes next to no time then.
    pub fn settle(&mut self) -> Result<(), TraceeError> {
        self.apply_settings()?;
        self.stand_in_calls()?;
        self.settled = true;
        Ok(())
    }

    /// It is no longer killed when its tracer ends, but let go by the kernel: for one that has settled that
    /// is the same as [`Tracee::release`] (`exit_ptrace`, kernel/ptrace.c).
    pub fn outlive(&mut self) -> Result<(), TraceeError> {
        self.options &= !ptrace::O_EXITKILL;
        for thread in &self.threads {
            let tid = thread.found.tid;
            ptrace::set_options(tid, self.options)
                .map_err(|e| TraceeError::kernel("PTRACE_SETOPTIONS", tid, e))?;
        }
        Ok(())
    }

    /// Lets it run from what was set; threads for which nothing was set go on from where they are.
    pub fn release(mut self) -> Result<(), TraceeError> {
        self.live = false;
        if !self.settled {
            self.settle()?;
        }
        self.deliver_owed_stop();
        for thread in &self.threads {
            tasks::detach(thread.found.tid)?;
            if self.leaves && thread.found.tid == self.pid {
                // Nothing of it runs but its last call.
                tasks::await_zombie(self.pid);
            }
        }
        Ok(())
    }

    /// Takes those that are to go on in an interrupted call to an event stop: only from there does the
    /// kernel repeat it.
    fn stand_in_calls(&self) -> Result<(), TraceeError> {
        let in_call = |thread: &&Thread| {
            !thread.at_event_stop && thread.set_regs.is_some_and(|regs| restart::is_interrupted(&regs))
        };
        let tids: Vec<i32> = self.threads.iter().filter(in_call).map(|thread| thread.found.tid).collect();
        for &tid in &tids {
            let at = |operation| move |errno| TraceeError::kernel(operation, tid, errno);
            ptrace::interrupt(tid).map_err(at("PTRACE_INTERRUPT"))?;
            ptrace::cont(tid, 0).map_err(at("PTRACE_CONT"))?;
        }
        let deadline = Instant::now() + STOP_LIMIT;
        for tid in tids {
            if tasks::wait_for_stop(tid, deadline)?.is_none() {
                return Err(TraceeError::Died { tid });
            }
        }
        Ok(())
    }

    /// Writes what was set into the threads, which stay stopped.
    pub fn apply_settings(&mut self) -> Result<(), TraceeError> {
        for thread in &mut self.threads {
            let tid = thread.found.tid;
            if let Some(xstate) = &thread.set_xstate {
                ptrace::set_xstate(tid, xstate).map_err(|e| TraceeError::kernel("setting XSTATE", tid, e))?;
            }
            if let Some(regs) = &thread.set_regs {
                ptrace::set_regs(tid, regs).map_err(|e| TraceeError::kernel("setting registers", tid, e))?;
            }
            if let Some(mask) = thread.set_sigmask {
                ptrace::set_sigmask(tid, mask)
                    .map_err(|e| TraceeError::kernel("setting the signal mask", tid, e))?;
            }
        }
        Ok(())
    }
}

impl Thread {
    /// Its registers and mask as found.
    fn give_back(&self) -> Result<(), TraceeError> {
        let changed = tasks::Changed {
            regs: self.touched || self.amended,
            moved: !self.at_event_stop,
            mask: self.masked,
        };
        tasks::give_back(&self.found, changed)
    }

    fn new(mut found: ThreadState) -> Thread {
        let amended = restart::hide_interrupt(&mut found.regs);
        Thread {
            found,
            masked: false,
            touched: false,
            at_event_stop: true,
            amended,
            set_regs: None,
            set_xstate: None,
            set_sigmask: None,
        }
    }
}

impl Drop for Tracee {
    fn drop(&mut self) {
        if !self.live {
            return;
        }
        // An error path: nobody to tell.
        let _ = self.give_all_back();
    }
}

/// What [`recover`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recovered {
    /// No stub: nothing to do.
    Untouched,
    /// A tracer had died during a freeze; every thread has its registers back.
    Thawed,
    /// It is a parked deputy; left as it is.
    Parked,
}

/// Makes a process whole whose tracer died while it was frozen. One that is whole is not stopped: a
/// stop is seen by calls that no stop may interrupt without their caller noticing (signal(7)).
pub fn recover(pid: i32) -> Result<Recovered, TraceeError> {
    if !has_stub(pid)? {
        return Ok(Recovered::Untouched);
    }
    let mut tracee = Tracee::freeze(pid)?;
    let Some(journal) = tracee.read_journal()? else {
        tracee.thaw()?;
        return Ok(Recovered::Untouched);
    };
    if journal.phase == stub::Phase::Parked {
        tracee.leave()?;
        return Ok(Recovered::Parked);
    }
    tracee.adopt_journal(&journal);
    let put_back = aio::put_back(&mut tracee);
    tracee.thaw()?;
    put_back?;
    Ok(Recovered::Thawed)
}

/// Whether there is a stub in a process; looks from outside.
fn has_stub(pid: i32) -> Result<bool, TraceeError> {
    let pid = crate::proc::face(pid);
    // There are no threads that would be let go.
    let looking = Tracee::of(pid, tasks::open_mem(pid)?);
    Ok(looking.find_stub(&looking.maps()?).is_some())
}

impl Tracee {
    /// Detaches without changing anything.
    pub fn leave(mut self) -> Result<(), TraceeError> {
        self.live = false;
        for thread in &self.threads {
            tasks::detach(thread.found.tid)?;
        }
        Ok(())
    }

    /// Keeps the threads traced and stopped, and forgets the rest: the caller drives them from now
    /// on with [`crate::sys::ptrace`].
    pub fn into_tids(mut self) -> Vec<i32> {
        self.live = false;
        self.threads.iter().map(|thread| thread.found.tid).collect()
    }

    fn adopt_journal(&mut self, journal: &stub::Journal) {
        let found: BTreeMap<i32, (u64, Regs)> =
            journal.threads.iter().map(|&(tid, mask, regs)| (tid, (mask, regs))).collect();
        for thread in &mut self.threads {
            if let Some((mask, regs)) = found.get(&thread.found.tid) {
                thread.found.regs = *regs;
                thread.found.sigmask = *mask;
                thread.masked = true;
                thread.touched = true;
            }
        }
    }
}

/// Whether a wait status tells the end.
pub fn is_end(stop: Stop) -> bool {
    matches!(stop, Stop::Gone(_))
}
