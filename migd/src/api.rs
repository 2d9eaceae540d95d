//! The daemon's API: what travels over its Unix socket, one JSON document a line.
//!
//! The tools are thin clients of this module; `--json` prints these very structures, so a field
//! name here is part of the contract in the documentation. Every request gets exactly one
//! [`Response`], except [`Request::Migrate`] with `progress` and [`Request::Watch`], which stream
//! [`Response::Progress`] or [`Response::Snapshot`] lines before (or instead of) the last one.
//!
//! The caller is known by `SO_PEERCRED`: nothing in a request is trusted to say who asks.

use serde::{Deserialize, Serialize};

/// Where the daemon listens unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/migd/migd.sock";
/// The environment variable that names another socket.
pub const SOCKET_ENV: &str = "MIGD_SOCKET";
/// Longest line either side accepts, bytes.
pub const MAX_LINE: usize = 4 << 20;

/// What a tool may ask of the daemon.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum Request {
    /// Who are you: answered with [`Response::Hello`].
    Hello,
    /// `mosrun`: the calling process (by its credentials) becomes a job and will exec next.
    /// The daemon sees the exec as the end of the connection (the descriptor is close-on-exec).
    Register(JobSpec),
    /// Everything known: nodes, processes, migrations in flight and recent.
    Snapshot,
    /// A [`Response::Snapshot`] every `interval_ms` until the client hangs up.
    Watch {
        /// Period, milliseconds.
        interval_ms: u64,
    },
    /// Move a process (or every process of a job).
    Migrate(MigrateRequest),
    /// What would stop it, and what it would cost: nothing is stopped. [`Response::Explain`].
    Explain {
        /// PID at home, or `job:NAME`.
        what: String,
        /// Node name, number, address, `home` or `best`.
        to: String,
    },
    /// Hold a process where it is, or move it to `node` first and hold it there.
    Pin {
        /// PID at home, or `job:NAME`.
        what: String,
        /// Where to hold it; absent: where it is.
        node: Option<String>,
    },
    /// Let the balancer move it again.
    Unpin {
        /// PID at home, or `job:NAME`.
        what: String,
    },
    /// The balancer's last decision about a process. [`Response::Why`].
    Why {
        /// PID at home.
        what: String,
    },
    /// A node-wide switch (root's).
    NodeSwitch {
        /// Which switch.
        switch: NodeSwitch,
    },
    /// Send all guests of this node home; returns when done. Implies `block`.
    Expel,
    /// Bring all of this node's own processes back; returns when done. Implies `lstay`.
    Bring,
    /// What this kernel and host support. [`Response::Doctor`].
    Doctor,
    /// The speed this node claims (10,000 is the standard node).
    SetSpeed {
        /// The new speed.
        speed: u32,
    },
    /// Read the policy's settings. [`Response::Policy`].
    PolicyShow,
    /// Change one of the policy's settings.
    PolicySet {
        /// The setting's name.
        key: String,
        /// Its new value, as text.
        value: String,
    },
    /// Past migrations. [`Response::History`].
    History {
        /// Only those that ended in the last so many seconds.
        since_secs: Option<u64>,
    },
}

/// Switches of `mosctl` in openMosix's sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum NodeSwitch {
    /// No process leaves this node by the balancer's choice (local and guests alike).
    Stay,
    Nostay,
    /// No local process leaves by the balancer's choice.
    Lstay,
    Nolstay,
    /// No guest arrives.
    Block,
    Noblock,
    /// No load information is sent.
    Quiet,
    Noquiet,
}

/// What `mosrun` asks for.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct JobSpec {
    /// The job's name (`-J`); its processes answer to `job:NAME`.
    pub name: Option<String>,
    /// Start on this node as soon as the program is running: a name, or `best`.
    pub start_on: Option<String>,
    /// Nodes the balancer may use; empty: all.
    pub any_of: Vec<String>,
    /// Pinned where it starts.
    pub locked: bool,
    /// Memory it will need, bytes (for placement).
    pub mem_bytes: Option<u64>,
    /// Declared CPU bound.
    pub cpu_bound: bool,
    /// Declared I/O bound: stays home unless moved by hand.
    pub io_bound: bool,
    /// Stay at home for good (`-h`).
    pub home: bool,
    /// Longest freeze the balancer may cause, milliseconds.
    pub max_downtime_ms: Option<u64>,
    /// The command line, for display before the exec is seen.
    pub command: Vec<String>,
}

