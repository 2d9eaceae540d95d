//! The arm of the policy: shows it the cluster, and does what it decides. (First: placement only.)

use super::Daemon;
use super::names::error;
use super::state::State;
use super::verbs::allowed;
use crate::api::{ApiError, ErrorKind};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// The balancer's memory.
#[derive(Debug, Default)]
pub struct Policy {}

/// Settings, as text.
pub fn show(state: &State) -> BTreeMap<String, String> {
    BTreeMap::from([("balance".to_string(), state.balance.to_string())])
}

/// Changes one.
pub fn set(state: &mut State, key: &str, value: &str) -> Result<(), ApiError> {
    if key == "balance"
        && let Ok(on) = value.parse()
    {
        state.balance = on;
        return Ok(());
    }
    let why = format!("`{key}` = `{value}` is not a setting");
    Err(error(ErrorKind::Usage, "the policy was not changed", why, "see `mosctl policy show`"))
}

/// Changes all that are named; what is not understood is logged.
pub fn set_all(state: &mut State, settings: &BTreeMap<String, String>) {
    for (key, value) in settings {
        if let Err(error) = set(state, key, value) {
            tracing::warn!(%error, "policy");
        }
    }
}

/// Where this process would be best, its own node among the candidates.
pub fn best(state: &State, pid: i32) -> Option<String> {
    let process = state.jobs.processes.get(&pid)?;
    let spec = &state.jobs.jobs.get(&process.kept.job)?.spec;
    let nodes = state.nodes();
    let cost = |node: &crate::api::NodeInfo| {
        let power = node.cpus.max(0.01) * f64::from(node.speed.max(1)) / 10_000.0;
        node.load + if node.name == process.node { 0.0 } else { 1.0 / power }
    };
    nodes
        .iter()
        .filter(|node| {
            node.name == process.node || (node.state == "up" && !node.blocked && node.age_ms < 5000)
        })
        .filter(|node| allowed(&spec.any_of, &nodes, &state.own.name, &node.name))
        .min_by(|a, b| cost(a).total_cmp(&cost(b)))
        .map(|node| node.name.clone())
}

/// Where the balancer wants it; `None`: where it is.
pub fn wanted(state: &State, pid: i32) -> Option<String> {
    best(state, pid)
}

/// Decides for ever.
pub async fn run(daemon: Arc<Daemon>) {
    loop {
        tokio::time::sleep(Duration::from_secs(3600)).await;
        let _ = &daemon;
    }
}
