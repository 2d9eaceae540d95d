//! A few system calls in one thread of a process whose others run on: from the vDSO, without a stub.

use super::tasks::{self, Seized};
use super::{Thread, Tracee, TraceeError};
use crate::sys::ptrace;
use std::time::{Duration, Instant};

/// How long one thread is waited for before another is tried.
const PATIENCE: Duration = Duration::from_millis(100);

impl Tracee {
    /// Stops thread `tid` of a process, and no other. For [`Tracee::call_without_stub`] and [`Tracee::thaw`] only.
    pub(crate) fn hold_one(pid: i32, tid: i32) -> Result<Tracee, TraceeError> {
        let mut tracee = Tracee::of(pid, tasks::open_mem(pid)?);
        match tasks::seize(pid, tid)? {
            Seized::Yes => {}
            Seized::Gone | Seized::Ended => return Err(TraceeError::Died { tid }),
        }
        let stopped = tracee.stop_one(tid);
        if stopped.is_err() && tracee.threads.is_empty() {
            tasks::let_go(tid);
        }
        stopped.map(|()| tracee)
    }

    fn stop_one(&mut self, tid: i32) -> Result<(), TraceeError> {
        ptrace::interrupt(tid).map_err(|e| TraceeError::kernel("PTRACE_INTERRUPT", tid, e))?;
        match tasks::wait_for_stop(tid, Instant::now() + PATIENCE)? {
            None => return Err(TraceeError::Died { tid }),
            Some(group) => self.group_stop = group,
        }
        // Not allowed everywhere, and needed only where there are filters.
        let _ = ptrace::set_options(tid, self.options | ptrace::O_SUSPEND_SECCOMP);
        self.threads.push(Thread::new(tasks::read_thread(&self.mem, tid)?));
        Ok(())
    }

    /// Runs one system call in the first thread, which must not need memory; gives the kernel's raw result.
    pub(crate) fn call_without_stub(&mut self, nr: libc::c_long, args: [u64; 6]) -> Result<i64, TraceeError> {
        if ptrace::dispatches_calls(self.tid(0)) {
            let what = "it handles its own system calls (PR_SET_SYSCALL_USER_DISPATCH)";
            return Err(TraceeError::Unfit { pid: self.pid, what });
        }
        let gate = self.vdso_syscall(&self.maps()?)?;
        self.call_at(0, gate, nr, args)
    }
}
