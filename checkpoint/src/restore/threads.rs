//! What each thread has for itself.

use super::new_threads::Inheritance;
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
/// credentials, and what they reset. What new threads have of their maker (`born`) or have called for is there.
pub fn set_threads(
    tracee: &mut Tracee,
    order: &[usize],
    image: &ProcessImage,
    options: RebuildOptions,
    born: Option<&Inheritance>,
) -> Result<(), RestoreError> {
    let credentials = |creds: &CredsImage| match options.credentials {
        Some(allowed) if born.is_none_or(|born| !born.has(creds, allowed)) => {
            credentials::calls(creds, allowed)
        }
        _ => Ok(Vec::new()),
    };
    let leaders = credentials(&image.creds)?;
    let calls_of = |(n, thread): (usize, &ThreadImage)| -> Result<Vec<Call>, RestoreError> {
        let mut calls = match born.filter(|_| n > 0) {
            Some(born) => born.lacks(thread, options),
            None => calls_of(thread, options),
        };
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
    let calls: Vec<Vec<Call>> = image.threads.iter().enumerate().map(calls_of).collect::<Result<_, _>>()?;
    let jobs = order.iter().copied().zip(calls.iter().map(|calls| calls.as_slice()));
    let jobs: Vec<(usize, &[Call])> = jobs.filter(|(_, calls)| !calls.is_empty()).collect();
    tracee.must_each(&jobs)?;
    // All new threads have the same, until here.
    let of_new = born.and(order.get(1)).map(|&i| Schedule::of(tracee.tid(i)));
    for (n, (&i, thread)) in order.iter().zip(&image.threads).enumerate() {
        Schedule::set(tracee.tid(i), thread, options, of_new.as_ref().filter(|_| n > 0));
    }
    Ok(())
}

/// When and where a thread may run.
struct Schedule {
    attributes: Option<Vec<u8>>,
    affinity: Option<Vec<u8>>,
    io_priority: Option<u32>,
}

impl Schedule {
    fn of(tid: i32) -> Schedule {
        Schedule {
            attributes: sched::attributes(tid).ok(),
            affinity: sched::affinity(tid).ok(),
            io_priority: sched::io_priority(tid).ok(),
        }
    }

    /// Sets what the thread does not have yet.
    fn set(tid: i32, thread: &ThreadImage, options: RebuildOptions, has: Option<&Schedule>) {
        let lacks = |same: fn(&Schedule, &ThreadImage) -> bool| has.is_none_or(|has| !same(has, thread));
        if options.affinity && lacks(|has, thread| has.affinity.as_ref() == Some(&thread.affinity)) {
            // CPUs that this machine does not have. Before the policy: a deadline needs all of them.
            let _ = sched::set_affinity(tid, &thread.affinity);
        }
        // Not allowed everywhere (real time, a better nice value): then it runs as others do here.
        if options.limits && lacks(|has, thread| has.attributes.as_ref() == Some(&thread.sched)) {
            let _ = sched::set_attributes(tid, &thread.sched);
        }
        if options.limits && lacks(|has, thread| has.io_priority == Some(thread.ioprio)) {
            let _ = sched::set_io_priority(tid, thread.ioprio);
        }
    }
}

/// What a thread must call for itself.
fn calls_of(thread: &ThreadImage, options: RebuildOptions) -> Vec<Call> {
    let args = [thread.clear_child_tid, 0, 0, 0, 0, 0];
    let mut calls = vec![Call::must("set_tid_address", libc::SYS_set_tid_address, args)];
    calls.extend(set_robust_list(thread));
    calls.push(set_altstack(thread));
    calls.extend(register_rseq(thread));
    calls.push(name(thread));
    calls.extend(set_timer_slack(thread));
    if options.misc {
        calls.extend(super::traits::of_thread(&thread.traits, None));
    }
    calls
}

pub fn set_robust_list(thread: &ThreadImage) -> Option<Call> {
    let (head, length) = thread.robust_list;
    let args = [head, length, 0, 0, 0, 0];
    (length != 0).then(|| Call::must("set_robust_list", libc::SYS_set_robust_list, args))
}

pub fn register_rseq(thread: &ThreadImage) -> Option<Call> {
    let rseq = thread.rseq;
    let args = [rseq.addr, rseq.len.into(), 0, rseq.signature.into(), 0, 0];
    (rseq.addr != 0).then(|| Call::must("registering rseq", libc::SYS_rseq, args))
}

pub fn name(thread: &ThreadImage) -> Call {
    let args = [libc::PR_SET_NAME as u64, 0, 0, 0, 0, 0];
    Call::must("naming a thread", libc::SYS_prctl, args).string(1, &thread.comm)
}

pub fn set_timer_slack(thread: &ThreadImage) -> Option<Call> {
    let args = [libc::PR_SET_TIMERSLACK as u64, thread.timer_slack_ns, 0, 0, 0, 0];
    (thread.timer_slack_ns != 0).then(|| Call::must("PR_SET_TIMERSLACK", libc::SYS_prctl, args))
}

pub fn set_altstack(thread: &ThreadImage) -> Call {
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
    let area = xstate::fit(&thread.xstate, was, &tracee.original(0).xstate, CpuImage::here());
    tracee.set_xstate(i, area.map_err(RestoreError::Unfit)?);
    tracee.set_sigmask(i, thread.sigmask);
    Ok(())
}
