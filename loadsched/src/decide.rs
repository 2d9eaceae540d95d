//! Decisions, each with its reason and every number that went into it.

use crate::cost::Costs;
use crate::{Cluster, Process, Settings};
use std::collections::BTreeMap;

/// What to do with a process.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Leave it.
    Stay,
    /// Move it to that node (an index).
    Move(usize),
}

/// One decision.
#[derive(Debug, Clone, PartialEq)]
pub struct Decision {
    /// PID at home.
    pub pid: i32,
    /// What to do.
    pub action: Action,
    /// The node that came first among the candidates, if any did.
    pub best: Option<usize>,
    /// In words.
    pub reason: String,
    /// Every number that went into it.
    pub numbers: BTreeMap<&'static str, f64>,
}

/// Decides on every process, the hungriest first; what is decided counts for those that follow.
pub fn decide(cluster: &Cluster, settings: &Settings) -> Vec<Decision> {
    let mut costs = Costs::new(cluster, settings);
    let mut order: Vec<&Process> =
        cluster.processes.iter().filter(|process| process.node < cluster.nodes.len()).collect();
    order.sort_by(|a, b| b.demand.total_cmp(&a.demand).then(b.cpu_ms.cmp(&a.cpu_ms)).then(a.pid.cmp(&b.pid)));
    let mut decisions = usher(cluster, settings, &mut costs, &order);
    for process in order {
        if decisions.iter().any(|decision| decision.pid == process.pid) {
            continue;
        }
        let decision = balance(cluster, settings, &costs, process);
        if let Action::Move(to) = decision.action {
            depart(&mut costs, process, to);
        }
        decisions.push(decision);
    }
    decisions
}

fn depart(costs: &mut Costs, process: &Process, to: usize) {
    let bytes = process.mem_bytes as f64;
    costs.fills[process.node].add(-process.demand, -bytes);
    costs.fills[process.node].leaving += 1;
    costs.fills[to].add(process.demand, bytes);
    costs.fills[to].arriving += 1;
}

/// Where a process that is about to start (or has just started at `process.node`) is best placed.
pub fn place(cluster: &Cluster, settings: &Settings, process: &Process) -> Option<usize> {
    let costs = Costs::new(cluster, settings);
    let demand = process.demand.max(1.0);
    let mut candidates = candidates(cluster, settings, &costs, process);
    candidates.push(process.node);
    cheapest(cluster, &costs, candidates, |costs, node| {
        // It has hardly run, so that its own node's average does not show it.
        costs.marginal(node, demand, process.mem_bytes as f64, false)
    })
}

/// Nodes that could take it, its own not among them.
fn candidates(cluster: &Cluster, settings: &Settings, costs: &Costs, process: &Process) -> Vec<usize> {
    let bytes = process.mem_bytes as f64;
    let fits = |index: usize| {
        let (node, fill) = (&cluster.nodes[index], &costs.fills[index]);
        node.up
            && !node.blocked
            && index != process.node
            && node.age_ms <= settings.max_load_age_ms
            && (process.allowed.is_empty() || process.allowed.contains(&index))
            && fill.free() - bytes > fill.mem_total * settings.reserve_pct / 100.0
            && fill.arriving < settings.max_arrivals
    };
    (0..cluster.nodes.len()).filter(|index| fits(*index)).collect()
}

/// The cheapest; among equals the dice decide, so that many who decide at once do not all take the first.
fn cheapest(
    cluster: &Cluster,
    costs: &Costs,
    candidates: Vec<usize>,
    cost: impl Fn(&Costs, usize) -> f64,
) -> Option<usize> {
    let turn = (cluster.dice % candidates.len().max(1) as u64) as usize;
    let mut candidates = candidates;
    candidates.rotate_left(turn);
    candidates.into_iter().min_by(|a, b| {
        let (a, b) = (cost(costs, *a), cost(costs, *b));
        if (a - b).abs() <= 1e-9 * a.abs().max(b.abs()) { std::cmp::Ordering::Equal } else { a.total_cmp(&b) }
    })
}

