//! Signal actions, and what is pending.

use super::{RestoreError, timers};
use crate::deputy::{SigInfo, requeue_signal};
use crate::image::ProcessImage;
use crate::tracee::{Call, Tracee, TraceeError};

/// Sets every action. Done before any signal may be delivered: all are blocked.
pub fn actions(image: &ProcessImage) -> impl Iterator<Item = Call> {
    let is_settable = |&signal: &u64| signal != libc::SIGKILL as u64 && signal != libc::SIGSTOP as u64;
    let all = (1u64..).zip(&image.signals.actions).filter(move |(signal, _)| is_settable(signal));
    all.map(|(signal, action)| {
        let bytes: Vec<u8> = action.iter().flat_map(|word| word.to_le_bytes()).collect();
        let args = [signal, 0, 0, 8, 0, 0];
        Call::must("setting a signal action", libc::SYS_rt_sigaction, args).input(1, &bytes)
    })
}

/// Queues what was pending: on the process, then on each thread, then what came later. What a timer has
/// sent anew already is not sent twice.
pub fn queue_pending(
    tracee: &mut Tracee,
    image: &ProcessImage,
    order: &[usize],
    after: &[SigInfo],
    clocks: bool,
) -> Result<(), RestoreError> {
    let is_there = |info: &&Vec<u8>| !timers::is_sent_anew(image, info, clocks);
    for info in image.signals.pending.iter().filter(is_there) {
        queue(tracee, None, info)?;
    }
    for (&i, thread) in order.iter().zip(&image.threads) {
        for info in thread.pending.iter().filter(is_there) {
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
