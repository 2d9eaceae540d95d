//! What a checkpoint records of one process: plain data, no procedure.
//!
//! Everything here travels through [`codec`]; page contents never do (see [`stream`]).
//! A field's unit and source are in its comment. Kernel structures that we only carry are kept as
//! the kernel's own bytes, so that nothing is lost by translating them.

use serde::{Deserialize, Serialize};

pub mod codec;
pub mod stream;

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
    /// Memory.
    pub mm: MmImage,
    /// Leader first, then in rising order of TID.
    pub threads: Vec<ThreadImage>,
    /// Signal actions and what is pending on the whole process.
    pub signals: SignalsImage,
    /// Interval and POSIX timers.
    pub timers: TimersImage,
    /// Credentials (the same in every thread, or the process is not migratable yet).
    pub creds: CredsImage,
    /// `prlimit`: resource, soft, hard.
    pub limits: Vec<(u32, u64, u64)>,
    /// Working directory, root, umask.
    pub fs: FsImage,
    /// Open files.
    pub files: FilesImage,
    /// What is left.
    pub misc: MiscImage,
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
}

/// The address space.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MmImage {
    /// Mappings in rising order.
    pub vmas: Vec<Vma>,
    /// Guard pages (`MADV_GUARD_INSTALL`): starts and ends, in rising order.
    pub guards: Vec<(u64, u64)>,
    /// `start_code end_code start_data end_data start_brk brk start_stack arg_start arg_end
    /// env_start env_end`: the order of `struct prctl_mm_map`.
    pub layout: [u64; 11],
    /// `/proc/PID/auxv` as it is.
    pub auxv: Vec<u8>,
    /// Target of `/proc/PID/exe`.
    pub exe: Vec<u8>,
    /// `/proc/PID/coredump_filter`.
    pub coredump_filter: u32,
    /// `PR_GET_THP_DISABLE`.
    pub thp_disable: bool,
}

/// One mapping.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vma {
    /// First address.
    pub start: u64,
    /// One past the last.
    pub end: u64,
    /// `PROT_*`.
    pub prot: u32,
    /// What is behind it.
    pub backing: Backing,
    /// `MAP_SHARED` rather than `MAP_PRIVATE`.
    pub shared: bool,
    /// Two-letter flags of `VmFlags:` in `smaps`, packed: see [`VmaFlags`].
    pub flags: VmaFlags,
    /// Name given with `PR_SET_VMA_ANON_NAME`, if any.
    pub name: Option<Vec<u8>>,
}

bitflags::bitflags! {
    /// The flags of a mapping that are carried (Documentation/filesystems/proc.rst, `VmFlags`).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
    #[serde(transparent)]
    pub struct VmaFlags: u32 {
        /// `gd`: grows down.
        const GROWSDOWN = 1;
        /// `lo`: locked.
        const LOCKED = 2;
        /// `lf`: lock on fault.
        const LOCKONFAULT = 4;
        /// `hg`: huge pages advised.
        const HUGEPAGE = 8;
        /// `nh`: huge pages advised against.
        const NOHUGEPAGE = 16;
        /// `dc`: not copied on fork.
        const DONTFORK = 32;
        /// `wf`: wiped on fork.
        const WIPEONFORK = 64;
        /// `dd`: not dumped.
        const DONTDUMP = 128;
        /// `mg`: mergeable.
        const MERGEABLE = 256;
        /// `sr`: sequential reads advised.
        const SEQ_READ = 512;
        /// `rr`: random reads advised.
        const RAND_READ = 1024;
        /// `nr`: no swap reserved.
        const NORESERVE = 2048;
        /// `ht`: hugetlb.
        const HUGETLB = 4096;
        /// `sl`: sealed (`mseal`).
        const SEALED = 8192;
        /// `um`/`uw`/`ui`: registered with a userfaultfd.
        const USERFAULT = 16384;
        /// `io`: device memory.
        const IO = 32768;
        /// `pf`: pure PFN range.
        const PFNMAP = 65536;
    }
}

/// What is behind a mapping.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Backing {
    /// Private anonymous memory (heap and stack too).
    Anon,
    /// Shared anonymous memory (`MAP_SHARED|MAP_ANONYMOUS`): mappings of one process with the
    /// same `id` are the same memory.
    SharedAnon {
        /// Inode number of the kernel's internal tmpfs file.
        id: u64,
        /// Offset into it, bytes.
        offset: u64,
    },
    /// A file.
    File(MappedFile),
    /// The vDSO's code.
    Vdso,
    /// The vDSO's data (one or more mappings named `[vvar…]`).
    Vvar,
    /// `[vsyscall]`: the same on every x86-64 kernel; never touched.
    Vsyscall,
}

