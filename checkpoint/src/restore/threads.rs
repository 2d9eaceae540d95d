//! What each thread has for itself.

use super::mappings::put_path;
use super::{RebuildOptions, RestoreError};
use crate::image::{ProcessImage, ThreadImage};
use crate::proc::status::Status;
use crate::sys::ptrace::{self, Regs};
use crate::sys::{rlimit, sched};
use crate::tracee::Tracee;

const RSEQ_FLAG_UNREGISTER: u64 = 1;

/// A task made by fork has the registration of the process it was forked from.
pub fn unregister_rseq(tracee: &mut Tracee) -> Result<(), RestoreError> {
    for i in 0..tracee.thread_count() {
        let rseq = ptrace::rseq(tracee.tid(i)).unwrap_or_default();
        if rseq.addr != 0 {
            let args = [rseq.addr, rseq.len.into(), RSEQ_FLAG_UNREGISTER, rseq.signature.into(), 0, 0];
            tracee.must(i, "unregistering rseq", libc::SYS_rseq, args)?;
        }
    }
    Ok(())
}

/// Index in the tracee of each thread of the image.
pub fn order(tracee: &Tracee, image: &ProcessImage) -> Result<Vec<usize>, RestoreError> {
    let inner: Vec<Option<i32>> = (0..tracee.thread_count())
        .map(|i| Status::read(tracee.tid(i)).ok().and_then(|status| status.inner_id()))
        .collect();
    image
        .threads
        .iter()
        .enumerate()
        .map(|(n, thread)| {
            let found = inner.iter().position(|&tid| tid == Some(thread.tid));
            // An image restored under another PID has other TIDs too: then they go by their order.
            found
                .or((n < inner.len() && !inner.contains(&Some(thread.tid))).then_some(n))
                .ok_or_else(|| RestoreError::Unfit(format!("thread {} is missing in the task", thread.tid)))
        })
        .collect()
}

/// Limits of the process; those that may not be raised stay as they are.
pub fn set_limits(tracee: &Tracee, image: &ProcessImage) {
    let pid = tracee.pid();
    for &(resource, soft, hard) in &image.limits {
        if rlimit::set(pid, resource, soft, hard).is_err()
            && let Ok((_, most)) = rlimit::get(pid, resource)
        {
            let _ = rlimit::set(pid, resource, soft.min(most), most.min(hard));
        }
    }
}

/// Everything of a thread but its registers.
pub fn set_thread(
    tracee: &mut Tracee,
    i: usize,
    thread: &ThreadImage,
    options: RebuildOptions,
) -> Result<(), RestoreError> {
    let args = [thread.clear_child_tid, 0, 0, 0, 0, 0];
    tracee.must(i, "set_tid_address", libc::SYS_set_tid_address, args)?;
    let (head, length) = thread.robust_list;
    if length != 0 {
        tracee.must(i, "set_robust_list", libc::SYS_set_robust_list, [head, length, 0, 0, 0, 0])?;
    }
    set_altstack(tracee, i, thread)?;
    if thread.rseq.addr != 0 {
        let rseq = thread.rseq;
        let args = [rseq.addr, rseq.len.into(), 0, rseq.signature.into(), 0, 0];
        tracee.must(i, "registering rseq", libc::SYS_rseq, args)?;
    }
    let name = put_path(tracee, &thread.comm)?;
    tracee.must(i, "naming a thread", libc::SYS_prctl, [libc::PR_SET_NAME as u64, name, 0, 0, 0, 0])?;
    if thread.timer_slack_ns != 0 {
        let args = [libc::PR_SET_TIMERSLACK as u64, thread.timer_slack_ns, 0, 0, 0, 0];
        tracee.must(i, "PR_SET_TIMERSLACK", libc::SYS_prctl, args)?;
    }
    let tid = tracee.tid(i);
    if options.limits {
        // Not allowed everywhere (real time, a better nice value): then it runs as others do here.
        let _ = sched::set_attributes(tid, &thread.sched);
        let _ = sched::set_io_priority(tid, thread.ioprio);
    }
    if options.affinity {
        // CPUs that this machine does not have.
        let _ = sched::set_affinity(tid, &thread.affinity);
    }
    Ok(())
}

/// `PR_SET_PDEATHSIG` of every thread.
pub fn set_parent_death_signals(
    tracee: &mut Tracee,
    order: &[usize],
    image: &ProcessImage,
) -> Result<(), RestoreError> {
    for (&i, thread) in order.iter().zip(&image.threads).filter(|(_, thread)| thread.pdeathsig != 0) {
        let args = [libc::PR_SET_PDEATHSIG as u64, thread.pdeathsig.into(), 0, 0, 0, 0];
        tracee.must(i, "PR_SET_PDEATHSIG", libc::SYS_prctl, args)?;
    }
    Ok(())
}

fn set_altstack(tracee: &mut Tracee, i: usize, thread: &ThreadImage) -> Result<(), RestoreError> {
    let (sp, flags, size) = thread.altstack;
    // SS_ONSTACK is a report, not a request; a zero stack is none.
    let flags = if size == 0 { libc::SS_DISABLE as u32 } else { flags & !(libc::SS_ONSTACK as u32) };
    let mut stack = sp.to_le_bytes().to_vec();
    stack.extend_from_slice(&u64::from(flags).to_le_bytes());
    stack.extend_from_slice(&size.to_le_bytes());
    let scratch = tracee.scratch();
    tracee.write_mem(scratch, &stack)?;
    tracee.must(i, "sigaltstack", libc::SYS_sigaltstack, [scratch, 0, 0, 0, 0, 0])?;
    Ok(())
}

/// Registers, extended state and signal mask, for the release.
pub fn set_registers(tracee: &mut Tracee, i: usize, thread: &ThreadImage) -> Result<(), RestoreError> {
    let words: [u64; 27] = thread
        .regs
        .as_slice()
        .try_into()
        .map_err(|_| RestoreError::Unfit("a thread without registers".into()))?;
    tracee.set_regs(i, Regs(words));
    tracee.set_xstate(i, thread.xstate.clone());
    tracee.set_sigmask(i, thread.sigmask);
    Ok(())
}