fn balance(cluster: &Cluster, settings: &Settings, costs: &Costs, process: &Process) -> Decision {
    let here = &costs.fills[process.node];
    let mut numbers = BTreeMap::from([
        ("demand", process.demand),
        ("load_here", here.load()),
        ("age_ms", process.age_ms as f64),
        ("cpu_ms", process.cpu_ms as f64),
        ("mem_bytes", process.mem_bytes as f64),
    ]);
    let stay = |reason: String, best: Option<usize>, numbers| Decision {
        pid: process.pid,
        action: Action::Stay,
        best,
        reason,
        numbers,
    };
    if let Some(reason) = not_now(cluster, settings, costs, process) {
        return stay(reason, None, numbers);
    }
    let bytes = process.mem_bytes as f64;
    let found = cheapest(cluster, costs, candidates(cluster, settings, costs, process), |costs, node| {
        costs.marginal(node, process.demand, bytes, false)
    });
    let Some(best) = found else {
        return stay("no other node could take it now".into(), None, numbers);
    };
    let there = &costs.fills[best];
    let cost_here = costs.marginal(process.node, process.demand, bytes, true);
    let cost_there = costs.marginal(best, process.demand, bytes, false);
    let rate_here = here.rate(here.runnable.max(process.demand));
    let rate_there = there.rate(there.runnable + process.demand);
    // The work left is expected to be what was done so far; at least what its age lets one expect.
    let left_ms = (process.cpu_ms as f64).max(settings.min_age_ms as f64);
    let gain_ms = left_ms / rate_here.max(1e-6) - left_ms / rate_there.max(1e-6);
    let move_ms = settings.move_fixed_ms as f64 + bytes * 1000.0 / settings.bytes_per_sec.max(1) as f64;
    numbers.extend([
        ("load_there", there.load()),
        ("cost_here", cost_here),
        ("cost_there", cost_there),
        ("rate_here", rate_here),
        ("rate_there", rate_there),
        ("gain_ms", gain_ms),
        ("move_ms", move_ms),
    ]);
    let name = &cluster.nodes[best].name;
    if cost_there > cost_here * settings.hysteresis {
        let part = cost_there / cost_here.max(1e-12) * 100.0;
        let limit = settings.hysteresis * 100.0;
        let reason =
            format!("{name} would cost {part:.0} % of what it costs here; it must be at most {limit:.0} %");
        return stay(reason, Some(best), numbers);
    }
    if gain_ms <= move_ms * settings.gain_factor {
        let reason = format!(
            "on {name} it would gain {gain_ms:.0} ms, less than {} times the {move_ms:.0} ms that moving costs",
            settings.gain_factor
        );
        return stay(reason, Some(best), numbers);
    }
    let reason = format!(
        "{name} costs {:.0} % of what it costs here, and it would gain {gain_ms:.0} ms for {move_ms:.0} ms of moving",
        cost_there / cost_here.max(1e-12) * 100.0
    );
    Decision { pid: process.pid, action: Action::Move(best), best: Some(best), reason, numbers }
}

/// Why a process is not even considered.
fn not_now(cluster: &Cluster, settings: &Settings, costs: &Costs, process: &Process) -> Option<String> {
    if let Some(held) = &process.held {
        return Some(held.clone());
    }
    let node = &cluster.nodes[process.node];
    if node.stay {
        return Some(format!("processes stay on {} (`mosctl nostay` lets them go)", node.name));
    }
    if !node.up {
        return Some(format!("{} does not answer", node.name));
    }
    if process.age_ms < settings.min_age_ms {
        return Some(format!("it is younger than {} ms", settings.min_age_ms));
    }
    if let Some(wanted) = residency_left(settings, process) {
        let freeze = process.last_freeze_ms;
        return Some(format!("it has moved less than {wanted} ms ago, which froze it for {freeze} ms"));
    }
    if process.demand < settings.min_demand {
        return Some("it hardly runs".into());
    }
    (costs.fills[process.node].leaving >= settings.max_departures)
        .then(|| format!("{} others are leaving {} just now", settings.max_departures, node.name))
}

/// How long it has to stay after its last move, ms, if that time is not over.
fn residency_left(settings: &Settings, process: &Process) -> Option<u64> {
    let earned = process.last_freeze_ms.saturating_mul(settings.residency_factor);
    let wanted = settings.min_residency_ms.max(earned);
    process.resident_ms.filter(|&ms| ms < wanted).map(|_| wanted)
}