/// What `migrate` asks for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MigrateRequest {
    /// PID at home, or `job:NAME`.
    pub what: String,
    /// Node name, number, address, `home`, `best` or `balance`.
    pub to: String,
    /// Do everything but commit.
    #[serde(default)]
    pub dry_run: bool,
    /// Freeze for the whole transfer.
    #[serde(default)]
    pub stop: bool,
    /// Answer at once ([`Response::Done`]) instead of when it has ended.
    #[serde(default)]
    pub no_wait: bool,
    /// Give up after so many milliseconds.
    #[serde(default)]
    pub timeout_ms: Option<u64>,
    /// Stream [`Response::Progress`] lines.
    #[serde(default)]
    pub progress: bool,
}

/// What the daemon answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "response", rename_all = "snake_case")]
pub enum Response {
    /// Done, nothing more to say.
    Done,
    /// To [`Request::Hello`].
    Hello {
        /// This node.
        node: String,
        /// The daemon's version.
        version: String,
        /// The daemon's PID.
        pid: i32,
    },
    /// To [`Request::Register`].
    Registered {
        /// The job's number on this node.
        job: u64,
    },
    /// The whole picture.
    Snapshot(Snapshot),
    /// One line of progress.
    Progress(MigrationInfo),
    /// Ended migrations, one a process.
    Migrated {
        /// One report a process moved.
        reports: Vec<MigrationInfo>,
    },
    /// To [`Request::Explain`].
    Explain(Explanation),
    /// To [`Request::Why`].
    Why(WhyReport),
    /// To [`Request::Doctor`].
    Doctor {
        /// One line a thing looked at.
        checks: Vec<DoctorCheck>,
    },
    /// To [`Request::PolicyShow`].
    Policy {
        /// Names and values.
        settings: std::collections::BTreeMap<String, String>,
    },
    /// To [`Request::History`].
    History {
        /// Oldest first.
        migrations: Vec<MigrationInfo>,
    },
    /// It could not be done.
    Error(ApiError),
}

/// Why something was not done: what failed, why, what to do next.
#[derive(Debug, Clone, Serialize, Deserialize, thiserror::Error)]
#[error("{what}: {why}")]
pub struct ApiError {
    /// Decides the exit code of the tool.
    pub kind: ErrorKind,
    /// What failed.
    pub what: String,
    /// Why.
    pub why: String,
    /// What to do next.
    pub next: String,
    /// For [`ErrorKind::NotMigratable`]: every blocker.
    #[serde(default)]
    pub blockers: Vec<Blocker>,
}

/// The kinds of failure and their exit codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// Exit 1.
    Failed,
    /// Exit 2.
    Usage,
    /// Exit 3: by policy or permission.
    Refused,
    /// Exit 4.
    NotMigratable,
    /// Exit 5.
    NodeDown,
}

impl ErrorKind {
    /// The tools' exit code.
    pub fn exit_code(self) -> i32 {
        match self {
            ErrorKind::Failed => 1,
            ErrorKind::Usage => 2,
            ErrorKind::Refused => 3,
            ErrorKind::NotMigratable => 4,
            ErrorKind::NodeDown => 5,
        }
    }
}

/// One reason why a process cannot move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blocker {
    /// What kind of thing: `fd`, `mapping`, `cpu`, `kernel`, `policy`, `tree`, `namespace`, …
    pub kind: String,
    /// In words, naming the thing: `fd 5: established TCP connection to 10.0.0.9:80`.
    pub what: String,
}

/// To `migrate --explain`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Explanation {
    /// PID at home.
    pub pid: i32,
    /// It and its descendants, which would move with it.
    #[serde(default)]
    pub pids: Vec<i32>,
    /// Where it would go.
    pub to: String,
    /// Empty: it can move.
    pub blockers: Vec<Blocker>,
    /// Bytes that would travel before compression.
    pub predicted_bytes: u64,
    /// Predicted total time, milliseconds.
    pub predicted_ms: u64,
    /// Predicted freeze time, milliseconds.
    pub predicted_freeze_ms: u64,
}

