//! What is known about a lab: written by its keeper, read by every verb.

use super::identity::ProcessId;
use super::place::Place;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::fs;
use std::net::Ipv4Addr;
use std::path::PathBuf;

/// A whole lab. The fields are those of `moslab status --json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LabState {
    /// Its name.
    pub name: String,
    /// `starting` or `up`.
    pub phase: String,
    /// The process that keeps it.
    pub keeper: ProcessId,
    /// The ordinary user of its nodes.
    pub user: String,
    /// CPUs each node may use; absent: not limited.
    pub cpus_per_node: Option<f64>,
    /// Rate of each node's link as `tc` takes it; absent: not limited.
    pub bandwidth: Option<String>,
    /// Control groups made for it, one a controller's hierarchy.
    pub cgroups: Vec<PathBuf>,
    /// What could not be had, in words.
    pub notes: Vec<String>,
    /// Its nodes in order.
    pub nodes: Vec<NodeState>,
}

/// One node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NodeState {
    /// `node1`, `node2`, …
    pub name: String,
    /// Its number, from 1.
    pub number: u32,
    /// Its address on the lab's bridge.
    pub address: Ipv4Addr,
    /// Its PID 1 as seen from outside; absent: the node is down.
    pub init: Option<ProcessId>,
    /// Which side of a partition it is on; 0: the main one.
    pub island: u32,
}

impl LabState {
    /// The state of a lab that is there, whether its keeper still runs or not.
    pub fn load(place: &Place) -> Result<Option<LabState>> {
        let path = place.state_file();
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map(Some).with_context(|| {
                format!("{} is damaged; `moslab down --name {}`", path.display(), place.name())
            }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("{} cannot be read", path.display())),
        }
    }

    /// The state of a lab that is up.
    pub fn of_running(place: &Place) -> Result<LabState> {
        match LabState::load(place)? {
            Some(state) if state.keeper.alive() => Ok(state),
            Some(_) => bail!(
                "lab {:?} has died (its keeper is gone); `moslab down --name {0}` clears what is left",
                place.name()
            ),
            None => bail!(
                "there is no lab {:?}; start it with `moslab up --name {}`{}",
                place.name(),
                place.name(),
                others(place)
            ),
        }
    }

    /// Writes it so that a reader never sees half of it.
    pub fn save(&self, place: &Place) -> Result<()> {
        let path = place.state_file();
        let new = path.with_extension("new");
        fs::write(&new, serde_json::to_vec_pretty(self)?)
            .and_then(|()| fs::rename(&new, &path))
            .with_context(|| format!("{} cannot be written", path.display()))
    }

    /// A node by name, number or address.
    pub fn node(&self, what: &str) -> Result<&NodeState> {
        self.nodes
            .iter()
            .find(|n| n.name == what || n.number.to_string() == what || n.address.to_string() == what)
            .with_context(|| {
                let names: Vec<&str> = self.nodes.iter().map(|n| n.name.as_str()).collect();
                format!("lab {:?} has no node {what:?}; it has {}", self.name, names.join(", "))
            })
    }

    /// A node that runs, and its PID 1.
    pub fn running_node(&self, what: &str) -> Result<(&NodeState, ProcessId)> {
        let node = self.node(what)?;
        match node.init {
            Some(init) if init.alive() => Ok((node, init)),
            _ => bail!("{} is down; `moslab restart {0} --name {}` brings it up again", node.name, self.name),
        }
    }
}

fn others(place: &Place) -> String {
    let others: Vec<String> = super::place::existing().into_iter().filter(|n| n != place.name()).collect();
    if others.is_empty() { String::new() } else { format!(" (there is: {})", others.join(", ")) }
}
