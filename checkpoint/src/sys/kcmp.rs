//! kcmp(2): whether two tasks share something.

use nix::errno::Errno;

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

/// Whether descriptor `fd` is what the epoll at `epoll` watches under the number `target` (there may
/// be several of a number: `which`).
pub fn same_epoll_target(pid: i32, fd: i32, epoll: i32, target: i32, which: u32) -> Result<bool, Errno> {
    const KCMP_EPOLL_TFD: i32 = 7;
    let slot = EpollSlot { epoll: epoll as u32, target: target as u32, which };
    let at = &raw const slot;
    // SAFETY: the kernel reads the structure, which outlives the call.
    let got = unsafe { libc::syscall(libc::SYS_kcmp, pid, pid, KCMP_EPOLL_TFD, fd as u64, at) };
    Errno::result(got).map(|order| order == 0)
}

/// Whether both tasks share it.
pub fn shared(a: i32, b: i32, what: Shared) -> Result<bool, Errno> {
    // SAFETY: no pointers.
    let got = unsafe { libc::syscall(libc::SYS_kcmp, a, b, what as i32, 0, 0) };
    Errno::result(got).map(|order| order == 0)
}

/// Whether two descriptors are the same open file description.
pub fn same_file(a: i32, fd_a: i32, b: i32, fd_b: i32) -> Result<bool, Errno> {
    const KCMP_FILE: i32 = 0;
    // SAFETY: no pointers.
    let got = unsafe { libc::syscall(libc::SYS_kcmp, a, b, KCMP_FILE, fd_a as u64, fd_b as u64) };
    Errno::result(got).map(|order| order == 0)
}
