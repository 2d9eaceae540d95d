//! The deputy: the original process, emptied and parked while its guest runs elsewhere.
//!
//! Its PID, parent, descriptors, terminal and command line stay. Its memory is given back. All
//! signals are blocked, its leader waits for them in `rt_sigtimedwait` in the [`stub`], and its other
//! threads wait in `pause`, untraced. The tracer of the leader sees each signal, with all its
//! siginfo, as the exit of that call. When the tracer dies, the deputy stays parked and
//! signals queue in the kernel, so that nothing is lost; a later tracer finds the last one in the slot.
//!
//! Only the leader waits for signals: with several threads waiting, real-time signals came out of
//! order. What is sent to another thread alone is collected by [`Deputy::thread_signals`].

mod fds;
mod home_coming;
mod park;

pub use fds::{install_fds, pass_fds, pass_one};
pub use home_coming::{
    drain_pending, drop_thread_signals, reap_ended_children, reconcile_threads, requeue_signal, take_slot,
};

use crate::sys::ptrace::{self, Regs, SIGINFO_LEN, Stop, SyscallSide};
use crate::tracee::{ALL_SIGNALS, STOP_LIMIT, Tracee, TraceeError, stub};
use nix::errno::Errno;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// A `siginfo_t` as the kernel keeps it.
pub type SigInfo = [u8; SIGINFO_LEN];

/// The signal's number in a siginfo.
pub fn signal_number(info: &SigInfo) -> i32 {
    i32::from_le_bytes(info[..4].try_into().expect("four bytes"))
}

/// What has happened to a deputy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeputyEvent {
    /// A signal was sent to the process; call [`Deputy::resume`] when it has been passed on.
    Signal(Box<SigInfo>),
    /// It was stopped by this signal (by `kill -STOP`, or by [`Deputy::stop`]).
    Stopped(u8),
    /// It goes on after a stop.
    Continued,
    /// It is dead, with this wait status (somebody has killed it).
    Died(i32),
}

/// A parked process, its leader traced by this OS thread.
pub struct Deputy {
    pid: i32,
    tids: Vec<i32>,
    stub: u64,
    mem: std::fs::File,
    /// A signal is in the slot and not yet passed on.
    holding: bool,
    /// Caught while something else was done with the leader; told by the next [`Deputy::poll`].
    caught: VecDeque<SigInfo>,
    stopped: bool,
    not_send: std::marker::PhantomData<*const ()>,
}

/// How a process ended, for [`Deputy::end`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// By `exit` with this code.
    Exited(u8),
    /// By this signal, with or without a core.
    Signalled {
        /// Which.
        signal: u8,
        /// The core flag of the wait status.
        core: bool,
    },
}

impl End {
    /// From a raw wait status; `None` if it does not tell an end.
    pub fn from_status(status: i32) -> Option<End> {
        if libc::WIFEXITED(status) {
            Some(End::Exited(libc::WEXITSTATUS(status) as u8))
        } else if libc::WIFSIGNALED(status) {
            Some(End::Signalled { signal: libc::WTERMSIG(status) as u8, core: libc::WCOREDUMP(status) })
        } else {
            None
        }
    }
}

impl Deputy {
    /// Its PID.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// The next thing that has happened, if any; never blocks. A SIGCHLD tells that there may be one.
    pub fn poll(&mut self) -> Result<Option<DeputyEvent>, TraceeError> {
        if let Some(info) = self.caught.pop_front() {
            return Ok(Some(DeputyEvent::Signal(Box::new(info))));
        }
        // Stops that mean nothing to the caller are passed; they cannot come without end because
        // each is caused by one of the caller's own actions or by one signal.
        for _ in 0..64 {
            let Some(stop) = ptrace::wait(self.pid, false).map_err(|e| self.kernel("waitpid", e))? else {
                return Ok(None);
            };
            if let Some(event) = self.handle(stop)? {
                return Ok(Some(event));
            }
        }
        Ok(None)
    }

