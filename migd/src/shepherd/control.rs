//! What the daemon and its shepherds say to each other over the shepherd's control socket
//! (a Unix stream socket the shepherd inherits as descriptor 3), one JSON document a line.
//!
//! There are two kinds of shepherd, both started by the daemon as `migd shepherd home|host`:
//!
//! * the **home shepherd**, one per process that is away or about to leave: it traces the deputy,
//!   serves the home view, and is the arbiter of every move of that process;
//! * the **host shepherd**, one per guest: it builds the guest, serves its FUSE device, and carries
//!   what the guest needs from home.
//!
//! A home shepherd dials the target's daemon on its one port (see [`Preamble`]); that daemon hands
//! the raw connection (as descriptor 4) to a new host shepherd, and the two shepherds speak
//! mutually authenticated TLS over it. The daemons are not in the data path, so that a restart of a
//! daemon costs no job.

use serde::{Deserialize, Serialize};

/// First bytes on every TCP connection to a daemon, before TLS: which of the two services is meant.
/// It gives no rights: both services then demand mutual TLS; a session's token only picks the
/// shepherd that was announced over an authenticated connection.
///
/// ```text
/// 0..6   b"migd/1"
/// 6      kind: 0 peer (daemon to daemon), 1 session (shepherd to shepherd)
/// 7      0
/// 8..24  session token (16 random bytes); zero for a peer
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preamble {
    /// What is meant.
    pub kind: PreambleKind,
    /// The announced session.
    pub token: [u8; 16],
}

/// The two services of a daemon's port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PreambleKind {
    /// Daemon to daemon.
    Peer,
    /// Shepherd to shepherd.
    Session,
}

/// Length of a [`Preamble`], bytes.
pub const PREAMBLE_LEN: usize = 24;

impl Preamble {
    /// As bytes.
    pub fn to_bytes(self) -> [u8; PREAMBLE_LEN] {
        let mut out = [0; PREAMBLE_LEN];
        out[..6].copy_from_slice(b"migd/1");
        out[6] = match self.kind {
            PreambleKind::Peer => 0,
            PreambleKind::Session => 1,
        };
        out[8..].copy_from_slice(&self.token);
        out
    }

    /// From bytes; `None` if they are not a preamble.
    pub fn from_bytes(bytes: &[u8; PREAMBLE_LEN]) -> Option<Preamble> {
        if &bytes[..6] != b"migd/1" || bytes[7] != 0 {
            return None;
        }
        let kind = match bytes[6] {
            0 => PreambleKind::Peer,
            1 => PreambleKind::Session,
            _ => return None,
        };
        let mut token = [0; 16];
        token.copy_from_slice(&bytes[8..]);
        Some(Preamble { kind, token })
    }
}

/// Daemon to home shepherd.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "snake_case")]
pub enum HomeOrder {
    /// Move the process.
    Move {
        /// The daemon's number for this migration; comes back in every event about it.
        id: u64,
        /// Where to; absent: home.
        target: Option<TargetNode>,
        /// Do everything but commit.
        dry_run: bool,
        /// Give up (and leave it running where it was) after so long.
        timeout_ms: u64,
    },
    /// Stop trying to move it.
    Cancel {
        /// The migration's number.
        id: u64,
    },
}

/// A node that has agreed to take the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetNode {
    /// Its name.
    pub name: String,
    /// `IP:PORT` of its daemon.
    pub address: String,
    /// The session announced to that daemon, in hexadecimal (32 digits).
    pub token: String,
}

/// Home shepherd to daemon.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum HomeEvent {
    /// Ready for orders.
    Ready,
    /// A migration has entered a phase, or made progress in it.
    Progress {
        /// The migration's number.
        id: u64,
        /// `preparing`, `freezing`, `copying`, `committing`.
        phase: String,
        /// Memory bytes carried so far.
        bytes: u64,
        /// Bytes on the wire so far.
        wire_bytes: u64,
    },
    /// A migration is committed: the process now runs at `node`.
    Moved {
        /// The migration's number.
        id: u64,
        /// Where it runs now.
        node: String,
        /// What it took.
        figures: MoveFigures,
        /// The processes that moved together, by their PIDs at home, parents first.
        #[serde(default)]
        pids: Vec<i32>,
    },
    /// A migration has failed; the process runs where it was.
    MoveFailed {
        /// The migration's number.
        id: u64,
        /// Why and what next.
        error: crate::api::ApiError,
    },
    /// The guest did something it can only do at home (fork, exec, a socket…) and waits for the
    /// daemon to order the way home.
    Retreat {
        /// The system call or condition, for `why` and the history.
        reason: String,
    },
    /// How a guest is doing, about once a second.
    GuestStat {
        /// PID at home.
        pid: i32,
        /// User and system CPU time it has used where it runs, ms.
        cpu_ms: u64,
        /// Resident bytes there.
        rss_bytes: u64,
        /// `R`, `S`, `T`, …
        state: char,
    },
    /// The process is home for good or has ended; the shepherd exits now.
    Gone {
        /// `home`, `exited`, `lost` (its host was lost; the reason is in `detail`).
        how: String,
        /// In words.
        detail: String,
    },
}

/// What a move took.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct MoveFigures {
    /// Memory bytes carried.
    pub bytes: u64,
    /// Bytes on the wire.
    pub wire_bytes: u64,
    /// Pages carried.
    pub pages: u64,
    /// Copy rounds.
    pub rounds: u32,
    /// From the order to the commit, microseconds.
    pub total_us: u64,
    /// No thread of it ran, microseconds.
    pub freeze_us: u64,
}

/// The reason of a [`HomeEvent::Retreat`] that came of [`HostOrder::SendHome`].
pub const EXPELLED: &str = "the host node expels its guests";

/// Host shepherd to daemon.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum HostEvent {
    /// Arriving, running, stopped…
    Guest {
        /// PID on its home node.
        home_pid: i32,
        /// Home node's name.
        home: String,
        /// PID here, once there is one.
        pid: Option<i32>,
        /// Owner's user id.
        uid: u32,
        /// `arriving`, `running`.
        state: String,
        /// Its command line.
        command: String,
        /// The others of its subtree: PID at home, PID here.
        #[serde(default)]
        others: Vec<(i32, i32)>,
    },
    /// It has left or ended; the shepherd exits now.
    Gone {
        /// In words.
        detail: String,
    },
}

/// Daemon to host shepherd.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "snake_case")]
pub enum HostOrder {
    /// Ask home to take this guest back (eviction).
    SendHome,
}
