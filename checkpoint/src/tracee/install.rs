//! Mapping the stub, into one process or into many at the same time.

use super::stub::{self, Phase};
use super::{Stub, Tracee, TraceeError};
use crate::sys::ptrace;
use nix::errno::Errno;

/// Where a stub is to be.
#[derive(Clone, Copy)]
struct Plan {
    at: u64,
    len: u64,
    /// A `syscall` instruction in the vDSO.
    gate: u64,
}

impl Plan {
    /// Never both written and executed (PR_SET_MDWE): a tracer may write to what cannot be written.
    fn map(&self) -> [u64; 6] {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let prot = libc::PROT_READ | libc::PROT_EXEC;
        [self.at, self.len, prot as u64, flags as u64, u64::MAX, 0]
    }

    /// All but the code, before a batch writes its results there.
    fn protect(&self) -> [u64; 6] {
        let data = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        [self.at + stub::PAGE, self.len - stub::PAGE, data, 0, 0, 0]
    }
}

/// Maps a stub into each that has none, at the same time: while one is looked after, the others run on
/// other CPUs.
pub fn install_stubs(tracees: &mut [&mut Tracee]) -> Result<(), TraceeError> {
    let mut planned: Vec<(usize, Plan)> = Vec::with_capacity(tracees.len());
    for (who, tracee) in tracees.iter_mut().enumerate().filter(|(_, tracee)| tracee.stub.is_none()) {
        planned.push((who, tracee.plan(&[])?));
    }
    let calls = planned.iter().map(|&(who, plan)| (who, plan.gate, libc::SYS_mmap, plan.map())).collect();
    let mapped = call_in_each(tracees, calls);
    let (mut there, mut others) = (Vec::with_capacity(planned.len()), Vec::new());
    for ((who, plan), got) in planned.into_iter().zip(mapped) {
        if matches!(got, Ok(got) if got == plan.at as i64) {
            // Whatever becomes of the others, it is unmapped again.
            tracees[who].stub = Some(Stub { at: plan.at, len: plan.len, gate: Some(plan.gate) });
            there.push((who, plan));
        } else {
            others.push((who, got));
        }
    }
    let calls =
        there.iter().map(|&(who, plan)| (who, plan.gate, libc::SYS_mprotect, plan.protect())).collect();
    for ((who, plan), got) in there.into_iter().zip(call_in_each(tracees, calls)) {
        match got? {
            0 => tracees[who].write_stub(plan)?,
            got => return Err(tracees[who].inside("protecting the stub", got)),
        }
    }
    for (who, got) in others {
        match got? {
            // Another one with the same memory has just got its stub there.
            got if got == -i64::from(libc::EEXIST) => tracees[who].install_stub(&[])?,
            got => return Err(tracees[who].inside("mapping the stub", got)),
        }
    }
    Ok(())
}

/// One call in the leader of each: who, from where, which.
type Calls = Vec<OneCall>;
type OneCall = (usize, u64, libc::c_long, [u64; 6]);

/// Runs the calls, and gives the kernel's raw result of each. All stand still afterwards, whatever fails.
fn call_in_each(tracees: &mut [&mut Tracee], calls: Calls) -> Vec<Result<i64, TraceeError>> {
    let go_on =
        |tid: i32| ptrace::cont_to_syscall(tid, 0).map_err(|e| TraceeError::kernel("PTRACE_SYSCALL", tid, e));
    let begin = |&(who, at, nr, args): &OneCall| {
        tracees[who].prepare_call(0, at, nr, args)?;
        go_on(tracees[who].tid(0))
    };
    let begun: Vec<Result<(), TraceeError>> = calls.iter().map(begin).collect();
    // To the entry, all of them, and then to the exit.
    let enter = |(&(who, _, nr, _), begun): (&OneCall, Result<(), TraceeError>)| {
        begun?;
        let tid = tracees[who].tid(0);
        tracees[who].await_syscall_stop(tid, nr)?;
        go_on(tid)
    };
    let entered: Vec<Result<(), TraceeError>> = calls.iter().zip(begun).map(enter).collect();
    let exit = |(&(who, _, nr, _), entered): (&OneCall, Result<(), TraceeError>)| {
        entered?;
        let tid = tracees[who].tid(0);
        tracees[who].await_exit(tid, nr)
    };
    calls.iter().zip(entered).map(exit).collect()
}

