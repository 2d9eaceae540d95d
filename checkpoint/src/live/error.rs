//! Why a process cannot be tracked.

use crate::tracee::TraceeError;
use nix::errno::Errno;
use std::io;

/// Whatever it is, the process runs on as it was: what is armed goes with the [`Tracker`](super::Tracker).
#[derive(Debug, thiserror::Error)]
pub enum LiveError {
    /// The userfaultfd could not be made in it.
    #[error(transparent)]
    Tracee(#[from] TraceeError),
    /// It has ended.
    #[error("process {pid} has ended")]
    Ended {
        /// Which process.
        pid: i32,
    },
    /// The kernel cannot track: migrate by stop and copy.
    #[error("this kernel cannot track written pages ({what}: {errno}); Linux 6.7 and later can")]
    Unsupported {
        /// What it refused.
        what: &'static str,
        /// What it said.
        errno: Errno,
    },
    /// Something of `/proc` could not be read.
    #[error("reading {what} of process {pid} failed: {source}")]
    Proc {
        /// What of it.
        what: &'static str,
        /// Whose.
        pid: i32,
        /// Why.
        source: io::Error,
    },
    /// A call that tracks failed.
    #[error("{operation} at {addr:#x} of process {pid} failed: {errno}")]
    Kernel {
        /// What was tried.
        operation: &'static str,
        /// Where.
        addr: u64,
        /// Whose memory.
        pid: i32,
        /// What the kernel said.
        errno: Errno,
    },
    /// Pages of a frozen process could not be read.
    #[error("memory at {addr:#x} of process {pid} cannot be read: {errno}")]
    Unreadable {
        /// Where.
        addr: u64,
        /// Whose.
        pid: i32,
        /// What the kernel said.
        errno: Errno,
    },
    /// It runs one other program after the other faster than they can be looked at.
    #[error("process {pid} executes programs faster than it can be tracked")]
    Restless {
        /// Which process.
        pid: i32,
    },
}

impl LiveError {
    pub(super) fn proc(what: &'static str, pid: i32) -> impl FnOnce(io::Error) -> LiveError {
        move |source| match source.raw_os_error() {
            Some(libc::ENOENT | libc::ESRCH) => LiveError::Ended { pid },
            _ => LiveError::Proc { what, pid, source },
        }
    }
}
