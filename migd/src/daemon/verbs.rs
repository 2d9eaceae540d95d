//! What each request of the API does.

use super::api_server::Answers;
use super::moves::{self, Cause, Moving, Wish};
use super::names::{Caller, Destination, error};
use super::{Daemon, doctor, machine, policy, processes, switches};
use crate::api::{
    ApiError, ErrorKind, Explanation, JobSpec, MigrateRequest, MigrationInfo, Request, Response, WhyReport,
};
use std::sync::Arc;
use std::time::Duration;

/// The shortest period of a watch.
const MIN_INTERVAL: Duration = Duration::from_millis(100);
/// How often progress is told.
const PROGRESS_EVERY: Duration = Duration::from_millis(200);
/// After its exec a program is given so long before it is placed, so that the loader has done its work
/// at home, where that costs least.
const SETTLE: Duration = Duration::from_millis(30);

type Answered = Result<Response, ApiError>;

/// Answers a request; `false`: the client has hung up.
pub async fn answer(daemon: &Arc<Daemon>, caller: Caller, request: Request, answers: &Answers) -> bool {
    let answered = match request {
        Request::Watch { interval_ms } => return watch(daemon, interval_ms, answers).await,
        Request::Migrate(request) => migrate(daemon, caller, request, answers).await,
        Request::Hello => Ok(Response::Hello {
            node: daemon.config.name.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id() as i32,
        }),
        // Taken before this; a second one on the same connection ends here.
        Request::Register(spec) => register(daemon, caller, spec).map(|job| Response::Registered { job }),
        Request::Snapshot => Ok(Response::Snapshot(daemon.lock().snapshot())),
        Request::Explain { what, to } => explain(daemon, caller, &what, &to).await,
        Request::Pin { what, node } => pin(daemon, caller, &what, node.as_deref()).await,
        Request::Unpin { what } => unpin(daemon, caller, &what),
        Request::Why { what } => why(daemon, caller, &what),
        Request::Doctor => run_doctor(daemon).await,
        Request::PolicyShow => Ok(Response::Policy { settings: policy::show(&daemon.lock()) }),
        Request::History { since_secs } => {
            let since =
                since_secs.map_or(0, |secs| moves::unix_ms().saturating_sub(secs.saturating_mul(1000)));
            Ok(Response::History { migrations: daemon.lock().history.since(since) })
        }
        roots => match caller.is_root() {
            true => node_wide(daemon, roots).await,
            false => {
                let why = "it concerns the whole node, and you are not root";
                Err(error(
                    ErrorKind::Refused,
                    "this is root's to do",
                    why,
                    "be root, or ask the administrator",
                ))
            }
        },
    };
    answers.send(answered.unwrap_or_else(Response::Error)).await
}

async fn node_wide(daemon: &Arc<Daemon>, request: Request) -> Answered {
    match request {
        Request::NodeSwitch { switch } => switches::turn(&mut daemon.lock(), switch),
        Request::Expel => switches::expel(daemon).await?,
        Request::Bring => switches::bring(daemon).await?,
        Request::SetSpeed { speed } => {
            if !(1..=10_000_000).contains(&speed) {
                let why = "a speed is between 1 and 10000000; the standard node has 10000";
                return Err(error(ErrorKind::Usage, "the speed was not set", why, "name another"));
            }
            daemon.lock().own.speed = speed;
            machine::save_speed(&daemon.config.state_dir, speed);
        }
        Request::PolicySet { key, value } => policy::set(&mut daemon.lock(), &key, &value)?,
        _ => {
            let why = "this daemon does not know it";
            return Err(error(ErrorKind::Usage, "the request was not carried out", why, "update migd"));
        }
    }
    daemon.policy_now.notify_one();
    Ok(Response::Done)
}

async fn watch(daemon: &Daemon, interval_ms: u64, answers: &Answers) -> bool {
    let period = Duration::from_millis(interval_ms).clamp(MIN_INTERVAL, Duration::from_secs(3600));
    let mut every = tokio::time::interval(period);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        every.tick().await;
        let snapshot = daemon.lock().snapshot();
        if !answers.send(Response::Snapshot(snapshot)).await {
            return false;
        }
    }
}

