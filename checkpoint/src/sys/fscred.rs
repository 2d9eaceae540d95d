//! Credentials of one thread only.
//!
//! glibc's `setgroups` changes every thread of the process (nptl(7), "setxid"), the system call
//! changes the caller. A file server that works under its caller's identity needs the latter.

use std::io;

/// Sets the supplementary groups of the calling thread, and of no other.
pub fn set_thread_groups(groups: &[u32]) -> io::Result<()> {
    // SAFETY: the kernel reads `groups.len()` 32-bit ids from a live slice and keeps no reference.
    let done = unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
