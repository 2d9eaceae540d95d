//! What a deputy needs before its guest's image is rebuilt in it.

use super::{Deputy, SigInfo, signal_number};
use crate::inventory::tree::has_ended;
use crate::proc::status::Status;
use crate::sys::ptrace::SIGINFO_LEN;
use crate::tracee::{Tracee, TraceeError, stub};

/// Tries to get a thread under a given TID by way of `ns_last_pid`: somebody else may take it first.
const TID_TRIES: usize = 100;

/// Gives the deputy just the threads that its guest has: others end, new ones are made under the
/// TIDs they got on the host node.
///
/// `clone3` with `set_tid` needs CAP_CHECKPOINT_RESTORE inside the deputy, which an ordinary user's
/// has not; then the next TID is steered from outside (`/proc/sys/kernel/ns_last_pid`, needs root).
pub fn reconcile_threads(tracee: &mut Tracee, wanted: &[i32]) -> Result<(), TraceeError> {
    for i in (1..tracee.thread_count()).rev() {
        if !wanted.contains(&tracee.tid(i)) {
            tracee.end_thread(i)?;
        }
    }
    for &tid in wanted {
        if tracee.index_of(tid).is_none() && tracee.add_thread(tid, true).is_err() {
            steer(tracee, tid)?;
        }
    }
    Ok(())
}

fn steer(tracee: &mut Tracee, tid: i32) -> Result<(), TraceeError> {
    for _ in 0..TID_TRIES {
        let previous = (tid - 1).to_string();
        if std::fs::write("/proc/sys/kernel/ns_last_pid", previous).is_err() {
            break;
        }
        let i = tracee.add_thread(tid, false)?;
        if tracee.tid(i) == tid {
            return Ok(());
        }
        tracee.end_thread(i)?;
    }
    Err(TraceeError::Unfit {
        pid: tracee.pid(),
        what: "a thread made on the host node cannot get its TID at home: another task has it",
    })
}

/// The signal that the park loop had caught and nobody has passed on, if any; the slot is emptied.
pub fn take_slot(tracee: &mut Tracee) -> Result<Option<SigInfo>, TraceeError> {
    let Some((at, _)) = tracee.stub_range() else { return Ok(None) };
    let mut info = [0; SIGINFO_LEN];
    tracee.read_mem(at + stub::SLOT, &mut info)?;
    if signal_number(&info) == 0 {
        return Ok(None);
    }
    tracee.write_mem(at + stub::SLOT, &[0; SIGINFO_LEN])?;
    Ok(Some(info))
}

/// Queues a signal with all its siginfo, to the process (`thread` is `None`) or to one thread.
///
/// It is queued from inside, because from outside the kernel refuses the codes of its own signals
/// (rt_sigqueueinfo(2)); all signals must be blocked by injection at that time, which they are.
pub fn requeue_signal(tracee: &mut Tracee, thread: Option<usize>, info: &SigInfo) -> Result<(), TraceeError> {
    let scratch = tracee.scratch() + 512;
    tracee.write_mem(scratch, info)?;
    let signal = signal_number(info) as u64;
    let i = thread.unwrap_or(0);
    let tgid = tracee.must(0, "getpid", libc::SYS_getpid, [0; 6])? as u64;
    match thread {
        None => {
            let args = [tgid, signal, scratch, 0, 0, 0];
            tracee.must(i, "queueing a signal", libc::SYS_rt_sigqueueinfo, args)?;
        }
        Some(i) => {
            let tid = tracee.must(i, "gettid", libc::SYS_gettid, [0; 6])? as u64;
            let args = [tgid, tid, signal, scratch, 0, 0];
            tracee.must(i, "queueing a signal", libc::SYS_rt_tgsigqueueinfo, args)?;
        }
    }
    Ok(())
}

impl Deputy {
    /// TIDs of the threads that have something pending of their own: sent to the thread, not to the
    /// process. Cheap: reads `status` of at most `limit` threads.
    pub fn threads_with_signals(&self, limit: usize) -> Vec<i32> {
        self.tids[1..].iter().take(limit).copied().filter(|&tid| has_pending(tid)).collect()
    }

