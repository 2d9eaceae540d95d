//! Many system calls in one round.
//!
//! An injected call by itself costs two ptrace stops, 30 µs and more. A batch is an array of calls in
//! the stub's pages that a loop in the stub runs through (`stub::CODE_BATCH`): the thread is let go
//! once, and stopped once when it says that it is through. That costs about what one injected call
//! does, and several threads can be at it at the same time.
//!
//! ```mermaid
//! sequenceDiagram
//!   participant T as tracer
//!   participant S as thread, in the stub
//!   T->>S: calls and what they point to, written to its memory
//!   T->>S: registers, PTRACE_CONT
//!   S->>S: call, result, next call …, "done", pause() for ever
//!   T-->>S: looks for "done"
//!   T->>S: PTRACE_INTERRUPT, event stop
//!   S->>T: results and answers, read from its memory
//! ```
//!
//! The tracer looks instead of waiting for a stop, because there is no stop that a thread could make
//! by itself and that would be harmless when the tracer has died meanwhile: a trap changes the action
//! of SIGTRAP when that is blocked or ignored (`force_sig_info_to_task`, kernel/signal.c), and without a
//! tracer it kills. As it is, a thread whose tracer has died ends in the hold loop, where
//! [`recover`](super::recover) finds it.

use super::naps::Naps;
use super::stub::{self, NOT_RUN, RECORD_LEN};
use super::{Stub, Tracee, TraceeError, tasks};
use crate::sys::ptrace::{self, Stop};
use nix::errno::Errno;
use std::time::{Duration, Instant};

/// Stops the threads of a round may make on their way before something is wrong with them.
const MAX_STOPS: u32 = 2000;
/// How long one single call may take (locking or unmapping hundreds of GiB takes a while).
const CALL_LIMIT: Duration = Duration::from_secs(300);

/// One system call of a batch.
#[derive(Debug, Clone)]
pub struct Call {
    operation: &'static str,
    nr: libc::c_long,
    args: [u64; 6],
    flags: u32,
    pointed: Vec<Pointed>,
    /// A string cannot have a NUL inside.
    unfit: bool,
}

/// Bytes that a call points to.
#[derive(Debug, Clone)]
struct Pointed {
    from: From,
    bytes: Vec<u8>,
    answer: bool,
}

/// What points to them.
#[derive(Debug, Clone, Copy)]
enum From {
    Argument(usize),
    /// Eight bytes at this offset of what was given before as this number.
    Within(usize, usize),
}

impl Call {
    /// A call that must succeed: if it fails, the batch stops there. `operation` is named by the error.
    pub fn must(operation: &'static str, nr: libc::c_long, args: [u64; 6]) -> Call {
        Call { operation, nr, args, flags: stub::RECORD_MUST, pointed: Vec::new(), unfit: false }
    }

    /// A call that may fail: the batch goes on.
    pub fn may(operation: &'static str, nr: libc::c_long, args: [u64; 6]) -> Call {
        Call { flags: 0, ..Call::must(operation, nr, args) }
    }

    /// Argument `arg` (from 0) points to these bytes.
    pub fn input(mut self, arg: usize, bytes: &[u8]) -> Call {
        assert!(arg < 6, "a system call has six arguments");
        self.pointed.push(Pointed { from: From::Argument(arg), bytes: bytes.to_vec(), answer: false });
        self
    }

    /// Argument `arg` points to this text, ended by a NUL. One that has a NUL inside is an error when
    /// the batch is run, before anything of it is.
    pub fn string(mut self, arg: usize, text: &[u8]) -> Call {
        self.unfit |= text.contains(&0);
        let mut bytes = text.to_vec();
        bytes.push(0);
        self.input(arg, &bytes)
    }

    /// Argument `arg` points to `len` zeros, which come back as an answer of the [`Reply`].
    pub fn output(self, arg: usize, len: usize) -> Call {
        self.in_out(arg, &vec![0; len])
    }

    /// Argument `arg` points to these bytes, which come back, changed or not, as an answer.
    pub fn in_out(mut self, arg: usize, bytes: &[u8]) -> Call {
        self = self.input(arg, bytes);
        self.pointed.last_mut().expect("just pushed").answer = true;
        self
    }

