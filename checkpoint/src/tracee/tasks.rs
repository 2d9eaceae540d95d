//! Stopping, reading and letting go of single tasks.

use super::{ALL_SIGNALS, ThreadState, TraceeError};
use crate::image::RseqImage;
use crate::sys::ptrace::{self, Regs, Stop};
use nix::errno::Errno;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// Stops to pass before a task must have reached its event stop.
const MAX_STOPS: usize = 1000;

pub fn list(pid: i32) -> Result<Vec<i32>, TraceeError> {
    let dir = fs::read_dir(format!("/proc/{pid}/task")).map_err(|e| io_error("listing threads", pid, &e))?;
    Ok(dir.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect())
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

pub fn refuse_foreign_tracer(pid: i32) -> Result<(), TraceeError> {
    let status = fs::read(format!("/proc/{pid}/status")).map_err(|e| io_error("reading status", pid, &e))?;
    let tracer = String::from_utf8_lossy(&status)
        .lines()
        .find_map(|line| line.strip_prefix("TracerPid:")?.trim().parse::<i32>().ok())
        .unwrap_or(0);
    match tracer {
        0 => Ok(()),
        tracer => Err(TraceeError::Traced { pid, tracer }),
    }
}

/// Waits until an interrupted task has stopped. `Ok(None)`: it has ended. `Some(signal)`: it is in a
/// group stop by that signal.
pub fn wait_for_stop(tid: i32, deadline: Instant) -> Result<Option<Option<u8>>, TraceeError> {
    let mut naps = 0u32;
    for _ in 0..MAX_STOPS {
        let stop = loop {
            match ptrace::wait(tid, false) {
                Ok(Some(stop)) => break stop,
                Ok(None) if Instant::now() > deadline => return Err(wont_stop(tid)),
                Ok(None) => {
                    naps += 1;
                    // Most stops come within microseconds: look often first.
                    if naps < 200 {
                        std::thread::yield_now();
                    } else {
                        std::thread::sleep(Duration::from_micros(50));
                    }
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
    Err(wont_stop(tid))
}

fn resume(tid: i32, signal: u8) -> Result<(), TraceeError> {
    ptrace::cont(tid, signal).map_err(|e| TraceeError::kernel("PTRACE_CONT", tid, e))
}

fn wont_stop(tid: i32) -> TraceeError {
    let wchan = fs::read_to_string(format!("/proc/{tid}/wchan")).unwrap_or_default();
    TraceeError::WontStop { tid, millis: super::STOP_LIMIT.as_millis() as u64, wchan }
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

/// Gives a thread its registers and mask back. One that was used for injection stands at a system-call
/// stop, where the kernel would not restart the interrupted call: it is taken to an event stop again.
pub fn give_back(found: &ThreadState, masked: bool, touched: bool) -> Result<(), TraceeError> {
    let tid = found.tid;
    let at = |operation| move |errno| TraceeError::kernel(operation, tid, errno);
    if touched {
        ptrace::set_regs(tid, &found.regs).map_err(at("setting registers"))?;
    }
    if masked {
        ptrace::set_sigmask(tid, found.sigmask).map_err(at("setting the signal mask"))?;
    }
    if touched {
        ptrace::interrupt(tid).map_err(at("PTRACE_INTERRUPT"))?;
        ptrace::cont(tid, 0).map_err(at("PTRACE_CONT"))?;
        if wait_for_stop(tid, Instant::now() + super::STOP_LIMIT)?.is_none() {
            return Err(TraceeError::Died { tid });
        }
    }
    Ok(())
}

pub fn detach(tid: i32) -> Result<(), TraceeError> {
    match ptrace::detach(tid, 0) {
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(errno) => Err(TraceeError::kernel("PTRACE_DETACH", tid, errno)),
    }
}
