//! timerfd with expirations that nobody has read yet (`TFD_IOC_SET_TICKS`, timerfd_create(2)).

use super::fd::own;
use nix::errno::Errno;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

/// `_IOW('T', 0, __u64)`.
pub const TFD_IOC_SET_TICKS: libc::c_ulong = 0x4008_5400;

/// Makes a timerfd with this remainder (0: disarmed), interval and unread expirations.
pub fn make(
    clock: i32,
    nonblocking: bool,
    value_ns: u64,
    interval_ns: u64,
    ticks: u64,
) -> Result<OwnedFd, Errno> {
    let flags = libc::TFD_CLOEXEC | if nonblocking { libc::TFD_NONBLOCK } else { 0 };
    // SAFETY: no pointers.
    let made = own(Errno::result(unsafe { libc::timerfd_create(clock, flags) })?);
    let time = |ns: u64| libc::timespec {
        tv_sec: (ns / 1_000_000_000) as i64,
        tv_nsec: (ns % 1_000_000_000) as i64,
    };
    let spec = libc::itimerspec { it_interval: time(interval_ns), it_value: time(value_ns) };
    // SAFETY: `spec` outlives the call.
    let set = unsafe { libc::timerfd_settime(made.as_raw_fd(), 0, &raw const spec, std::ptr::null_mut()) };
    Errno::result(set)?;
    if ticks > 0 {
        // SAFETY: `ticks` outlives the call and has the size that the request tells.
        let set = unsafe { libc::ioctl(made.as_raw_fd(), TFD_IOC_SET_TICKS, &raw const ticks) };
        Errno::result(set)?;
    }
    Ok(made)
}

/// Lets the kernel count the expirations up to now: an expired timer with an interval stands still
/// until somebody asks (fs/timerfd.c, `do_timerfd_gettime`), and `fdinfo` does not count as asking.
pub fn count_expirations(timer: BorrowedFd<'_>) -> Result<(), Errno> {
    let none = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let mut spec = libc::itimerspec { it_interval: none, it_value: none };
    // SAFETY: `spec` outlives the call.
    let got = unsafe { libc::timerfd_gettime(timer.as_raw_fd(), &raw mut spec) };
    Errno::result(got).map(drop)
}
