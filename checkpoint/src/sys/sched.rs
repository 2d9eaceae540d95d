//! Scheduling attributes, affinity, I/O priority, robust lists and limits of another task.

use nix::errno::Errno;

/// `struct sched_attr` as the kernel gives it (56 bytes or more).
pub fn attributes(tid: i32) -> Result<Vec<u8>, Errno> {
    let mut attr = vec![0u8; 56];
    // SAFETY: the buffer has the length given.
    let got = unsafe { libc::syscall(libc::SYS_sched_getattr, tid, attr.as_mut_ptr(), attr.len(), 0) };
    Errno::result(got).map(|_| attr)
}

/// Sets what [`attributes`] gave.
pub fn set_attributes(tid: i32, attr: &[u8]) -> Result<(), Errno> {
    if attr.len() < 48 || attr.len() > 4096 {
        return Err(Errno::EINVAL);
    }
    let mut copy = attr.to_vec();
    let length = copy.len() as u32;
    copy[..4].copy_from_slice(&length.to_le_bytes());
    // SAFETY: the structure begins with its own length, and is that long.
    let got = unsafe { libc::syscall(libc::SYS_sched_setattr, tid, copy.as_ptr(), 0) };
    Errno::result(got).map(drop)
}

/// Whether attributes are those of SCHED_DEADLINE: `sched_policy` follows the length (sched_setattr(2)).
pub fn is_deadline(attributes: &[u8]) -> bool {
    attributes.get(4..8) == Some(&(libc::SCHED_DEADLINE as u32).to_ne_bytes()[..])
}

/// CPU affinity, one bit a CPU.
pub fn affinity(tid: i32) -> Result<Vec<u8>, Errno> {
    let mut mask = [0u8; 1024];
    // SAFETY: the buffer has the length given.
    let got = unsafe { libc::syscall(libc::SYS_sched_getaffinity, tid, mask.len(), mask.as_mut_ptr()) };
    let used = Errno::result(got)? as usize;
    Ok(mask.get(..used).unwrap_or_default().to_vec())
}

/// Sets CPU affinity.
pub fn set_affinity(tid: i32, mask: &[u8]) -> Result<(), Errno> {
    // SAFETY: the buffer has the length given.
    let got = unsafe { libc::syscall(libc::SYS_sched_setaffinity, tid, mask.len(), mask.as_ptr()) };
    Errno::result(got).map(drop)
}

/// `ioprio_get` of a task.
pub fn io_priority(tid: i32) -> Result<u32, Errno> {
    // SAFETY: no pointers. 1 is IOPRIO_WHO_PROCESS.
    let got = unsafe { libc::syscall(libc::SYS_ioprio_get, 1, tid) };
    Errno::result(got).map(|value| value as u32)
}

/// `ioprio_set` of a task.
pub fn set_io_priority(tid: i32, value: u32) -> Result<(), Errno> {
    // SAFETY: no pointers.
    let got = unsafe { libc::syscall(libc::SYS_ioprio_set, 1, tid, value) };
    Errno::result(got).map(drop)
}

/// Head and length of a task's robust futex list.
pub fn robust_list(tid: i32) -> Result<(u64, u64), Errno> {
    let (mut head, mut length) = (0u64, 0u64);
    // SAFETY: both outlive the call.
    let got = unsafe { libc::syscall(libc::SYS_get_robust_list, tid, &raw mut head, &raw mut length) };
    Errno::result(got).map(|_| (head, length))
}
