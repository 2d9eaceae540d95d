//! Stopping, reading and letting go of single tasks.

use super::naps::Naps;
use super::{ALL_SIGNALS, ThreadState, TraceeError};
use crate::image::RseqImage;
use crate::sys::bpf::threads;
use crate::sys::ptrace::{self, Regs, Stop};
use nix::errno::Errno;
use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// Stops to pass before a task must have reached its event stop.
const MAX_STOPS: usize = 1000;
/// How much longer than others a task may take to stop that is able to run.
const CPU_LIMIT: Duration = Duration::from_secs(20);
/// How often a task that does not stop is asked whether it has ended, in naps.
const LOOK_EVERY: u32 = 64;
/// How long a task that is to be let go may take to stop.
const LET_GO_LIMIT: Duration = Duration::from_millis(200);
/// How long the ends of threads are waited for whose leader has ended.
const ENDS_LIMIT: Duration = Duration::from_secs(1);

pub fn list(pid: i32) -> Result<Vec<i32>, TraceeError> {
    let dir = fs::read_dir(format!("/proc/{pid}/task")).map_err(|e| io_error("listing threads", pid, &e))?;
    Ok(dir.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect())
}

/// Threads of a process that are not seized yet. `complete`: those that are stand still, all of them: then their
/// number tells whether there are others, and nothing is looked up in `/proc` that the kernel would have to
/// forget when they end.
pub fn unseized(pid: i32, seized: &BTreeSet<i32>, complete: bool) -> Result<Vec<i32>, TraceeError> {
    let all = match seized.is_empty() {
        // If one ends meanwhile, others may be missing: they are found the next time.
        true => threads::of_many(pid).map(|all| all.iter().map(|thread| thread.tid).collect()),
        false if complete && crate::proc::thread_count(pid) == seized.len() => return Ok(Vec::new()),
        false => None,
    };
    let all = all.map_or_else(|| list(pid), Ok)?;
    Ok(all.into_iter().filter(|tid| !seized.contains(tid)).collect())
}

pub fn io_error(operation: &'static str, tid: i32, error: &std::io::Error) -> TraceeError {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ESRCH) => TraceeError::Died { tid },
        Some(code) => TraceeError::Kernel { operation, tid, errno: Errno::from_raw(code) },
        // A short read: nothing is mapped there, or nothing is left of it.
        None => TraceeError::Kernel { operation, tid, errno: Errno::EFAULT },
    }
}

pub fn open_mem(pid: i32) -> Result<File, TraceeError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(format!("/proc/{pid}/mem"))
        .map_err(|e| io_error("opening memory", pid, &e))
}

/// Who traces a task; 0: nobody.
fn tracer_of(tid: i32) -> Result<i32, TraceeError> {
    let status = fs::read(format!("/proc/{tid}/status")).map_err(|e| io_error("reading status", tid, &e))?;
    let status = String::from_utf8_lossy(&status);
    let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:")?.trim().parse().ok());
    Ok(tracer.unwrap_or(0))
}

/// What became of the attempt to seize a task.
pub enum Seized {
    Yes,
    /// It is not there any more.
    Gone,
    /// It is there for who waits for it.
    Ended,
}

/// Seizes a thread of a process, one that a freeze that failed has left to this very thread too.
pub fn seize(pid: i32, tid: i32) -> Result<Seized, TraceeError> {
    let errno = match ptrace::seize(tid, ptrace::O_TRACESYSGOOD) {
        Ok(()) => return Ok(Seized::Yes),
        Err(Errno::ESRCH) => return Ok(Seized::Gone),
        // A leader that has ended stays until the others have (EPERM, ptrace(2)).
        Err(_) if is_zombie(tid) => return Ok(Seized::Ended),
        Err(errno) => errno,
    };
    match tracer_of(tid) {
        Ok(tracer) if tracer == nix::unistd::gettid().as_raw() => stop_again(tid).map(|()| Seized::Yes),
        Ok(0) => Err(TraceeError::kernel("PTRACE_SEIZE", tid, errno)),
        Ok(tracer) => Err(TraceeError::Traced { pid, tracer }),
        Err(TraceeError::Died { .. }) if tid != pid => Ok(Seized::Gone),
        Err(error) => Err(error),
    }
}

/// Makes a task of ours tell of a stop again that it stands in already: it goes on to the next.
fn stop_again(tid: i32) -> Result<(), TraceeError> {
    let at = |operation| move |errno| TraceeError::kernel(operation, tid, errno);
    ptrace::interrupt(tid).map_err(at("PTRACE_INTERRUPT"))?;
    // What it has to tell is taken; a signal that it was to get is given to it.
    let signal = match ptrace::wait(tid, false).map_err(at("waitpid"))? {
        Some(Stop::Signal(signal)) => signal,
        _ => 0,
    };
    match ptrace::cont(tid, signal) {
        // It runs.
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(errno) => Err(at("PTRACE_CONT")(errno)),
    }
}

