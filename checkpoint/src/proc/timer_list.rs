//! `/proc/timer_list`: the kernel's high-resolution timers that wake sleeping tasks.
//!
//! The file does not say whom a timer wakes. It does say, to the nanosecond, when, and that is nowhere
//! else to be had (kernel/time/timer_list.c).

use std::fs;
use std::io;

/// One timer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timer {
    /// When it is due, ns of the host's CLOCK_MONOTONIC.
    pub due_ns: u64,
    /// When it is due at the latest: later by the task's timer slack.
    pub latest_ns: u64,
    /// The kernel's (hashed) address of it.
    pub id: u64,
}

/// The timers of sleeping tasks, in rising order.
pub fn read() -> io::Result<Vec<Timer>> {
    Ok(parse(&String::from_utf8_lossy(&fs::read("/proc/timer_list")?)))
}

/// When POSIX timers that are set to a time of day are due, ns of CLOCK_REALTIME, in rising order. One
/// that is set to a time from now counts by another clock (`common_hrtimer_arm`,
/// kernel/time/posix-timers.c).
pub fn times_of_day() -> io::Result<Vec<u64>> {
    Ok(parse_times_of_day(&String::from_utf8_lossy(&fs::read("/proc/timer_list")?)))
}

fn parse_times_of_day(text: &str) -> Vec<u64> {
    /// HRTIMER_BASE_REALTIME, and the one of soft interrupts (linux/hrtimer_defs.h).
    const BASES: [&str; 2] = ["1", "5"];
    let mut out = Vec::new();
    let (mut wanted, mut posix) = (false, false);
    for line in text.lines().map(str::trim_start) {
        if let Some(index) = line.strip_prefix(".index:") {
            wanted = BASES.contains(&index.trim());
        } else if let Some(rest) = line.strip_prefix("# expires at ") {
            if std::mem::take(&mut posix) {
                out.extend(times(rest, 0).map(|(due_ns, _)| due_ns));
            }
        } else if line.starts_with('#') {
            posix = wanted && line.contains(" posix_timer_fn,");
        } else if line.starts_with("cpu:") {
            wanted = false;
        }
    }
    out.sort_unstable();
    out
}

/// ```text
///  clock 0:
///   .offset:     0 nsecs
/// active timers:
///  #0: <000000009d646356>, hrtimer_wakeup, S:01
///  # expires at 1268464186417-1268464343416 nsecs [in 144850139 to 145007138 nsecs]
/// ```
fn parse(text: &str) -> Vec<Timer> {
    let mut out = Vec::new();
    let mut offset: i64 = 0;
    let mut id = None;
    for line in text.lines().map(str::trim_start) {
        if let Some(rest) = line.strip_prefix(".offset:") {
            offset = rest.split_ascii_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(0);
        } else if let Some(rest) = line.strip_prefix("# expires at ") {
            if let Some(id) = id.take() {
                out.extend(times(rest, offset).map(|(due_ns, latest_ns)| Timer { due_ns, latest_ns, id }));
            }
        } else if line.starts_with('#') {
            id = line.contains(" hrtimer_wakeup,").then(|| address(line)).flatten();
        } else if line.starts_with("cpu:") || line.starts_with("clock ") {
            // Each clock's own offset follows; without high resolution there is none.
            offset = 0;
        }
    }
    out.sort_unstable();
    out
}

fn address(line: &str) -> Option<u64> {
    let (_, rest) = line.split_once('<')?;
    u64::from_str_radix(rest.split_once('>')?.0, 16).ok()
}

fn times(rest: &str, offset: i64) -> Option<(u64, u64)> {
    let (due, latest) = rest.split_ascii_whitespace().next()?.split_once('-')?;
    let time = |text: &str| u64::try_from(text.parse::<i64>().ok()?.checked_sub(offset)?).ok();
    Some((time(due)?, time(latest)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SAMPLE: &str = "Timer List Version: v0.10\nnow at 100 nsecs\n\ncpu: 0\n clock 0:\n  .base:       00000000a6091b83\n  \
        .offset:     0 nsecs\nactive timers:\n #0: <000000000f7078af>, tick_nohz_handler, S:01\n \
        # expires at 1536668000000-1536668000000 nsecs [in 3074308 to 3074308 nsecs]\n \
        #1: <00000000c3789b8f>, hrtimer_wakeup, S:01\n \
        # expires at 1536681662259-1536681712259 nsecs [in 16736567 to 16786567 nsecs]\n \
        clock 1:\n  .offset:     1000000 nsecs\n #0: <00000000000000ff>, hrtimer_wakeup, S:01\n \
        # expires at 1005000-1006000 nsecs [in 5 to 6 nsecs]\n";

    proptest! {
        #[test]
        fn never_panics(text in "((#|clock|cpu:|.offset:|.index: 1\n| posix_timer_fn,| # expires at|<|hrtimer_wakeup,|[-0-9a-f]{1,24}|>| )*\n){0,8}") {
            parse(&text);
            parse_times_of_day(&text);
        }
    }

    #[test]
    fn reads_sleepers_on_all_clocks() {
        let found = parse(SAMPLE);
        let wanted = [
            Timer { due_ns: 5000, latest_ns: 6000, id: 0xff },
            Timer { due_ns: 1_536_681_662_259, latest_ns: 1_536_681_712_259, id: 0xc378_9b8f },
        ];
        assert_eq!(found, wanted);
    }
    #[test]
    fn reads_timers_set_to_a_time_of_day() {
        let text = "cpu: 0\n clock 0:\n  .index:      0\n #0: <01>, posix_timer_fn, S:01\n \
            # expires at 7-7 nsecs [in 1 to 1 nsecs]\n clock 1:\n  .index:      1\n  .offset:     1000 nsecs\n \
            #0: <02>, hrtimer_wakeup, S:01\n # expires at 8-8 nsecs [in 1 to 1 nsecs]\n \
            #1: <03>, posix_timer_fn, S:01\n # expires at 1795787675799560364-1795787675799560364 nsecs [in 1]\n";
        assert_eq!(parse_times_of_day(text), [1_795_787_675_799_560_364]);
    }
}
