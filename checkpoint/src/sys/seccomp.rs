//! seccomp(2) user notifications: the supervisor's end.
//!
//! A filtered call waits in the kernel until its notification is answered. A signal, a freeze or a
//! death ends the wait without one; the call is then repeated, or not (`seccomp_do_user_notification`,
//! kernel/seccomp.c).

use nix::errno::Errno;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `SECCOMP_SET_MODE_FILTER`.
pub const SET_MODE_FILTER: u64 = 1;
/// `SECCOMP_FILTER_FLAG_TSYNC`: all threads.
pub const FLAG_TSYNC: u64 = 1;
/// `SECCOMP_FILTER_FLAG_SPEC_ALLOW`: no slower memory accesses for a filtered process.
pub const FLAG_SPEC_ALLOW: u64 = 4;
/// `SECCOMP_FILTER_FLAG_NEW_LISTENER`: the result is a descriptor of notifications.
pub const FLAG_NEW_LISTENER: u64 = 8;
/// `SECCOMP_FILTER_FLAG_TSYNC_ESRCH`: needed for both of these together.
pub const FLAG_TSYNC_ESRCH: u64 = 16;

/// `SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV` (5.19): once it is told, a call waits through signals that
/// do not kill. A tracer's interrupt does not end it either: see [`Answer::Repeat`].
pub const FLAG_WAIT_KILLABLE: u64 = 32;

/// `AUDIT_ARCH_X86_64`.
pub const ARCH_X86_64: u32 = 0xc000_003e;

const IOCTL_RECV: libc::c_ulong = 0xc050_2100;
const IOCTL_SEND: libc::c_ulong = 0xc018_2101;
const IOCTL_ID_VALID: libc::c_ulong = 0x4008_2102;
const CONTINUE: u32 = 1;

/// `struct seccomp_notif`, with its `struct seccomp_data` laid out.
#[repr(C)]
#[derive(Default)]
struct Notification {
    id: u64,
    pid: u32,
    flags: u32,
    nr: i32,
    arch: u32,
    instruction_pointer: u64,
    args: [u64; 6],
}
const _: () = assert!(size_of::<Notification>() == 80);

/// `struct seccomp_notif_resp`.
#[repr(C)]
struct Response {
    id: u64,
    val: i64,
    error: i32,
    flags: u32,
}
const _: () = assert!(size_of::<Response>() == 24);

/// A call that waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// Names the notification.
    pub id: u64,
    /// The thread, as numbered in the receiver's PID namespace.
    pub tid: i32,
    /// The number of the system call.
    pub nr: i64,
    /// `AUDIT_ARCH_*`: whose numbering.
    pub arch: u32,
    /// Its arguments.
    pub args: [u64; 6],
}

/// How a call ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// With this result.
    Value(i64),
    /// With this error.
    Error(Errno),
    /// The kernel does it after all.
    Continue,
    /// It is to be made again (`ERESTARTNOINTR`). Only for a thread that has been interrupted by its
    /// tracer and has not stopped yet: on its way to that stop the kernel sees to the repetition, any
    /// other thread would see a strange error.
    Repeat,
}

/// Takes the next notification; waits for one. `ENOENT`: it went away meanwhile; ask again.
pub fn receive(listener: BorrowedFd<'_>) -> Result<Call, Errno> {
    // The kernel demands zeros.
    let mut got = Notification::default();
    // SAFETY: the request fills a `struct seccomp_notif`, which `got` is, and which outlives it.
    Errno::result(unsafe { libc::ioctl(listener.as_raw_fd(), IOCTL_RECV, &raw mut got) })?;
    Ok(Call { id: got.id, tid: got.pid as i32, nr: got.nr.into(), arch: got.arch, args: got.args })
}

/// Ends the wait. `ENOENT`: it has ended by itself.
pub fn answer(listener: BorrowedFd<'_>, id: u64, answer: Answer) -> Result<(), Errno> {
    let (val, error, flags) = match answer {
        Answer::Value(val) => (val, 0, 0),
        Answer::Error(errno) => (0, -(errno as i32), 0),
        Answer::Continue => (0, 0, CONTINUE),
        Answer::Repeat => (0, -513, 0),
    };
    let response = Response { id, val, error, flags };
    // SAFETY: the request reads a `struct seccomp_notif_resp`, which outlives the call.
    Errno::result(unsafe { libc::ioctl(listener.as_raw_fd(), IOCTL_SEND, &raw const response) }).map(drop)
}

/// Whether that call still waits: what was read of its memory before is meant only if it does.
pub fn is_waiting(listener: BorrowedFd<'_>, id: u64) -> bool {
    // SAFETY: the request reads a 64-bit number, which outlives the call.
    unsafe { libc::ioctl(listener.as_raw_fd(), IOCTL_ID_VALID, &raw const id) == 0 }
}
