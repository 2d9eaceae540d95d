//! What the home shepherd and a host shepherd say to each other on a link's control channel.
//!
//! A move's own steps are the messages of [`crate::protocol`]; the rest serves a guest that runs.
//!
//! ```mermaid
//! sequenceDiagram
//!   participant H as home shepherd
//!   participant T as host shepherd
//!   H->>T: Welcome (who comes, clocks, token)
//!   T->>H: requests of the home view (mounting)
//!   T->>H: Move(Prepared)
//!   H->>T: image frames
//!   T->>H: Move(Ready)
//!   H->>T: Move(Commit)
//!   T->>H: Move(Running)
//!   H-->>T: Signal, Continue, Kill …
//!   T-->>H: Ask, Retreat, Stopped, Ended …
//! ```

use serde::{Deserialize, Serialize};

/// Version of these messages; the two must be equal.
pub const VERSION: u32 = 3;

/// From the home shepherd to a host shepherd.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum ToHost {
    /// The first message: who comes.
    Welcome(Box<Welcome>),
    /// A step of a move.
    Move(Step),
    /// Pass a signal on to a guest, with its siginfo; to one thread if `tid` is given.
    Signal {
        /// Which of the subtree: PID at home.
        pid: i32,
        /// TID (the same here and at home).
        tid: Option<i32>,
        /// `siginfo_t`.
        info: Vec<u8>,
    },
    /// Send it a plain signal: SIGSTOP, SIGCONT, SIGKILL.
    Kill {
        /// Whom; absent: all of them.
        pid: Option<i32>,
        /// Which.
        signal: i32,
    },
    /// To [`ToHome::Ask`].
    Answer {
        /// The question's number.
        id: u64,
        /// Its answer.
        reply: Reply,
    },
}

/// Who comes, and what its place must look like.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Welcome {
    /// [`VERSION`].
    pub version: u32,
    /// Home node's name.
    pub home: String,
    /// PID at home.
    pub pid: i32,
    /// Owner.
    pub uid: u32,
    /// Command line, for display.
    pub command: String,
    /// Host name and domain name it sees.
    pub utsname: (Vec<u8>, Vec<u8>),
    /// Home's CLOCK_MONOTONIC and CLOCK_BOOTTIME now, ns.
    pub clocks_ns: (u64, u64),
    /// Names the hidden directory of the home view.
    pub token: [u8; 16],
    /// Its controlling terminal: path at home, handle in the home view.
    pub terminal: Option<(Vec<u8>, u64)>,
    /// TIDs made on this host start here.
    pub tid_base: i32,
    /// Home's `pid_max`: TIDs must stay below it.
    pub pid_max: i32,
}

/// From a host shepherd to the home shepherd.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum ToHome {
    /// A step of a move.
    Move(Step),
    /// A guest calls something that home must answer.
    Ask {
        /// Which of them.
        pid: i32,
        /// Comes back in the answer.
        id: u64,
        /// What.
        question: Question,
    },
    /// A guest needs something that it can have only at home; all of them go.
    Retreat {
        /// The system call or condition.
        reason: String,
    },
    /// It was stopped by this signal.
    Stopped {
        /// Which of them.
        pid: i32,
        /// Which.
        signal: u8,
    },
    /// It goes on.
    Continued {
        /// Which of them.
        pid: i32,
    },
    /// It has ended, with this wait status.
    Ended {
        /// Which of them.
        pid: i32,
        /// As waitpid(2) gives it.
        status: i32,
    },
    /// How it is doing.
    Stat {
        /// Which of them.
        pid: i32,
        /// User and system time, ms.
        cpu_ms: u64,
        /// Resident bytes.
        rss_bytes: u64,
        /// `R`, `S`, `T`, …
        state: char,
    },
}

/// A step of a move: `epoch` says of which.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Step {
    /// Handed out by home, rising.
    pub epoch: u64,
    /// Which step.
    pub kind: StepKind,
}

/// The steps.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum StepKind {
    /// To the target: make a place.
    Prepare,
    /// From the target: the place is ready.
    Prepared,
    /// To the source: freeze the guest and send its image.
    Freeze,
    /// From the source: all sent.
    Sent {
        /// Figures.
        figures: SendFigures,
    },
    /// From the target: rebuilt and stopped.
    Ready,
    /// To the target: let it run.
    Commit,
    /// From the target: it runs.
    Running,
    /// To the source: it runs elsewhere; throw your copy away.
    Forget,
    /// To either: the move is off. The source lets it run on; the target throws its copy away.
    Abort {
        /// Why.
        why: String,
    },
    /// From either: this side cannot go on.
    Failed {
        /// Blockers, if that is the reason.
        blockers: Vec<crate::api::Blocker>,
        /// In words.
        why: String,
    },
}

/// What sending took.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct SendFigures {
    /// Memory bytes.
    pub bytes: u64,
    /// Bytes of the stream.
    pub wire_bytes: u64,
    /// Pages.
    pub pages: u64,
}

/// A question of the guest's.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Question {
    /// getppid, getpgid, getsid….
    Identity(IdentityQuestion),
    /// A terminal request on an open file of home's.
    Terminal {
        /// Handle in the home view.
        handle: u64,
        /// The request.
        request: u64,
        /// The argument itself, for requests that take a number.
        value: u64,
        /// Bytes behind the argument.
        bytes: Vec<u8>,
    },
}

/// What of its identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum IdentityQuestion {
    /// getppid(2).
    ParentPid,
    /// getpgid(2) of a process (0: itself).
    ProcessGroup(i32),
    /// getsid(2) of a process (0: itself).
    Session(i32),
}

/// An answer: the call's result, and bytes for its argument.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Reply {
    /// Result, or a negative errno.
    pub result: i64,
    /// To be written behind the argument.
    pub bytes: Vec<u8>,
}
