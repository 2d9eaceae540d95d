//! What a checkpoint records of one process: plain data, no procedure.
//!
//! Everything here travels through [`codec`]; page contents never do (see [`stream`]).
//! A field's unit and source are in its comment. Kernel structures that we only carry are kept as
//! the kernel's own bytes, so that nothing is lost by translating them.

use serde::{Deserialize, Serialize};

pub mod codec;
pub mod cpu;
mod files;
pub mod kept;
mod memory;
pub mod objects;
pub mod reports;
pub mod shares;
pub mod sockets;
mod sparse;
pub mod stream;
pub mod terminals;
pub mod traits;

pub use files::{
    EpollTarget, FdImage, FileKind, FilesImage, LockImage, LockKind, OpenFile, PipeImage, WatchImage,
};
pub use memory::{
    Backing, ContextImage, HUGE_PAGE_SHIFTS, MAX_VDSO, MappedFile, MmImage, PAGE_SHIFT, Vma, VmaFlags,
};

/// Bound on the processes of one image, and on the ended children of one of them.
pub const MAX_PROCESSES: usize = 4096;

/// One process with all its threads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProcessImage {
    /// PID in the namespace where it was read.
    pub pid: i32,
    /// PID of its parent, which comes before it in the image; 0: its parent is not in the image.
    pub ppid: i32,
    /// Children that have ended and that it has not waited for.
    pub zombies: Vec<ZombieImage>,
    /// Process group.
    pub pgid: i32,
    /// Session.
    pub sid: i32,
    /// The signal by which it tells its parent of its end; 0: by none.
    pub exit_signal: i32,
    /// Which thread of its parent's has it as a child (`__WNOTHREAD`, `PR_SET_PDEATHSIG`): the TID; 0 or
    /// one that is not there: the leader.
    pub parent_tid: i32,
    /// Memory.
    pub mm: MmImage,
    /// Leader first, then in rising order of TID.
    pub threads: Vec<ThreadImage>,
    /// Signal actions and what is pending on the whole process.
    pub signals: SignalsImage,
    /// Interval and POSIX timers.
    pub timers: TimersImage,
    /// Credentials of the leader, and of every thread that has none of its own.
    pub creds: CredsImage,
    /// The system-call filters that its threads name.
    pub seccomp: SeccompImage,
    /// `prlimit`: resource, soft, hard.
    pub limits: Vec<(u32, u64, u64)>,
    /// Working directory, root, umask.
    pub fs: FsImage,
    /// Open files.
    pub files: FilesImage,
    /// What is left.
    pub misc: MiscImage,
    /// What it shares with earlier processes of the image.
    pub shares: shares::SharesImage,
    /// What its parent has heard of its stops.
    pub report: reports::ReportImage,
    /// Settings that no file of it tells.
    pub traits: traits::ProcessTraits,
}

impl ProcessImage {
    /// Without the filters that it was found with: a guest's are not its own.
    pub fn forget_filters(&mut self) {
        self.seccomp = SeccompImage::default();
        for thread in &mut self.threads {
            (thread.seccomp_mode, thread.seccomp_filters) = (0, Vec::new());
        }
    }
}

/// A child that has ended and that its parent has not waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ZombieImage {
    /// Its PID.
    pub pid: i32,
    /// Its process group.
    pub pgid: i32,
    /// Its session.
    pub sid: i32,
    /// How it ended: the raw status of wait(2).
    pub status: i32,
    /// The signal by which it has told its parent; 0: by none.
    pub exit_signal: i32,
    /// Which thread of its parent's has it as a child.
    pub parent_tid: i32,
}

/// One thread.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThreadImage {
    /// TID in the namespace where it was read.
    pub tid: i32,
    /// `struct user_regs_struct` (27 words) as at an event stop: a call that was interrupted has the
    /// kernel's own code as its result (`ERESTARTSYS` and the like).
    pub regs: Vec<u64>,
    /// What was left of the relative time-out of that call, ns, where the kernel kept it
    /// (`ERESTART_RESTARTBLOCK`); elsewhere the registers say it.
    pub wait_left_ns: Option<u64>,
    /// `NT_X86_XSTATE` as it is.
    #[serde(with = "sparse")]
    pub xstate: Vec<u8>,
    /// Blocked signals.
    pub sigmask: u64,
    /// `struct rseq` registration: address, length, signature; address 0: none.
    pub rseq: RseqImage,
    /// Robust futex list: head, length.
    pub robust_list: (u64, u64),
    /// `set_tid_address`.
    pub clear_child_tid: u64,
    /// `stack_t` as the kernel gives it: sp, flags, size.
    pub altstack: (u64, u32, u64),
    /// Pending on this thread alone, oldest first: `siginfo_t`, 128 bytes each.
    pub pending: Vec<Vec<u8>>,
    /// Name (`comm`).
    pub comm: Vec<u8>,
    /// Scheduling policy and parameters (`sched_getattr`, as it is).
    #[serde(with = "serde_bytes")]
    pub sched: Vec<u8>,
    /// CPU affinity at home, one bit a CPU. Not applied on another node.
    #[serde(with = "serde_bytes")]
    pub affinity: Vec<u8>,
    /// `PR_GET_TIMERSLACK`, ns.
    pub timer_slack_ns: u64,
    /// `ioprio_get`.
    pub ioprio: u32,
    /// `PR_GET_PDEATHSIG`.
    pub pdeathsig: u32,
    /// Credentials, where they are others than the leader's.
    pub creds: Option<CredsImage>,
    /// `PR_GET_SECCOMP`: 0 none, 1 strict, 2 filters.
    pub seccomp_mode: u8,
    /// Its filters, oldest first: indices into [`SeccompImage::filters`].
    pub seccomp_filters: Vec<u32>,
    /// What it does not share with its process.
    pub apart: shares::ApartImage,
    /// Settings that no file of it tells.
    pub traits: traits::ThreadTraits,
}

