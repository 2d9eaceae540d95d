//! clone3(2) used as fork(2): for a process with one thread, with a wanted PID and new namespaces.
//!
//! The C library's own fork is not used because it knows neither. What it would do besides (its
//! handlers, its cached thread id) matters to programs with threads only, and those are refused.

use nix::errno::Errno;
use std::fs;

/// `struct clone_args` (`<linux/sched.h>`), version 2 (with `cgroup`).
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}
const _: () = assert!(size_of::<CloneArgs>() == 88);

/// Which side of a fork this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The parent; the child's PID in the parent's PID namespace.
    Parent(i32),
    /// The child.
    Child,
}

/// Forks. `namespaces` are `CLONE_NEW*` flags for the child; `pid` is the PID it must have in its
/// own (innermost) PID namespace, which needs CAP_CHECKPOINT_RESTORE there.
///
/// `EDEADLK`: the caller has more than one thread, so that the child could find a lock taken for
/// ever. `EEXIST`: the PID is taken.
pub fn fork(namespaces: i32, pid: Option<i32>) -> Result<Side, Errno> {
    let threads =
        fs::read_dir("/proc/self/task").map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(0)))?;
    if threads.count() != 1 {
        return Err(Errno::EDEADLK);
    }
    let wanted = pid.unwrap_or(0);
    let mut args = CloneArgs {
        flags: namespaces as u32 as u64,
        exit_signal: libc::SIGCHLD as u64,
        ..CloneArgs::default()
    };
    if pid.is_some() {
        args.set_tid = &raw const wanted as u64;
        args.set_tid_size = 1;
    }
    // SAFETY: `args` and `wanted` outlive the call and have the sizes told; without CLONE_VM and
    // with no stack given the child runs on a copy of this one; this is the only thread, so that
    // the copy is as consistent as after a call of any function.
    let got = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) };
    Ok(match Errno::result(got)? {
        0 => Side::Child,
        child => Side::Parent(child as i32),
    })
}

/// Ends this process at once, without the handlers that belong to the process it was forked from.
pub fn exit_now(status: i32) -> ! {
    // SAFETY: _exit(2) has no preconditions.
    unsafe { libc::_exit(status) }
}

/// Ends this process by a signal, without a core file.
pub fn die_of(signal: i32) -> ! {
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the structures and the set outlive the calls; the default action runs no code of ours.
    unsafe {
        libc::setrlimit(libc::RLIMIT_CORE, &raw const none);
        libc::signal(signal, libc::SIG_DFL);
        let mut set = std::mem::zeroed::<libc::sigset_t>();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, signal);
        libc::sigprocmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
        libc::kill(libc::getpid(), signal);
    }
    // One whose default is not the end cannot have ended a process.
    exit_now(1)
}