    /// The eight bytes at `offset` of what was given last point to these bytes (structures with
    /// pointers in them). What follows still counts as pointed to by the same structure.
    pub fn within(mut self, offset: usize, bytes: &[u8]) -> Call {
        let parent = self.pointed.iter().rposition(|p| matches!(p.from, From::Argument(_)));
        let parent = parent.expect("there is a structure to point from");
        assert!(offset + 8 <= self.pointed[parent].bytes.len(), "the pointer is inside the structure");
        let from = From::Within(parent, offset);
        self.pointed.push(Pointed { from, bytes: bytes.to_vec(), answer: false });
        self
    }

    /// It makes a thread, which goes into the hold loop, or runs records of its own first
    /// (`stub::RECORD_CLONES`).
    pub fn makes_thread(mut self) -> Call {
        self.flags |= stub::RECORD_CLONES;
        self
    }

    /// What it is for.
    pub fn operation(&self) -> &'static str {
        self.operation
    }

    /// Whether the batch stops if it fails.
    pub fn is_must(&self) -> bool {
        self.flags & stub::RECORD_MUST != 0
    }

    /// Bytes it needs in the argument area.
    pub(super) fn pointed_len(&self) -> usize {
        self.pointed.iter().map(|pointed| pointed.bytes.len().next_multiple_of(8)).sum()
    }
}

/// What came of one call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// The kernel's raw result: a negative errno on failure.
    pub value: i64,
    answers: Vec<Vec<u8>>,
}

impl Reply {
    /// Why it failed, if it did.
    pub fn errno(&self) -> Option<Errno> {
        (-4095..0).contains(&self.value).then(|| Errno::from_raw(-self.value as i32))
    }

    /// What the call wrote to its `n`th output (from 0), as long as that was.
    pub fn answer(&self, n: usize) -> &[u8] {
        &self.answers[n]
    }
}

/// Calls of one job that one round runs.
pub(super) struct Slice {
    pub job: usize,
    pub first: usize,
    /// Its first record's number.
    pub record: usize,
    pub count: usize,
}

/// What one round writes into the stub.
pub(super) struct Round {
    stub: Stub,
    pub slices: Vec<Slice>,
    records: Vec<u8>,
    arguments: Vec<u8>,
    has_answers: bool,
}

/// How far the jobs of a process have come.
struct Progress {
    job: usize,
    call: usize,
    replies: Vec<Vec<Reply>>,
}

impl Progress {
    fn new(jobs: &[(usize, &[Call])]) -> Progress {
        let replies = jobs.iter().map(|(_, calls)| Vec::with_capacity(calls.len())).collect();
        Progress { job: 0, call: 0, replies }
    }
}

/// A round under way.
pub(super) struct Started {
    pub round: Round,
    /// Slots and threads that run.
    pub going: Vec<(usize, usize)>,
    pub result: Result<(), TraceeError>,
    /// Stops that they have made on their way.
    pub stops: u32,
}

/// The jobs of one process: threads, and what each is to call.
pub type Jobs<'a> = Vec<(usize, &'a [Call])>;