/// A node short of memory sends away the smallest process that clears the deficit, or else the largest.
fn usher(cluster: &Cluster, settings: &Settings, costs: &mut Costs, order: &[&Process]) -> Vec<Decision> {
    let mut decisions = Vec::new();
    for node in 0..cluster.nodes.len() {
        let fill = &costs.fills[node];
        let wanted = fill.mem_total * settings.reserve_pct / 100.0;
        let deficit = wanted - fill.free();
        if deficit <= 0.0 || cluster.nodes[node].mem_total_bytes == 0 {
            continue;
        }
        let movable = |process: &&&Process| {
            process.node == node
                && process.held.is_none()
                && !cluster.nodes[node].stay
                && process.resident_ms.is_none_or(|ms| ms >= settings.min_residency_ms)
                && process.mem_bytes as f64 > deficit / 16.0
        };
        let mut fitting: Vec<&&Process> = order.iter().filter(movable).collect();
        fitting.sort_by_key(|process| {
            let clears = process.mem_bytes as f64 >= deficit;
            (!clears, if clears { process.mem_bytes } else { u64::MAX - process.mem_bytes })
        });
        let found = fitting.into_iter().find_map(|process| {
            let candidates = candidates(cluster, settings, costs, process);
            let bytes = process.mem_bytes as f64;
            let to = cheapest(cluster, costs, candidates, |costs, to| {
                costs.marginal(to, process.demand, bytes, false)
            })?;
            Some((*process, to))
        });
        let Some((process, to)) = found else { continue };
        let numbers = BTreeMap::from([
            ("deficit_bytes", deficit),
            ("mem_bytes", process.mem_bytes as f64),
            ("free_here_bytes", costs.fills[node].free()),
            ("free_there_bytes", costs.fills[to].free()),
        ]);
        let reason =
            format!("{} is short of memory; {} has room", cluster.nodes[node].name, cluster.nodes[to].name);
        depart(costs, process, to);
        decisions.push(Decision {
            pid: process.pid,
            action: Action::Move(to),
            best: Some(to),
            reason,
            numbers,
        });
    }
    decisions
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Node, UnderWay};

    fn node(name: &str, cpus: f64, runnable: f64) -> Node {
        Node {
            name: name.into(),
            up: true,
            blocked: false,
            stay: false,
            cpus,
            speed: 1.0,
            runnable,
            mem_total_bytes: 4 << 30,
            mem_available_bytes: 3 << 30,
            age_ms: 300,
        }
    }

    fn process(pid: i32) -> Process {
        Process {
            pid,
            node: 0,
            demand: 1.0,
            mem_bytes: 10 << 20,
            cpu_ms: 3000,
            age_ms: 10_000,
            resident_ms: None,
            last_freeze_ms: 0,
            held: None,
            allowed: Vec::new(),
        }
    }

    /// Lets every decision come true and decides again, until nothing moves any more.
    fn settle(mut cluster: Cluster, settings: &Settings) -> (Cluster, usize) {
        let mut moves = 0;
        for _ in 0..100 {
            let decided = decide(&cluster, settings);
            let before = moves;
            for decision in decided {
                let Action::Move(to) = decision.action else { continue };
                moves += 1;
                let moved = cluster.processes.iter_mut().find(|p| p.pid == decision.pid).expect("known");
                cluster.nodes[moved.node].runnable -= moved.demand;
                cluster.nodes[to].runnable += moved.demand;
                moved.node = to;
            }
            if moves == before {
                return (cluster, moves);
            }
        }
        panic!("it never settles");
    }

    fn counts(cluster: &Cluster) -> Vec<usize> {
        (0..cluster.nodes.len())
            .map(|n| cluster.processes.iter().filter(|process| process.node == n).count())
            .collect()
    }

    #[test]
    fn eight_jobs_spread_over_three_nodes_and_then_rest() {
        for cpus in [0.5, 0.6, 1.0, 2.0] {
            let cluster = Cluster {
                nodes: vec![node("a", cpus, 8.0), node("b", cpus, 0.0), node("c", cpus, 0.0)],
                processes: (1..=8).map(process).collect(),
                ..Cluster::default()
            };
            let (cluster, moves) = settle(cluster, &Settings::default());
            let counts = counts(&cluster);
            assert!(counts.iter().all(|count| (2..=3).contains(count)), "{cpus} CPUs: {counts:?}");
            assert!(moves <= 6, "{moves} moves");
        }
    }

    #[test]
    fn two_on_one_cpu_and_an_idle_node() {
        let cluster = Cluster {
            nodes: vec![node("a", 1.0, 2.0), node("b", 1.0, 0.0)],
            processes: vec![process(1), process(2)],
            ..Cluster::default()
        };
        assert_eq!(counts(&settle(cluster, &Settings::default()).0), [1, 1]);
    }

    #[test]
    fn a_faster_node_gets_more() {
        let mut fast = node("fast", 1.0, 0.0);
        fast.speed = 3.0;
        let cluster = Cluster {
            nodes: vec![node("slow", 1.0, 8.0), fast],
            processes: (1..=8).map(process).collect(),
            ..Cluster::default()
        };
        let counts = counts(&settle(cluster, &Settings::default()).0);
        assert!(counts[1] > counts[0], "{counts:?}");
    }

    #[test]
    fn who_may_not_move_is_told_why() {
        let mut cluster = Cluster {
            nodes: vec![node("a", 1.0, 4.0), node("b", 1.0, 0.0)],
            processes: vec![process(1)],
            ..Cluster::default()
        };
        let settings = Settings::default();
        let reason = |cluster: &Cluster| {
            let decision = decide(cluster, &settings).remove(0);
            assert_eq!(decision.action, Action::Stay, "{decision:?}");
            decision.reason
        };
        cluster.processes[0].held = Some("it is pinned".into());
        assert_eq!(reason(&cluster), "it is pinned");
        cluster.processes[0] = Process { resident_ms: Some(100), ..process(1) };
        assert!(reason(&cluster).contains("moved less than 3000 ms"));
        cluster.processes[0] = Process { resident_ms: Some(5000), last_freeze_ms: 800, ..process(1) };
        assert!(reason(&cluster).contains("moved less than 8000 ms"), "a dear move has to pay first");
        cluster.processes[0] = Process { demand: 0.1, ..process(1) };
        assert!(reason(&cluster).contains("hardly runs"));
        cluster.processes[0] = Process { allowed: vec![0], ..process(1) };
        assert!(reason(&cluster).contains("no other node"));
        cluster.processes[0] = Process { mem_bytes: 4 << 30, ..process(1) };
        assert!(reason(&cluster).contains("no other node"), "it does not fit there");
        cluster.processes[0] = process(1);
        cluster.nodes[1].blocked = true;
        assert!(reason(&cluster).contains("no other node"));
        cluster.nodes[1] = Node { age_ms: 60_000, ..node("b", 1.0, 0.0) };
        assert!(reason(&cluster).contains("no other node"), "nothing was heard of it for long");
        cluster.nodes[1] = node("b", 1.0, 3.0);
        assert!(reason(&cluster).contains('%'));
        cluster.nodes[0].stay = true;
        assert!(reason(&cluster).contains("stay"));
    }

    #[test]
    fn what_is_under_way_counts_already() {
        let under_way = |arrived_ms| UnderWay { from: 0, to: 1, demand: 1.0, mem_bytes: 0, arrived_ms };
        let mut cluster = Cluster {
            nodes: vec![node("a", 1.0, 2.0), node("b", 1.0, 0.0)],
            processes: vec![process(1)],
            ..Cluster::default()
        };
        let settings = Settings::default();
        assert_eq!(decide(&cluster, &settings)[0].action, Action::Move(1));
        for arrived in [None, Some(0), Some(1000)] {
            cluster.under_way = vec![under_way(arrived)];
            assert_eq!(decide(&cluster, &settings)[0].action, Action::Stay, "{arrived:?}");
        }
        cluster.under_way = vec![under_way(Some(20_000))];
        assert_eq!(decide(&cluster, &settings)[0].action, Action::Move(1), "the averages show it by now");
    }

    #[test]
    fn memory_goes_before_load() {
        let mut full = node("full", 4.0, 0.0);
        full.mem_available_bytes = 100 << 20;
        let cluster = Cluster {
            nodes: vec![full, node("empty", 1.0, 3.0)],
            processes: vec![
                Process { mem_bytes: 50 << 20, ..process(1) },
                Process { mem_bytes: 200 << 20, ..process(2) },
                Process { mem_bytes: 900 << 20, ..process(3) },
            ],
            ..Cluster::default()
        };
        let moved: Vec<i32> = decide(&cluster, &Settings::default())
            .into_iter()
            .filter(|decision| decision.action == Action::Move(1))
            .map(|decision| decision.pid)
            .collect();
        assert_eq!(moved, [2], "the smallest that clears the deficit of some 105 MiB");
    }

    #[test]
    fn placement_takes_the_emptiest_and_equals_share() {
        let mut cluster = Cluster {
            nodes: vec![node("a", 1.0, 1.0), node("b", 1.0, 0.0), node("c", 1.0, 0.0)],
            ..Cluster::default()
        };
        let settings = Settings::default();
        let mut seen = std::collections::BTreeSet::new();
        for dice in 0..6 {
            cluster.dice = dice;
            seen.extend(place(&cluster, &settings, &process(1)));
        }
        assert_eq!(seen.into_iter().collect::<Vec<_>>(), [1, 2]);
        cluster.nodes.truncate(1);
        assert_eq!(place(&cluster, &settings, &process(1)), Some(0));
    }

    #[test]
    fn absurd_figures_do_no_harm() {
        let mut bad = node("bad", f64::NAN, f64::INFINITY);
        bad.speed = 0.0;
        bad.mem_total_bytes = 0;
        bad.mem_available_bytes = u64::MAX;
        let cluster = Cluster {
            nodes: vec![bad, node("b", 0.0, -5.0)],
            processes: vec![
                process(1),
                Process { node: 77, ..process(2) },
                Process { demand: f64::NAN, ..process(3) },
            ],
            under_way: vec![UnderWay { from: 9, to: 12, demand: f64::NAN, mem_bytes: 1, arrived_ms: None }],
            dice: u64::MAX,
        };
        assert_eq!(decide(&cluster, &Settings::default()).len(), 2);
        assert_eq!(decide(&Cluster::default(), &Settings::default()), []);
    }
}
