//! Stops of children, as far as their parents have heard of them.
//!
//! A child is stopped here, by the signal that had stopped it, while it stands in its stub: calls are
//! injected into it nevertheless, and when it is let go it stands stopped. What its parent has taken note
//! of it takes note of again. No SIGCHLD comes of all this: until their own actions are set, all
//! have one for it that wants none (`SA_NOCLDSTOP`, sigaction(2)).

use super::RestoreError;
use super::births::forget_signals;
use super::family::Family;
use crate::sys::wait;
use crate::tracee::TraceeError;

/// Stops whoever was stopped, or was and goes on untold; the root is stopped when it is let go.
pub(super) fn stop_again(family: &mut Family<'_>) -> Result<(), RestoreError> {
    for (who, image) in family.images.iter().enumerate().skip(1) {
        let signal = match image.signals.stopped_by {
            Some(signal) => i32::from(signal),
            None if image.report.continued => libc::SIGSTOP,
            None => continue,
        };
        let Some(member) = &mut family.members[who] else { continue };
        member.tracee.stop_by(signal)?;
        if image.signals.stopped_by.is_none() {
            let pid = member.tracee.pid();
            wait::kill(pid, libc::SIGCONT).map_err(|errno| TraceeError::kernel("kill", pid, errno))?;
            // It is blocked, and not one of those that the image has pending.
            forget_signals(&mut member.tracee, 1 << (libc::SIGCONT - 1))?;
        } else if image.report.stop_taken
            && let Some(Some(parent)) = family.place_of(image.ppid).map(|up| family.members[up].as_mut())
        {
            let flags = libc::WSTOPPED | libc::WNOHANG | libc::__WALL;
            let args = [libc::P_PID.into(), image.pid as u64, 0, flags as u64, 0, 0];
            parent.tracee.must(0, "waiting for a stop", libc::SYS_waitid, args)?;
        }
    }
    Ok(())
}