/// System-call filters of a process (seccomp(2)).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeccompImage {
    /// Each program once.
    pub filters: Vec<FilterImage>,
    /// They were installed with `SECCOMP_FILTER_FLAG_SPEC_ALLOW`, as far as can be seen.
    pub spec_allow: bool,
}

/// One system-call filter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilterImage {
    /// `struct sock_filter`, 8 bytes each.
    #[serde(with = "serde_bytes")]
    pub program: Vec<u8>,
    /// `SECCOMP_FILTER_FLAG_LOG`.
    pub log: bool,
}

/// An rseq registration (`PTRACE_GET_RSEQ_CONFIGURATION`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RseqImage {
    /// Address of `struct rseq`; 0: not registered.
    pub addr: u64,
    /// Its length, bytes.
    pub len: u32,
    /// The abort signature.
    pub signature: u32,
    /// Registration flags.
    pub flags: u32,
}

/// Signals of the whole process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignalsImage {
    /// Signal 1 to 64: handler, flags, restorer, mask (`struct kernel_sigaction`).
    pub actions: Vec<[u64; 4]>,
    /// Pending on the process, oldest first: `siginfo_t`, 128 bytes each.
    pub pending: Vec<Vec<u8>>,
    /// It is stopped, by this signal (a group stop); restored stopped.
    pub stopped_by: Option<u8>,
}

/// Timers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimersImage {
    /// `ITIMER_REAL`, `_VIRTUAL`, `_PROF`: interval and remainder, microseconds.
    pub itimers: [(u64, u64); 3],
    /// POSIX timers.
    pub posix: Vec<PosixTimer>,
}

/// One POSIX timer (`timer_create`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PosixTimer {
    /// The kernel's id; kept (`PR_TIMER_CREATE_RESTORE_IDS`, or created in order).
    pub id: i32,
    /// Clock.
    pub clock: i32,
    /// `sigev_notify`.
    pub notify: i32,
    /// Signal.
    pub signo: i32,
    /// `sigev_value`.
    pub value: u64,
    /// For `SIGEV_THREAD_ID`: the TID.
    pub tid: i32,
    /// Interval, ns.
    pub interval_ns: u64,
    /// Remainder, ns; 0: disarmed.
    pub value_ns: u64,
    /// Overrun of the expiration that was told last (timer_getoverrun(2)).
    pub overrun: i32,
    /// When it is due on its clock, ns, where that is a moment rather than a rest: not for clocks of CPU
    /// time, and for `CLOCK_REALTIME` only if it was set to a time of day.
    pub due_ns: Option<u64>,
    /// The thread whose CPU time it counts, if it counts that of the thread that has made it; 0: it does not.
    pub owner: i32,
}

/// Credentials.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CredsImage {
    /// Real, effective, saved, file-system user id.
    pub uids: [u32; 4],
    /// Real, effective, saved, file-system group id.
    pub gids: [u32; 4],
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Inheritable, permitted, effective, bounding, ambient capabilities.
    pub caps: [u64; 5],
    /// `PR_GET_SECUREBITS`.
    pub securebits: u32,
    /// `PR_GET_NO_NEW_PRIVS`.
    pub no_new_privs: bool,
}

/// Working directory, root, umask.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsImage {
    /// Path of the working directory.
    pub cwd: Vec<u8>,
    /// The working directory has been removed.
    pub cwd_deleted: bool,
    /// Path of the root (`/` unless chrooted).
    pub root: Vec<u8>,
    /// umask.
    pub umask: u32,
}

/// What is left.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MiscImage {
    /// `personality`.
    pub personality: u32,
    /// `PR_GET_DUMPABLE`.
    pub dumpable: u32,
    /// `PR_GET_CHILD_SUBREAPER`.
    pub child_subreaper: bool,
    /// `/proc/PID/oom_score_adj`.
    pub oom_score_adj: i32,
    /// Host name and domain name it sees (UTS namespace).
    pub utsname: (Vec<u8>, Vec<u8>),
    /// `CLOCK_MONOTONIC` and `CLOCK_BOOTTIME` where it was read, ns.
    pub clocks_ns: (u64, u64),
    /// Kernel release, for the record.
    pub kernel: String,
    /// The CPU where it was read.
    pub cpu: cpu::CpuImage,
    /// What it has registered for by membarrier(2): `MEMBARRIER_CMD_REGISTER_*`.
    pub membarrier: u32,
}
