//! The arm of the policy: shows [`loadsched`] the cluster, and does what it decides.
//!
//! Every home decides for its own processes, wherever they run. Whatever a move ran into (a blocker, a
//! refusal) keeps the balancer from the same process for a while, longer each time.

use super::Daemon;
use super::jobs::{Job, Process};
use super::moves::{self, Cause, Wish};
use super::names::error;
use super::state::State;
use crate::api::{ApiError, ErrorKind, NodeInfo, WhyReport};
use loadsched::{Action, Cluster, Decision, Settings, UnderWay};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often it decides if nothing happens.
const EVERY: Duration = Duration::from_secs(1);
/// And at most, whatever happens.
const PAUSE: Duration = Duration::from_millis(300);
/// A move counts as load under way until the averages surely show it.
const REMEMBER: Duration = Duration::from_secs(10);
/// How long a move by the balancer may take.
const LIMIT: Duration = Duration::from_secs(120);
/// After a refusal a process is left alone for so long, doubled each time.
const FIRST_PAUSE: Duration = Duration::from_secs(3);
const MAX_DOUBLINGS: u32 = 7;
/// One move that took very long must not stop the balancer for good.
const MAX_OVERHEAD_MS: f64 = 10_000.0;

/// The balancer's memory.
#[derive(Debug, Default)]
pub struct Policy {
    /// Its settings.
    pub settings: Settings,
    recent: Vec<Recent>,
    /// What a move of the balancer took beyond its bytes, ms, decayed; moves on busy nodes take longer.
    overhead_ms: f64,
}

#[derive(Debug)]
struct Recent {
    from: String,
    to: String,
    demand: f64,
    mem_bytes: u64,
    at: Instant,
}

impl Policy {
    /// A move has taken so long.
    pub fn took(&mut self, total_ms: f64, bytes: u64) {
        let of_bytes = bytes as f64 * 1000.0 / self.settings.bytes_per_sec.max(1) as f64;
        let beyond = (total_ms - of_bytes).clamp(0.0, MAX_OVERHEAD_MS);
        self.overhead_ms += (beyond - self.overhead_ms) * 0.3;
    }

    /// The settings, with what moves really cost these days.
    fn measured(&self) -> Settings {
        let fixed = self.settings.move_fixed_ms.max(self.overhead_ms as u64);
        Settings { move_fixed_ms: fixed, ..self.settings.clone() }
    }

    /// A move was committed.
    pub fn arrived(&mut self, from: &str, to: &str, process: &Process) {
        self.recent.retain(|recent| recent.at.elapsed() < REMEMBER);
        self.recent.push(Recent {
            from: from.into(),
            to: to.into(),
            demand: process.demand.value(),
            mem_bytes: process.rss_bytes,
            at: Instant::now(),
        });
    }
}

/// Settings, as text.
pub fn show(state: &State) -> BTreeMap<String, String> {
    let mut settings = state.policy.settings.show();
    settings.insert("balance".into(), state.balance.to_string());
    settings
}

/// Changes one.
pub fn set(state: &mut State, key: &str, value: &str) -> Result<(), ApiError> {
    let refused =
        |why: String| error(ErrorKind::Usage, "the policy was not changed", why, "see `mosctl policy show`");
    match key {
        "balance" => {
            let on = match value {
                "true" | "on" | "yes" | "1" => true,
                "false" | "off" | "no" | "0" => false,
                _ => return Err(refused(format!("`{value}` is neither on nor off"))),
            };
            state.balance = on;
            Ok(())
        }
        _ => state.policy.settings.set(key, value).map_err(|error| refused(error.to_string())),
    }
}

/// Changes all that are named; what is not understood is logged.
pub fn set_all(state: &mut State, settings: &BTreeMap<String, String>) {
    for (key, value) in settings {
        if let Err(error) = set(state, key, value) {
            tracing::warn!(%error, "policy");
        }
    }
}

