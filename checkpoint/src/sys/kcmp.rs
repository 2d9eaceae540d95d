//! kcmp(2): whether two tasks share something.

use nix::errno::Errno;
use std::cmp::Ordering;

/// What is compared (`KCMP_*`).
#[derive(Debug, Clone, Copy)]
pub enum Shared {
    /// The address space.
    Memory = 1,
    /// The descriptor table.
    Files = 2,
    /// Working directory and umask.
    Fs = 3,
    /// Signal handlers.
    Handlers = 4,
}

/// `struct kcmp_epoll_slot`.
#[repr(C)]
struct EpollSlot {
    epoll: u32,
    target: u32,
    which: u32,
}

const _: () = assert!(size_of::<EpollSlot>() == 12);

/// Whether descriptor `fd` of process `of` is what the epoll `epoll` of process `pid` watches under the
/// number `target` (there may be several of a number: `which`).
pub fn same_epoll_target(
    (of, fd): (i32, i32),
    (pid, epoll): (i32, i32),
    target: i32,
    which: u32,
) -> Result<bool, Errno> {
    const KCMP_EPOLL_TFD: i32 = 7;
    let slot = EpollSlot { epoll: epoll as u32, target: target as u32, which };
    let at = &raw const slot;
    // SAFETY: the kernel reads the structure, which outlives the call.
    let got = unsafe { libc::syscall(libc::SYS_kcmp, of, pid, KCMP_EPOLL_TFD, fd as u64, at) };
    Errno::result(got).map(|order| order == 0)
}

/// Whether both tasks share it.
pub fn shared(a: i32, b: i32, what: Shared) -> Result<bool, Errno> {
    order(a, b, what).map(|order| order == Ordering::Equal)
}

/// How what one task has compares with what another has: an order that holds until the next boot.
pub fn order(a: i32, b: i32, what: Shared) -> Result<Ordering, Errno> {
    // SAFETY: no pointers.
    let got = unsafe { libc::syscall(libc::SYS_kcmp, a, b, what as i32, 0, 0) };
    ordering(got)
}

/// Whether two descriptors are the same open file description.
pub fn same_file(a: i32, fd_a: i32, b: i32, fd_b: i32) -> Result<bool, Errno> {
    order_of_files((a, fd_a), (b, fd_b)).map(|order| order == Ordering::Equal)
}

/// How the open file descriptions of two descriptors (of processes) compare.
pub fn order_of_files(a: (i32, i32), b: (i32, i32)) -> Result<Ordering, Errno> {
    const KCMP_FILE: i32 = 0;
    // SAFETY: no pointers.
    let got = unsafe { libc::syscall(libc::SYS_kcmp, a.0, b.0, KCMP_FILE, a.1 as u64, b.1 as u64) };
    ordering(got)
}

/// kcmp(2): 0 equal, 1 less, 2 greater, 3 not equal and nothing else known.
fn ordering(got: libc::c_long) -> Result<Ordering, Errno> {
    match Errno::result(got)? {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        2 => Ok(Ordering::Greater),
        _ => Err(Errno::ENOTSUP),
    }
}
