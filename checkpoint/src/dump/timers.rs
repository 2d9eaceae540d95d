//! Interval timers and POSIX timers (`/proc/PID/timers`, proc(5)).

use super::DumpError;
use super::inside::{Inside, TimerAnswer};
use crate::image::{PosixTimer, TimersImage};
use crate::inventory::timers::{is_of_its_maker, parse};
use crate::proc::{self, status::Status, timer_list};
use crate::sys::fd::{pidfd_getfd, pidfd_open};
use crate::sys::timerfd::count_expirations;
use std::os::fd::AsFd;

pub fn read(inside: &mut Inside<'_>) -> Result<TimersImage, DumpError> {
    inside.ask_itimers_again()?;
    let mut image = TimersImage { itimers: inside.process.itimers, ..TimersImage::default() };
    let pid = inside.pid();
    // Without it (CONFIG_CHECKPOINT_RESTORE) nobody can know what timers there are.
    let text = proc::read(pid, "timers").map_err(|source| DumpError::Proc {
        what: "timers (CONFIG_CHECKPOINT_RESTORE)",
        pid,
        source,
    })?;
    let text = String::from_utf8_lossy(&text);
    let timers = parse(&text);
    let asked: Vec<(i32, i32)> = timers.iter().map(|timer| (timer.id, timer.clock)).collect();
    let answers = inside.posix_timers(&asked)?;
    let times_of_day = times_of_day(timers.iter().zip(&answers));
    for (mut timer, answer) in timers.into_iter().zip(answers) {
        (timer.interval_ns, timer.value_ns, timer.overrun) =
            (answer.interval_ns, answer.value_ns, answer.overrun);
        timer.due_ns = due(timer.clock, &answer, &times_of_day);
        if is_of_its_maker(timer.clock) {
            timer.owner = owner(inside, &timer)?;
        }
        if timer.tid != 0 {
            // As the thread is known in its own namespace.
            timer.tid = Status::read(timer.tid).ok().and_then(|s| s.inner_id()).unwrap_or(timer.tid);
        }
        image.posix.push(timer);
    }
    Ok(image)
}

/// When timers that are set to a time of day are due. The kernel's list misses one now and then, when
/// another one before it goes off while it is made (`print_active_timers`, kernel/time/timer_list.c).
fn times_of_day<'a>(timers: impl Iterator<Item = (&'a PosixTimer, &'a TimerAnswer)> + Clone) -> Vec<u64> {
    const LOOKS: usize = 4;
    let mut found = Vec::new();
    for _ in 0..LOOKS {
        let mut open = timers.clone().filter(|(timer, answer)| {
            let set = timer.clock == libc::CLOCK_REALTIME && answer.value_ns > 0;
            set && due(timer.clock, answer, &found).is_none()
        });
        if open.next().is_none() {
            break;
        }
        found.extend(timer_list::times_of_day().unwrap_or_default());
    }
    found
}

/// When a timer is due on its clock.
fn due(clock: i32, answer: &TimerAnswer, times_of_day: &[u64]) -> Option<u64> {
    let (before, after) = answer.clock_ns?;
    if answer.value_ns == 0 || clock < 0 {
        return None;
    }
    // Between the two it was asked what is left: it must not be early.
    let latest = after.checked_add(answer.value_ns)?;
    if clock != libc::CLOCK_REALTIME {
        return Some(latest);
    }
    let earliest = before.checked_add(answer.value_ns)?;
    times_of_day.iter().copied().find(|due| (earliest..=latest).contains(due))
}

/// The TID of the thread whose CPU time a timer counts, which only its rest tells: it shrinks while that
/// thread runs, and no other thread does. One that is not set is set for that, unless what it has sent
/// would be lost by it.
fn owner(inside: &mut Inside<'_>, timer: &PosixTimer) -> Result<i32, DumpError> {
    let hint = (0..inside.thread_count()).find(|&i| inside.original(i).tid == timer.tid).unwrap_or(0);
    let idle = timer.value_ns == 0;
    let has_sent = idle && (timer.overrun > 0 || inside.has_timer_signal(timer.id)?);
    if inside.thread_count() == 1 || has_sent {
        return Ok(inside.threads[hint].tid);
    }
    const FAR_NS: u64 = 1 << 60;
    if idle {
        inside.set_timer(timer.id, FAR_NS)?;
    }
    let mut found = hint;
    for i in std::iter::once(hint).chain((0..inside.thread_count()).filter(|&i| i != hint)) {
        if inside.timer_counts_thread(timer.id, i)? {
            found = i;
            break;
        }
    }
    if idle {
        inside.set_timer(timer.id, 0)?;
    }
    Ok(inside.threads[found].tid)
}

/// Whether `info` (`siginfo_t`) is what the timer has sent.
pub fn is_of(info: &[u8], timer: i32) -> bool {
    const SI_TIMER: i32 = -2;
    // Number, errno, code, padding; of a timer: its id.
    let word = |at: usize| {
        info.get(at..at + 4).map(|bytes| i32::from_le_bytes(bytes.try_into().expect("four bytes")))
    };
    word(8) == Some(SI_TIMER) && word(16) == Some(timer)
}

/// A timer without an interval that went off after it was asked: its signal is among those pending.
pub fn disarm_gone_off<'a>(timers: &mut TimersImage, pending: impl Iterator<Item = &'a Vec<u8>> + Clone) {
    for timer in timers.posix.iter_mut().filter(|timer| timer.interval_ns == 0) {
        if pending.clone().any(|info| is_of(info, timer.id)) {
            (timer.value_ns, timer.due_ns) = (0, None);
        }
    }
}

/// Brings what `fdinfo` shows of the process' timerfds up to date.
pub fn settle_timerfds(pid: i32) -> std::io::Result<()> {
    let pidfd = pidfd_open(pid)?;
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
        let is_timer =
            std::fs::read_link(entry.path()).is_ok_and(|link| link.as_os_str() == "anon_inode:[timerfd]");
        let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
        if let (true, Some(number)) = (is_timer, number) {
            count_expirations(pidfd_getfd(pidfd.as_fd(), number)?.as_fd())?;
        }
    }
    Ok(())
}
