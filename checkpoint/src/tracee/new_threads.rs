//! Threads made from inside a process that is being rebuilt.
//!
//! A new thread makes the calls that only it can make for itself before it is stopped for the first time: while
//! the maker makes the next one, and without a stop of its own for them, which would cost more than they do.
//!
//! ```mermaid
//! sequenceDiagram
//!   participant T as tracer
//!   participant M as maker, in the stub
//!   participant N as new threads, in the stub
//!   T->>M: clone records, and those of the new threads; PTRACE_CONT
//!   M->>N: clone3, clone3 …
//!   N->>N: call, result, next call …, "done", pause() for ever
//!   T->>M: event stop
//!   T->>N: PTRACE_SEIZE
//!   T-->>N: looks for "done"
//!   T->>N: PTRACE_INTERRUPT; their stops are waited for in the next round
//! ```
//!
//! Tried: `CLONE_PTRACE` and `PTRACE_O_TRACECLONE` seize a new thread by themselves, but stop it before its first
//! instruction: then there is a stop more.

use super::batch::{Round, Slice, Started};
use super::{Call, MAX_THREADS, Stub, Thread, ThreadState, Tracee, TraceeError, stub, tasks};
use crate::sys::ptrace::{self, Regs};
use std::collections::BTreeSet;
use std::time::Instant;

const CLONE_FLAGS: u64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM) as u64;

/// Length of `struct clone_args` (`CLONE_ARGS_SIZE_VER2`, linux/sched.h).
const CLONE_ARGS_LEN: u64 = 88;
/// Offset of its `set_tid`.
const SET_TID_AT: usize = 64;

/// A thread to be made.
#[derive(Debug, Clone)]
pub struct NewThread {
    /// Its TID in the process' namespace.
    pub tid: i32,
    /// What the kernel clears and wakes when it ends (set_tid_address(2)); 0: nothing.
    pub clear_child_tid: u64,
    /// What it calls for itself, before it is stopped.
    pub calls: Vec<Call>,
}

impl NewThread {
    /// The records it needs, and the bytes for what they point to.
    fn room(&self) -> (usize, usize) {
        let own: usize = self.calls.iter().map(Call::pointed_len).sum();
        (1 + self.calls.len(), own + CLONE_ARGS_LEN as usize + size_of::<u64>())
    }

    /// Its making: `records` are its own, `done` the word that tells that it is through.
    fn clone_call(&self, records: u64, done: u64) -> Call {
        let count = self.calls.len() as u64;
        Call::must("making a thread", libc::SYS_clone3, [0, CLONE_ARGS_LEN, records, count, done, 0])
            .input(0, &clone_args(self.clear_child_tid, 1))
            .within(SET_TID_AT, &self.tid.to_le_bytes())
            .makes_thread()
    }
}

impl Tracee {
    /// Makes a thread more, standing in the stub's hold loop; with `set_tid` under that TID
    /// (clone3(2), needs CAP_CHECKPOINT_RESTORE inside), else under whatever TID comes, which the
    /// caller compares with [`Tracee::tid`]. Gives its index (always the last).
    pub fn add_thread(&mut self, tid: i32, set_tid: bool) -> Result<usize, TraceeError> {
        if self.threads.len() >= MAX_THREADS {
            return Err(TraceeError::Unfit { pid: self.pid, what: "it has too many threads" });
        }
        let leader = self.tid(0);
        let scratch = self.scratch();
        let mut arguments = clone_args(0, u64::from(set_tid));
        if set_tid {
            arguments[SET_TID_AT..SET_TID_AT + 8].copy_from_slice(&(scratch + 128).to_le_bytes());
        }
        self.write_mem(scratch, &arguments)?;
        self.write_mem(scratch + 128, &tid.to_le_bytes())?;
        let options = self.options | ptrace::O_TRACECLONE;
        let at = |operation| move |errno| TraceeError::kernel(operation, leader, errno);
        ptrace::set_options(leader, options).map_err(at("PTRACE_SETOPTIONS"))?;
        let got = self.must(0, "making a thread", libc::SYS_clone3, [scratch, CLONE_ARGS_LEN, 0, 0, 0, 0]);
        ptrace::set_options(leader, self.options).map_err(at("PTRACE_SETOPTIONS"))?;
        // The kernel answers with the TID in *its* namespace; the tracer's view comes by the event.
        got?;
        let new = self.newest_tid()?;
        match tasks::wait_for_stop(new, Instant::now() + super::STOP_LIMIT)? {
            None => return Err(TraceeError::Died { tid: new }),
            Some(_) => {
                // It inherited the option.
                ptrace::set_options(new, self.options)
                    .map_err(|e| TraceeError::kernel("PTRACE_SETOPTIONS", new, e))?;
            }
        }
        self.push_made(tasks::read_made(new)?);
        Ok(self.threads.len() - 1)
    }

