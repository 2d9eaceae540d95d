//! The stops alone: what of a dump of many threads is the kernel's.

use super::subject::Subject;
use checkpoint::proc;
use checkpoint::sys::ptrace::{self, Stop};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::time::{Duration, Instant};

/// Seizes and stops every thread of a process, reads its registers, lets it run on and stops it once more, as
/// for the questions that only it can ask, and ends the process: no dump can do with less. Nothing is looked at
/// before, nothing is asked, and nothing is written.
pub fn stops(subject: Subject) -> Duration {
    let pid = subject.pid();
    let begun = Instant::now();
    let tids = proc::tids(pid).expect("threads");
    tids.iter().for_each(|&tid| ptrace::seize(tid, ptrace::O_TRACESYSGOOD).expect("seizes"));
    stop_all(&tids);
    for &tid in &tids {
        ptrace::regs(tid).expect("registers");
        ptrace::xstate(tid).expect("extended state");
        ptrace::sigmask(tid).expect("a mask");
        ptrace::peek_siginfo(tid, 0, false).expect("signals");
    }
    tids.iter().for_each(|&tid| ptrace::cont(tid, 0).expect("goes on"));
    stop_all(&tids);
    kill(Pid::from_raw(pid), Signal::SIGKILL).expect("ends it");
    // The leader last: it is there until the others have been waited for.
    for &tid in tids.iter().rev() {
        while matches!(ptrace::wait(tid, true), Ok(Some(stop)) if !matches!(stop, Stop::Gone(_))) {}
    }
    begun.elapsed()
}

fn stop_all(tids: &[i32]) {
    tids.iter().for_each(|&tid| ptrace::interrupt(tid).expect("interrupts"));
    for &tid in tids {
        assert!(matches!(ptrace::wait(tid, true), Ok(Some(Stop::Event))), "thread {tid} does not stop");
    }
}