/// Waits until an interrupted task has stopped. `Ok(None)`: it has ended. `Some(signal)`: it is in a
/// group stop by that signal.
pub fn wait_for_stop(tid: i32, deadline: Instant) -> Result<Option<Option<u8>>, TraceeError> {
    let began = Instant::now();
    let (mut naps, mut looks) = (Naps::default(), 0u32);
    for _ in 0..MAX_STOPS {
        let stop = loop {
            match ptrace::wait(tid, false) {
                Ok(Some(stop)) => break stop,
                Ok(None) if Instant::now() > deadline && !may_stop_yet(tid, deadline) => {
                    return Err(wont_stop(tid, began.elapsed()));
                }
                Ok(None) => {
                    looks = looks.wrapping_add(1);
                    if looks % LOOK_EVERY == 0 && is_zombie(tid) && list(tid).is_ok_and(|tids| tids.len() > 1)
                    {
                        // A leader whose other threads live on: nothing more is told of it.
                        return Ok(None);
                    }
                    naps.nap();
                }
                Err(errno) => return Err(TraceeError::kernel("waitpid", tid, errno)),
            }
        };
        match stop {
            Stop::Event => return Ok(Some(None)),
            Stop::Group(signal) => return Ok(Some(Some(signal))),
            Stop::Gone(_) => return Ok(None),
            // A signal that was on its way when we came: let it be delivered; the event stop follows
            // before the program runs again.
            Stop::Signal(signal) => resume(tid, signal)?,
            Stop::Syscall | Stop::Clone => resume(tid, 0)?,
        }
    }
    Err(wont_stop(tid, began.elapsed()))
}

/// Lets it run on to its event stop. Any stop takes the place of the one that was asked for (ptrace_stop()
/// in kernel/signal.c clears JOBCTL_TRAP_STOP), so it is asked for again: with signals that come fast
/// enough there would never be one.
fn resume(tid: i32, signal: u8) -> Result<(), TraceeError> {
    ptrace::interrupt(tid).map_err(|e| TraceeError::kernel("PTRACE_INTERRUPT", tid, e))?;
    ptrace::cont(tid, signal).map_err(|e| TraceeError::kernel("PTRACE_CONT", tid, e))
}

/// Whether it has ended and is there only for who waits for it.
pub fn is_zombie(tid: i32) -> bool {
    let stat = crate::proc::status::Stat::read(tid);
    stat.is_ok_and(|stat| stat.field(3) == Some("Z"))
}

/// Waits a moment for the end of a leader; one that is stopped does not end before it goes on.
pub fn await_zombie(tid: i32) {
    let deadline = Instant::now() + ENDS_LIMIT;
    let state =
        || crate::proc::status::Stat::read(tid).ok().and_then(|stat| Some(stat.field(3)?.to_string()));
    while matches!(state().as_deref(), Some("R" | "S" | "D")) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_micros(50));
    }
}