    /// Takes what is pending on those threads: (TID, siginfo), oldest first of each.
    pub fn thread_signals(self, tids: &[i32]) -> Result<(Tracee, Vec<(i32, SigInfo)>), TraceeError> {
        let (mut tracee, caught) = self.freeze()?;
        let scratch = tracee.scratch();
        let (stub_at, _) =
            tracee.stub_range().ok_or(TraceeError::Unfit { pid: tracee.pid(), what: "it has no stub" })?;
        let pid = tracee.pid();
        let mut out: Vec<(i32, SigInfo)> = caught.into_iter().map(|info| (pid, info)).collect();
        for &tid in tids {
            let Some(i) = tracee.index_of(tid) else { continue };
            // Bounded by the kernel's own limit on queued signals, and by this.
            for _ in 0..1024 {
                tracee.write_mem(scratch, &[0; 16])?;
                let args = [stub_at + stub::SIGSET, scratch + 512, scratch, 8, 0, 0];
                if tracee.syscall(i, libc::SYS_rt_sigtimedwait, args)? <= 0 {
                    break;
                }
                let mut info = [0; SIGINFO_LEN];
                tracee.read_mem(scratch + 512, &mut info)?;
                out.push((tid, info));
            }
        }
        Ok((tracee, out))
    }
}

/// Takes note of children that have ended, as their parent has done where it ran: of all but `unknown`,
/// which it has not waited for there.
pub fn reap_ended_children(tracee: &mut Tracee, unknown: &[i32]) -> Result<(), TraceeError> {
    let children = crate::inventory::tree::children(tracee.pid());
    for child in children.into_iter().filter(|child| !unknown.contains(child)) {
        let ended = Status::read(child).is_ok_and(|status| has_ended(child, &status));
        if ended {
            let flags = (libc::WNOHANG | libc::__WALL) as u64;
            // ECHILD: it is gone by itself.
            tracee.syscall(0, libc::SYS_wait4, [child as u64, 0, flags, 0, 0, 0])?;
        }
    }
    Ok(())
}

/// Forgets what is pending on single threads: nothing that is pending on the process must be left.
pub fn drop_thread_signals(tracee: &mut Tracee) -> Result<(), TraceeError> {
    let Some((at, _)) = tracee.stub_range() else { return Ok(()) };
    let scratch = tracee.scratch();
    for i in 0..tracee.thread_count() {
        if !has_pending(tracee.tid(i)) {
            continue;
        }
        // Bounded by the kernel's own limit on queued signals, and by this.
        for _ in 0..65_536 {
            tracee.write_mem(scratch, &[0; 16])?;
            let args = [at + stub::SIGSET, scratch + 512, scratch, 8, 0, 0];
            if tracee.syscall(i, libc::SYS_rt_sigtimedwait, args)? <= 0 {
                break;
            }
        }
    }
    Ok(())
}

fn has_pending(tid: i32) -> bool {
    let Ok(status) = std::fs::read_to_string(format!("/proc/{tid}/status")) else { return false };
    status
        .lines()
        .find_map(|line| u64::from_str_radix(line.strip_prefix("SigPnd:")?.trim(), 16).ok())
        .is_some_and(|mask| mask != 0)
}

/// Takes everything that the kernel has queued for the process (or its leader) while it was parked,
/// oldest first.
pub fn drain_pending(tracee: &mut Tracee) -> Result<Vec<SigInfo>, TraceeError> {
    let Some((at, _)) = tracee.stub_range() else { return Ok(Vec::new()) };
    let scratch = tracee.scratch();
    let mut out = Vec::new();
    // The kernel's own limit on queued signals is lower (RLIMIT_SIGPENDING).
    while out.len() < 65_536 {
        tracee.write_mem(scratch, &[0; 16])?;
        let args = [at + stub::SIGSET, scratch + 512, scratch, 8, 0, 0];
        if tracee.syscall(0, libc::SYS_rt_sigtimedwait, args)? <= 0 {
            break;
        }
        let mut info = [0; SIGINFO_LEN];
        tracee.read_mem(scratch + 512, &mut info)?;
        out.push(info);
    }
    Ok(out)
}
