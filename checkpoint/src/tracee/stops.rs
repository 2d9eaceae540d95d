//! Group stops (signal(7)) of a process that stands in its stub.

use super::{ALL_SIGNALS, STOP_LIMIT, Tracee, TraceeError};
use crate::sys::ptrace::{self, Stop};
use crate::sys::wait;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// How long a signal other than SIGSTOP may take: it does nothing in an orphaned group.
const SIGNAL_LIMIT: Duration = Duration::from_millis(200);

impl Tracee {
    /// Stops it by `signal`, all its threads; by SIGSTOP where the other does not stop it. It stays in the
    /// stub, and calls are injected as before; when it is let go, it stands stopped. Its parent is told.
    pub fn stop_by(&mut self, signal: i32) -> Result<(), TraceeError> {
        let stops = [libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU].contains(&signal);
        if stops && self.try_stop(signal, SIGNAL_LIMIT)? {
            return Ok(());
        }
        match self.try_stop(libc::SIGSTOP, STOP_LIMIT)? {
            true => Ok(()),
            false => Err(TraceeError::Unfit { pid: self.pid, what: "it does not stop again" }),
        }
    }

    fn try_stop(&mut self, signal: i32, limit: Duration) -> Result<bool, TraceeError> {
        let pid = self.pid;
        wait::kill(pid, libc::SIGSTOP).map_err(|errno| TraceeError::kernel("kill", pid, errno))?;
        let mut running: BTreeSet<i32> = self.threads.iter().map(|thread| thread.found.tid).collect();
        let at = |operation, tid| move |errno| TraceeError::kernel(operation, tid, errno);
        let all = running.clone();
        for &tid in &all {
            // Blocked, it would be queued instead (ptrace_signal in kernel/signal.c).
            ptrace::set_sigmask(tid, ALL_SIGNALS & !(1 << (signal - 1)))
                .map_err(at("setting the signal mask", tid))?;
            ptrace::cont(tid, 0).map_err(at("PTRACE_CONT", tid))?;
        }
        let mut deadline = Instant::now() + STOP_LIMIT;
        while !running.is_empty() {
            let mut nothing = true;
            for tid in running.clone() {
                let sent = match ptrace::wait(tid, false).map_err(at("waitpid", tid))? {
                    None => continue,
                    Some(Stop::Gone(_)) => return Err(TraceeError::Died { tid }),
                    Some(Stop::Group(_)) => {
                        running.remove(&tid);
                        nothing = false;
                        continue;
                    }
                    // Any signal may take its place here (ptrace(2)).
                    Some(Stop::Signal(sent)) if i32::from(sent) == libc::SIGSTOP => {
                        deadline = Instant::now() + limit;
                        signal as u8
                    }
                    Some(_) => 0,
                };
                nothing = false;
                ptrace::cont(tid, sent).map_err(at("PTRACE_CONT", tid))?;
            }
            if nothing && Instant::now() > deadline {
                self.hold(&running)?;
                break;
            }
            if nothing {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
        for &tid in &all {
            super::tasks::block_all(tid)?;
        }
        Ok(running.is_empty())
    }

    /// Threads that run on in the stub stand again.
    fn hold(&self, running: &BTreeSet<i32>) -> Result<(), TraceeError> {
        for &tid in running {
            ptrace::interrupt(tid).map_err(|errno| TraceeError::kernel("PTRACE_INTERRUPT", tid, errno))?;
            if super::tasks::wait_for_stop(tid, Instant::now() + STOP_LIMIT)?.is_none() {
                return Err(TraceeError::Died { tid });
            }
        }
        Ok(())
    }
}
