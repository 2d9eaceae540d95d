//! One migration from the wish to its line in the history.
//!
//! ```mermaid
//! sequenceDiagram
//!     participant D as daemon at home
//!     participant T as daemon of the target
//!     participant S as home shepherd
//!     D->>D: blockers? (the process runs on)
//!     D->>T: PrepareGuest(token, …)
//!     T-->>D: Ok, or Refused(reason)
//!     D->>S: Move(target, token)
//!     S->>T: session(token), handed to a new host shepherd
//!     S-->>D: Progress…, then Moved(figures) or MoveFailed(why)
//! ```
//!
//! A move is a task of its own: a client that hangs up changes nothing.

use super::names::error;
use super::protocol::{Answer, Question};
use super::state::InFlight;
use super::{Daemon, admission, shepherds};
use crate::api::{ApiError, Blocker, ErrorKind, Explanation, MigrationInfo};
use crate::shepherd::control::{HomeOrder, MoveFigures, TargetNode};
use crate::shepherd::preflight;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

pub use admission::Announced;

/// A session that was announced must come within this time.
pub const SESSION_LIMIT: Duration = Duration::from_secs(30);
/// How long a move may take if nobody says otherwise.
pub const MOVE_LIMIT: Duration = Duration::from_secs(300);
/// How long the target may take to answer.
const ASK_LIMIT: Duration = Duration::from_secs(6);
/// What the shepherd may take beyond its limit to say that it has reached it.
const GRACE: Duration = Duration::from_secs(15);
/// How long a retreat waits for a move that is under way.
const RETREAT_LIMIT: Duration = Duration::from_secs(120);

/// Who wants it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Cause {
    Balancer,
    User,
    Retreat,
    Expel,
    Placement,
}

impl Cause {
    fn as_str(self) -> &'static str {
        match self {
            Cause::Balancer => "balancer",
            Cause::User => "user",
            Cause::Retreat => "retreat",
            Cause::Expel => "expel",
            Cause::Placement => "placement",
        }
    }
}

/// One wish.
#[derive(Debug, Clone)]
pub struct Wish {
    /// PID at home.
    pub pid: i32,
    /// To which node; home by its name.
    pub to: String,
    /// Who wants it.
    pub cause: Cause,
    /// Do everything but commit.
    pub dry_run: bool,
    /// For the whole.
    pub limit: Duration,
}

/// What becomes of it.
pub type Moving = JoinHandle<Result<MigrationInfo, ApiError>>;

