//! What the policy is shown.

/// One node.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// It can be reached.
    pub up: bool,
    /// It takes no guests.
    pub blocked: bool,
    /// Nothing leaves it by the balancer's choice.
    pub stay: bool,
    /// CPUs; a share of one counts as that share.
    pub cpus: f64,
    /// Speed of a CPU; 1 is the standard node.
    pub speed: f64,
    /// Decayed number of runnable threads.
    pub runnable: f64,
    /// Memory, bytes.
    pub mem_total_bytes: u64,
    /// Of that, what could be used, bytes.
    pub mem_available_bytes: u64,
    /// How old all this is, ms.
    pub age_ms: u64,
}

/// One process that is at home with the one who decides.
#[derive(Debug, Clone, PartialEq)]
pub struct Process {
    /// PID at home.
    pub pid: i32,
    /// Where it runs: an index into the nodes.
    pub node: usize,
    /// Threads of it that want to run, decayed.
    pub demand: f64,
    /// Its memory, bytes.
    pub mem_bytes: u64,
    /// CPU time used so far, ms.
    pub cpu_ms: u64,
    /// Since its start, ms.
    pub age_ms: u64,
    /// Since it last moved, ms; absent: it never has.
    pub resident_ms: Option<u64>,
    /// How long that move froze it, ms; 0: it never has.
    pub last_freeze_ms: u64,
    /// Why the balancer must leave it alone, if so.
    pub held: Option<String>,
    /// Nodes it may use; empty: all.
    pub allowed: Vec<usize>,
}

/// A move under way, or so recent that the nodes' averages do not show it all yet.
#[derive(Debug, Clone, PartialEq)]
pub struct UnderWay {
    /// From which node.
    pub from: usize,
    /// To which.
    pub to: usize,
    /// Threads that want to run.
    pub demand: f64,
    /// Memory, bytes.
    pub mem_bytes: u64,
    /// Since its commit, ms; absent: still under way.
    pub arrived_ms: Option<u64>,
}

/// Everything at one moment.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Cluster {
    /// All nodes known.
    pub nodes: Vec<Node>,
    /// The processes to decide on.
    pub processes: Vec<Process>,
    /// Moves that the nodes do not show yet.
    pub under_way: Vec<UnderWay>,
    /// A random number: which of several equal nodes is taken.
    pub dice: u64,
}
