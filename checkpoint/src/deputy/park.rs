//! From a frozen process to a deputy.

use super::Deputy;
use crate::image::{Backing, ProcessImage};
use crate::sys::ptrace::{self, SIGINFO_LEN};
use crate::tracee::stub::{self, PAGE, Phase};
use crate::tracee::{ALL_SIGNALS, Tracee, TraceeError};
use std::collections::VecDeque;
use std::fs::OpenOptions;
use std::marker::PhantomData;

/// `rseq(2)`: unregister.
const RSEQ_FLAG_UNREGISTER: u64 = 1;

impl Deputy {
    /// Gives the memory of a frozen process back and parks it. `image` is what was read of it: its
    /// guest must run elsewhere by now, because there is no way back but [`Deputy::freeze`] and a
    /// rebuild.
    pub fn park(mut tracee: Tracee, image: &ProcessImage) -> Result<Deputy, TraceeError> {
        tracee.install_stub(&[])?;
        disarm_timers(&mut tracee, image)?;
        unregister_rseq(&mut tracee)?;
        tracee.write_journal(Phase::Parked)?;
        empty(&mut tracee, image)?;
        Deputy::enter(tracee)
    }

    /// Parks a deputy again: one that was frozen for a home-coming that came to nothing.
    pub fn park_again(mut tracee: Tracee, image: &ProcessImage) -> Result<Deputy, TraceeError> {
        disarm_timers(&mut tracee, image)?;
        // Those that the rebuild had registered already.
        for i in 0..tracee.thread_count() {
            let rseq = ptrace::rseq(tracee.tid(i)).unwrap_or_default();
            if rseq.addr != 0 {
                let args = [rseq.addr, rseq.len.into(), RSEQ_FLAG_UNREGISTER, rseq.signature.into(), 0, 0];
                tracee.syscall(i, libc::SYS_rseq, args)?;
            }
        }
        tracee.write_journal(Phase::Parked)?;
        empty(&mut tracee, image)?;
        Deputy::enter(tracee)
    }

    fn enter(mut tracee: Tracee) -> Result<Deputy, TraceeError> {
        let pid = tracee.pid();
        let (stub, _) = tracee.stub_range().ok_or(TraceeError::Unfit { pid, what: "it has no stub" })?;
        tracee.write_mem(stub + stub::SLOT, &[0; SIGINFO_LEN])?;
        let mem = OpenOptions::new()
            .read(true)
            .write(true)
            .open(format!("/proc/{pid}/mem"))
            .map_err(|_| TraceeError::Died { tid: pid })?;
        for i in 0..tracee.thread_count() {
            let mut regs = tracee.original(i).regs;
            regs.set_rip(stub + if i == 0 { stub::CODE_PARK } else { stub::CODE_HOLD });
            regs.set_orig_rax(u64::MAX);
            regs.set_rax(0);
            regs.set_r12(stub + stub::SLOT);
            regs.set_r13(stub + stub::SIGSET);
            tracee.set_regs(i, regs);
            tracee.set_sigmask(i, ALL_SIGNALS);
        }
        let stopped = tracee.group_stop().is_some();
        tracee.apply_settings()?;
        let tids = tracee.into_tids();
        for &tid in &tids[1..] {
            ptrace::detach(tid, 0).map_err(|e| TraceeError::kernel("PTRACE_DETACH", tid, e))?;
        }
        let deputy = Deputy {
            pid,
            tids,
            stub,
            mem,
            holding: false,
            caught: VecDeque::new(),
            stopped,
            not_send: PhantomData,
        };
        deputy.go(0)?;
        Ok(deputy)
    }
}

/// A timer left armed here would fire beside the guest's own.
fn disarm_timers(tracee: &mut Tracee, image: &ProcessImage) -> Result<(), TraceeError> {
    let scratch = tracee.scratch();
    tracee.write_mem(scratch, &[0; 32])?;
    for which in 0..3 {
        tracee.syscall(0, libc::SYS_setitimer, [which, scratch, 0, 0, 0, 0])?;
    }
    for timer in &image.timers.posix {
        tracee.syscall(0, libc::SYS_timer_delete, [timer.id as u64, 0, 0, 0, 0, 0])?;
    }
    Ok(())
}

/// The kernel writes to a registered `struct rseq` on every return to user mode: without its memory
/// that is an endless SIGSEGV.
fn unregister_rseq(tracee: &mut Tracee) -> Result<(), TraceeError> {
    for i in 0..tracee.thread_count() {
        let rseq = tracee.original(i).rseq;
        if rseq.addr == 0 {
            continue;
        }
        let args = [rseq.addr, rseq.len.into(), RSEQ_FLAG_UNREGISTER, rseq.signature.into(), 0, 0];
        tracee.must(i, "unregistering rseq", libc::SYS_rseq, args)?;
    }
    Ok(())
}

/// Unmaps everything but the stub, the vDSO and its data, and the pages with the command line and the
/// environment, so that `ps` at home shows what it always showed.
fn empty(tracee: &mut Tracee, image: &ProcessImage) -> Result<(), TraceeError> {
    let mut keep: Vec<(u64, u64)> = image
        .mm
        .vmas
        .iter()
        .filter(|vma| matches!(vma.backing, Backing::Vdso | Backing::Vvar | Backing::Vsyscall))
        .map(|vma| (vma.start, vma.end))
        .collect();
    if let Some((at, len)) = tracee.stub_range() {
        keep.push((at, at + len));
    }
    let [.., arg_start, _, _, env_end] = image.mm.layout;
    if arg_start < env_end {
        keep.push((arg_start & !(PAGE - 1), env_end.next_multiple_of(PAGE)));
    }
    keep.sort_unstable();
    for (start, end) in gaps(&tracee.ranges()?, &keep) {
        tracee.must(0, "unmapping", libc::SYS_munmap, [start, end - start, 0, 0, 0, 0])?;
    }
    Ok(())
}

/// The mapped ranges outside `keep` (sorted), as few as possible: one munmap(2) may span holes.
fn gaps(mapped: &[(u64, u64, String)], keep: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let mut out: Vec<(u64, u64)> = Vec::new();
    for &(start, end, _) in mapped {
        // Not an address that user space may name.
        if start >= 0xffff_8000_0000_0000 {
            continue;
        }
        let mut from = start;
        for &(keep_start, keep_end) in keep.iter().filter(|&&(s, e)| s < end && e > start) {
            if keep_start > from {
                out.push((from, keep_start));
            }
            from = from.max(keep_end);
        }
        if from < end {
            out.push((from, end));
        }
    }
    let mut merged: Vec<(u64, u64)> = Vec::new();
    for (start, end) in out {
        match merged.last_mut() {
            Some(last) if !keep.iter().any(|&(s, e)| s < start && e > last.1) => last.1 = end,
            _ => merged.push((start, end)),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::gaps;

    #[test]
    fn gaps_keep_what_is_kept() {
        let maps: Vec<_> = [(0x1000, 0x3000), (0x5000, 0x9000), (0xa000, 0xb000), (0xf000, 0x10000)]
            .map(|(s, e)| (s, e, String::new()))
            .into();
        assert_eq!(gaps(&maps, &[(0x6000, 0x7000)]), [(0x1000, 0x6000), (0x7000, 0x10000)]);
        assert_eq!(gaps(&maps, &[(0xa000, 0xb000)]), [(0x1000, 0x9000), (0xf000, 0x10000)]);
        assert_eq!(gaps(&maps, &[]), [(0x1000, 0x10000)]);
        assert_eq!(gaps(&maps, &[(0, 0x20000)]), []);
    }
}