/// Waits (at most `limit`) until a process is not under way: what a user asks for comes after what the
/// balancer has begun, instead of being refused for it.
pub async fn settled(daemon: &Daemon, pid: i32, limit: Duration) {
    let deadline = Instant::now() + limit;
    let moving = || {
        let state = daemon.lock();
        let with = state.jobs.moves_with(pid);
        with.iter().any(|pid| state.jobs.processes.get(pid).is_some_and(|process| process.moving.is_some()))
    };
    while moving() && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Begins a move; its number, and its end to be waited for. Refused at once: no such process, already
/// moving. A process that is there already is a success without a move (number 0).
pub fn begin(daemon: &Arc<Daemon>, wish: Wish) -> Result<(u64, Moving), ApiError> {
    let pid = wish.pid;
    let what = format!("process {pid} was not moved to {}", wish.to);
    let mut state = daemon.lock();
    let state = &mut *state;
    // Of a subtree that is away, any of its processes may be named.
    let known = match state.jobs.processes.contains_key(&pid) {
        true => Some(pid),
        false => state.jobs.together(pid).first().copied(),
    };
    let Some(process) = known.and_then(|pid| state.jobs.processes.get(&pid)) else {
        return Err(error(ErrorKind::Failed, what, "it has ended", "nothing; see `mosps`"));
    };
    let wish = Wish { pid: process.kept.pid, ..wish };
    let root = process.with.unwrap_or(wish.pid);
    let family = state.jobs.moves_with(wish.pid);
    let busy = family.iter().find_map(|pid| Some((*pid, state.jobs.processes.get(pid)?.moving?)));
    if let Some((who, other)) = busy {
        let to = state.migrations.get(&other).map_or("", |flight| flight.info.to.as_str());
        let who = if who == pid { "it".to_string() } else { format!("process {who} of its subtree") };
        let why = format!("{who} is on its way to {to}");
        return Err(error(ErrorKind::Failed, what, why, "wait for that, and try again"));
    }
    let mut info = MigrationInfo {
        pid: root,
        job: state.jobs.jobs.get(&process.kept.job).map_or_else(String::new, |job| job.label()),
        from: process.node.clone(),
        to: wish.to.clone(),
        phase: "preparing".into(),
        cause: wish.cause.as_str().into(),
        ..MigrationInfo::default()
    };
    if process.node == wish.to {
        info.phase = "done".into();
        info.ended_unix_ms = unix_ms();
        return Ok((0, tokio::spawn(std::future::ready(Ok(info)))));
    }
    let id = state.next_migration;
    state.next_migration += 1;
    info.id = id;
    for pid in family {
        if let Some(process) = state.jobs.processes.get_mut(&pid) {
            process.moving = Some(id);
        }
    }
    let flight = InFlight {
        info,
        dry_run: wish.dry_run,
        started: Instant::now(),
        outcome: None,
        shepherd: None,
        taken_up: false,
    };
    state.migrations.insert(id, flight);
    let daemon = Arc::clone(daemon);
    Ok((id, tokio::spawn(async move { carry_out(&daemon, id, root, wish).await })))
}

/// `root` is the number of the shepherd.
async fn carry_out(daemon: &Arc<Daemon>, id: u64, root: i32, wish: Wish) -> Result<MigrationInfo, ApiError> {
    let result = attempt(daemon, id, root, &wish).await;
    let mut state = daemon.lock();
    let state = &mut *state;
    let Some(mut flight) = state.migrations.remove(&id) else {
        return Err(error(ErrorKind::Failed, "the migration is not known", "a bug", "see the log of migd"));
    };
    let info = &mut flight.info;
    info.total_ms = millis(flight.started.elapsed());
    info.ended_unix_ms = unix_ms();
    if let Ok(figures) = &result {
        *info = with_figures(info.clone(), figures);
        info.phase = "done".into();
        state.policy.took(info.total_ms, info.bytes);
    }
    if let Err(error) = &result {
        info.phase = "failed".into();
        info.error = Some(error.why.clone());
        tracing::info!(id, pid = wish.pid, to = wish.to, why = error.why, "not moved");
    }
    for process in state.jobs.processes.values_mut().filter(|process| process.moving == Some(id)) {
        process.moving = None;
        match &result {
            // What blocks the whole need not block each of them.
            Err(error) if error.kind == ErrorKind::NotMigratable && process.kept.pid == wish.pid => {
                process.cantmove = Some(error.why.clone());
            }
            Ok(_) if wish.cause != Cause::Retreat => process.cantmove = None,
            _ => {}
        }
    }
    let info = flight.info;
    if !wish.dry_run {
        state.history.add(info.clone());
    }
    daemon.policy_now.notify_one();
    result.map(|_| info)
}

fn with_figures(info: MigrationInfo, figures: &MoveFigures) -> MigrationInfo {
    MigrationInfo {
        bytes: figures.bytes,
        wire_bytes: figures.wire_bytes,
        pages: figures.pages,
        rounds: figures.rounds,
        freeze_ms: figures.freeze_us as f64 / 1000.0,
        ..info
    }
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// Unix time, milliseconds.
pub fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}

/// A subtree moves whole: descendants that are elsewhere by themselves come home first.
async fn gather(daemon: &Arc<Daemon>, wish: &Wish) {
    let scattered = {
        let state = daemon.lock();
        let at_home = state.jobs.processes.get(&wish.pid).is_some_and(|p| p.node == daemon.config.name);
        if at_home { state.jobs.tops(&state.jobs.scattered(wish.pid)) } else { Vec::new() }
    };
    for pid in scattered {
        settled(daemon, pid, wish.limit).await;
        let to = daemon.config.name.clone();
        if let Ok((_, ends)) = begin(daemon, Wish { pid, to, dry_run: false, ..wish.clone() }) {
            // If it cannot come, that blocks the others.
            let _ = ends.await;
        }
    }
}

async fn attempt(daemon: &Arc<Daemon>, id: u64, root: i32, wish: &Wish) -> Result<MoveFigures, ApiError> {
    let what = format!("process {} was not moved to {}", wish.pid, wish.to);
    let homewards = wish.to == daemon.config.name;
    if !homewards && wish.cause == Cause::User && !wish.dry_run {
        Box::pin(gather(daemon, wish)).await;
    }
    let target = if homewards { None } else { Some(prepare(daemon, wish, &what).await?) };
    let failed = |why: String| {
        error(ErrorKind::Failed, what.clone(), why, "it runs on where it was; see the log of migd")
    };
    let timeout_ms = wish.limit.as_millis() as u64;
    let order = HomeOrder::Move { id, target, dry_run: wish.dry_run, timeout_ms };
    // One that has just brought it home is still there, and ends before it reads this: another one begins.
    const SHEPHERDS: usize = 3;
    for _ in 0..SHEPHERDS {
        shepherds::ensure_home(daemon, root)
            .await
            .map_err(|error| failed(format!("its shepherd does not start: {error}")))?;
        let (tell, told) = oneshot::channel();
        if !hand_over(daemon, id, root, order.clone(), tell) {
            continue;
        }
        match tokio::time::timeout(wish.limit + GRACE, told).await {
            Ok(Ok(outcome)) => return outcome,
            Ok(Err(_)) if !daemon.lock().migrations.get(&id).is_some_and(|flight| flight.taken_up) => {}
            Ok(Err(_)) => return Err(failed("its shepherd ended before it was done".into())),
            Err(_) => {
                if let Some(shepherd) = daemon.lock().homes.get(&root) {
                    shepherd.order(HomeOrder::Cancel { id });
                }
                return Err(failed(format!("it took longer than {} s", wish.limit.as_secs())));
            }
        }
    }
    Err(failed("its shepherd has ended".into()))
}

/// Gives an order to the shepherd that is there; `false`: there is none that takes it.
fn hand_over(
    daemon: &Daemon,
    id: u64,
    root: i32,
    order: HomeOrder,
    tell: oneshot::Sender<Result<MoveFigures, ApiError>>,
) -> bool {
    let mut state = daemon.lock();
    let shepherd = state.homes.get(&root).cloned();
    if let Some(flight) = state.migrations.get_mut(&id) {
        flight.outcome = Some(tell);
        flight.shepherd.clone_from(&shepherd);
    }
    shepherd.is_some_and(|shepherd| shepherd.order(order))
}

/// Looks for blockers, and asks the target.
async fn prepare(daemon: &Arc<Daemon>, wish: &Wish, what: &str) -> Result<TargetNode, ApiError> {
    let address = address_of(daemon, &wish.to, what)?;
    let (at_home, uid, rss) = {
        let state = daemon.lock();
        match state.jobs.processes.get(&wish.pid) {
            Some(process) => {
                let with = state.jobs.moves_with(wish.pid);
                let others = with.iter().filter(|pid| **pid != wish.pid);
                let others = others.filter_map(|pid| state.jobs.processes.get(pid)).map(|p| p.rss_bytes);
                let bytes = others.sum::<u64>() + process.rss_bytes;
                (process.node == daemon.config.name, process.kept.uid, bytes)
            }
            None => {
                return Err(error(ErrorKind::Failed, what, "it has ended", "nothing; see `mosps`"));
            }
        }
    };
    let mut bytes = rss;
    if at_home {
        let found = look(wish.pid, &wish.to).await?;
        bytes = found.predicted_bytes;
        if !found.blockers.is_empty() {
            return Err(not_migratable(what, found.blockers));
        }
    }
    let token: [u8; 16] = rand::random();
    let question = Question::PrepareGuest {
        token,
        home: daemon.config.name.clone(),
        pid: wish.pid,
        uid,
        bytes,
        cpu: admission::cpu_features().to_vec(),
        by_hand: wish.cause == Cause::User,
    };
    match daemon.peers.ask(address, question, ASK_LIMIT).await {
        Ok(Answer::Ok) => {}
        Ok(Answer::Refused { kind, reason }) if kind == "cpu" || kind == "kernel" => {
            let blocker = Blocker { kind, what: format!("node {}: {reason}", wish.to) };
            return Err(not_migratable(what, vec![blocker]));
        }
        Ok(Answer::Refused { reason, .. }) => {
            let why = format!("node {} refuses it: {reason}", wish.to);
            return Err(error(ErrorKind::Refused, what, why, "name another node, or wait"));
        }
        Err(why) => {
            let next = "see `mosctl nodes`; is it up and reachable?";
            return Err(error(ErrorKind::NodeDown, what, format!("node {}: {why}", wish.to), next));
        }
    }
    Ok(TargetNode { name: wish.to.clone(), address: address.to_string(), token: hex(&token) })
}

fn address_of(daemon: &Daemon, node: &str, what: &str) -> Result<SocketAddr, ApiError> {
    let state = daemon.lock();
    let members = || state.members.iter().filter(|member| member.identity.name == node);
    if let Some(member) = members().find(|member| member.state != foca::State::Down) {
        return Ok(member.identity.address);
    }
    if members().next().is_some() {
        return Err(error(ErrorKind::NodeDown, what, format!("node {node} is down"), "see `mosctl nodes`"));
    }
    Err(error(ErrorKind::Failed, what, format!("there is no node `{node}`"), "see `mosctl nodes`"))
}

fn not_migratable(what: &str, blockers: Vec<Blocker>) -> ApiError {
    let why = blockers.iter().map(|blocker| blocker.what.as_str()).collect::<Vec<_>>().join("; ");
    ApiError {
        kind: ErrorKind::NotMigratable,
        what: what.into(),
        why,
        next: "close what is named, or wait until the process has; it was not stopped".into(),
        blockers,
    }
}

/// Blockers and a prediction for a process at home; nothing is stopped.
pub async fn look(pid: i32, to: &str) -> Result<Explanation, ApiError> {
    let name = to.to_string();
    let looked = tokio::task::spawn_blocking(move || preflight::explain(pid, &name)).await;
    let what = format!("process {pid} could not be looked at");
    match looked {
        Ok(Ok(explanation)) => Ok(explanation),
        Ok(Err(why)) => Err(error(ErrorKind::Failed, what, why.to_string(), "see `mosps`")),
        Err(why) => Err(error(ErrorKind::Failed, what, why.to_string(), "a bug: see the log of migd")),
    }
}

/// Brings a process home as soon as it is not moving any more.
pub fn retreat(daemon: &Arc<Daemon>, pid: i32, cause: Cause) {
    let daemon = Arc::clone(daemon);
    tokio::spawn(async move {
        let started = Instant::now();
        loop {
            let to = daemon.config.name.clone();
            match begin(&daemon, Wish { pid, to, cause, dry_run: false, limit: MOVE_LIMIT }) {
                Ok((_, moving)) => {
                    if let Ok(Err(error)) = moving.await {
                        tracing::error!(pid, %error, "it could not be brought home");
                    }
                    return;
                }
                Err(error) if started.elapsed() > RETREAT_LIMIT => {
                    return tracing::error!(pid, %error, "it could not be brought home");
                }
                Err(_) if daemon.lock().jobs.processes.contains_key(&pid) => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Err(_) => return,
            }
        }
    });
}

/// A session has come: only one that was announced gets a shepherd.
pub fn session_arrived(daemon: &Arc<Daemon>, token: [u8; 16], stream: TcpStream) -> io::Result<()> {
    let announced = daemon.lock().announced.remove(&token);
    let announced = announced.filter(|announced| announced.at.elapsed() < SESSION_LIMIT);
    let announced = announced.ok_or(io::Error::other("a session that nobody has announced"))?;
    let stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    shepherds::start_host(daemon, &hex(&token), &stream, (announced.pid, announced.home))
}

/// Answers another daemon's question.
pub async fn answer(daemon: &Arc<Daemon>, from: &str, question: Question) -> Answer {
    admission::answer(daemon, from, question)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
