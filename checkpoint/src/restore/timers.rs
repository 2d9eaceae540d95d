//! Timers are set to go off when they would have gone off.
//!
//! What is due at a time of a clock that goes on is set to that time. What counts CPU time, or time from
//! now on CLOCK_REALTIME, is set to what was left.
//!
//! A POSIX timer with an interval whose signal nobody had taken, or that had told of an overrun, is set
//! to the time when it first went off (timer_create(2) allows that): the kernel itself sends the signal
//! then, and counts what was missed since.

use super::RestoreError;
use crate::dump::timers::is_of;
use crate::image::{FileKind, PosixTimer, ProcessImage};
use crate::inventory::timers::readable;
use crate::sys::timerfd::TFD_IOC_SET_TICKS;
use crate::tracee::{Call, Tracee, TraceeError, restart};
use nix::errno::Errno;

/// `prctl(2)`, 6.15 on: timer_create(2) takes the id from where it writes it.
const PR_TIMER_CREATE_RESTORE_IDS: u64 = 77;
/// Timers made and deleted again to reach an id, on older kernels.
const ID_TRIES: i32 = 4096;
/// `TIMER_ABSTIME` and `TFD_TIMER_ABSTIME`.
const ABSTIME: u64 = 1;
/// What an overrun is counted anew for is that far from its next expiration, ns.
const MARGIN_NS: u64 = 50_000_000;
/// How long the signal of a timer that is due is waited for, ns.
const SIGNAL_LIMIT_NS: u64 = 1_000_000_000;

/// Arms interval timers, POSIX timers and timerfds. `clocks`: those that count from boot go on.
pub fn set(
    tracee: &mut Tracee,
    order: &[usize],
    image: &ProcessImage,
    clocks: bool,
) -> Result<(), RestoreError> {
    let mut calls = Vec::new();
    for (which, &(interval, value)) in (0u64..).zip(&image.timers.itimers) {
        if value == 0 {
            continue;
        }
        let words = [interval / 1_000_000, interval % 1_000_000, value / 1_000_000, value % 1_000_000];
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        calls.push(Call::must("setitimer", libc::SYS_setitimer, [which, 0, 0, 0, 0, 0]).input(1, &bytes));
    }
    tracee.must_all(0, &calls)?;
    let thread = |tid: i32| {
        let at = image.threads.iter().position(|thread| thread.tid == tid);
        at.and_then(|at| order.get(at)).copied().unwrap_or(0)
    };
    for timer in &image.timers.posix {
        create(tracee, thread(timer.owner), timer)?;
        arm(tracee, thread(timer.tid), image, timer, clocks)?;
    }
    for (index, file) in image.files.files.iter().enumerate() {
        let fd = image.files.fds.iter().find(|fd| fd.file as usize == index);
        if let (Some(fd), FileKind::TimerFd { .. }) = (fd, &file.kind) {
            set_timerfd(tracee, fd.fd, &file.kind, clocks)?;
        }
    }
    Ok(())
}

/// The time on its clock at which something is due, if that means anything here.
fn usable(clock: i32, due_ns: Option<u64>, clocks: bool) -> Option<u64> {
    let of_boot = matches!(clock, libc::CLOCK_MONOTONIC | libc::CLOCK_BOOTTIME | libc::CLOCK_BOOTTIME_ALARM);
    due_ns.filter(|_| clock >= 0 && (clocks || !of_boot))
}

/// Made by thread `maker`, whose CPU time it may count.
fn create(tracee: &mut Tracee, maker: usize, timer: &PosixTimer) -> Result<(), RestoreError> {
    let scratch = tracee.scratch();
    // struct sigevent: value, signo, notify, tid.
    let mut event = timer.value.to_le_bytes().to_vec();
    for word in [timer.signo, timer.notify, timer.tid] {
        event.extend_from_slice(&word.to_le_bytes());
    }
    event.resize(64, 0);
    let (at_event, at_id) = (scratch, scratch + 64);
    let restore_ids = tracee.syscall(0, libc::SYS_prctl, [PR_TIMER_CREATE_RESTORE_IDS, 1, 0, 0, 0, 0])? == 0;
    let mut made = -1;
    for _ in 0..ID_TRIES {
        tracee.write_mem(at_event, &event)?;
        tracee.write_mem(at_id, &timer.id.to_le_bytes())?;
        let args = [timer.clock as i64 as u64, at_event, at_id, 0, 0, 0];
        match tracee.must(maker, "timer_create", libc::SYS_timer_create, args) {
            Err(TraceeError::Inside { errno: Errno::EOPNOTSUPP, .. }) => {
                let why = "it has a timer that wakes the machine, and there is no real-time clock here";
                return Err(RestoreError::Unfit(why.into()));
            }
            other => other?,
        };
        let mut id = [0; 4];
        tracee.read_mem(at_id, &mut id)?;
        made = i32::from_le_bytes(id);
        if made == timer.id {
            break;
        }
        tracee.must(0, "timer_delete", libc::SYS_timer_delete, [made as u64, 0, 0, 0, 0, 0])?;
        if made > timer.id {
            break;
        }
    }
    if restore_ids {
        tracee.syscall(0, libc::SYS_prctl, [PR_TIMER_CREATE_RESTORE_IDS, 0, 0, 0, 0, 0])?;
    }
    if made != timer.id {
        return Err(RestoreError::Unfit(format!("a POSIX timer could not get its id {} again", timer.id)));
    }
    Ok(())
}

