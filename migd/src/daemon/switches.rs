//! `expel`, `bring` and what stopping does: emptying a node of guests, and calling its own home.

use super::Daemon;
use super::moves::{self, Cause, Wish};
use super::names::error;
use super::state::State;
use crate::api::{ApiError, ErrorKind, NodeSwitch};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long guests may take to go home.
const EXPEL_LIMIT: Duration = Duration::from_secs(120);
/// A guest that has not gone is told again after so long.
const REMIND_EVERY: Duration = Duration::from_secs(5);

/// Turns one of `mosctl`'s switches.
pub fn turn(state: &mut State, switch: NodeSwitch) {
    let switches = &mut state.switches;
    match switch {
        NodeSwitch::Stay => switches.stay = true,
        NodeSwitch::Nostay => switches.stay = false,
        NodeSwitch::Lstay => switches.lstay = true,
        NodeSwitch::Nolstay => switches.lstay = false,
        NodeSwitch::Block => switches.block = true,
        NodeSwitch::Noblock => switches.block = false,
        NodeSwitch::Quiet => switches.quiet = true,
        NodeSwitch::Noquiet => switches.quiet = false,
    }
}

/// Sends all guests home and lets no more in.
pub async fn expel(daemon: &Arc<Daemon>) -> Result<(), ApiError> {
    daemon.lock().switches.block = true;
    let started = Instant::now();
    let mut reminded: Option<Instant> = None;
    loop {
        let left = {
            let state = daemon.lock();
            if reminded.is_none_or(|at| at.elapsed() > REMIND_EVERY) {
                reminded = Some(Instant::now());
                for guest in state.guests.values() {
                    guest.send_home();
                }
            }
            state.guests.len()
        };
        if left == 0 {
            return Ok(());
        }
        if started.elapsed() > EXPEL_LIMIT {
            let why = format!("{left} are still here after {} s", EXPEL_LIMIT.as_secs());
            let next = "see the log of migd here and at their homes; `mosctl expel` again goes on";
            return Err(error(ErrorKind::Failed, "not all guests have gone home", why, next));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Brings all processes that are at home here back, and keeps them.
pub async fn bring(daemon: &Arc<Daemon>) -> Result<(), ApiError> {
    daemon.lock().switches.lstay = true;
    let home = daemon.config.name.clone();
    let mut last: Option<ApiError> = None;
    // A process that was just under way to somewhere needs another round.
    for round in 0..3 {
        let away: Vec<i32> = {
            let state = daemon.lock();
            let away = state.jobs.processes.values().filter(|p| p.node != home || p.moving.is_some());
            away.map(|process| process.kept.pid).collect()
        };
        if away.is_empty() {
            return Ok(());
        }
        if round > 0 {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        let mut moving = Vec::new();
        for pid in away {
            let wish =
                Wish { pid, to: home.clone(), cause: Cause::User, dry_run: false, limit: moves::MOVE_LIMIT };
            match moves::begin(daemon, wish) {
                Ok((_, ends)) => moving.push(ends),
                Err(error) => last = Some(error),
            }
        }
        for ends in moving {
            if let Ok(Err(error)) = ends.await {
                last = Some(error);
            }
        }
    }
    let state = daemon.lock();
    let left = state.jobs.processes.values().filter(|process| process.node != home).count();
    match last {
        Some(last) if left > 0 => {
            let what = format!("{left} processes could not be brought home");
            Err(ApiError { what, ..last })
        }
        _ => Ok(()),
    }
}

/// Both, for the daemon's end.
pub async fn clear(daemon: &Arc<Daemon>) {
    let (brought, expelled) = tokio::join!(bring(daemon), expel(daemon));
    for error in [brought.err(), expelled.err()].into_iter().flatten() {
        tracing::warn!(%error, "stopping");
    }
}