/// The cluster as the policy sees it.
fn view(state: &State, nodes: &[NodeInfo]) -> Cluster {
    let index = |name: &str| nodes.iter().position(|node| node.name == name).unwrap_or(usize::MAX);
    let processes = state.jobs.processes.values().filter_map(|process| {
        let job = state.jobs.jobs.get(&process.kept.job)?;
        Some(seen(state, nodes, process, job))
    });
    let moving = state.migrations.values().filter_map(|flight| {
        let process = state.jobs.processes.get(&flight.info.pid)?;
        Some(UnderWay {
            from: index(&flight.info.from),
            to: index(&flight.info.to),
            demand: process.demand.value(),
            mem_bytes: process.rss_bytes,
            arrived_ms: None,
        })
    });
    let recent = state.policy.recent.iter().map(|recent| UnderWay {
        from: index(&recent.from),
        to: index(&recent.to),
        demand: recent.demand,
        mem_bytes: recent.mem_bytes,
        arrived_ms: Some(recent.at.elapsed().as_millis() as u64),
    });
    // Guests of other homes that were promised a place here.
    let coming = state.announced.values().filter(|a| a.at.elapsed() < REMEMBER).map(|announced| UnderWay {
        from: usize::MAX,
        to: index(&state.own.name),
        demand: 1.0,
        mem_bytes: announced.bytes,
        arrived_ms: None,
    });
    Cluster {
        nodes: nodes.iter().map(|node| seen_node(state, node)).collect(),
        processes: processes.collect(),
        under_way: moving.chain(recent).chain(coming).collect(),
        dice: rand::random(),
    }
}

fn seen_node(state: &State, node: &NodeInfo) -> loadsched::Node {
    let speed = f64::from(node.speed.max(1)) / f64::from(super::machine::STANDARD_SPEED);
    loadsched::Node {
        name: node.name.clone(),
        up: node.state == "up",
        blocked: node.blocked && node.name != state.own.name,
        stay: if node.name == state.own.name { state.switches.stay } else { node.stay },
        cpus: node.cpus,
        speed,
        runnable: node.load * node.cpus * speed,
        mem_total_bytes: node.mem_total_bytes,
        mem_available_bytes: node.mem_available_bytes,
        age_ms: node.age_ms,
    }
}

fn seen(state: &State, nodes: &[NodeInfo], process: &Process, job: &Job) -> loadsched::Process {
    let own = &state.own.name;
    let allowed = match job.spec.any_of.as_slice() {
        [] => Vec::new(),
        names => {
            let known = |name: &String| nodes.iter().position(|node| node.name == *name);
            let mut allowed: Vec<usize> = names.iter().filter_map(known).collect();
            // None of them is known: it stays, rather than being allowed everywhere.
            if allowed.is_empty() {
                allowed.push(usize::MAX);
            }
            allowed
        }
    };
    let demand = process.demand.value();
    loadsched::Process {
        pid: process.kept.pid,
        node: nodes.iter().position(|node| node.name == process.node).unwrap_or(usize::MAX),
        demand: if job.spec.cpu_bound { demand.max(1.0) } else { demand },
        mem_bytes: process.rss_bytes.max(job.spec.mem_bytes.unwrap_or(0)),
        cpu_ms: process.total_cpu_ms,
        age_ms: process.age_ms,
        resident_ms: process.moved_at.map(|at| at.elapsed().as_millis() as u64),
        last_freeze_ms: process.kept.last_freeze_ms.map_or(0, |ms| ms as u64),
        held: held(state, process, job).or_else(|| {
            (process.node == *own && state.switches.lstay)
                .then(|| "processes of this node stay here (`mosctl nolstay` lets them go)".to_string())
        }),
        allowed,
    }
}

/// Why the balancer leaves a process alone.
fn held(state: &State, process: &Process, job: &Job) -> Option<String> {
    if let Some(id) = process.moving {
        let to = state.migrations.get(&id).map_or("", |flight| flight.info.to.as_str());
        return Some(format!("it is on its way to {to}"));
    }
    if job.spec.home {
        return Some("it was started to stay at home (`-h`)".into());
    }
    if process.kept.locked {
        return Some("it is pinned (`mosctl unpin` lets it go)".into());
    }
    if job.spec.io_bound {
        return Some("it is I/O bound, or was not started by mosrun: it moves by hand only".into());
    }
    if !state.balance {
        return Some("the balancer is off (`mosctl policy set balance=on`)".into());
    }
    if process.stay_until.is_some_and(|until| until > Instant::now()) {
        let why = process.cantmove.clone();
        return Some(
            why.unwrap_or_else(|| "its last move did not succeed; it is left alone for a while".into()),
        );
    }
    if state.jobs.has_children(process.kept.pid) {
        return Some("it has child processes: they move one by one, all together by hand".into());
    }
    if let Some(root) = process.with.filter(|root| state.jobs.together(*root).len() > 1) {
        return Some(format!("it was moved together with others, as the subtree of process {root}"));
    }
    let limit = job.spec.max_downtime_ms?;
    let settings = &state.policy.settings;
    let freeze_ms = settings
        .move_fixed_ms
        .saturating_add(process.rss_bytes.saturating_mul(1000) / settings.bytes_per_sec.max(1));
    (freeze_ms > limit)
        .then(|| format!("moving would freeze it for some {freeze_ms} ms; {limit} ms are allowed"))
}