/// `teller`: the thread that takes its signals, if one does.
fn arm(
    tracee: &mut Tracee,
    teller: usize,
    image: &ProcessImage,
    timer: &PosixTimer,
    clocks: bool,
) -> Result<(), RestoreError> {
    if timer.value_ns == 0 {
        return Ok(());
    }
    let Some(due) = usable(timer.clock, timer.due_ns, clocks) else {
        return settime(tracee, timer, 0, timer.value_ns);
    };
    if timer.interval_ns == 0 {
        return settime(tracee, timer, ABSTIME, due.max(1));
    }
    let before = |expirations: u64| {
        let back = timer.interval_ns.checked_mul(expirations)?;
        due.checked_sub(back).filter(|&start| start > 0)
    };
    if has_pending(image, timer) {
        return settime(tracee, timer, ABSTIME, before(1).unwrap_or(due).max(1));
    }
    if timer.overrun > 0
        && now(tracee, timer.clock)?.saturating_add(MARGIN_NS) < due
        && let Some(start) = before(timer.overrun as u64 + 1)
    {
        settime(tracee, timer, ABSTIME, start)?;
        if take_signal(tracee, teller, timer)? == i64::from(timer.overrun) {
            return Ok(());
        }
        // It took so long that it went off once more: that is to be told.
    }
    settime(tracee, timer, ABSTIME, due.max(1))
}

fn settime(tracee: &mut Tracee, timer: &PosixTimer, flags: u64, value_ns: u64) -> Result<(), RestoreError> {
    let times = [restart::timespec(timer.interval_ns), restart::timespec(value_ns)].concat();
    let args = [timer.id as u64, flags, 0, 0, 0, 0];
    let call = Call::must("timer_settime", libc::SYS_timer_settime, args).input(2, &times);
    tracee.must_all(0, &[call])?;
    Ok(())
}

/// A clock as the task sees it, ns.
fn now(tracee: &mut Tracee, clock: i32) -> Result<u64, RestoreError> {
    let args = [readable(clock) as i64 as u64, 0, 0, 0, 0, 0];
    let call = Call::must("clock_gettime", libc::SYS_clock_gettime, args);
    let replies = tracee.must_all(0, &[call.output(1, 16)])?;
    let bytes = replies[0].answer(0);
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    Ok(word(0).saturating_mul(1_000_000_000).saturating_add(word(8)))
}

/// Takes what the timer has sent just now; gives the overrun that was told with it.
fn take_signal(tracee: &mut Tracee, thread: usize, timer: &PosixTimer) -> Result<i64, RestoreError> {
    let signal = 1u64.checked_shl(timer.signo.wrapping_sub(1) as u32).unwrap_or(0);
    let wait = Call::may("taking a signal", libc::SYS_rt_sigtimedwait, [0, 0, 0, 8, 0, 0]);
    let wait = wait.input(0, &signal.to_le_bytes()).input(2, &restart::timespec(SIGNAL_LIMIT_NS));
    let args = [timer.id as u64, 0, 0, 0, 0, 0];
    let overrun = Call::may("timer_getoverrun", libc::SYS_timer_getoverrun, args);
    let replies = tracee.must_all(thread, &[wait, overrun])?;
    Ok(match replies[0].value {
        taken if taken == i64::from(timer.signo) => replies[1].value,
        _ => -1,
    })
}

fn has_pending(image: &ProcessImage, timer: &PosixTimer) -> bool {
    let of_threads = image.threads.iter().flat_map(|thread| &thread.pending);
    image.signals.pending.iter().chain(of_threads).any(|info| is_of(info, timer.id))
}

/// Whether a pending signal is one that its timer has sent anew.
pub fn is_sent_anew(image: &ProcessImage, info: &[u8], clocks: bool) -> bool {
    let sends = |timer: &&PosixTimer| {
        let periodic = timer.value_ns > 0 && timer.interval_ns > 0;
        periodic && is_of(info, timer.id) && usable(timer.clock, timer.due_ns, clocks).is_some()
    };
    image.timers.posix.iter().any(|timer| sends(&timer))
}

/// Sets a timerfd, which has been made with what was left, to when it is due.
fn set_timerfd(tracee: &mut Tracee, fd: i32, kind: &FileKind, clocks: bool) -> Result<(), RestoreError> {
    let FileKind::TimerFd { clock, mut ticks, settime_flags, value_ns, interval_ns, due_ns } = *kind else {
        return Ok(());
    };
    let Some(due) = usable(clock, due_ns, clocks).filter(|_| value_ns > 0) else { return Ok(()) };
    let now = now(tracee, clock)?;
    let value = match u64::from(settime_flags) & ABSTIME {
        0 => due.saturating_sub(now),
        _ => due,
    };
    let times = [restart::timespec(interval_ns), restart::timespec(value.max(1))].concat();
    let args = [fd as u64, settime_flags.into(), 0, 0, 0, 0];
    let mut calls = vec![Call::must("timerfd_settime", libc::SYS_timerfd_settime, args).input(2, &times)];
    if ticks > 0 {
        // Those that nobody has read; the one that is due now is told beside them.
        ticks = ticks.saturating_add(u64::from(due <= now));
        let args = [fd as u64, TFD_IOC_SET_TICKS, 0, 0, 0, 0];
        calls.push(Call::must("TFD_IOC_SET_TICKS", libc::SYS_ioctl, args).input(2, &ticks.to_le_bytes()));
    }
    tracee.must_all(0, &calls)?;
    Ok(())
}
