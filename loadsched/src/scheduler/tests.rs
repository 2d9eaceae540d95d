use super::*;
use proptest::prelude::*;

fn node(name: &str, load: f64) -> NodeView {
    NodeView {
        name: name.into(),
        load,
        cpus: 0.66,
        speed: 10_000,
        mem_total: 8 << 30,
        mem_available: 7 << 30,
        up: true,
        ..NodeView::default()
    }
}

fn process(pid: i32, at: &str, cpu_pct: f64) -> ProcView {
    ProcView {
        pid,
        node: at.into(),
        home: "node1".into(),
        cpu_ms: 3000,
        age_ms: 10_000,
        cpu_pct,
        bytes: 50 << 20,
        ..ProcView::default()
    }
}

/// Three nodes and CPU-bound jobs, with load figures that lag as the daemon's do.
struct World {
    at: Vec<usize>,
    load: [f64; 3],
    since_move: Vec<Option<u64>>,
    moves: usize,
    scheduler: Scheduler,
}

impl World {
    fn tick(&mut self, now: u64, settings: &Settings) {
        let names = ["node1", "node2", "node3"];
        let counts: Vec<f64> = (0..3).map(|n| self.at.iter().filter(|&&at| at == n).count() as f64).collect();
        for (load, count) in self.load.iter_mut().zip(&counts) {
            *load = *load * 0.46 + count / 0.66 * 0.54;
        }
        let nodes: Vec<NodeView> = names.iter().zip(self.load).map(|(name, load)| node(name, load)).collect();
        let processes: Vec<ProcView> = self
            .at
            .iter()
            .enumerate()
            .map(|(pid, &at)| {
                let mut view = process(pid as i32, names[at], (66.0 / counts[at]).min(100.0));
                view.age_ms = now;
                view.since_move_ms = self.since_move[pid].map(|moved| now - moved);
                view
            })
            .collect();
        for decision in self.scheduler.decide(now, &nodes, &processes, settings) {
            if let Action::Move { to } = decision.action {
                self.at[decision.pid as usize] = names.iter().position(|name| *name == to).expect("a node");
                self.since_move[decision.pid as usize] = Some(now);
                self.moves += 1;
            }
        }
    }
}

#[test]
fn spreads_eight_jobs_without_thrash() {
    let settings = Settings::default();
    let mut world = World {
        at: vec![0; 8],
        load: [0.0; 3],
        since_move: vec![None; 8],
        moves: 0,
        scheduler: Scheduler::default(),
    };
    let mut even_at = None;
    for second in 1..=60u64 {
        world.tick(second * 1000, &settings);
        let mut counts: Vec<usize> = (0..3).map(|n| world.at.iter().filter(|&&at| at == n).count()).collect();
        counts.sort_unstable();
        if counts == [2, 3, 3] {
            even_at.get_or_insert(second);
        }
    }
    assert!(even_at.is_some_and(|at| at <= 12), "even at {even_at:?}, at the end {:?}", world.at);
    assert!(world.moves <= 7, "{} moves for 8 jobs", world.moves);
}

#[test]
fn what_holds_a_process_is_named() {
    let settings = Settings::default();
    let nodes = [node("node1", 12.0), node("node2", 0.0)];
    let mut scheduler = Scheduler::default();
    let mut reason = |change: fn(&mut ProcView)| {
        let mut view = process(1, "node1", 8.0);
        change(&mut view);
        let decision = scheduler.decide(100_000, &nodes, &[view], &settings).remove(0);
        assert_eq!(decision.action, Action::Stay);
        decision.reason
    };
    assert!(reason(|p| p.locked = true).contains("pinned"));
    assert!(reason(|p| p.age_ms = 100).contains("minimum"));
    assert!(reason(|p| p.cantmove = Some("fd 3".into())).contains("fd 3"));
    assert!(reason(|p| p.any_of = vec!["node9".into()]).contains("no other node"));
    assert!(reason(|p| p.cpu_pct = 0.0).contains("too little"));
    assert!(reason(|p| (p.retreats, p.since_retreat_ms) = (3, Some(15_000))).contains("system call"));
    assert!(reason(|p| p.bytes = 100 << 30).contains("no other node"));
}

#[test]
fn a_node_short_of_memory_gives_one_up() {
    let mut full = node("node1", 0.1);
    full.mem_available = 100 << 20;
    let nodes = [full, node("node2", 1.0)];
    let decision = Scheduler::default()
        .decide(100_000, &nodes, &[process(1, "node1", 1.0)], &Settings::default())
        .remove(0);
    assert_eq!(decision.action, Action::Move { to: "node2".into() });
}

#[test]
fn the_best_node_is_the_idle_one() {
    let nodes = [node("node1", 3.0), node("node2", 0.0), node("node3", 1.0)];
    let settings = Settings::default();
    let best = Scheduler::default().best_node(0, &nodes, &process(1, "node1", 100.0), &settings);
    assert_eq!(best.as_deref(), Some("node2"));
}

proptest! {
    #[test]
    fn never_panics_nor_moves_to_where_it_must_not(
        loads in proptest::collection::vec((any::<f64>(), any::<f64>(), any::<u32>(), any::<u64>(), any::<u64>(), any::<bool>()), 0..6),
        processes in proptest::collection::vec((0usize..8, any::<f64>(), any::<u64>(), any::<u64>()), 0..8),
    ) {
        let nodes: Vec<NodeView> = loads.iter().enumerate().map(|(n, &(load, cpus, speed, total, available, blocked))| NodeView {
            name: format!("n{n}"), load, cpus, speed, mem_total: total, mem_available: available, up: true, blocked, ..NodeView::default()
        }).collect();
        let views: Vec<ProcView> = processes.iter().enumerate().map(|(pid, &(at, cpu_pct, bytes, age_ms))| ProcView {
            pid: pid as i32, node: format!("n{at}"), home: "n0".into(), cpu_pct, bytes, age_ms, ..ProcView::default()
        }).collect();
        for decision in Scheduler::default().decide(5, &nodes, &views, &Settings::default()) {
            if let Action::Move { to } = decision.action {
                let target = nodes.iter().find(|node| node.name == to).expect("a known node");
                prop_assert!(!target.blocked || target.name == "n0");
            }
        }
    }
}