impl Tracee {
    /// Maps the stub at a free address outside `avoid` (ranges of start and end).
    ///
    /// Does nothing if there is one already.
    pub fn install_stub(&mut self, avoid: &[(u64, u64)]) -> Result<(), TraceeError> {
        if self.stub.is_some() {
            return Ok(());
        }
        let mut plan = self.plan(avoid)?;
        let mut got = self.call_at(0, plan.gate, libc::SYS_mmap, plan.map())?;
        if got == -i64::from(libc::EEXIST) {
            plan = self.plan(avoid)?;
            got = self.call_at(0, plan.gate, libc::SYS_mmap, plan.map())?;
        }
        if got != plan.at as i64 {
            return Err(self.inside("mapping the stub", got));
        }
        let got = self.call_at(0, plan.gate, libc::SYS_mprotect, plan.protect())?;
        if got != 0 {
            return Err(self.inside("protecting the stub", got));
        }
        self.write_stub(plan)
    }

    fn plan(&mut self, avoid: &[(u64, u64)]) -> Result<Plan, TraceeError> {
        self.refuse_dispatchers()?;
        let len = stub::stub_len(self.threads.len() + stub::MORE_THREADS);
        // Of somebody who has the same memory and was frozen later they are old: then the place is taken, and
        // another one is looked for.
        let maps = self.maps.take().map_or_else(|| self.maps_as_told(), Ok)?;
        let maps = String::from_utf8_lossy(&maps);
        Ok(Plan { at: self.free_range(&maps, len, avoid)?, len, gate: self.vdso_syscall(&maps)? })
    }

    fn write_stub(&mut self, plan: Plan) -> Result<(), TraceeError> {
        let mut page = stub::CODE.to_vec();
        page.resize(stub::MAGIC_AT as usize, 0xcc);
        page.extend_from_slice(stub::MAGIC);
        page.resize(stub::CODE_BATCH as usize, 0xcc);
        page.extend_from_slice(&stub::BATCH_CODE);
        self.write_mem(plan.at, &page)?;
        self.write_mem(plan.at + stub::SIGSET, &u64::MAX.to_le_bytes())?;
        self.stub = Some(Stub { at: plan.at, len: plan.len, gate: Some(plan.gate) });
        self.write_journal(Phase::Frozen)
    }

    /// Limits by name: what of them is left is known before a freeze, but not all of it, and not for long.
    fn inside(&self, operation: &'static str, got: i64) -> TraceeError {
        let unfit = |what| TraceeError::Unfit { pid: self.pid, what };
        match Errno::from_raw(-got as i32) {
            Errno::ENOMEM => unfit(
                "it may not map what a freeze needs in it (its limits of address space and data, vm.max_map_count)",
            ),
            Errno::EAGAIN => unfit(
                "it may not lock what a freeze needs in it (mlockall with MCL_FUTURE, and its limit of locked memory)",
            ),
            errno => TraceeError::Inside { operation, tid: self.pid, errno },
        }
    }

    /// A thread that has its own system calls handed to itself would be handed the injected ones.
    fn refuse_dispatchers(&self) -> Result<(), TraceeError> {
        match (0..self.thread_count()).any(|i| ptrace::dispatches_calls(self.tid(i))) {
            true => Err(TraceeError::Unfit {
                pid: self.pid,
                what: "it handles its own system calls (PR_SET_SYSCALL_USER_DISPATCH)",
            }),
            false => Ok(()),
        }
    }
}
