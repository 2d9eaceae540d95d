//! The opportunity cost of using a node.
//!
//! CPU has no natural limit as memory has. As in the paper's normalisation, its capacity is the least
//! power of two above the largest load per CPU anywhere.

use crate::average::not_seen_after;
use crate::{Cluster, Node, Settings};

/// Nodes tell their load every second; so much of a change is on its way even after the averages.
const TOLD_AFTER_SECS: f64 = 1.0;

/// How full one node is, with what is under way counted in.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Fill {
    /// Runnable threads.
    pub runnable: f64,
    /// Standard CPUs.
    pub power: f64,
    /// CPUs, whatever their speed.
    pub cpus: f64,
    pub mem_used: f64,
    pub mem_total: f64,
    pub arriving: u64,
    pub leaving: u64,
}

impl Fill {
    fn of(node: &Node) -> Fill {
        let cpus = if node.cpus.is_finite() { node.cpus.max(0.01) } else { 0.01 };
        let speed = if node.speed.is_finite() { node.speed.max(0.01) } else { 0.01 };
        Fill {
            runnable: if node.runnable.is_finite() { node.runnable.max(0.0) } else { 0.0 },
            power: cpus * speed,
            cpus,
            mem_used: node.mem_total_bytes.saturating_sub(node.mem_available_bytes) as f64,
            mem_total: node.mem_total_bytes.max(1) as f64,
            arriving: 0,
            leaving: 0,
        }
    }

    /// Load per standard CPU.
    pub fn load(&self) -> f64 {
        self.runnable / self.power
    }

    /// What a thread gets of a standard CPU here if so many want to run.
    pub fn rate(&self, runnable: f64) -> f64 {
        (self.cpus / runnable.max(self.cpus).max(1.0)).min(1.0) * self.power / self.cpus
    }

    pub fn add(&mut self, demand: f64, bytes: f64) {
        self.runnable = (self.runnable + demand).max(0.0);
        self.mem_used = (self.mem_used + bytes).max(0.0);
    }

    pub fn free(&self) -> f64 {
        self.mem_total - self.mem_used
    }
}

/// All nodes, as they will be when what is under way has arrived.
#[derive(Debug, Clone)]
pub(crate) struct Costs {
    pub fills: Vec<Fill>,
    base: f64,
    cpu_limit: f64,
}

impl Costs {
    pub fn new(cluster: &Cluster, settings: &Settings) -> Costs {
        let mut fills: Vec<Fill> = cluster.nodes.iter().map(Fill::of).collect();
        for moving in &cluster.under_way {
            let (part, under_way) = match moving.arrived_ms {
                None => (1.0, 1),
                Some(ms) => (not_seen_after(ms as f64 / 1000.0 - TOLD_AFTER_SECS).min(1.0), 0),
            };
            let (demand, bytes) = (moving.demand * part, moving.mem_bytes as f64 * part);
            if let Some(from) = fills.get_mut(moving.from) {
                from.add(-demand, -bytes);
                from.leaving += under_way;
            }
            if let Some(to) = fills.get_mut(moving.to) {
                to.add(demand, bytes);
                to.arriving += under_way;
            }
        }
        let largest = fills.iter().map(Fill::load).fold(1.0, f64::max);
        let mut cpu_limit = 2.0;
        while cpu_limit <= largest && cpu_limit < 1e9 {
            cpu_limit *= 2.0;
        }
        Costs { fills, base: settings.cost_base.max(cluster.nodes.len() as f64), cpu_limit }
    }

    fn cost(&self, fill: &Fill) -> f64 {
        self.base.powf(fill.load() / self.cpu_limit)
            + self.base.powf((fill.mem_used / fill.mem_total).min(4.0))
    }

    /// What it costs the cluster that this is on that node; `there`: it is counted in already.
    pub fn marginal(&self, node: usize, demand: f64, bytes: f64, there: bool) -> f64 {
        let now = &self.fills[node];
        let mut other = now.clone();
        if there {
            other.add(-demand, -bytes);
            self.cost(now) - self.cost(&other)
        } else {
            other.add(demand, bytes);
            self.cost(&other) - self.cost(now)
        }
    }
}
