//! Children made from inside a process that is being rebuilt.
//!
//! A child made by clone3(2) in its parent starts with the parent's memory, copy-on-write, and with
//! all else that fork inherits. It is seized by the kernel before it runs an instruction (ptrace(2),
//! `PTRACE_O_TRACEFORK`), and stands in its own copy of the stub, in the hold loop.

use super::{Thread, Tracee, TraceeError, tasks};
use crate::sys::ptrace;
use std::time::Instant;

/// What a child is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offspring {
    /// Its PID, in the PID namespace of who makes it.
    pub pid: i32,
    /// `CLONE_*` flags. With `CLONE_PARENT` it is a sibling of who makes it, and tells of its end by
    /// the same signal.
    pub flags: u64,
    /// The signal by which it tells its parent of its end; 0: by none.
    pub exit_signal: i32,
}

impl Tracee {
    /// The kernel kills it if this tracer ends before it is let go.
    pub fn end_with_tracer(&mut self) -> Result<(), TraceeError> {
        self.options = ptrace::O_TRACESYSGOOD | ptrace::O_EXITKILL;
        for thread in &self.threads {
            let tid = thread.found.tid;
            ptrace::set_options(tid, self.options)
                .map_err(|e| TraceeError::kernel("PTRACE_SETOPTIONS", tid, e))?;
        }
        Ok(())
    }

    /// Makes a child by clone3(2) in thread `i`. It is frozen, with the same stub.
    pub fn make_child(&mut self, i: usize, child: Offspring) -> Result<Tracee, TraceeError> {
        let maker = self.tid(i);
        let scratch = self.scratch();
        // struct clone_args: flags pidfd child_tid parent_tid exit_signal stack stack_size tls
        // set_tid set_tid_size cgroup
        let mut words = [0u64; 11];
        words[0] = child.flags;
        if child.flags & libc::CLONE_PARENT as u64 == 0 {
            words[4] = child.exit_signal as u64;
        }
        words[8] = scratch + 128;
        words[9] = 1;
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.write_mem(scratch, &bytes)?;
        self.write_mem(scratch + 128, &child.pid.to_le_bytes())?;
        let options = self.options | ptrace::O_TRACEFORK | ptrace::O_TRACEVFORK | ptrace::O_TRACECLONE;
        let at = |operation| move |errno| TraceeError::kernel(operation, maker, errno);
        ptrace::set_options(maker, options).map_err(at("PTRACE_SETOPTIONS"))?;
        self.made = None;
        let got = self.must(i, "making a child", libc::SYS_clone3, [scratch, 88, 0, 0, 0, 0]);
        ptrace::set_options(maker, self.options).map_err(at("PTRACE_SETOPTIONS"))?;
        got?;
        // The PID as this tracer knows it, which may be in another namespace.
        let Some(pid) = self.made.take() else {
            return Err(TraceeError::Unfit { pid: self.pid, what: "the child just made is not there" });
        };
        self.take_over(pid).inspect_err(|_| {
            let _ = crate::sys::wait::kill(pid, libc::SIGKILL);
        })
    }

    fn take_over(&self, pid: i32) -> Result<Tracee, TraceeError> {
        if tasks::wait_for_stop(pid, Instant::now() + super::STOP_LIMIT)?.is_none() {
            return Err(TraceeError::Died { tid: pid });
        }
        // It has inherited those by which it was caught.
        ptrace::set_options(pid, self.options)
            .map_err(|e| TraceeError::kernel("PTRACE_SETOPTIONS", pid, e))?;
        let mem = tasks::open_mem(pid)?;
        let found = tasks::read_thread(&mem, pid)?;
        let mut leader = Thread::new(found);
        // All signals are blocked, and its registers are of the stub.
        leader.masked = true;
        leader.touched = true;
        let mut child = Tracee::of(pid, mem);
        (child.threads, child.stub, child.options) = (vec![leader], self.stub, self.options);
        Ok(child)
    }
}