/// Where this process would be best, its own node among the candidates.
pub fn best(state: &State, pid: i32) -> Option<String> {
    let nodes = state.nodes();
    let cluster = view(state, &nodes);
    let process = cluster.processes.iter().find(|process| process.pid == pid)?;
    loadsched::place(&cluster, &state.policy.measured(), process).map(|index| nodes[index].name.clone())
}

/// Where the balancer wants it, whatever its age, residency or lock; `None`: where it is.
pub fn wanted(state: &State, pid: i32) -> Option<String> {
    let nodes = state.nodes();
    let mut cluster = view(state, &nodes);
    cluster.processes.retain(|process| process.pid == pid);
    for process in &mut cluster.processes {
        (process.held, process.resident_ms) = (None, None);
        process.demand = process.demand.max(1.0);
    }
    let settings = Settings { min_age_ms: 0, gain_factor: 0.0, ..state.policy.measured() };
    match loadsched::decide(&cluster, &settings).pop()?.action {
        Action::Move(to) => nodes.get(to).map(|node| node.name.clone()),
        Action::Stay => None,
    }
}

/// Decides for ever.
pub async fn run(daemon: Arc<Daemon>) {
    loop {
        let _ = tokio::time::timeout(EVERY, daemon.policy_now.notified()).await;
        for (pid, to, reason) in tick(&daemon) {
            tracing::info!(pid, to, reason, "the balancer moves");
            carry_out(&daemon, pid, to);
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Decides once; remembers why; returns what is to be moved where.
fn tick(daemon: &Daemon) -> Vec<(i32, String, String)> {
    let mut state = daemon.lock();
    if state.jobs.processes.is_empty() {
        return Vec::new();
    }
    let nodes = state.nodes();
    let cluster = view(&state, &nodes);
    let decisions = loadsched::decide(&cluster, &state.policy.measured());
    let now = Instant::now();
    let mut moves = Vec::new();
    for decision in decisions {
        if let Action::Move(to) = decision.action
            && let Some(node) = nodes.get(to)
        {
            moves.push((decision.pid, node.name.clone(), decision.reason.clone()));
        }
        let report = report(decision, &nodes);
        if let Some(process) = state.jobs.processes.get_mut(&report.pid) {
            process.why = Some((now, report));
        }
    }
    moves
}

fn report(decision: Decision, nodes: &[NodeInfo]) -> WhyReport {
    let decided = if decision.action == Action::Stay { "stay" } else { "move" };
    WhyReport {
        pid: decision.pid,
        decision: decided.into(),
        reason: decision.reason,
        target: decision.best.and_then(|index| nodes.get(index)).map(|node| node.name.clone()),
        numbers: decision.numbers.into_iter().map(|(name, number)| (name.to_string(), number)).collect(),
        age_ms: 0,
    }
}

fn carry_out(daemon: &Arc<Daemon>, pid: i32, to: String) {
    let wish = Wish { pid, to, cause: Cause::Balancer, dry_run: false, limit: LIMIT };
    let Ok((_, moving)) = moves::begin(daemon, wish) else { return };
    let daemon = Arc::clone(daemon);
    tokio::spawn(async move {
        let result = moving.await;
        let mut state = daemon.lock();
        let Some(process) = state.jobs.processes.get_mut(&pid) else { return };
        match result {
            Ok(Ok(_)) => process.refusals = 0,
            _ => {
                let pause = FIRST_PAUSE * (1 << process.refusals.min(MAX_DOUBLINGS));
                process.refusals += 1;
                let until = Instant::now() + pause;
                process.stay_until = Some(process.stay_until.map_or(until, |other| other.max(until)));
            }
        }
    });
}