    /// Makes threads under their TIDs (`set_tid` of clone3(2)), which make their calls and stand in the stub's
    /// hold loop then. The new ones come in any order. Thread `maker` makes them: what it has of its own, they
    /// share (clone(2)). After an error those that were made are there.
    pub fn add_threads(&mut self, maker: usize, new: &[NewThread]) -> Result<(), TraceeError> {
        if new.is_empty() {
            return Ok(());
        }
        if self.threads.len() + new.len() > MAX_THREADS {
            return Err(TraceeError::Unfit { pid: self.pid, what: "it has too many threads" });
        }
        new.iter().flat_map(|thread| &thread.calls).try_for_each(|call| self.refuse_unfit(call))?;
        if new.chunks(1).any(|alone| fitting(alone) == 0) {
            return Err(TraceeError::Unfit { pid: self.pid, what: "a thread has too many calls to make" });
        }
        let one_namespace = self.is_in_our_pid_namespace();
        let (mut rest, mut last, mut made) = (new, None, Ok(()));
        while made.is_ok() && !rest.is_empty() {
            let (some, others) = rest.split_at(fitting(rest));
            made = self.make_some(maker, some, one_namespace, &mut last);
            rest = others;
        }
        made.and(last.map_or(Ok(()), |mut last| self.stand(&mut last)))
    }

    /// Makes as many as one round has room for. `last`: those of the round before, which have been asked to stop.
    fn make_some(
        &mut self,
        maker: usize,
        new: &[NewThread],
        one_namespace: bool,
        last: &mut Option<Started>,
    ) -> Result<(), TraceeError> {
        let stub = self.stub.ok_or(TraceeError::Unfit { pid: self.pid, what: "there is no stub in it" })?;
        let (round, clones) = lay_out(new, stub);
        self.write_round(&round)?;
        self.start(maker, stub.at, 0, &round.slices[0])?;
        let mut started = Started { round, going: vec![(0, maker)], result: Ok(()), stops: 0 };
        let stand = last.take().map_or(Ok(()), |mut last| self.stand(&mut last));
        self.await_done(&mut started);
        self.interrupt_all(&mut started);
        self.halt_all(&mut started);
        let made = self.results(&started.round, new.len());
        let here = made
            .and_then(|made| self.seize_made(stub, made.into_iter().filter(|&tid| tid > 0), one_namespace));
        match here {
            Ok(here) => started.going = (1..).zip(here).collect(),
            Err(error) => return started.result.and(Err(error)),
        }
        self.await_done(&mut started);
        self.interrupt_all(&mut started);
        let failed = std::mem::replace(&mut started.result, Ok(()));
        let told = failed.and(stand).and_then(|()| self.tell_failures(&started, maker, &clones, new));
        if let Err(error) = told {
            let _ = self.stand(&mut started);
            return Err(error);
        }
        *last = Some(started);
        Ok(())
    }

    /// Waits until those stand that were asked to.
    fn stand(&mut self, asked: &mut Started) -> Result<(), TraceeError> {
        self.halt_all(asked);
        std::mem::replace(&mut asked.result, Ok(()))
    }

    /// The error of the first call that has failed. Where TIDs are another namespace's it may name another of the
    /// new threads: which of them has which slot they do not tell.
    fn tell_failures(
        &self,
        started: &Started,
        maker: usize,
        clones: &[Call],
        new: &[NewThread],
    ) -> Result<(), TraceeError> {
        let mut jobs: Vec<(usize, &[Call])> = vec![(maker, clones)];
        let indices = started.going.iter().map(|&(_, thread)| thread).chain(std::iter::repeat(maker));
        jobs.extend(indices.zip(new.iter().map(|thread| thread.calls.as_slice())));
        let mut replies = vec![Vec::new(); jobs.len()];
        self.collect(&started.round, &jobs, &mut replies)?;
        self.all_have_succeeded(&jobs, &replies)
    }