/// `mosrun`: the caller becomes a job. One small read of `/proc`, no waiting.
pub fn register(daemon: &Daemon, caller: Caller, spec: JobSpec) -> Result<u64, ApiError> {
    let what = "the job was not taken in";
    // It waits for our answer, so its PID cannot have been reused.
    let Some(stat) = processes::read(caller.pid, daemon.units) else {
        let why = format!("process {} cannot be seen from the daemon", caller.pid);
        return Err(error(ErrorKind::Failed, what, why, "run mosrun in the daemon's PID namespace"));
    };
    let mut state = daemon.lock();
    if let Some(node) = spec.start_on.as_deref().filter(|node| *node != "best") {
        state.destination(node).map_err(|error| ApiError {
            what: what.into(),
            why: error.to_string(),
            ..error
        })?;
    }
    let any_of = state.expand(&spec.any_of);
    let number = state.jobs.register(&daemon.config.name, &stat, caller.uid, JobSpec { any_of, ..spec });
    daemon.save_now.notify_one();
    Ok(number)
}

/// The registered process has closed its connection: its program runs now, and can be placed.
pub fn program_runs(daemon: &Arc<Daemon>, pid: i32) {
    let daemon = Arc::clone(daemon);
    tokio::spawn(async move {
        tokio::time::sleep(SETTLE).await;
        let (command, uid) = (processes::command_line(pid), processes::owner(pid));
        let to = {
            let mut state = daemon.lock();
            state.jobs.looked(pid, command, uid);
            let Some(process) = state.jobs.processes.get(&pid) else { return };
            let Some(spec) = state.jobs.jobs.get(&process.kept.job).map(|job| &job.spec) else { return };
            match spec.start_on.as_deref() {
                None => None,
                Some("best") => policy::best(&state, pid),
                Some(node) => match state.destination(node) {
                    Ok(Destination::Node(name)) => Some(name),
                    _ => None,
                },
            }
        };
        let Some(to) = to else { return daemon.policy_now.notify_one() };
        let wish = Wish { pid, to, cause: Cause::Placement, dry_run: false, limit: moves::MOVE_LIMIT };
        if let Ok((_, moving)) = moves::begin(&daemon, wish) {
            let _ = moving.await;
        }
    });
}

async fn migrate(
    daemon: &Arc<Daemon>,
    caller: Caller,
    request: MigrateRequest,
    answers: &Answers,
) -> Answered {
    let pids = daemon.find_processes(caller, &request.what)?;
    let pids = daemon.lock().jobs.tops(&pids);
    let destination = daemon.lock().destination(&request.to)?;
    let limit = request.timeout_ms.map_or(moves::MOVE_LIMIT, Duration::from_millis);
    let mut moving: Vec<(i32, u64, Moving)> = Vec::new();
    let mut first_error = None;
    for pid in pids {
        let Some(to) = node_for(daemon, pid, &destination) else { continue };
        let wish = Wish { pid, to, cause: Cause::User, dry_run: request.dry_run, limit };
        moves::settled(daemon, pid, limit).await;
        match moves::begin(daemon, wish) {
            Ok((id, ends)) => moving.push((pid, id, ends)),
            Err(error) => drop(first_error.get_or_insert(error)),
        }
    }
    if request.no_wait {
        return match first_error {
            Some(error) if moving.is_empty() => Err(error),
            _ => Ok(Response::Done),
        };
    }
    let mut reports = Vec::new();
    for (_, id, ends) in moving {
        match finish(daemon, id, ends, request.progress.then_some(answers)).await {
            Ok(report) => reports.push(report),
            Err(error) => drop(first_error.get_or_insert(error)),
        }
    }
    match first_error {
        // Some of a job could not: what moved, moved; the reason is told.
        Some(error) => Err(error),
        None => Ok(Response::Migrated { reports }),
    }
}

fn node_for(daemon: &Daemon, pid: i32, destination: &Destination) -> Option<String> {
    match destination {
        Destination::Node(name) => Some(name.clone()),
        Destination::Best => policy::best(&daemon.lock(), pid),
        Destination::Balance => policy::wanted(&daemon.lock(), pid),
    }
}

async fn finish(
    daemon: &Daemon,
    id: u64,
    mut ends: Moving,
    progress: Option<&Answers>,
) -> Result<MigrationInfo, ApiError> {
    loop {
        let ended = tokio::time::timeout(PROGRESS_EVERY, &mut ends).await;
        match ended {
            Ok(Ok(result)) => return result,
            Ok(Err(why)) => {
                let next = "see the log of migd";
                return Err(error(ErrorKind::Failed, "the migration broke off", why.to_string(), next));
            }
            Err(_) => {}
        }
        let info = daemon.lock().migrations.get(&id).map(|flight| MigrationInfo {
            total_ms: flight.started.elapsed().as_secs_f64() * 1000.0,
            ..flight.info.clone()
        });
        if let (Some(answers), Some(info)) = (progress, info) {
            answers.send(Response::Progress(info)).await;
        }
    }
}

