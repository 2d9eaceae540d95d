//! Signal actions, timers, and what is pending.

use super::RestoreError;
use crate::deputy::{SigInfo, requeue_signal};
use crate::image::{PosixTimer, ProcessImage};
use crate::tracee::{Tracee, TraceeError};

/// `prctl(2)`, 6.15 on: timer_create(2) takes the id from where it writes it.
const PR_TIMER_CREATE_RESTORE_IDS: u64 = 77;
/// Timers made and deleted again to reach an id, on older kernels.
const ID_TRIES: i32 = 4096;

/// Sets every action. Done before any signal may be delivered: all are blocked.
pub fn set_actions(tracee: &mut Tracee, image: &ProcessImage) -> Result<(), RestoreError> {
    let scratch = tracee.scratch();
    for (signal, action) in (1u64..).zip(&image.signals.actions) {
        if signal == libc::SIGKILL as u64 || signal == libc::SIGSTOP as u64 {
            continue;
        }
        let bytes: Vec<u8> = action.iter().flat_map(|word| word.to_le_bytes()).collect();
        tracee.write_mem(scratch, &bytes)?;
        let args = [signal, scratch, 0, 8, 0, 0];
        tracee.must(0, "setting a signal action", libc::SYS_rt_sigaction, args)?;
    }
    Ok(())
}

/// Arms interval and POSIX timers with what was left.
pub fn set_timers(tracee: &mut Tracee, image: &ProcessImage) -> Result<(), RestoreError> {
    let scratch = tracee.scratch();
    for (which, &(interval, value)) in (0u64..).zip(&image.timers.itimers) {
        if value == 0 {
            continue;
        }
        let words = [interval / 1_000_000, interval % 1_000_000, value / 1_000_000, value % 1_000_000];
        tracee.write_mem(scratch, &words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>())?;
        tracee.must(0, "setitimer", libc::SYS_setitimer, [which, scratch, 0, 0, 0, 0])?;
    }
    for timer in &image.timers.posix {
        create(tracee, timer)?;
        arm(tracee, timer)?;
    }
    Ok(())
}

fn create(tracee: &mut Tracee, timer: &PosixTimer) -> Result<(), RestoreError> {
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
        tracee.must(0, "timer_create", libc::SYS_timer_create, args)?;
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

fn arm(tracee: &mut Tracee, timer: &PosixTimer) -> Result<(), RestoreError> {
    if timer.value_ns == 0 {
        return Ok(());
    }
    const SECOND: u64 = 1_000_000_000;
    let scratch = tracee.scratch();
    let words = [
        timer.interval_ns / SECOND,
        timer.interval_ns % SECOND,
        timer.value_ns / SECOND,
        timer.value_ns % SECOND,
    ];
    tracee.write_mem(scratch, &words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>())?;
    tracee.must(0, "timer_settime", libc::SYS_timer_settime, [timer.id as u64, 0, scratch, 0, 0, 0])?;
    Ok(())
}

/// Queues what was pending: on the process, then on each thread, then what came later.
pub fn queue_pending(
    tracee: &mut Tracee,
    image: &ProcessImage,
    order: &[usize],
    after: &[SigInfo],
) -> Result<(), RestoreError> {
    for info in &image.signals.pending {
        queue(tracee, None, info)?;
    }
    for (&i, thread) in order.iter().zip(&image.threads) {
        for info in &thread.pending {
            queue(tracee, Some(i), info)?;
        }
    }
    for info in after {
        queue(tracee, None, info)?;
    }
    Ok(())
}

fn queue(tracee: &mut Tracee, thread: Option<usize>, info: &[u8]) -> Result<(), RestoreError> {
    let info = SigInfo::try_from(info)
        .map_err(|_| RestoreError::Unfit("a pending signal has not the size of a siginfo".into()))?;
    match requeue_signal(tracee, thread, &info) {
        // The limit on queued signals is the user's, and may be lower here.
        Err(TraceeError::Inside { errno: nix::errno::Errno::EAGAIN, .. }) => Ok(()),
        other => Ok(other?),
    }
}

/// Lets it stop as soon as it is released.
pub fn stop(tracee: &Tracee) {
    let pid = nix::unistd::Pid::from_raw(tracee.pid());
    let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP);
}