    /// Seizes the threads that have been made, under these TIDs of the process' namespace; gives their indices.
    fn seize_made(
        &mut self,
        stub: Stub,
        made: impl Iterator<Item = i64>,
        one_namespace: bool,
    ) -> Result<std::ops::Range<usize>, TraceeError> {
        let first = self.threads.len();
        let new: Vec<i32> =
            if one_namespace { made.map(|tid| tid as i32).collect() } else { self.unknown()? };
        let regs = self.holding_registers(stub);
        for tid in new {
            ptrace::seize(tid, self.options).map_err(|e| TraceeError::kernel("PTRACE_SEIZE", tid, e))?;
            self.push_made(tasks::made(tid, regs));
        }
        Ok(first..self.threads.len())
    }

    /// Threads that are not known yet, by the TIDs that the tracer knows them under.
    fn unknown(&self) -> Result<Vec<i32>, TraceeError> {
        let known: BTreeSet<i32> = self.threads.iter().map(|thread| thread.found.tid).collect();
        Ok(tasks::list(self.pid)?.into_iter().filter(|tid| !known.contains(tid)).collect())
    }

    /// Those of a thread that was made by one in the stub.
    fn holding_registers(&self, stub: Stub) -> Regs {
        let mut regs = self.threads[0].found.regs;
        regs.set_rip(stub.at + stub::CODE_HOLD);
        // In no call that the kernel would restart.
        regs.set_orig_rax(u64::MAX);
        regs
    }

    /// A thread that was made by injection.
    fn push_made(&mut self, found: ThreadState) {
        let mut thread = Thread::new(found);
        thread.masked = true;
        thread.touched = true;
        self.threads.push(thread);
    }

    /// Whether the TIDs that it knows are those that the tracer knows.
    fn is_in_our_pid_namespace(&self) -> bool {
        let namespace = |whose: &str| std::fs::read_link(format!("/proc/{whose}/ns/pid"));
        matches!((namespace("self"), namespace(&self.pid.to_string())), (Ok(ours), Ok(theirs)) if ours == theirs)
    }

    fn newest_tid(&self) -> Result<i32, TraceeError> {
        let known = |tid: &i32| self.threads.iter().any(|thread| thread.found.tid == *tid);
        tasks::list(self.pid)?
            .into_iter()
            .find(|tid| !known(tid))
            .ok_or(TraceeError::Unfit { pid: self.pid, what: "the thread just made is not there" })
    }
}

/// How many of them one round has room for.
fn fitting(new: &[NewThread]) -> usize {
    let (mut records, mut arguments) = (stub::MAX_RECORDS, stub::ARGUMENTS_LEN);
    let mut take = |thread: &&NewThread| {
        let (own_records, own_arguments) = thread.room();
        let fits = own_records <= records && own_arguments <= arguments;
        (records, arguments) = (records.saturating_sub(own_records), arguments.saturating_sub(own_arguments));
        fits
    };
    // The maker has a slot too.
    new.iter().take(stub::MAX_JOBS - 1).take_while(|thread| take(thread)).count()
}

/// The maker's calls, and behind them those of the new threads.
fn lay_out(new: &[NewThread], stub: Stub) -> (Round, Vec<Call>) {
    let mut round = Round::new(stub);
    let mut clones = Vec::with_capacity(new.len());
    round.slices.push(Slice { job: 0, first: 0, record: 0, count: new.len() });
    let mut record = new.len();
    for (slot, thread) in (1..).zip(new) {
        let records = stub.at + stub::RECORDS + (record * stub::RECORD_LEN) as u64;
        clones.push(thread.clone_call(records, stub.at + stub::BATCH + slot as u64 * 8));
        let count = thread.calls.len();
        round.slices.push(Slice { job: slot, first: 0, record, count });
        if count == 0 {
            round.set_done(slot);
        }
        record += count;
    }
    clones.iter().chain(new.iter().flat_map(|thread| &thread.calls)).for_each(|call| round.push(call));
    (round, clones)
}

/// `struct clone_args` of a thread; its `set_tid` is still to be filled in.
fn clone_args(clear_child_tid: u64, set_tid_size: u64) -> [u8; CLONE_ARGS_LEN as usize] {
    // flags pidfd child_tid parent_tid exit_signal stack stack_size tls set_tid set_tid_size cgroup
    let mut bytes = [0; CLONE_ARGS_LEN as usize];
    let clear = if clear_child_tid == 0 { 0 } else { libc::CLONE_CHILD_CLEARTID as u64 };
    bytes[..8].copy_from_slice(&(CLONE_FLAGS | clear).to_le_bytes());
    bytes[16..24].copy_from_slice(&clear_child_tid.to_le_bytes());
    bytes[SET_TID_AT + 8..SET_TID_AT + 16].copy_from_slice(&set_tid_size.to_le_bytes());
    bytes
}