/// Everything at one moment.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Snapshot {
    /// This node's name.
    pub node: String,
    /// Every node known.
    pub nodes: Vec<NodeInfo>,
    /// Job processes at home here, and guests here.
    pub processes: Vec<ProcessInfo>,
    /// In flight first, then recent ones, newest first.
    pub migrations: Vec<MigrationInfo>,
}

/// One node.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeInfo {
    /// Its name.
    pub name: String,
    /// Its number: position in the list of names, from 1.
    pub number: u32,
    /// `IP:PORT` of its daemon.
    pub address: String,
    /// `up`, `suspect` or `down`.
    pub state: String,
    /// Load: decayed runnable threads × (10,000 ÷ speed) ÷ CPUs.
    pub load: f64,
    /// 10,000 is the standard node.
    pub speed: u32,
    /// CPUs it may use; a share of one counts as that share.
    pub cpus: f64,
    /// CPU use, per cent of `cpus`.
    pub cpu_pct: f64,
    /// Bytes.
    pub mem_total_bytes: u64,
    /// Bytes.
    pub mem_available_bytes: u64,
    /// PSI `some avg10`, per cent.
    pub psi_cpu_some_pct: f64,
    /// PSI `some avg10`, per cent.
    pub psi_memory_some_pct: f64,
    /// Its own processes that are elsewhere.
    pub guests_out: u32,
    /// Guests it hosts.
    pub guests_in: u32,
    /// Takes no guests.
    pub blocked: bool,
    /// Its processes stay.
    pub stay: bool,
    /// Milliseconds since this was measured.
    pub age_ms: u64,
}

/// One process of a job.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ProcessInfo {
    /// PID at home.
    pub pid: i32,
    /// The job's name, or its number as text.
    pub job: String,
    /// Owner's user name.
    pub user: String,
    /// Owner's user id.
    pub uid: u32,
    /// Home node.
    pub home: String,
    /// Where it runs now.
    pub node: String,
    /// `running`, `sleeping`, `stopped`, `moving`, …
    pub state: String,
    /// Per cent of one CPU.
    pub cpu_pct: f64,
    /// Resident bytes where it runs.
    pub rss_bytes: u64,
    /// How often it has moved.
    pub migrations: u32,
    /// Pinned.
    pub locked: bool,
    /// Why it cannot move, if so.
    pub cantmove: Option<String>,
    /// Freeze time of its last move, milliseconds.
    pub last_freeze_ms: Option<f64>,
    /// Nodes visited, in order, home first.
    pub visited: Vec<String>,
    /// Its command line.
    pub command: String,
}

/// One migration, in flight or ended.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct MigrationInfo {
    /// Number on its home node.
    pub id: u64,
    /// PID at home; of a subtree its first process.
    pub pid: i32,
    /// The processes that moved together, by their PIDs at home; empty until they have.
    pub pids: Vec<i32>,
    /// The job.
    pub job: String,
    /// From which node.
    pub from: String,
    /// To which node.
    pub to: String,
    /// `preparing`, `freezing`, `copying`, `committing`, `done`, `failed`.
    pub phase: String,
    /// Who asked: `balancer`, `user`, `retreat`, `expel`, `placement`.
    pub cause: String,
    /// Memory bytes carried.
    pub bytes: u64,
    /// Bytes on the wire.
    pub wire_bytes: u64,
    /// Pages carried.
    pub pages: u64,
    /// Copy rounds.
    pub rounds: u32,
    /// Total time, milliseconds.
    pub total_ms: f64,
    /// Time in which no thread of it ran, milliseconds.
    pub freeze_ms: f64,
    /// Why it failed.
    pub error: Option<String>,
    /// Unix time of its end, milliseconds.
    pub ended_unix_ms: u64,
}

/// To `mosctl why`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct WhyReport {
    /// PID at home.
    pub pid: i32,
    /// `stay` or `move`.
    pub decision: String,
    /// In words.
    pub reason: String,
    /// Where it would go or went.
    pub target: Option<String>,
    /// Every number that went into it.
    pub numbers: std::collections::BTreeMap<String, f64>,
    /// Milliseconds since the decision.
    pub age_ms: u64,
}

/// One line of `mosctl doctor`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DoctorCheck {
    /// What was looked at.
    pub name: String,
    /// `ok`, `degraded` or `missing`.
    pub status: String,
    /// What was found.
    pub found: String,
    /// What to do about it; empty if nothing.
    pub next: String,
}
