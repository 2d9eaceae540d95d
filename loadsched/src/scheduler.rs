//! Decisions.

use crate::cost::{self, Use};
use crate::load;
use crate::recent::{Move, Recent};
use crate::settings::Settings;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A node as it is known here.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct NodeView {
    /// Its name.
    pub name: String,
    /// Decayed runnable threads × (standard speed ÷ speed) ÷ CPUs.
    pub load: f64,
    /// CPUs; a share counts as that share.
    pub cpus: f64,
    /// 10,000 is the standard node.
    pub speed: u32,
    /// Bytes.
    pub mem_total: u64,
    /// Bytes.
    pub mem_available: u64,
    /// It answers.
    pub up: bool,
    /// It takes no guests.
    pub blocked: bool,
    /// Nothing leaves it by our choice.
    pub stay: bool,
    /// Age of these figures, ms.
    pub age_ms: u64,
}

/// A process that is ours to place.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ProcView {
    /// PID at home.
    pub pid: i32,
    /// Where it runs.
    pub node: String,
    /// Its home node.
    pub home: String,
    /// CPU time used so far, ms: the measure of its age.
    pub cpu_ms: u64,
    /// Time since its start, ms.
    pub age_ms: u64,
    /// Time since its last move, ms; absent: it never moved.
    pub since_move_ms: Option<u64>,
    /// Per cent of one CPU.
    pub cpu_pct: f64,
    /// Bytes that a move would carry.
    pub bytes: u64,
    /// Held where it is.
    pub locked: bool,
    /// Declared I/O bound, or to stay home.
    pub stays_home: bool,
    /// The only nodes it may use; empty: all.
    pub any_of: Vec<String>,
    /// Why it cannot move.
    pub cantmove: Option<String>,
    /// It is being moved.
    pub moving: bool,
    /// How often it had to come home for a system call.
    pub retreats: u32,
    /// Time since the last such, ms.
    pub since_retreat_ms: Option<u64>,
}

/// What to do with a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Action {
    /// Nothing.
    Stay,
    /// Move it.
    Move {
        /// Where to.
        to: String,
    },
}

/// A decision about one process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// Which.
    pub pid: i32,
    /// What.
    pub action: Action,
    /// Why, in words.
    pub reason: String,
    /// Every number that went into it.
    pub numbers: BTreeMap<String, f64>,
}

/// The balancer's memory.
#[derive(Debug, Clone, Default)]
pub struct Scheduler {
    recent: Recent,
}

/// A node with the corrections applied, as decisions of one round change it.
struct Site<'a> {
    view: &'a NodeView,
    usage: Use,
}

impl Scheduler {
    /// Decides about every process, in order of what it has used (the longest-running first, because
    /// it will gain the most).
    pub fn decide(
        &mut self,
        now_ms: u64,
        nodes: &[NodeView],
        processes: &[ProcView],
        settings: &Settings,
    ) -> Vec<Decision> {
        self.recent.forget(now_ms, settings.lag_ms);
        let mut sites = self.sites(now_ms, nodes, settings);
        let mut order: Vec<&ProcView> = processes.iter().collect();
        order.sort_by_key(|process| (std::cmp::Reverse(process.cpu_ms), process.pid));
        let mut left: Vec<String> = Vec::new();
        order
            .into_iter()
            .map(|process| {
                let mut decision = self.about(now_ms, process, &sites, nodes.len(), settings, &left);
                if let Action::Move { to } = &decision.action {
                    let tasks = decision.numbers.get("tasks").copied().unwrap_or(1.0);
                    apply(&mut sites, &process.node, -tasks, -(process.bytes as f64));
                    apply(&mut sites, to, tasks, process.bytes as f64);
                    self.recent.add(Move {
                        from: process.node.clone(),
                        to: to.clone(),
                        tasks,
                        at_ms: now_ms,
                        pid: process.pid,
                    });
                    left.push(process.node.clone());
                    decision.numbers.insert("arrivals_at_target".into(), 1.0);
                }
                decision
            })
            .collect()
    }