/// The file behind a mapping.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MappedFile {
    /// Path in the process' mount namespace, as bytes, without ` (deleted)`.
    pub path: Vec<u8>,
    /// The name is gone or stands for another file now.
    pub deleted: bool,
    /// `st_dev`.
    pub dev: u64,
    /// `st_ino`.
    pub ino: u64,
    /// Offset, bytes.
    pub offset: u64,
    /// The mapping may be (made) written: a shared one needs a writable descriptor.
    pub may_write: bool,
}

/// One thread.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThreadImage {
    /// TID in the namespace where it was read.
    pub tid: i32,
    /// `struct user_regs_struct` (27 words), after system-call restart was arranged.
    pub regs: Vec<u64>,
    /// `NT_X86_XSTATE` as it is.
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
    pub sched: Vec<u8>,
    /// CPU affinity at home, one bit a CPU. Not applied on another node.
    pub affinity: Vec<u8>,
    /// `PR_GET_TIMERSLACK`, ns.
    pub timer_slack_ns: u64,
    /// `ioprio_get`.
    pub ioprio: u32,
    /// `PR_GET_PDEATHSIG`.
    pub pdeathsig: u32,
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
    /// Overrun not yet told.
    pub overrun: i32,
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

/// Open files: the table of descriptors over the open file descriptions.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilesImage {
    /// Descriptors in rising order.
    pub fds: Vec<FdImage>,
    /// Open file descriptions, each once.
    pub files: Vec<OpenFile>,
    /// Contents of the internal pipes; empty where the embedder keeps the pipes themselves.
    pub pipes: Vec<PipeImage>,
}

/// A pipe that the process has with itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PipeImage {
    /// Inode number: which [`OpenFile`]s are its ends.
    pub ino: u64,
    /// Size of its buffer, bytes.
    pub capacity: u32,
    /// What was written and not read.
    pub data: Vec<u8>,
}

/// One descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FdImage {
    /// Number.
    pub fd: i32,
    /// Close on exec.
    pub cloexec: bool,
    /// Index into [`FilesImage::files`].
    pub file: u32,
}

/// One open file description.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenFile {
    /// `O_*` as `fdinfo` tells them, without `O_CLOEXEC`.
    pub flags: u32,
    /// Position, bytes.
    pub pos: u64,
    /// Target of `/proc/PID/fd/N`.
    pub link: Vec<u8>,
    /// `st_dev`, `st_ino`, `st_mode`, `st_rdev` of the file.
    pub stat: (u64, u64, u32, u64),
    /// `F_GETOWN_EX` type and id, `F_GETSIG`; all 0: none.
    pub owner: (i32, i32, i32),
    /// What it is.
    pub kind: FileKind,
    /// The same number in other processes of the image: the same open file description. 0: none of them
    /// has it.
    pub shared: u32,
}

/// What an open file description stands for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileKind {
    /// A regular file.
    Regular {
        /// The name is gone or stands for another file now.
        deleted: bool,
    },
    /// A directory.
    Directory,
    /// A character device that is the same on every node: `null`, `zero`, `full`, `random`,
    /// `urandom`.
    LocalDevice,
    /// A terminal.
    Tty,
    /// A pipe without a name, or a FIFO: read end, write end, or both (by `flags`).
    Pipe {
        /// The other end is held by nobody outside the image.
        internal: bool,
    },
    /// `eventfd`.
    EventFd {
        /// Its counter.
        count: u64,
        /// `EFD_SEMAPHORE`.
        semaphore: bool,
    },
    /// `epoll`.
    Epoll {
        /// What it watches: fd, events, data.
        targets: Vec<(i32, u32, u64)>,
    },
    /// `timerfd`.
    TimerFd {
        /// Clock.
        clock: i32,
        /// Expirations not yet read.
        ticks: u64,
        /// `TFD_TIMER_*` flags of `settime`.
        settime_flags: u32,
        /// Remainder, ns; 0: disarmed.
        value_ns: u64,
        /// Interval, ns.
        interval_ns: u64,
    },
    /// `signalfd`.
    SignalFd {
        /// Which signals (bit n−1 is signal n).
        mask: u64,
    },
    /// Held by the embedder under this handle: migd's home view uses it for what stays open at
    /// home while the guest is away.
    Foreign {
        /// The embedder's own number for it.
        handle: u64,
    },
    /// Anything else: always a blocker; the text says what it is.
    Unsupported {
        /// For the refusal.
        what: String,
    },
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
}
