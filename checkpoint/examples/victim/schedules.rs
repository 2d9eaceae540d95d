//! How threads are scheduled: policies, priorities, CPUs, I/O priorities, timer slack; each its own.

use crate::calls::ok;
use crate::{Meeting, fail, same};
use std::sync::{Arc, Barrier};

/// `struct sched_attr` without clamps of utilisation (sched_setattr(2), `SCHED_ATTR_SIZE_VER0`).
#[repr(C)]
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Attributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

const RESET_ON_FORK: u64 = 1;
/// Best effort, level 6 (`IOPRIO_PRIO_VALUE`, linux/ioprio.h).
const BEST_EFFORT_6: i64 = 2 << 13 | 6;
const SLACK_NS: u64 = 123_456;

impl Attributes {
    fn new(policy: i32) -> Attributes {
        Attributes { policy: policy as u32, ..Attributes::default() }
    }

    fn set(mut self) -> bool {
        self.size = size_of::<Attributes>() as u32;
        // SAFETY: the structure begins with its own length, and outlives the call.
        unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const self, 0) == 0 }
    }
}

/// Everything of the calling thread.
#[derive(Debug, PartialEq, Eq)]
struct Schedule {
    attributes: Attributes,
    cpus: Vec<usize>,
    io_priority: i64,
    slack_ns: i32,
}

impl Schedule {
    fn read() -> Schedule {
        let mut attributes = Attributes::default();
        let length = size_of::<Attributes>();
        // SAFETY: the buffers have the lengths given and outlive the calls.
        unsafe {
            let got = libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, length, 0);
            ok("sched_getattr", got);
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            ok("sched_getaffinity", libc::sched_getaffinity(0, size_of_val(&set), &raw mut set));
            Schedule {
                attributes,
                cpus: (0..1024).filter(|&cpu| libc::CPU_ISSET(cpu, &set)).collect(),
                io_priority: ok("ioprio_get", libc::syscall(libc::SYS_ioprio_get, 1, 0)),
                slack_ns: ok("PR_GET_TIMERSLACK", libc::prctl(libc::PR_GET_TIMERSLACK)),
            }
        }
    }
}

/// Sets what a thread is named after; `false`: it is not to be had here.
fn set(name: &str) -> bool {
    let now = Schedule::read();
    // SAFETY: no pointers but to a set that outlives the call.
    unsafe {
        match name {
            "nice" => Attributes { nice: 7, ..Attributes::new(libc::SCHED_OTHER) }.set(),
            "batch" => Attributes { nice: 3, ..Attributes::new(libc::SCHED_BATCH) }.set(),
            "idle" => Attributes::new(libc::SCHED_IDLE).set(),
            "fifo" => Attributes { priority: 10, ..Attributes::new(libc::SCHED_FIFO) }.set(),
            "rr" => {
                let flags = RESET_ON_FORK;
                Attributes { priority: 20, flags, ..Attributes::new(libc::SCHED_RR) }.set()
            }
            "deadline" => {
                let (runtime, deadline, period) = (1_000_000, 10_000_000, 20_000_000);
                Attributes { runtime, deadline, period, ..Attributes::new(libc::SCHED_DEADLINE) }.set()
            }
            "cpu" => {
                let mut set: libc::cpu_set_t = std::mem::zeroed();
                libc::CPU_SET(now.cpus[now.cpus.len() - 1], &mut set);
                libc::sched_setaffinity(0, size_of_val(&set), &raw const set) == 0
            }
            "io" => libc::syscall(libc::SYS_ioprio_set, 1, 0, BEST_EFFORT_6) == 0,
            "slack" => libc::prctl(libc::PR_SET_TIMERSLACK, SLACK_NS) == 0,
            _ => false,
        }
    }
}

pub fn run(meeting: &Meeting) {
    const NAMES: [&str; 9] = ["nice", "batch", "idle", "fifo", "rr", "deadline", "cpu", "io", "slack"];
    let barrier = Arc::new(Barrier::new(NAMES.len() + 1));
    let one = |name: &'static str| {
        let barrier = Arc::clone(&barrier);
        std::thread::spawn(move || {
            let usual = Schedule::read();
            let is_set = set(name);
            let wanted = Schedule::read();
            if !is_set {
                // Real time where a control group has no share of it, say.
                println!("NOT HAD {name}");
            } else if wanted == usual {
                fail(&format!("{name} changes nothing"));
            }
            barrier.wait();
            // It stands in a futex while it is saved.
            barrier.wait();
            same(name, Schedule::read(), wanted);
        })
    };
    let threads: Vec<_> = NAMES.into_iter().map(one).collect();
    let wanted = Schedule::read();
    barrier.wait();
    meeting.pause();
    same("the leader", Schedule::read(), wanted);
    barrier.wait();
    for thread in threads {
        if thread.join().is_err() {
            fail("a thread has panicked");
        }
    }
}
