//! What can go wrong with a traced process.

use nix::errno::Errno;

/// Why a traced process could not be handled. Whether it still runs is said at each variant.
#[derive(Debug, thiserror::Error)]
pub enum TraceeError {
    /// A kernel call failed. The process runs or stands as it was.
    #[error("{operation} on task {tid} failed: {errno}")]
    Kernel {
        /// What was tried.
        operation: &'static str,
        /// On which task.
        tid: i32,
        /// What the kernel said.
        errno: Errno,
    },
    /// The process (or this thread of it) ended while it was being handled.
    #[error("task {tid} ended while it was being handled")]
    Died {
        /// Which task.
        tid: i32,
    },
    /// A thread did not stop in time (uninterruptible sleep, vfork). The process goes on.
    #[error("thread {tid} did not stop within {millis} ms: it is {doing}")]
    WontStop {
        /// Which thread.
        tid: i32,
        /// How long we waited.
        millis: u64,
        /// What it is at instead.
        doing: String,
    },
    /// Somebody else traces it. The process is untouched.
    #[error("process {pid} is traced by process {tracer} (a debugger or strace)")]
    Traced {
        /// Which process.
        pid: i32,
        /// Its tracer.
        tracer: i32,
    },
    /// No room for the stub, or no system-call instruction in the vDSO.
    #[error("process {pid}: {what}")]
    Unfit {
        /// Which process.
        pid: i32,
        /// What is missing.
        what: &'static str,
    },
    /// An injected system call did not come back as it should: the process is not in a state we know.
    #[error("injected system call {nr} in task {tid} did not return after {stops} stops")]
    Runaway {
        /// Which task.
        tid: i32,
        /// Which call.
        nr: i64,
        /// How many stops were seen.
        stops: u32,
    },
    /// An injected system call failed.
    #[error("{operation} inside task {tid} failed: {errno}")]
    Inside {
        /// What was tried.
        operation: &'static str,
        /// In which task.
        tid: i32,
        /// What the kernel said.
        errno: Errno,
    },
}

impl TraceeError {
    /// From a ptrace-like call: `ESRCH` means that the task is gone.
    pub fn kernel(operation: &'static str, tid: i32, errno: Errno) -> Self {
        match errno {
            Errno::ESRCH => TraceeError::Died { tid },
            errno => TraceeError::Kernel { operation, tid, errno },
        }
    }
}