    fn handle(&mut self, stop: Stop) -> Result<Option<DeputyEvent>, TraceeError> {
        match stop {
            Stop::Gone(status) => return Ok(Some(DeputyEvent::Died(status))),
            Stop::Syscall => {
                if let Some(info) = self.caught()? {
                    self.holding = true;
                    return Ok(Some(DeputyEvent::Signal(Box::new(info))));
                }
                self.go(0)?;
            }
            Stop::Group(signal) => {
                // Blocked again: `stop` had let this one through.
                self.block_all()?;
                ptrace::listen(self.pid).map_err(|e| self.kernel("PTRACE_LISTEN", e))?;
                if !std::mem::replace(&mut self.stopped, true) {
                    return Ok(Some(DeputyEvent::Stopped(signal)));
                }
            }
            Stop::Event => {
                self.go(0)?;
                if std::mem::replace(&mut self.stopped, false) {
                    return Ok(Some(DeputyEvent::Continued));
                }
            }
            Stop::Signal(signal) => self.go(signal)?,
            Stop::Clone => self.go(0)?,
        }
        Ok(None)
    }

    /// The signal that the park loop has caught, if the leader is at the exit of its call.
    fn caught(&self) -> Result<Option<SigInfo>, TraceeError> {
        let side = self.side()?;
        let regs = ptrace::regs(self.pid).map_err(|e| self.kernel("reading registers", e))?;
        let parked = regs.rip() == self.stub + stub::CODE_PARKED;
        if side != SyscallSide::Exit || !parked || regs.rax() as i64 <= 0 {
            return Ok(None);
        }
        self.slot()
    }

    fn side(&self) -> Result<SyscallSide, TraceeError> {
        ptrace::syscall_side(self.pid).map_err(|e| self.kernel("PTRACE_GET_SYSCALL_INFO", e))
    }

    fn slot(&self) -> Result<Option<SigInfo>, TraceeError> {
        let mut info = [0; SIGINFO_LEN];
        self.read(stub::SLOT, &mut info)?;
        Ok((signal_number(&info) != 0).then_some(info))
    }

    /// The signal told last has been passed on: waits for the next.
    pub fn resume(&mut self) -> Result<(), TraceeError> {
        if !std::mem::replace(&mut self.holding, false) {
            return Ok(());
        }
        self.write(stub::SLOT, &[0; SIGINFO_LEN])?;
        self.enter_park_loop()?;
        self.go(0)
    }

    /// Whether a told signal has not been passed on yet.
    pub fn is_holding(&self) -> bool {
        self.holding
    }

    /// Stops it as the guest was stopped, so that its parent sees it.
    pub fn stop(&mut self, signal: u8) -> Result<(), TraceeError> {
        if i32::from(signal) == libc::SIGSTOP {
            self.kill(libc::SIGSTOP);
            return Ok(());
        }
        self.interrupted()?;
        self.let_through(signal)?;
        self.enter_park_loop()?;
        self.go(0)
    }

    /// Ends it as the guest has ended; consumes the deputy. Its parent sees just that.
    pub fn end(mut self, end: End) -> Result<(), TraceeError> {
        match end {
            End::Signalled { signal, .. } if i32::from(signal) == libc::SIGKILL => {
                self.kill_and_reap();
                return Ok(());
            }
            _ => {}
        }
        if self.stopped {
            // A stopped process does not run what follows.
            self.kill(libc::SIGCONT);
        }
        self.interrupted()?;
        match end {
            End::Exited(code) => {
                let mut regs = self.regs_at(stub::CODE_SYSCALL)?;
                regs.set_rax(libc::SYS_exit_group as u64);
                regs.set_rdi(code.into());
                self.set_regs(&regs)?;
            }
            End::Signalled { signal, core } => {
                if !core {
                    self.no_core_file();
                }
                self.let_through(signal)?;
                self.enter_park_loop()?;
            }
        }
        ptrace::detach(self.pid, 0).map_err(|e| self.kernel("PTRACE_DETACH", e))
    }

