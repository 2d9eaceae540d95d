//! Timers: what `/proc/PID/timers` and a timerfd's `fdinfo` tell.

use super::Blocker;
use super::family::Family;
use crate::image::{FileKind, PosixTimer};
use crate::proc::{self, fdinfo::FdInfo};
use crate::sys::time_namespace::Offsets;
use nix::time::{ClockId, clock_gettime};

/// `TFD_TIMER_ABSTIME` (timerfd_create(2)).
const ABSTIME: u32 = 1;

/// A timerfd of process `pid`, by its `fdinfo`, which was read just now.
pub fn timerfd(pid: i32, info: &FdInfo) -> Option<FileKind> {
    let clock = info.number("clockid", 10)? as i32;
    let settime_flags = info.number("settime flags", 8).unwrap_or(0) as u32;
    let value_ns = info.timer("it_value")?;
    let due_ns = due(pid, clock, settime_flags, value_ns);
    Some(FileKind::TimerFd {
        clock,
        ticks: info.number("ticks", 10).unwrap_or(0),
        settime_flags,
        value_ns,
        interval_ns: info.timer("it_interval")?,
        due_ns,
    })
}

/// When it is due on its clock as the process sees that.
fn due(pid: i32, clock: i32, settime_flags: u32, value_ns: u64) -> Option<u64> {
    // Set to a time from now, one on CLOCK_REALTIME does not count by it.
    if value_ns == 0 || clock == libc::CLOCK_REALTIME && settime_flags & ABSTIME == 0 {
        return None;
    }
    let now = clock_gettime(ClockId::from_raw(readable(clock))).ok()?;
    let now_ns = (now.tv_sec() as u64).checked_mul(1_000_000_000)?.checked_add(now.tv_nsec() as u64)?;
    let (theirs, ours) = (Offsets::of(pid).ok()?, Offsets::of(std::process::id() as i32).ok()?);
    let ahead_ns = match clock {
        libc::CLOCK_MONOTONIC => theirs.monotonic_ns.checked_sub(ours.monotonic_ns)?,
        libc::CLOCK_BOOTTIME | libc::CLOCK_BOOTTIME_ALARM => {
            theirs.boottime_ns.checked_sub(ours.boottime_ns)?
        }
        _ => 0,
    };
    now_ns.checked_add_signed(ahead_ns)?.checked_add(value_ns)
}

/// The same time, of a clock that can be read without a real-time clock device too (`alarm_clock_get_timespec`,
/// kernel/time/alarmtimer.c).
pub fn readable(clock: i32) -> i32 {
    match clock {
        libc::CLOCK_REALTIME_ALARM => libc::CLOCK_REALTIME,
        libc::CLOCK_BOOTTIME_ALARM => libc::CLOCK_BOOTTIME,
        clock => clock,
    }
}

/// Timers that count the CPU time of processes that are not carried.
pub fn blockers(pid: i32, family: &Family, blockers: &mut Vec<Blocker>) {
    let text = proc::read(pid, "timers").unwrap_or_default();
    for timer in parse(&String::from_utf8_lossy(&text)) {
        if let Some(other) = process_of(timer.clock).filter(|&other| !family.has(other)) {
            let what = format!("a timer of it counts the CPU time of process {other}");
            blockers.push(Blocker { kind: "tree", what });
        }
    }
}

/// The process whose CPU time a clock counts, if the clock names one (clock_getcpuclockid(3)).
fn process_of(clock: i32) -> Option<i32> {
    /// CPUCLOCK_PERTHREAD_MASK (include/linux/posix-timers_types.h).
    const OF_THREAD: i32 = 4;
    let id = !(clock >> 3);
    (clock < 0 && clock & OF_THREAD == 0 && id != 0).then_some(id)
}

/// Whether a clock counts the CPU time of the thread that makes a timer on it, whichever that is.
pub fn is_of_its_maker(clock: i32) -> bool {
    clock < 0 && clock & 4 != 0 && !(clock >> 3) == 0
}

/// ```text
/// ID: 1
/// signal: 60/00007fff86e452a8
/// notify: signal/pid.2634
/// ClockID: 0
/// ```
pub fn parse(text: &str) -> Vec<PosixTimer> {
    let mut out: Vec<PosixTimer> = Vec::new();
    for line in text.lines() {
        let Some((key, value)) = line.split_once(": ") else { continue };
        if key == "ID" {
            let Ok(id) = value.parse() else { continue };
            out.push(PosixTimer {
                id,
                clock: 0,
                notify: libc::SIGEV_NONE,
                signo: 0,
                value: 0,
                tid: 0,
                interval_ns: 0,
                value_ns: 0,
                overrun: 0,
                due_ns: None,
                owner: 0,
            });
            continue;
        }
        let Some(timer) = out.last_mut() else { continue };
        match key {
            "signal" => {
                let (signo, pointer) = value.split_once('/').unwrap_or((value, "0"));
                timer.signo = signo.parse().unwrap_or(0);
                timer.value = u64::from_str_radix(pointer.trim_start_matches("0x"), 16).unwrap_or(0);
            }
            "notify" => {
                let (how, whom) = value.split_once('/').unwrap_or((value, ""));
                timer.notify = match how {
                    "signal" => libc::SIGEV_SIGNAL,
                    "thread" => libc::SIGEV_THREAD,
                    _ => libc::SIGEV_NONE,
                };
                if let Some(tid) = whom.strip_prefix("tid.") {
                    timer.notify |= libc::SIGEV_THREAD_ID;
                    timer.tid = tid.parse().unwrap_or(0);
                }
            }
            "ClockID" => timer.clock = value.trim().parse().unwrap_or(0),
            _ => {}
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn never_panics(text in "((ID|signal|notify|ClockID): [-0-9a-z./]{0,30}\n){0,8}") {
            parse(&text);
        }
    }

    #[test]
    fn reads_what_the_kernel_shows() {
        let text = "ID: 3\nsignal: 34/00007fff86e452a8\nnotify: signal/tid.2634\nClockID: 1\n\
                    ID: 4\nsignal: 14/0\nnotify: none/pid.1\nClockID: 0\nID: x\n";
        let timers = parse(text);
        assert_eq!(timers.len(), 2);
        assert_eq!((timers[0].id, timers[0].signo, timers[0].tid, timers[0].clock), (3, 34, 2634, 1));
        assert_eq!(timers[0].notify, libc::SIGEV_SIGNAL | libc::SIGEV_THREAD_ID);
        assert_eq!(timers[0].value, 0x7fff86e452a8);
        assert_eq!(timers[1].notify, libc::SIGEV_NONE);
    }

    #[test]
    fn whose_cpu_time_a_clock_counts() {
        // clock_getcpuclockid(3) of process 1234, and the clocks that timers have for
        // CLOCK_PROCESS_CPUTIME_ID and CLOCK_THREAD_CPUTIME_ID.
        assert_eq!(process_of((!1234 << 3) | 2), Some(1234));
        assert!([-6, -2, 1, (!1234 << 3) | 6].into_iter().all(|clock| process_of(clock).is_none()));
        assert!(is_of_its_maker(-2) && !is_of_its_maker(-6) && !is_of_its_maker((!1234 << 3) | 6));
    }
}