    /// A move that was not ours to decide (by hand, a retreat): it corrects the figures just the same.
    pub fn moved(&mut self, now_ms: u64, pid: i32, from: &str, to: &str) {
        self.recent.add(Move { from: from.into(), to: to.into(), tasks: 1.0, at_ms: now_ms, pid });
    }

    /// The node where a process of `tasks` and `bytes` costs least, among those that take it.
    pub fn best_node(
        &self,
        now_ms: u64,
        nodes: &[NodeView],
        process: &ProcView,
        settings: &Settings,
    ) -> Option<String> {
        let sites = self.sites(now_ms, nodes, settings);
        sites
            .iter()
            .filter(|site| site.view.name == process.node || takes(site, process, settings).is_ok())
            .map(|site| {
                let mut usage = site.usage;
                if site.view.name == process.node {
                    usage.tasks = (usage.tasks - 1.0).max(0.0);
                }
                (cost::marginal(usage, 1.0, process.bytes as f64, nodes.len()), site)
            })
            .min_by(|a, b| a.0.total_cmp(&b.0))
            .map(|(_, site)| site.view.name.clone())
    }

    fn sites<'a>(&self, now_ms: u64, nodes: &'a [NodeView], settings: &Settings) -> Vec<Site<'a>> {
        nodes
            .iter()
            .map(|view| {
                let power = load::power(view.cpus, view.speed);
                let correction = self.recent.correction(&view.name, now_ms, settings.lag_ms);
                Site {
                    view,
                    usage: Use {
                        tasks: (view.load * power + correction).max(0.0),
                        power,
                        mem_used: view.mem_total.saturating_sub(view.mem_available) as f64,
                        mem_total: view.mem_total as f64,
                    },
                }
            })
            .collect()
    }

    fn about(
        &self,
        now_ms: u64,
        process: &ProcView,
        sites: &[Site<'_>],
        cluster: usize,
        settings: &Settings,
        left: &[String],
    ) -> Decision {
        let mut numbers = BTreeMap::new();
        let stay = |reason: String, numbers: BTreeMap<String, f64>| Decision {
            pid: process.pid,
            action: Action::Stay,
            reason,
            numbers,
        };
        let Some(source) = sites.iter().find(|site| site.view.name == process.node) else {
            return stay(format!("nothing is known of {}, where it runs", process.node), numbers);
        };
        if let Some(reason) = held(process, source.view, settings) {
            return stay(reason, numbers);
        }
        let pressed = is_pressed(source, settings);
        // What it wants: under contention it gets less CPU than it would use.
        let slowdown = (source.usage.tasks / source.usage.power).max(1.0);
        let tasks = (process.cpu_pct / 100.0 * slowdown).clamp(0.0, 64.0);
        let tasks = if tasks > 0.7 { tasks.max(1.0) } else { tasks };
        numbers.insert("tasks".into(), tasks);
        numbers.insert("source_tasks".into(), source.usage.tasks);
        numbers.insert("source_power".into(), source.usage.power);
        if process.cpu_pct < settings.min_cpu_pct && !pressed {
            return stay("it uses too little CPU to be worth a move".into(), numbers);
        }
        if !pressed && left.iter().filter(|node| **node == process.node).count() >= 2 {
            return stay("enough has left its node in this round".into(), numbers);
        }
        let bytes = process.bytes as f64;
        let mut without = source.usage;
        without.tasks = (without.tasks - tasks).max(0.0);
        without.mem_used = (without.mem_used - bytes).max(0.0);
        let here = cost::marginal(without, tasks, bytes, cluster);
        numbers.insert("cost_here".into(), here);
        let best = sites
            .iter()
            .filter(|site| site.view.name != process.node)
            .filter(|site| takes(site, process, settings).is_ok())
            .filter(|site| {
                let since = now_ms.saturating_sub(settings.arrival_window_ms);
                self.recent.arrivals(&site.view.name, since) < settings.max_arrivals
            })
            .map(|site| (cost::marginal(site.usage, tasks, bytes, cluster), site))
            .min_by(|a, b| a.0.total_cmp(&b.0));
        let Some((there, target)) = best else {
            return stay("no other node takes it now".into(), numbers);
        };
        numbers.insert("cost_there".into(), there);
        numbers.insert("target_tasks".into(), target.usage.tasks);
        numbers.insert("target_power".into(), target.usage.power);
        let go = |reason: String, numbers: BTreeMap<String, f64>| Decision {
            pid: process.pid,
            action: Action::Move { to: target.view.name.clone() },
            reason,
            numbers,
        };
        if pressed {
            let reason = format!("{} is short of memory and {} has room", source.view.name, target.view.name);
            return go(reason, numbers);
        }
        if there > here * settings.hysteresis {
            let reason = format!(
                "{} would cost {there:.3}, which is not under {:.0} % of the {here:.3} here",
                target.view.name,
                settings.hysteresis * 100.0
            );
            return stay(reason, numbers);
        }
        let now = (source.usage.tasks / source.usage.power).max(1.0);
        let then = ((target.usage.tasks + tasks) / target.usage.power).max(1.0);
        let gain_ms = process.age_ms as f64 * (1.0 - then / now);
        let move_ms = settings.move_fixed_ms + bytes / settings.move_bytes_per_sec.max(1.0) * 1000.0;
        numbers.insert("slowdown_here".into(), now);
        numbers.insert("slowdown_there".into(), then);
        numbers.insert("gain_ms".into(), gain_ms);
        numbers.insert("move_ms".into(), move_ms);
        if gain_ms < settings.gain_factor * move_ms {
            let reason = format!("it would gain {gain_ms:.0} ms for a move of {move_ms:.0} ms");
            return stay(reason, numbers);
        }
        let reason =
            format!("{} costs {there:.3} instead of {here:.3}; gain {gain_ms:.0} ms", target.view.name);
        go(reason, numbers)
    }
}