async fn explain(daemon: &Arc<Daemon>, caller: Caller, what: &str, to: &str) -> Answered {
    let pids = daemon.find_processes(caller, what)?;
    let destination = daemon.lock().destination(to)?;
    let Some(pid) = daemon.lock().jobs.tops(&pids).first().copied() else {
        return Err(error(ErrorKind::Failed, format!("there is no {what}"), "it has ended", "see `mosps`"));
    };
    let to = node_for(daemon, pid, &destination).unwrap_or_else(|| daemon.config.name.clone());
    let away = {
        let state = daemon.lock();
        let process = state.jobs.processes.get(&pid).filter(|p| p.node != daemon.config.name);
        process.map(|process| {
            let pids = state.jobs.together(process.with.unwrap_or(pid));
            let all = pids.iter().filter_map(|pid| state.jobs.processes.get(pid));
            (all.map(|process| process.rss_bytes).sum::<u64>(), pids)
        })
    };
    let at_home = away.is_none();
    // A guest was looked at when it left; what it has since it has there.
    let explanation = match away {
        Some((bytes, pids)) => Explanation {
            pid,
            pids,
            to,
            blockers: Vec::new(),
            predicted_bytes: bytes,
            predicted_ms: bytes / 500_000 + 20,
            predicted_freeze_ms: bytes / 500_000 + 20,
        },
        None => moves::look(pid, &to).await?,
    };
    if let Some(process) = daemon.lock().jobs.processes.get_mut(&pid)
        && at_home
    {
        let words: Vec<&str> = explanation.blockers.iter().map(|blocker| blocker.what.as_str()).collect();
        process.cantmove = (!words.is_empty()).then(|| words.join("; "));
    }
    Ok(Response::Explain(explanation))
}

async fn pin(daemon: &Arc<Daemon>, caller: Caller, what: &str, node: Option<&str>) -> Answered {
    let pids = daemon.find_processes(caller, what)?;
    let to = match node {
        None => None,
        Some(node) => Some(daemon.lock().destination(node)?),
    };
    let tops = daemon.lock().jobs.tops(&pids);
    for pid in pids {
        // Pinned first, so that the balancer does not take it away in between.
        daemon.lock().jobs.set_locked(pid, true);
        daemon.save_now.notify_one();
        if !tops.contains(&pid) {
            continue;
        }
        let Some(to) = to.as_ref().and_then(|to| node_for(daemon, pid, to)) else { continue };
        let wish = Wish { pid, to, cause: Cause::User, dry_run: false, limit: moves::MOVE_LIMIT };
        moves::settled(daemon, pid, moves::MOVE_LIMIT).await;
        let moved = match moves::begin(daemon, wish) {
            Ok((id, ends)) => finish(daemon, id, ends, None).await,
            Err(error) => Err(error),
        };
        if let Err(error) = moved {
            daemon.lock().jobs.set_locked(pid, false);
            return Err(error);
        }
    }
    Ok(Response::Done)
}

fn unpin(daemon: &Daemon, caller: Caller, what: &str) -> Answered {
    for pid in daemon.find_processes(caller, what)? {
        daemon.lock().jobs.set_locked(pid, false);
    }
    daemon.save_now.notify_one();
    daemon.policy_now.notify_one();
    Ok(Response::Done)
}

fn why(daemon: &Daemon, caller: Caller, what: &str) -> Answered {
    let pids = daemon.find_processes(caller, what)?;
    let state = daemon.lock();
    let process = pids.first().and_then(|pid| state.jobs.processes.get(pid));
    let Some(process) = process else {
        return Err(error(ErrorKind::Failed, format!("there is no {what}"), "it has ended", "see `mosps`"));
    };
    let report = match &process.why {
        Some((at, report)) => WhyReport { age_ms: at.elapsed().as_millis() as u64, ..report.clone() },
        None => WhyReport {
            pid: process.kept.pid,
            decision: "stay".into(),
            reason: "the balancer has not looked at it yet".into(),
            ..WhyReport::default()
        },
    };
    Ok(Response::Why(report))
}

async fn run_doctor(daemon: &Arc<Daemon>) -> Answered {
    let shared = Arc::clone(daemon);
    let checks = tokio::task::spawn_blocking(move || doctor::examine(&shared)).await;
    let checks = checks.map_err(|why| {
        error(ErrorKind::Failed, "the examination broke off", why.to_string(), "see the log of migd")
    })?;
    Ok(Response::Doctor { checks })
}
