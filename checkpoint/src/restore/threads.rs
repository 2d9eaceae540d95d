//! What each thread has for itself.

use super::xstate;
use super::{RebuildOptions, RestoreError, credentials};
use crate::image::cpu::CpuImage;
use crate::image::{CredsImage, ProcessImage, ThreadImage};
use crate::sys::ptrace::{self, Regs};
use crate::sys::{rlimit, sched};
use crate::tracee::{Call, Tracee};
use std::collections::BTreeMap;

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
pub fn order(tracee: &mut Tracee, image: &ProcessImage) -> Result<Vec<usize>, RestoreError> {
    let inner = inner_tids(tracee)?;
    image
        .threads
        .iter()
        .enumerate()
        .map(|(n, thread)| {
            // An image restored under another PID has other TIDs too: then they go by their order.
            let found = inner.get(&thread.tid).copied();
            found
                .or((n < inner.len()).then_some(n))
                .ok_or_else(|| RestoreError::Unfit(format!("thread {} is missing in the task", thread.tid)))
        })
        .collect()
}

/// Index in the tracee of the thread that knows itself under `tid`.
pub fn place(tracee: &mut Tracee, tid: i32) -> Result<usize, RestoreError> {
    let found = inner_tids(tracee)?.get(&tid).copied();
    found.ok_or_else(|| RestoreError::Unfit(format!("thread {tid} is missing in the task")))
}

/// Index of each thread by the TID that it knows itself under.
fn inner_tids(tracee: &mut Tracee) -> Result<BTreeMap<i32, usize>, RestoreError> {
    let all = 0..tracee.thread_count();
    let namespace = |whose: &str| std::fs::read_link(format!("/proc/{whose}/ns/pid"));
    if let (Ok(ours), Ok(theirs)) = (namespace("self"), namespace(&tracee.pid().to_string()))
        && ours == theirs
    {
        return Ok(all.map(|i| (tracee.tid(i), i)).collect());
    }
    let ask = [Call::must("gettid", libc::SYS_gettid, [0; 6])];
    let jobs: Vec<(usize, &[Call])> = all.map(|i| (i, ask.as_slice())).collect();
    let replies = tracee.must_each(&jobs)?;
    Ok(replies.iter().zip(0..).filter_map(|(replies, i)| Some((replies.first()?.value as i32, i))).collect())
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

/// Everything of the threads but their registers, in one batch of each: what must be set by itself, then
/// credentials, and what they reset.
pub fn set_threads(
    tracee: &mut Tracee,
    order: &[usize],
    image: &ProcessImage,
    options: RebuildOptions,
) -> Result<(), RestoreError> {
    let credentials = |creds: &CredsImage| match options.credentials {
        Some(allowed) => credentials::calls(creds, allowed),
        None => Ok(Vec::new()),
    };
    let leaders = credentials(&image.creds)?;
    let calls_of = |thread: &ThreadImage| -> Result<Vec<Call>, RestoreError> {
        let mut calls = calls_of(thread);
        if options.misc {
            calls.extend(super::traits::of_thread(&thread.traits));
        }
        match &thread.creds {
            Some(own) => calls.extend(credentials(own)?),
            None => calls.extend_from_slice(&leaders),
        }
        if options.pdeathsig && thread.pdeathsig != 0 {
            // Reset by a change of credentials (prctl(2), PR_SET_PDEATHSIG).
            let args = [libc::PR_SET_PDEATHSIG as u64, thread.pdeathsig.into(), 0, 0, 0, 0];
            calls.push(Call::must("PR_SET_PDEATHSIG", libc::SYS_prctl, args));
        }
        Ok(calls)
    };
    let calls: Vec<Vec<Call>> = image.threads.iter().map(calls_of).collect::<Result<_, _>>()?;
    let jobs: Vec<(usize, &[Call])> =
        order.iter().copied().zip(calls.iter().map(|calls| calls.as_slice())).collect();
    tracee.must_each(&jobs)?;
    for (&i, thread) in order.iter().zip(&image.threads) {
        let tid = tracee.tid(i);
        if options.affinity {
            // CPUs that this machine does not have. Before the policy: a deadline needs all of them.
            let _ = sched::set_affinity(tid, &thread.affinity);
        }
        if options.limits {
            // Not allowed everywhere (real time, a better nice value): then it runs as others do here.
            let _ = sched::set_attributes(tid, &thread.sched);
            let _ = sched::set_io_priority(tid, thread.ioprio);
        }
    }
    Ok(())
}

/// What a thread must call for itself.
fn calls_of(thread: &ThreadImage) -> Vec<Call> {
    let args = [thread.clear_child_tid, 0, 0, 0, 0, 0];
    let mut calls = vec![Call::must("set_tid_address", libc::SYS_set_tid_address, args)];
    let (head, length) = thread.robust_list;
    if length != 0 {
        let args = [head, length, 0, 0, 0, 0];
        calls.push(Call::must("set_robust_list", libc::SYS_set_robust_list, args));
    }
    calls.push(set_altstack(thread));
    if thread.rseq.addr != 0 {
        let rseq = thread.rseq;
        let args = [rseq.addr, rseq.len.into(), 0, rseq.signature.into(), 0, 0];
        calls.push(Call::must("registering rseq", libc::SYS_rseq, args));
    }
    let args = [libc::PR_SET_NAME as u64, 0, 0, 0, 0, 0];
    calls.push(Call::must("naming a thread", libc::SYS_prctl, args).string(1, &thread.comm));
    if thread.timer_slack_ns != 0 {
        let args = [libc::PR_SET_TIMERSLACK as u64, thread.timer_slack_ns, 0, 0, 0, 0];
        calls.push(Call::must("PR_SET_TIMERSLACK", libc::SYS_prctl, args));
    }
    calls
}

fn set_altstack(thread: &ThreadImage) -> Call {
    let (sp, flags, size) = thread.altstack;
    // SS_ONSTACK is a report, not a request; a zero stack is none.
    let flags = if size == 0 { libc::SS_DISABLE as u32 } else { flags & !(libc::SS_ONSTACK as u32) };
    let stack = [sp.to_le_bytes(), u64::from(flags).to_le_bytes(), size.to_le_bytes()].concat();
    Call::must("sigaltstack", libc::SYS_sigaltstack, [0; 6]).input(0, &stack)
}

/// The general registers of the image.
pub fn registers(thread: &ThreadImage) -> Result<[u64; 27], RestoreError> {
    let words = thread.regs.as_slice().try_into();
    words.map_err(|_| RestoreError::Unfit("a thread without registers".into()))
}

/// Registers, extended state and signal mask, for the release.
pub fn set_registers(
    tracee: &mut Tracee,
    i: usize,
    thread: &ThreadImage,
    regs: Regs,
    was: &CpuImage,
) -> Result<(), RestoreError> {
    tracee.set_regs(i, regs);
    let area = xstate::fit(&thread.xstate, was, &tracee.original(i).xstate, CpuImage::here());
    tracee.set_xstate(i, area.map_err(RestoreError::Unfit)?);
    tracee.set_sigmask(i, thread.sigmask);
    Ok(())
}
