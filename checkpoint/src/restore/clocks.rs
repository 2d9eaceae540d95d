//! The clocks that count from the machine's boot go on where they were.
//!
//! CLOCK_MONOTONIC and CLOCK_BOOTTIME must not go back, and jump for a program that was saved an hour
//! ago or on another machine. So its processes are born into a time namespace in which they are
//! what the image says (time_namespaces(7)): deadlines that the program has computed, and timers that
//! are set to them, stay right. The clocks run from the moment the root is made; filling the
//! processes takes its time.

use super::RestoreError;
use crate::image::ProcessImage;
use crate::sys::time_namespace::{ForChildren, Offsets, clocks_ns};
use nix::errno::Errno;

/// What becomes of the clocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clocks {
    /// They go on where they were.
    GoOn,
    /// They are the machine's, and have jumped by so many nanoseconds: this program may not make a
    /// time namespace, or the kernel has none.
    Jump(u64),
}

/// Makes the namespace that the root, which is made while the second part of the result is there, is
/// born in.
pub(super) fn continue_from(image: &ProcessImage) -> Result<(Clocks, Option<ForChildren>), RestoreError> {
    let was = image.misc.clocks_ns;
    let own = Offsets::of(std::process::id() as i32)
        .map_err(|source| RestoreError::File { what: "reading timens_offsets".into(), source })?;
    let here = clocks_ns();
    let offset = |was: u64, here: u64, own: i64| -> Option<i64> {
        i64::try_from(i128::from(was) - i128::from(here) + i128::from(own)).ok()
    };
    let offsets = (offset(was.0, here.0, own.monotonic_ns), offset(was.1, here.1, own.boottime_ns));
    let made = match offsets {
        (Some(monotonic_ns), Some(boottime_ns)) => ForChildren::make(Offsets { monotonic_ns, boottime_ns }),
        _ => Err(Errno::ERANGE),
    };
    match made {
        Ok(made) => Ok((Clocks::GoOn, Some(made))),
        Err(Errno::ERANGE) => Err(RestoreError::Unfit(
            "the image is not consistent: its clocks are beyond what a kernel counts".into(),
        )),
        Err(errno) => {
            let back = was.0.saturating_sub(here.0).max(was.1.saturating_sub(here.1));
            match back {
                0 => Ok((Clocks::Jump(here.0 - was.0), None)),
                back_ns => Err(RestoreError::Clocks { back_ns, errno }),
            }
        }
    }
}