fn apply(sites: &mut [Site<'_>], node: &str, tasks: f64, bytes: f64) {
    if let Some(site) = sites.iter_mut().find(|site| site.view.name == node) {
        site.usage.tasks = (site.usage.tasks + tasks).max(0.0);
        site.usage.mem_used = (site.usage.mem_used + bytes).max(0.0);
    }
}

/// Why a process is not to be moved, whatever the load.
fn held(process: &ProcView, node: &NodeView, settings: &Settings) -> Option<String> {
    if process.moving {
        return Some("it is being moved".into());
    }
    if process.locked {
        return Some("it is pinned".into());
    }
    if let Some(why) = &process.cantmove {
        return Some(format!("it cannot move: {why}"));
    }
    if process.stays_home {
        return Some("it was started to stay home".into());
    }
    if node.stay {
        return Some(format!("{} keeps its processes (stay)", node.name));
    }
    if process.age_ms < settings.residency_ms
        || process.since_move_ms.is_some_and(|since| since < settings.residency_ms)
    {
        return Some("it has not stayed for its minimum time yet".into());
    }
    let backoff = settings.retreat_backoff_ms.saturating_mul(1 << process.retreats.saturating_sub(1).min(12));
    if process.retreats > 0 && process.since_retreat_ms.is_some_and(|since| since < backoff) {
        return Some("it came home for a system call a short time ago".into());
    }
    None
}

fn is_pressed(site: &Site<'_>, settings: &Settings) -> bool {
    let total = site.view.mem_total as f64;
    total > 0.0 && total - site.usage.mem_used < total * settings.memory_low
}

/// Whether a node may get this process.
fn takes(site: &Site<'_>, process: &ProcView, settings: &Settings) -> Result<(), &'static str> {
    let view = site.view;
    if !view.up || view.age_ms > settings.max_age_ms {
        return Err("it is down, or silent");
    }
    if view.blocked && view.name != process.home {
        return Err("it takes no guests");
    }
    if !process.any_of.is_empty() && !process.any_of.contains(&view.name) && view.name != process.home {
        return Err("the job may not use it");
    }
    let free = view.mem_total as f64 - site.usage.mem_used;
    if (process.bytes as f64) * 1.1 > free {
        return Err("it has not the memory");
    }
    Ok(())
}

#[cfg(test)]
mod tests;