/// Waits for the ends of traced threads, a moment: those that do not end are left as they are.
pub fn await_ends(tids: &BTreeSet<i32>) {
    let deadline = Instant::now() + ENDS_LIMIT;
    // The leader last.
    let group = |&tid: &i32| {
        list(tid).is_ok()
            && crate::proc::status::Status::read(tid)
                .is_ok_and(|status| status.decimal("Tgid") == Some(tid as u64))
    };
    let (leaders, others): (Vec<i32>, Vec<i32>) = tids.iter().copied().partition(group);
    for tid in others.into_iter().chain(leaders) {
        while !matches!(ptrace::wait(tid, false), Ok(Some(Stop::Gone(_))) | Err(_)) {
            if Instant::now() > deadline {
                return;
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}

/// Whether a task that has not stopped in time is worth more of it: one that can run only waits for a CPU, where
/// many want one. It is asked once more, which does nothing to one that has heard.
fn may_stop_yet(tid: i32, deadline: Instant) -> bool {
    let waits = crate::proc::status::Stat::read(tid).is_ok_and(|stat| stat.field(3) == Some("D"));
    let may = !waits && Instant::now() < deadline + CPU_LIMIT;
    if may {
        std::thread::sleep(Duration::from_millis(1));
    }
    may && ptrace::interrupt(tid).is_ok()
}

/// `waited`: for how long it was waited for.
fn wont_stop(tid: i32, waited: Duration) -> TraceeError {
    let doing = match crate::inventory::tree::is_in_vfork(tid) {
        true => "in vfork(2), until its child runs another program or ends".into(),
        false => {
            let place = fs::read_to_string(format!("/proc/{tid}/wchan")).unwrap_or_default();
            let state = crate::proc::status::Stat::read(tid);
            match state.as_ref().ok().and_then(|stat| stat.field(3)) {
                Some("D") => format!("in an uninterruptible wait ({place})"),
                state => format!("in state {} ({place})", state.unwrap_or("?")),
            }
        }
    };
    TraceeError::WontStop { tid, millis: waited.as_millis() as u64, doing }
}

pub fn read_thread(mem: &File, tid: i32) -> Result<ThreadState, TraceeError> {
    let at = |operation| move |errno| TraceeError::kernel(operation, tid, errno);
    let rseq = ptrace::rseq(tid).unwrap_or_default();
    let mut regs = ptrace::regs(tid).map_err(at("reading registers"))?;
    abort_critical_section(mem, &rseq, &mut regs);
    Ok(ThreadState {
        tid,
        regs,
        xstate: ptrace::xstate(tid).map_err(at("reading XSTATE"))?,
        sigmask: ptrace::sigmask(tid).map_err(at("reading the signal mask"))?,
        rseq,
    })
}

/// A thread that was made to be filled.
pub fn read_made(tid: i32) -> Result<ThreadState, TraceeError> {
    let regs = ptrace::regs(tid).map_err(|e| TraceeError::kernel("reading registers", tid, e))?;
    Ok(made(tid, regs))
}

/// What a thread was made with, all of whose signals are blocked.
pub fn made(tid: i32, regs: Regs) -> ThreadState {
    ThreadState { tid, regs, xstate: Vec::new(), sigmask: ALL_SIGNALS, rseq: RseqImage::default() }
}

/// A thread stopped inside an rseq critical section must go on at its abort address: it has been
/// preempted (kernel/rseq.c does the same on return to user mode, but only sees the stub's address).
fn abort_critical_section(mem: &File, rseq: &RseqImage, regs: &mut Regs) {
    if rseq.addr == 0 {
        return;
    }
    let mut word = [0u8; 8];
    // `rseq_cs` follows the two cpu ids in `struct rseq`.
    if mem.read_exact_at(&mut word, rseq.addr + 8).is_err() {
        return;
    }
    let section = u64::from_le_bytes(word);
    let mut body = [0u8; 32];
    if section == 0 || mem.read_exact_at(&mut body, section).is_err() {
        return;
    }
    let field = |at: usize| u64::from_le_bytes(body[at..at + 8].try_into().expect("eight bytes"));
    let (start, length, abort) = (field(8), field(16), field(24));
    if regs.rip().wrapping_sub(start) < length {
        regs.set_rip(abort);
    }
}

pub fn block_all(tid: i32) -> Result<(), TraceeError> {
    ptrace::set_sigmask(tid, ALL_SIGNALS).map_err(|e| TraceeError::kernel("setting the signal mask", tid, e))
}

/// What is different in a thread from what was found.
#[derive(Debug, Clone, Copy)]
pub struct Changed {
    /// Its registers.
    pub regs: bool,
    /// It has left the stop it was found in, and stands at no other event stop.
    pub moved: bool,
    /// Its signal mask.
    pub mask: bool,
}

/// Gives a thread its registers and mask back. One that was used for a single injected call stands at a
/// system-call stop, where the kernel would not restart the interrupted call: it is taken to an event
/// stop again.
pub fn give_back(found: &ThreadState, changed: Changed) -> Result<(), TraceeError> {
    let tid = found.tid;
    let at = |operation| move |errno| TraceeError::kernel(operation, tid, errno);
    if changed.regs {
        ptrace::set_regs(tid, &found.regs).map_err(at("setting registers"))?;
    }
    if changed.mask {
        ptrace::set_sigmask(tid, found.sigmask).map_err(at("setting the signal mask"))?;
    }
    if changed.moved {
        ptrace::interrupt(tid).map_err(at("PTRACE_INTERRUPT"))?;
        ptrace::cont(tid, 0).map_err(at("PTRACE_CONT"))?;
        if wait_for_stop(tid, Instant::now() + super::STOP_LIMIT)?.is_none() {
            return Err(TraceeError::Died { tid });
        }
    }
    Ok(())
}

/// Lets go of a task that stands, or is seen to run.
pub fn detach(tid: i32) -> Result<(), TraceeError> {
    match ptrace::detach(tid, 0) {
        Ok(()) => Ok(()),
        Err(Errno::ESRCH) => {
            let_go(tid);
            Ok(())
        }
        Err(errno) => Err(TraceeError::kernel("PTRACE_DETACH", tid, errno)),
    }
}

/// Lets go of a task of ours that may run: only one that stands can be let go, so it is asked to stop, and a
/// moment is waited for that. One that waits uninterruptibly stays ours, and is taken up by the next
/// freeze ([`seize`]).
pub fn let_go(tid: i32) {
    let deadline = Instant::now() + LET_GO_LIMIT;
    // ESRCH: it has ended, or is not ours.
    while ptrace::interrupt(tid).is_ok() && Instant::now() < deadline {
        let signal = match ptrace::wait(tid, false) {
            Ok(Some(Stop::Gone(_))) | Err(_) => return,
            Ok(Some(Stop::Signal(signal))) => signal,
            Ok(_) => 0,
        };
        if ptrace::detach(tid, signal).is_ok() {
            return;
        }
        std::thread::sleep(Duration::from_micros(100));
    }
}
