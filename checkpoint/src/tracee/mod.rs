//! A frozen process: every thread in a ptrace stop, owned by one OS thread.
//!
//! ```mermaid
//! stateDiagram-v2
//!   [*] --> Running
//!   Running --> Frozen: freeze
//!   Frozen --> Frozen: install_stub, syscall, remove_stub
//!   Frozen --> Running: thaw (as found) or release (as set)
//!   Frozen --> Parked: deputy::park
//!   Parked --> Frozen: freeze, with the stub found again
//! ```
//!
//! A `Tracee` is not `Send`: ptrace requests are accepted only from the thread that seized. Dropping
//! one without `thaw` or `release` gives the process its registers back as well as it can.
//! Never `PTRACE_O_EXITKILL`: our death must not be the user's.

mod error;
mod inject;
pub mod restart;
pub mod stub;
mod tasks;

pub use error::TraceeError;
pub use restart::arrange_restart;

use crate::image::RseqImage;
use crate::sys::ptrace::{self, Regs, Stop};
use std::fs::File;
use std::marker::PhantomData;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

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
    /// Extended state.
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
    set_regs: Option<Regs>,
    set_xstate: Option<Vec<u8>>,
    set_sigmask: Option<u64>,
}

/// A process with every thread in a ptrace stop.
pub struct Tracee {
    pid: i32,
    threads: Vec<Thread>,
    group_stop: Option<u8>,
    stub: Option<Stub>,
    /// A SIGSTOP came while system calls were injected: it cannot be blocked, so it is owed.
    stop_owed: bool,
    mem: File,
    live: bool,
    not_send: PhantomData<*const ()>,
}

#[derive(Debug, Clone, Copy)]
struct Stub {
    at: u64,
    len: u64,
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
        tasks::refuse_foreign_tracer(pid)?;
        let mem = tasks::open_mem(pid)?;
        let mut tracee = Tracee {
            pid,
            threads: Vec::new(),
            group_stop: None,
            stub: None,
            stop_owed: false,
            mem,
            live: true,
            not_send: PhantomData,
        };
        let mut seized: Vec<i32> = Vec::new();
        for _ in 0..FREEZE_ROUNDS {
            let fresh: Vec<i32> = tasks::list(pid)?.into_iter().filter(|tid| !seized.contains(tid)).collect();
            if fresh.is_empty() {
                tracee.threads.sort_by_key(|thread| (thread.found.tid != pid, thread.found.tid));
                tracee.stub = tracee.find_stub();
                return Ok(tracee);
            }
            let deadline = Instant::now() + STOP_LIMIT;
            let mut asked = Vec::with_capacity(fresh.len());
            for tid in fresh {
                match ptrace::seize(tid, ptrace::O_TRACESYSGOOD) {
                    Ok(()) => {}
                    Err(nix::errno::Errno::ESRCH) => continue,
                    Err(errno) => return Err(TraceeError::kernel("PTRACE_SEIZE", tid, errno)),
                }
                ptrace::interrupt(tid).map_err(|e| TraceeError::kernel("PTRACE_INTERRUPT", tid, e))?;
                interrupted(tid);
                seized.push(tid);
                asked.push(tid);
            }
            if seized.len() > MAX_THREADS {
                return Err(TraceeError::Unfit { pid, what: "it has too many threads" });
            }
            for tid in asked {
                match tasks::wait_for_stop(tid, deadline)? {
                    None if tid == pid => return Err(TraceeError::Died { tid }),
                    None => {}
                    Some(group) => {
                        tracee.group_stop = tracee.group_stop.or(group);
                        let found = tasks::read_thread(&tracee.mem, tid)?;
                        tracee.threads.push(Thread::new(found));
                    }
                }
            }
        }
        Err(TraceeError::Unfit { pid, what: "it makes threads faster than they can be stopped" })
    }

    /// Freezes a process that was just made to be filled; the same as [`Tracee::freeze`].
    pub fn adopt(pid: i32) -> Result<Tracee, TraceeError> {
        Tracee::freeze(pid)
    }

    /// Its PID.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Number of threads.
    pub fn thread_count(&self) -> usize {
        self.threads.len()
    }

    /// TID of thread `i`; the leader is 0.
    pub fn tid(&self, i: usize) -> i32 {
        self.threads[i].found.tid
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

    /// Writes its memory, read-only pages too (`FOLL_FORCE`, fs/proc/base.c).
    pub fn write_mem(&self, addr: u64, buf: &[u8]) -> Result<(), TraceeError> {
        self.mem.write_all_at(buf, addr).map_err(|e| tasks::io_error("writing memory", self.pid, &e))
    }

    /// Gives everything back as found and lets it run: the kernel restarts what was interrupted.
    pub fn thaw(mut self) -> Result<(), TraceeError> {
        self.live = false;
        if self.stub.is_some() {
            self.remove_stub()?;
        }
        for thread in &self.threads {
            tasks::give_back(&thread.found, thread.masked, thread.touched)?;
        }
        self.deliver_owed_stop();
        for thread in &self.threads {
            tasks::detach(thread.found.tid)?;
        }
        Ok(())
    }

    /// Lets it run from what was set; threads for which nothing was set go on from where they are.
    pub fn release(mut self) -> Result<(), TraceeError> {
        self.live = false;
        self.apply_settings()?;
        self.deliver_owed_stop();
        for thread in &self.threads {
            tasks::detach(thread.found.tid)?;
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
    fn new(found: ThreadState) -> Thread {
        Thread { found, masked: false, touched: false, set_regs: None, set_xstate: None, set_sigmask: None }
    }
}

impl Drop for Tracee {
    fn drop(&mut self) {
        if !self.live {
            return;
        }
        // An error path: best effort, and nobody to tell.
        if self.stub.is_some() {
            let _ = self.remove_stub();
        }
        for thread in &self.threads {
            let _ = tasks::give_back(&thread.found, thread.masked, thread.touched);
        }
        self.deliver_owed_stop();
        for thread in &self.threads {
            let _ = tasks::detach(thread.found.tid);
        }
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
    tracee.thaw()?;
    Ok(Recovered::Thawed)
}

/// Whether there is a stub in a process; looks from outside.
fn has_stub(pid: i32) -> Result<bool, TraceeError> {
    let looking = Tracee {
        pid,
        threads: Vec::new(),
        group_stop: None,
        stub: None,
        stop_owed: false,
        mem: tasks::open_mem(pid)?,
        live: false,
        not_send: PhantomData,
    };
    Ok(looking.find_stub().is_some())
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
        for (tid, mask, regs) in &journal.threads {
            if let Some(thread) = self.threads.iter_mut().find(|thread| thread.found.tid == *tid) {
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
