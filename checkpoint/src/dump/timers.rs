//! Interval timers and POSIX timers (`/proc/PID/timers`, proc(5)).

use super::DumpError;
use super::inside::Inside;
use crate::image::{PosixTimer, TimersImage};
use crate::proc::{self, status::Status};
use crate::sys::fd::{pidfd_getfd, pidfd_open};
use crate::sys::timerfd::count_expirations;
use std::os::fd::AsFd;

pub fn read(inside: &mut Inside<'_>) -> Result<TimersImage, DumpError> {
    let mut image = TimersImage::default();
    for (which, timer) in image.itimers.iter_mut().enumerate() {
        *timer = inside.itimer(which as u64)?;
    }
    let pid = inside.pid();
    // Without it (CONFIG_CHECKPOINT_RESTORE) nobody can know what timers there are.
    let text = proc::read(pid, "timers").map_err(|source| DumpError::Proc {
        what: "timers (CONFIG_CHECKPOINT_RESTORE)",
        pid,
        source,
    })?;
    let text = String::from_utf8_lossy(&text);
    for mut timer in parse(&text) {
        (timer.interval_ns, timer.value_ns, timer.overrun) = inside.posix_timer(timer.id)?;
        if timer.tid != 0 {
            // As the thread is known in its own namespace.
            timer.tid = Status::read(timer.tid).ok().and_then(|s| s.inner_id()).unwrap_or(timer.tid);
        }
        image.posix.push(timer);
    }
    Ok(image)
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

/// ```text
/// ID: 1
/// signal: 60/00007fff86e452a8
/// notify: signal/pid.2634
/// ClockID: 0
/// ```
fn parse(text: &str) -> Vec<PosixTimer> {
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
}
