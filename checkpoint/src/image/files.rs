//! What is recorded of open files: descriptors, the descriptions that they name, locks, contents of pipes.

use super::sockets::SocketImage;
use super::terminals::TerminalImage;
use serde::{Deserialize, Serialize};

/// Open files: the table of descriptors over the open file descriptions.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilesImage {
    /// Descriptors in rising order.
    pub fds: Vec<FdImage>,
    /// Open file descriptions, each once.
    pub files: Vec<OpenFile>,
    /// Contents of the internal pipes; empty where the embedder keeps the pipes themselves.
    pub pipes: Vec<PipeImage>,
    /// Sockets of all processes of the image, in that of the first one.
    pub sockets: Vec<SocketImage>,
    /// Pseudo-terminals whose masters processes of the image have, in that of the first one.
    pub terminals: Vec<TerminalImage>,
    /// Open file descriptions that are in a message of a socket, in that of the first one; `shared`
    /// tells whether a process has them too.
    pub in_flight: Vec<OpenFile>,
}

/// A pipe or FIFO that the processes of the image have among themselves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PipeImage {
    /// Device and inode number: which [`OpenFile`]s are its ends.
    pub id: (u64, u64),
    /// Size of its buffer, bytes.
    pub capacity: u32,
    /// What was written and not read.
    #[serde(with = "serde_bytes")]
    pub data: Vec<u8>,
    /// How it was written, if any of it was in packets (`O_DIRECT`): length of each piece, and whether it is a
    /// packet. Else empty.
    pub pieces: Vec<(u32, bool)>,
    /// Its readers are told that the writer has gone; a FIFO's are not before the first has come.
    pub hangup: bool,
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
    /// `F_GET_RW_HINT`; 0: none.
    pub write_hint: u64,
    /// Locks and leases taken through it; POSIX locks are those of the process in whose image this is.
    pub locks: Vec<LockImage>,
    /// What it is.
    pub kind: FileKind,
    /// The same number in other processes of the image: the same open file description. 0: none of them
    /// has it.
    pub shared: u32,
}

/// A lock or lease on a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockImage {
    /// Whose it is.
    pub kind: LockKind,
    /// For writing rather than for reading.
    pub exclusive: bool,
    /// First byte.
    pub start: u64,
    /// Last byte; the largest number: to the end of the file, wherever that will be.
    pub end: u64,
    /// The process that has taken it; -1: not told.
    pub pid: i32,
}

/// Whose a lock is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum LockKind {
    /// The process' (`F_SETLK`).
    Posix,
    /// The open file description's, of a range (`F_OFD_SETLK`).
    Description,
    /// The open file description's, of the whole file (flock(2)).
    Flock,
    /// A lease (`F_SETLEASE`).
    Lease,
    /// Anything else: always a blocker.
    Unknown {
        /// As the kernel shows it.
        line: String,
    },
}

impl LockImage {
    pub(crate) fn unknown(line: &str) -> LockImage {
        LockImage {
            kind: LockKind::Unknown { line: line.into() },
            exclusive: true,
            start: 0,
            end: 0,
            pid: -1,
        }
    }

    /// In words, for a refusal.
    pub fn name(&self) -> String {
        let how = if self.exclusive { "write" } else { "read" };
        let range = match (self.start, self.end) {
            (0, u64::MAX) => String::new(),
            (start, u64::MAX) => format!(", from byte {start} on"),
            (start, end) => format!(", bytes {start} to {end}"),
        };
        match &self.kind {
            LockKind::Posix => format!("a POSIX lock ({how}{range})"),
            LockKind::Description => format!("an OFD lock ({how}{range})"),
            LockKind::Flock => format!("a FLOCK lock ({how})"),
            LockKind::Lease => format!("a lease ({how})"),
            LockKind::Unknown { line } => format!("a lock that is not carried ({})", line.trim()),
        }
    }
}

/// What an open file description stands for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileKind {
    /// A regular file.
    Regular {
        /// The name is gone or stands for another file now.
        deleted: bool,
    },
    /// A memfd: its contents are those of the image's object with this `st_dev` and `st_ino`, as are those of
    /// a deleted file.
    Memfd,
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
        /// What it watches.
        targets: Vec<EpollTarget>,
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
        /// When it is due on its clock, ns, where that is a moment rather than a rest.
        due_ns: Option<u64>,
    },
    /// `signalfd`.
    SignalFd {
        /// Which signals (bit n−1 is signal n).
        mask: u64,
    },
    /// Opened with `O_PATH`: a place in the file tree, and no more.
    Path {
        /// The name is gone or stands for another file now.
        deleted: bool,
    },
    /// A process or thread (pidfd_open(2); `PIDFD_THREAD` and `PIDFD_NONBLOCK` are in the flags).
    Pidfd {
        /// Its PID or TID; 0: it has ended and was waited for.
        pid: i32,
    },
    /// A file or directory of the process file system.
    Proc {
        /// The process whose it is; 0: the system's.
        pid: i32,
    },
    /// A namespace, one of those that the saving program was in too; the link tells which.
    Namespace,
    /// `inotify` without unread events.
    Inotify {
        /// What it watches.
        watches: Vec<WatchImage>,
    },
    /// The master side of a pseudo-terminal.
    PtyMaster {
        /// N of `/dev/pts/N`.
        index: u32,
    },
    /// The slave side of a pseudo-terminal whose master is in the image.
    PtySlave {
        /// N of `/dev/pts/N`.
        index: u32,
    },
    /// A socket.
    Socket {
        /// In words, for the refusal of who does not carry it.
        what: String,
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
    /// A memfd of huge pages (`MFD_HUGETLB`); else as [`FileKind::Memfd`].
    HugeMemfd,
}

impl FileKind {
    /// Whether it is a memfd, of pages of any size.
    pub fn is_memfd(&self) -> bool {
        matches!(self, FileKind::Memfd | FileKind::HugeMemfd)
    }
}

/// What an epoll watches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpollTarget {
    /// The number under which it was added.
    pub fd: i32,
    /// `EPOLL*`; of a one-shot target that has told, only the flags.
    pub events: u32,
    /// What is told with its events.
    pub data: u64,
    /// Where the file is now: PID (0: the process that has the epoll) and number. The number under which it was
    /// added may have been closed, or stand for another file.
    pub at: (i32, i32),
    /// Its event has been taken: an edge-triggered target that is ready, or a one-shot one.
    pub spent: bool,
}

/// What an inotify watches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchImage {
    /// The watch descriptor.
    pub wd: i32,
    /// `IN_*`.
    pub mask: u32,
    /// `st_dev` of the file.
    pub dev: u64,
    /// `st_ino` of the file.
    pub ino: u64,
    /// Its path; empty: it has none that leads to it.
    pub path: Vec<u8>,
    /// Its handle in its file system (name_to_handle_at(2)): type and bytes; no bytes: there is none.
    pub handle: (i32, Vec<u8>),
}