    /// Kills it outright: its guest is lost.
    pub fn kill(&self, signal: i32) {
        let _ = nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(self.pid),
            nix::sys::signal::Signal::try_from(signal).ok(),
        );
    }

    /// Kills it, and takes note of that as its tracer, so that its parent hears of it at once.
    pub fn kill_and_reap(self) {
        self.kill(libc::SIGKILL);
        let deadline = Instant::now() + STOP_LIMIT;
        while Instant::now() < deadline {
            match ptrace::wait(self.pid, false) {
                Ok(Some(Stop::Gone(_))) | Err(_) => return,
                Ok(_) => std::thread::sleep(Duration::from_micros(50)),
            }
        }
    }

    /// Freezes it again, for the home-coming: gives a [`Tracee`] with the stub in place.
    ///
    /// Gives the signals too that it had caught and that nobody was told of.
    pub fn freeze(mut self) -> Result<(Tracee, Vec<SigInfo>), TraceeError> {
        self.interrupted()?;
        self.enter_park_loop()?;
        ptrace::detach(self.pid, 0).map_err(|e| self.kernel("PTRACE_DETACH", e))?;
        Ok((Tracee::freeze(self.pid)?, self.caught.into()))
    }

    /// Brings the leader to a stop; a signal that it catches on the way is kept for later.
    fn interrupted(&mut self) -> Result<(), TraceeError> {
        if self.holding {
            self.keep_caught()?;
            return Ok(());
        }
        ptrace::interrupt(self.pid).map_err(|e| self.kernel("PTRACE_INTERRUPT", e))?;
        let deadline = Instant::now() + STOP_LIMIT;
        while Instant::now() < deadline {
            match ptrace::wait(self.pid, false).map_err(|e| self.kernel("waitpid", e))? {
                Some(Stop::Event | Stop::Group(_)) => return Ok(()),
                Some(Stop::Syscall) if self.caught()?.is_some() => {
                    self.holding = true;
                    return self.keep_caught();
                }
                Some(Stop::Gone(_)) => return Err(TraceeError::Died { tid: self.pid }),
                Some(Stop::Signal(signal)) => self.go(signal)?,
                // Any stop takes the interrupt's place (kernel/signal.c, `ptrace_stop`): at the exit of
                // the interrupted call this one will do, at an entry the interrupt is asked for anew.
                Some(Stop::Syscall) if self.side()? == SyscallSide::Exit => return Ok(()),
                Some(Stop::Syscall | Stop::Clone) => {
                    self.go(0)?;
                    ptrace::interrupt(self.pid).map_err(|e| self.kernel("PTRACE_INTERRUPT", e))?;
                }
                None => std::thread::sleep(Duration::from_micros(50)),
            }
        }
        Err(TraceeError::WontStop {
            tid: self.pid,
            millis: STOP_LIMIT.as_millis() as u64,
            doing: "in a call of its own".into(),
        })
    }

    fn keep_caught(&mut self) -> Result<(), TraceeError> {
        self.caught.extend(self.slot()?);
        self.write(stub::SLOT, &[0; SIGINFO_LEN])?;
        self.holding = false;
        Ok(())
    }

    /// Closes descriptors that the guest has closed: at home somebody may wait for that end.
    pub fn close_fds(&mut self, fds: &[i32]) -> Result<(), TraceeError> {
        if self.stopped || fds.is_empty() {
            // It runs nothing while it is stopped; the home-coming closes them as well.
            return Ok(());
        }
        self.interrupted()?;
        for &fd in fds {
            self.inject(libc::SYS_close, [fd as u64, 0, 0, 0, 0, 0])?;
        }
        self.enter_park_loop()?;
        self.go(0)
    }

    /// Sets the default action of `signal`, sends it to the leader and unblocks just it.
    fn let_through(&mut self, signal: u8) -> Result<(), TraceeError> {
        let number = u64::from(signal);
        self.write(stub::SCRATCH, &[0; 32])?;
        let scratch = self.stub + stub::SCRATCH;
        self.inject(libc::SYS_rt_sigaction, [number, scratch, 0, 8, 0, 0])?;
        let tid = self.pid_inside()?;
        self.inject(libc::SYS_tgkill, [tid, tid, number, 0, 0, 0])?;
        ptrace::set_sigmask(self.pid, ALL_SIGNALS & !(1 << (number - 1)))
            .map_err(|e| self.kernel("setting the signal mask", e))
    }

    /// Its PID as it knows it itself.
    fn pid_inside(&mut self) -> Result<u64, TraceeError> {
        Ok(self.inject(libc::SYS_getpid, [0; 6])? as u64)
    }

    fn inject(&mut self, nr: libc::c_long, args: [u64; 6]) -> Result<i64, TraceeError> {
        let mut regs = self.regs_at(stub::CODE_SYSCALL)?;
        let [a, b, c, d, _, _] = args;
        regs.set_rax(nr as u64);
        regs.set_rdi(a);
        regs.set_rsi(b);
        regs.set_rdx(c);
        regs.set_r10(d);
        self.set_regs(&regs)?;
        let mut entered = false;
        for _ in 0..64 {
            self.go(0)?;
            match ptrace::wait(self.pid, true).map_err(|e| self.kernel("waitpid", e))? {
                Some(Stop::Syscall) if entered => {
                    let regs = ptrace::regs(self.pid).map_err(|e| self.kernel("reading registers", e))?;
                    return Ok(regs.rax() as i64);
                }
                Some(Stop::Syscall) => entered = true,
                Some(Stop::Gone(_)) => return Err(TraceeError::Died { tid: self.pid }),
                _ => {}
            }
        }
        Err(TraceeError::Runaway { tid: self.pid, nr, stops: 64 })
    }

    fn enter_park_loop(&mut self) -> Result<(), TraceeError> {
        let mut regs = self.regs_at(stub::CODE_PARK)?;
        regs.set_r12(self.stub + stub::SLOT);
        regs.set_r13(self.stub + stub::SIGSET);
        self.set_regs(&regs)
    }

    fn regs_at(&self, offset: u64) -> Result<Regs, TraceeError> {
        let mut regs = ptrace::regs(self.pid).map_err(|e| self.kernel("reading registers", e))?;
        regs.set_rip(self.stub + offset);
        regs.set_orig_rax(u64::MAX);
        regs.set_rax(0);
        Ok(regs)
    }

    fn set_regs(&self, regs: &Regs) -> Result<(), TraceeError> {
        ptrace::set_regs(self.pid, regs).map_err(|e| self.kernel("setting registers", e))
    }

    fn block_all(&self) -> Result<(), TraceeError> {
        ptrace::set_sigmask(self.pid, ALL_SIGNALS).map_err(|e| self.kernel("setting the signal mask", e))
    }

    fn go(&self, signal: u8) -> Result<(), TraceeError> {
        ptrace::cont_to_syscall(self.pid, signal).map_err(|e| self.kernel("PTRACE_SYSCALL", e))
    }

    fn no_core_file(&self) {
        use nix::sys::resource::Resource;
        let _ = crate::sys::rlimit::lower_soft(self.pid, Resource::RLIMIT_CORE, 0);
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), TraceeError> {
        use std::os::unix::fs::FileExt;
        self.mem.read_exact_at(buf, self.stub + offset).map_err(|e| self.io("reading memory", &e))
    }

    fn write(&self, offset: u64, buf: &[u8]) -> Result<(), TraceeError> {
        use std::os::unix::fs::FileExt;
        self.mem.write_all_at(buf, self.stub + offset).map_err(|e| self.io("writing memory", &e))
    }

    fn kernel(&self, operation: &'static str, errno: Errno) -> TraceeError {
        TraceeError::kernel(operation, self.pid, errno)
    }

    fn io(&self, operation: &'static str, error: &std::io::Error) -> TraceeError {
        let errno = error.raw_os_error().map_or(Errno::EFAULT, Errno::from_raw);
        TraceeError::kernel(operation, self.pid, errno)
    }
}