/// Runs the jobs of several processes at the same time: while one is looked after, the others run on other
/// CPUs. The replies are in the order of the processes, and of their jobs. A call that must succeed and
/// fails is an error that names it.
pub fn must_each_of(asked: &mut [(&mut Tracee, Jobs<'_>)]) -> Result<Vec<Vec<Vec<Reply>>>, TraceeError> {
    let mut progress: Vec<Progress> = asked.iter().map(|(_, jobs)| Progress::new(jobs)).collect();
    let mut result = Ok(());
    loop {
        let mut rounds: Vec<(usize, Started)> = Vec::with_capacity(asked.len());
        for (who, (tracee, jobs)) in asked.iter_mut().enumerate() {
            match tracee.begin_round(jobs, &mut progress[who]) {
                Ok(started) => rounds.extend(started.map(|started| (who, started))),
                Err(error) => result = result.and(Err(error)),
            }
            if result.is_err() {
                break;
            }
        }
        if rounds.is_empty() {
            break;
        }
        // Those that were started must be stopped again, whatever has become of the others.
        for (who, started) in &mut rounds {
            asked[*who].0.await_done(started);
        }
        for (who, started) in &mut rounds {
            asked[*who].0.interrupt_all(started);
        }
        for (who, started) in rounds {
            let (tracee, jobs) = &mut asked[who];
            result = result.and(tracee.take_replies(started, jobs, &mut progress[who]));
        }
        if result.is_err() {
            break;
        }
    }
    result?;
    for ((tracee, jobs), progress) in asked.iter().zip(&progress) {
        tracee.all_have_succeeded(jobs, &progress.replies)?;
    }
    Ok(progress.into_iter().map(|one| one.replies).collect())
}

impl Tracee {
    /// Runs the calls in thread `i`, in order. Gives a reply for each that was run: fewer than there
    /// are calls only if one that must succeed failed, which is the last reply then.
    pub fn batch(&mut self, i: usize, calls: &[Call]) -> Result<Vec<Reply>, TraceeError> {
        let mut replies = self.batch_each(&[(i, calls)])?;
        Ok(replies.pop().unwrap_or_default())
    }

    /// Like [`Tracee::batch`], but a call that must succeed and fails is an error that names it.
    pub fn must_all(&mut self, i: usize, calls: &[Call]) -> Result<Vec<Reply>, TraceeError> {
        let mut replies = self.must_each(&[(i, calls)])?;
        Ok(replies.pop().unwrap_or_default())
    }

    /// Runs calls in several threads at the same time: the order holds within a thread only. The
    /// replies are in the order of `jobs`.
    pub fn batch_each(&mut self, jobs: &[(usize, &[Call])]) -> Result<Vec<Vec<Reply>>, TraceeError> {
        let mut progress = Progress::new(jobs);
        while let Some(started) = self.begin_round(jobs, &mut progress)? {
            self.end_round(started, jobs, &mut progress)?;
        }
        Ok(progress.replies)
    }

    /// Starts as many calls as fit. `None`: there are none left. An error in between is told by
    /// [`Tracee::end_round`].
    fn begin_round(
        &mut self,
        jobs: &[(usize, &[Call])],
        progress: &mut Progress,
    ) -> Result<Option<Started>, TraceeError> {
        let stub = self.stub.ok_or(TraceeError::Unfit { pid: self.pid, what: "there is no stub in it" })?;
        while progress.job < jobs.len() {
            let round = self.lay_out(stub, jobs, progress)?;
            if !round.slices.is_empty() {
                return self.start_all(round, jobs).map(Some);
            }
        }
        Ok(None)
    }

    /// Waits for what was started, and takes the replies.
    fn end_round(
        &mut self,
        mut started: Started,
        jobs: &[(usize, &[Call])],
        progress: &mut Progress,
    ) -> Result<(), TraceeError> {
        self.await_done(&mut started);
        self.interrupt_all(&mut started);
        self.take_replies(started, jobs, progress)
    }

    fn take_replies(
        &mut self,
        mut started: Started,
        jobs: &[(usize, &[Call])],
        progress: &mut Progress,
    ) -> Result<(), TraceeError> {
        self.halt_all(&mut started);
        started.result.map_err(|error| match error {
            TraceeError::Runaway { tid, stops, .. } => {
                let nr = self.first_not_run(&started.round, jobs).unwrap_or(-1);
                TraceeError::Runaway { tid, nr, stops }
            }
            other => other,
        })?;
        if self.collect(&started.round, jobs, &mut progress.replies)? {
            // The job that is not through has failed: its other calls are not run.
            (progress.job, progress.call) = (progress.job + 1, 0);
        }
        Ok(())
    }

    /// Like [`Tracee::batch_each`], but a call that must succeed and fails is an error that names it.
    pub fn must_each(&mut self, jobs: &[(usize, &[Call])]) -> Result<Vec<Vec<Reply>>, TraceeError> {
        let replies = self.batch_each(jobs)?;
        self.all_have_succeeded(jobs, &replies)?;
        Ok(replies)
    }

    pub(super) fn all_have_succeeded(
        &self,
        jobs: &[(usize, &[Call])],
        replies: &[Vec<Reply>],
    ) -> Result<(), TraceeError> {
        for ((i, calls), replies) in jobs.iter().zip(replies) {
            let failed =
                calls.iter().zip(replies).find(|(call, reply)| call.is_must() && reply.errno().is_some());
            if let Some((call, reply)) = failed
                && let Some(errno) = reply.errno()
            {
                return Err(TraceeError::Inside { operation: call.operation, tid: self.tid(*i), errno });
            }
        }
        Ok(())
    }

    /// Takes as many calls as fit, from where the progress is, which is moved forward.
    fn lay_out(
        &self,
        stub: Stub,
        jobs: &[(usize, &[Call])],
        progress: &mut Progress,
    ) -> Result<Round, TraceeError> {
        let Progress { job, call, .. } = progress;
        let mut round = Round::new(stub);
        let mut room = stub::MAX_RECORDS;
        while *job < jobs.len() && round.slices.len() < stub::MAX_JOBS {
            let (thread, calls) = jobs[*job];
            if round.slices.iter().any(|slice| jobs[slice.job].0 == thread) {
                break;
            }
            let first = *call;
            let record = stub::MAX_RECORDS - room;
            while let Some(next) = calls.get(*call) {
                self.refuse_unfit(next)?;
                if room == 0 || round.arguments.len() + next.pointed_len() > stub::ARGUMENTS_LEN {
                    break;
                }
                round.push(next);
                room -= 1;
                *call += 1;
            }
            if *call > first {
                round.slices.push(Slice { job: *job, first, record, count: *call - first });
            }
            if *call < calls.len() {
                break;
            }
            (*job, *call) = (*job + 1, 0);
        }
        Ok(round)
    }

    /// What cannot be written down as a record.
    pub(super) fn refuse_unfit(&self, call: &Call) -> Result<(), TraceeError> {
        let unfit = |what| Err(TraceeError::Unfit { pid: self.pid, what });
        if call.unfit {
            return unfit("a text to be given to it has a NUL byte inside");
        }
        if call.pointed_len() > stub::ARGUMENTS_LEN {
            return unfit("the arguments of a system call are too long");
        }
        Ok(())
    }

    pub(super) fn write_round(&self, round: &Round) -> Result<(), TraceeError> {
        let at = round.stub.at;
        self.write_mem(at + stub::BATCH, &round.records)?;
        if !round.arguments.is_empty() {
            self.write_mem(at + stub::ARGUMENTS, &round.arguments)?;
        }
        Ok(())
    }

    /// Lets every thread of the round run through its calls.
    fn start_all(&mut self, round: Round, jobs: &[(usize, &[Call])]) -> Result<Started, TraceeError> {
        let at = round.stub.at;
        self.write_round(&round)?;
        let mut going = Vec::with_capacity(round.slices.len());
        let mut result = Ok(());
        for (slot, slice) in round.slices.iter().enumerate() {
            let thread = jobs[slice.job].0;
            result = self.start(thread, at, slot, slice);
            if result.is_err() {
                break;
            }
            going.push((slot, thread));
        }
        Ok(Started { round, going, result, stops: 0 })
    }

    pub(super) fn start(&mut self, i: usize, at: u64, slot: usize, slice: &Slice) -> Result<(), TraceeError> {
        let mut regs = self.injection_regs(i)?;
        regs.set_rip(at + stub::CODE_BATCH);
        regs.set_rbx(at + stub::RECORDS + slice.record as u64 * RECORD_LEN as u64);
        regs.set_r12(slice.count as u64);
        regs.set_r13(at + stub::BATCH + slot as u64 * 8);
        let tid = self.tid(i);
        ptrace::set_regs(tid, &regs).map_err(|e| TraceeError::kernel("setting registers", tid, e))?;
        ptrace::cont(tid, 0).map_err(|e| TraceeError::kernel("PTRACE_CONT", tid, e))
    }

    /// Waits until all are through, or one fails.
    pub(super) fn await_done(&mut self, started: &mut Started) {
        if started.result.is_ok() {
            started.result = self.until_done(&started.round, &started.going, &mut started.stops);
        }
    }

    fn until_done(
        &mut self,
        round: &Round,
        going: &[(usize, usize)],
        stops: &mut u32,
    ) -> Result<(), TraceeError> {
        let mut done = vec![0; round.slices.len() * 8];
        let mut naps = Naps::default();
        let mut deadline = Instant::now() + CALL_LIMIT;
        let mut run_by_then = 0;
        loop {
            if let Err(error) = self.read_mem(round.stub.at + stub::BATCH, &mut done) {
                // Its memory goes before its end is told.
                return Err(if self.has_no_memory() { TraceeError::Died { tid: self.pid } } else { error });
            }
            let Some(&(_, first)) = going.iter().find(|(slot, _)| done[slot * 8] == 0) else { return Ok(()) };
            // A stop on the way is the exception: each thread is asked for it when its calls take longer, and
            // those too that are through, as new threads do not tell which slot is whose.
            for &(_, thread) in going.iter().take_while(|_| !naps.is_eager()) {
                let tid = self.tid(thread);
                if let Some(stop) =
                    ptrace::wait(tid, false).map_err(|e| TraceeError::kernel("waitpid", tid, e))?
                {
                    self.pass(thread, stop, stops)?;
                }
            }
            naps.nap();
            if Instant::now() > deadline {
                let run = self.count_run(round)?;
                if run == run_by_then {
                    return Err(TraceeError::Runaway { tid: self.tid(first), nr: -1, stops: *stops });
                }
                (run_by_then, deadline) = (run, Instant::now() + CALL_LIMIT);
            }
        }
    }

    /// Asks all that were started to stop.
    pub(super) fn interrupt_all(&mut self, started: &mut Started) {
        for &(_, thread) in &started.going {
            let tid = self.tid(thread);
            let asked = ptrace::interrupt(tid).map_err(|e| TraceeError::kernel("PTRACE_INTERRUPT", tid, e));
            if started.result.is_ok() {
                started.result = asked;
            }
        }
    }

    /// Waits until those have stopped that were asked to, after an error too: whoever gives them their
    /// registers back needs them stopped.
    pub(super) fn halt_all(&mut self, started: &mut Started) {
        for &(_, thread) in &started.going {
            match &started.result {
                Ok(()) => started.result = self.halt(thread, &mut started.stops),
                Err(_) => {
                    let _ = tasks::wait_for_stop(self.tid(thread), Instant::now() + super::STOP_LIMIT);
                }
            }
        }
    }

    /// `VmSize` is told of processes only that have memory (fs/proc/array.c).
    fn has_no_memory(&self) -> bool {
        crate::proc::status::Status::read(self.pid).map_or(true, |status| status.line("VmSize").is_none())
    }

    /// Takes a thread that was interrupted to its event stop.
    fn halt(&mut self, i: usize, stops: &mut u32) -> Result<(), TraceeError> {
        let tid = self.tid(i);
        loop {
            match self.next_stop(tid)? {
                Stop::Event | Stop::Group(_) => {
                    self.threads[i].at_event_stop = true;
                    return Ok(());
                }
                stop => self.pass(i, stop, stops)?,
            }
        }
    }

    /// Waits for the next stop of a thread that was interrupted, or its end.
    fn next_stop(&self, tid: i32) -> Result<Stop, TraceeError> {
        /// Looks between two questions whether it has ended.
        const LOOK_EVERY: u32 = 64;
        // The end of a leader is not told before those of the others have been waited for, which nobody does here.
        let is_told = self.threads.len() == 1 || tid != self.process();
        let (mut naps, mut looks) = (Naps::default(), 0u32);
        loop {
            match ptrace::wait(tid, is_told).map_err(|e| TraceeError::kernel("waitpid", tid, e))? {
                Some(stop) => return Ok(stop),
                None if is_told => {}
                None => {
                    looks = looks.wrapping_add(1);
                    if looks % LOOK_EVERY == 0 && tasks::is_zombie(tid) {
                        return Err(TraceeError::Died { tid });
                    }
                    naps.nap();
                }
            }
        }
    }

    /// Lets a thread go on that has stopped on its way.
    fn pass(&mut self, i: usize, stop: Stop, stops: &mut u32) -> Result<(), TraceeError> {
        let tid = self.tid(i);
        *stops += 1;
        if *stops > MAX_STOPS {
            return Err(TraceeError::Runaway { tid, nr: -1, stops: *stops });
        }
        match stop {
            Stop::Gone(_) => return Err(TraceeError::Died { tid }),
            // It cannot be blocked.
            Stop::Signal(signal) if i32::from(signal) == libc::SIGSTOP => self.stop_owed = true,
            // Everything else is blocked: an event, or a fault that will come again.
            _ => {}
        }
        ptrace::cont(tid, 0).map_err(|e| TraceeError::kernel("PTRACE_CONT", tid, e))
    }

    /// Reads what came of it. True: the last job has failed.
    pub(super) fn collect(
        &self,
        round: &Round,
        jobs: &[(usize, &[Call])],
        replies: &mut [Vec<Reply>],
    ) -> Result<bool, TraceeError> {
        let mut records = vec![0; round.records.len() - stub::DONE_LEN];
        self.read_mem(round.stub.at + stub::RECORDS, &mut records)?;
        let mut arguments = vec![0; if round.has_answers { round.arguments.len() } else { 0 }];
        self.read_mem(round.stub.at + stub::ARGUMENTS, &mut arguments)?;
        let mut at = 0;
        let mut stopped = false;
        for slice in &round.slices {
            let calls = &jobs[slice.job].1[slice.first..slice.first + slice.count];
            stopped = false;
            for (call, n) in calls.iter().zip(slice.record..) {
                let value = result_of(&records[n * RECORD_LEN..]);
                let mut answers = Vec::new();
                for pointed in &call.pointed {
                    if pointed.answer {
                        answers.push(arguments[at..at + pointed.bytes.len()].to_vec());
                    }
                    at += pointed.bytes.len().next_multiple_of(8);
                }
                if value != NOT_RUN {
                    let reply = Reply { value, answers };
                    stopped = call.is_must() && reply.errno().is_some();
                    replies[slice.job].push(reply);
                }
            }
        }
        let unfinished = round.slices.last().is_some_and(|s| s.first + s.count < jobs[s.job].1.len());
        Ok(stopped && unfinished)
    }

    /// The results of the first `count` records.
    pub(super) fn results(&self, round: &Round, count: usize) -> Result<Vec<i64>, TraceeError> {
        let mut records = vec![0; count * RECORD_LEN];
        self.read_mem(round.stub.at + stub::RECORDS, &mut records)?;
        Ok(records.chunks_exact(RECORD_LEN).map(result_of).collect())
    }

    fn count_run(&self, round: &Round) -> Result<usize, TraceeError> {
        let mut records = vec![0; round.records.len() - stub::DONE_LEN];
        self.read_mem(round.stub.at + stub::RECORDS, &mut records)?;
        Ok(records.chunks_exact(RECORD_LEN).filter(|record| result_of(record) != NOT_RUN).count())
    }

    fn first_not_run(&self, round: &Round, jobs: &[(usize, &[Call])]) -> Option<i64> {
        let mut records = vec![0; round.records.len() - stub::DONE_LEN];
        self.read_mem(round.stub.at + stub::RECORDS, &mut records).ok()?;
        let n = records.chunks_exact(RECORD_LEN).position(|record| result_of(record) == NOT_RUN)?;
        let slice = round.slices.iter().rfind(|slice| slice.record <= n)?;
        jobs[slice.job].1.get(slice.first + n - slice.record).map(|call| call.nr)
    }
}

impl Round {
    pub(super) fn new(stub: Stub) -> Round {
        let records = vec![0; stub::DONE_LEN];
        Round { stub, slices: Vec::new(), records, arguments: Vec::new(), has_answers: false }
    }

    /// Nobody runs the calls of this slot: there are none.
    pub(super) fn set_done(&mut self, slot: usize) {
        self.records[slot * 8] = 1;
    }

    pub(super) fn push(&mut self, call: &Call) {
        let mut args = call.args;
        let mut offsets = Vec::with_capacity(call.pointed.len());
        for pointed in &call.pointed {
            let offset = self.arguments.len();
            let addr = self.stub.at + stub::ARGUMENTS + offset as u64;
            self.arguments.extend_from_slice(&pointed.bytes);
            self.arguments.resize(offset + pointed.bytes.len().next_multiple_of(8), 0);
            self.has_answers |= pointed.answer;
            match pointed.from {
                From::Argument(arg) => args[arg] = addr,
                From::Within(parent, inside) => {
                    let place: usize = offsets[parent] + inside;
                    self.arguments[place..place + 8].copy_from_slice(&addr.to_le_bytes());
                }
            }
            offsets.push(offset);
        }
        let head = call.nr as u32 as u64 | u64::from(call.flags) << 32;
        for word in [head].into_iter().chain(args).chain([NOT_RUN as u64]) {
            self.records.extend_from_slice(&word.to_le_bytes());
        }
    }
}

/// The last word of a record.
fn result_of(record: &[u8]) -> i64 {
    i64::from_le_bytes(record[RECORD_LEN - 8..RECORD_LEN].try_into().expect("eight bytes"))
}
