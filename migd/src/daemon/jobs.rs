//! The jobs at home here and their processes: who belongs to what, where it is, what it is allowed.
//!
//! A process is known by its PID *and* its start time, so that a reused PID is never taken for it.
//! Pure bookkeeping: what `/proc` says is handed in.

use super::processes::Stat;
use crate::api::{JobSpec, ProcessInfo, WhyReport};
use loadsched::Average;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

/// Processes known at most; what is beyond is not a job's.
const MAX_PROCESSES: usize = 65_536;
/// Nodes remembered in a process' itinerary.
const MAX_VISITED: usize = 256;
/// After a guest had to come home for a call, it stays at least so long; twice as long each time.
const RETREAT_STAY: Duration = Duration::from_secs(5);

/// One job.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Job {
    /// Its number.
    pub number: u64,
    /// What was asked for.
    pub spec: JobSpec,
    /// Its owner.
    pub uid: u32,
}

impl Job {
    /// What it is called in lists.
    pub fn label(&self) -> String {
        self.spec.name.clone().unwrap_or_else(|| self.number.to_string())
    }
}

/// What of a process outlives the daemon.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Kept {
    /// Its PID.
    pub pid: i32,
    /// Clock ticks after boot at which it started.
    pub start_time: u64,
    /// Its job's number.
    pub job: u64,
    /// Its owner.
    pub uid: u32,
    /// Nodes visited, in order, home first.
    pub visited: Vec<String>,
    /// How often it has moved.
    pub migrations: u32,
    /// Pinned.
    pub locked: bool,
    /// Freeze time of its last move, ms.
    pub last_freeze_ms: Option<f64>,
}

/// One process.
#[derive(Debug, Clone)]
pub struct Process {
    /// What outlives the daemon.
    pub kept: Kept,
    /// Where it runs.
    pub node: String,
    /// Its owner's name.
    pub user: String,
    /// Its command line.
    pub command: String,
    /// The name of its program, to see an exec.
    pub comm: String,
    /// As in `/proc`.
    pub state: char,
    /// CPU time so far, ms.
    pub cpu_ms: u64,
    /// Per cent of one CPU, decayed.
    pub cpu_pct: f64,
    /// Resident bytes where it runs.
    pub rss_bytes: u64,
    /// Age, ms.
    pub age_ms: u64,
    /// Its parent at home.
    pub parent: i32,
    /// While it is away: the process whose subtree it moved with, perhaps itself. Its shepherd has that
    /// one's number.
    pub with: Option<i32>,
    /// The migration it is in.
    pub moving: Option<u64>,
    /// Why it cannot move, as last found.
    pub cantmove: Option<String>,
    /// When it last arrived somewhere.
    pub moved_at: Option<Instant>,
    /// The balancer leaves it alone until then.
    pub stay_until: Option<Instant>,
    /// How often it came home for a call.
    pub retreats: u32,
    /// The balancer's last decision.
    pub why: Option<(Instant, WhyReport)>,
    /// Threads of it that want to run, decayed.
    pub demand: Average,
    demand_seen: Option<Instant>,
    /// CPU time in all places so far, ms.
    pub total_cpu_ms: u64,
    /// Moves of the balancer that were refused in a row.
    pub refusals: u32,
    /// When its CPU time was last looked at.
    sampled: Option<(Instant, u64)>,
}

/// All jobs.
#[derive(Debug, Default)]
pub struct Jobs {
    /// By number.
    pub jobs: BTreeMap<u64, Job>,
    /// By PID.
    pub processes: BTreeMap<i32, Process>,
    next: u64,
    users: HashMap<u32, String>,
    changed: bool,
}

/// What is saved.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Saved {
    next: u64,
    jobs: Vec<Job>,
    processes: Vec<Kept>,
}

impl Jobs {
    /// A new job, whose first process is this one. One that belongs to a job already changes jobs.
    pub fn register(&mut self, home: &str, stat: &Stat, uid: u32, spec: JobSpec) -> u64 {
        self.next += 1;
        let number = self.next;
        let command = spec.command.join(" ");
        let locked = spec.locked || spec.home;
        self.jobs.insert(number, Job { number, spec, uid });
        self.add(home, stat, uid, number, locked, command);
        number
    }

    fn add(&mut self, home: &str, stat: &Stat, uid: u32, job: u64, locked: bool, command: String) {
        let kept = Kept {
            pid: stat.pid,
            start_time: stat.start_time,
            job,
            uid,
            visited: vec![home.to_string()],
            migrations: 0,
            locked,
            last_freeze_ms: None,
        };
        let user = self.user(uid);
        self.processes.insert(stat.pid, Process::new(kept, home, user, stat, command));
        self.changed = true;
    }

    fn user(&mut self, uid: u32) -> String {
        self.users.get(&uid).cloned().unwrap_or_else(|| uid.to_string())
    }

    /// User ids whose names are not known yet.
    pub fn nameless(&self) -> Vec<u32> {
        let mut uids: Vec<u32> = self.processes.values().map(|p| p.kept.uid).collect();
        uids.sort_unstable();
        uids.dedup();
        uids.retain(|uid| !self.users.contains_key(uid));
        uids
    }

    /// The names of users.
    pub fn name_users(&mut self, names: Vec<(u32, String)>) {
        self.users.extend(names);
        for process in self.processes.values_mut() {
            if let Some(name) = self.users.get(&process.kept.uid) {
                process.user.clone_from(name);
            }
        }
    }

    /// Takes in what `/proc` says now. New descendants join their parent's job; what has ended goes.
    /// Returns the PIDs whose command line and owner should be looked at: the new and the exec'ed.
    pub fn scanned(&mut self, home: &str, stats: &BTreeMap<i32, Stat>, now: Instant) -> Vec<i32> {
        let alive = |process: &Process| {
            stats
                .get(&process.kept.pid)
                .is_some_and(|stat| stat.start_time == process.kept.start_time && stat.state != 'Z')
        };
        let before = self.processes.len();
        self.processes.retain(|_, process| alive(process));
        let mut look = Vec::new();
        self.adopt_descendants(home, stats, &mut look);
        for process in self.processes.values_mut() {
            let Some(stat) = stats.get(&process.kept.pid) else { continue };
            process.parent = stat.parent;
            if process.comm != stat.comm {
                process.comm.clone_from(&stat.comm);
                look.push(stat.pid);
            }
            // While it is away, `/proc` tells of its deputy; the shepherd tells of the guest.
            if process.node == home {
                process.state = stat.state;
                process.rss_bytes = stat.rss_bytes;
                process.used(stat.cpu_ms, now);
            }
        }
        let used: std::collections::BTreeSet<u64> = self.processes.values().map(|p| p.kept.job).collect();
        self.jobs.retain(|number, _| used.contains(number));
        self.changed |= before != self.processes.len() || !look.is_empty();
        look
    }

    fn adopt_descendants(&mut self, home: &str, stats: &BTreeMap<i32, Stat>, look: &mut Vec<i32>) {
        let mut children: HashMap<i32, Vec<&Stat>> = HashMap::new();
        for stat in stats.values().filter(|stat| stat.state != 'Z') {
            children.entry(stat.parent).or_default().push(stat);
        }
        let mut open: Vec<i32> = self.processes.keys().copied().collect();
        while let Some(pid) = open.pop() {
            let Some(parent) = self.processes.get(&pid) else { continue };
            let (job, uid, locked) = (parent.kept.job, parent.kept.uid, parent.kept.locked);
            // A process that is away has no new children at home: what it has went with it, seen for the first
            // time now.
            let (away, node) = (parent.with, parent.node.clone());
            for stat in children.get(&pid).into_iter().flatten() {
                if self.processes.contains_key(&stat.pid) || self.processes.len() >= MAX_PROCESSES {
                    continue;
                }
                // A lock is the job's own wish (`-L`, `-h`); a pin of the parent alone is not inherited.
                let asked = self.jobs.get(&job).is_some_and(|job| job.spec.locked || job.spec.home);
                self.add(home, stat, uid, job, locked && asked, stat.comm.clone());
                if let Some(process) = self.processes.get_mut(&stat.pid).filter(|_| away.is_some()) {
                    (process.with, process.node) = (away, node.clone());
                }
                look.push(stat.pid);
                open.push(stat.pid);
            }
        }
    }

    /// Command line and owner, freshly looked up.
    pub fn looked(&mut self, pid: i32, command: String, uid: Option<u32>) {
        let Some(process) = self.processes.get_mut(&pid) else { return };
        if !command.is_empty() {
            process.command = command;
        }
        if let Some(uid) = uid
            && uid != process.kept.uid
        {
            process.kept.uid = uid;
            process.user = self.users.get(&uid).cloned().unwrap_or_else(|| uid.to_string());
        }
    }

    /// It has arrived at `node`.
    pub fn arrived(&mut self, pid: i32, node: &str, freeze_ms: Option<f64>, now: Instant) {
        let Some(process) = self.processes.get_mut(&pid) else { return };
        if process.node == node {
            return;
        }
        process.node = node.to_string();
        process.moved_at = Some(now);
        process.sampled = None;
        if process.kept.visited.last().map(String::as_str) != Some(node)
            && process.kept.visited.len() < MAX_VISITED
        {
            process.kept.visited.push(node.to_string());
        }
        if let Some(freeze_ms) = freeze_ms {
            process.kept.migrations += 1;
            process.kept.last_freeze_ms = Some(freeze_ms);
        }
        self.changed = true;
    }

    /// These have arrived at `node` together, as the subtree of `root`.
    pub fn arrived_together(
        &mut self,
        home: &str,
        root: i32,
        pids: &[i32],
        node: &str,
        freeze_ms: Option<f64>,
        now: Instant,
    ) {
        // Who is not among them any more has ended, or is at home.
        for pid in self.together(root).into_iter().chain([root]).chain(pids.iter().copied()) {
            let moved = pids.is_empty() || pids.contains(&pid);
            if let Some(process) = self.processes.get_mut(&pid).filter(|_| moved) {
                process.with = (node != home).then_some(root);
                self.arrived(pid, node, freeze_ms, now);
            }
        }
    }

    /// Those that are away with this one.
    pub fn together(&self, root: i32) -> Vec<i32> {
        self.processes.values().filter(|p| p.with == Some(root)).map(|p| p.kept.pid).collect()
    }

    /// Of these, who is no descendant of another of them that is on the same node: who is to be moved
    /// for all of them to move.
    pub fn tops(&self, pids: &[i32]) -> Vec<i32> {
        let mut with: Vec<i32> = Vec::new();
        let is_top = |pid: i32| {
            let Some(process) = self.processes.get(&pid) else { return true };
            let mut above = process.parent;
            // No longer than there are processes, whatever they say.
            for _ in 0..self.processes.len() {
                let Some(parent) = self.processes.get(&above) else { return true };
                if pids.contains(&above) && parent.node == process.node && parent.with == process.with {
                    return false;
                }
                above = parent.parent;
            }
            true
        };
        let mut tops: Vec<i32> = pids.iter().copied().filter(|&pid| is_top(pid)).collect();
        // A subtree that has lost its first process has several, which move together.
        tops.retain(|pid| {
            let Some(root) = self.processes.get(pid).and_then(|process| process.with) else { return true };
            let fresh = !with.contains(&root);
            with.push(root);
            fresh
        });
        tops
    }

    /// Descendants of `pid` that are not where it is.
    pub fn scattered(&self, pid: i32) -> Vec<i32> {
        let Some(node) = self.processes.get(&pid).map(|process| &process.node) else { return Vec::new() };
        let mut family = self.family(pid);
        family.retain(|pid| self.processes.get(pid).is_some_and(|process| process.node != *node));
        family
    }

    /// Who moves when `pid` does: those it is away with; at home, it and its descendants there.
    pub fn moves_with(&self, pid: i32) -> Vec<i32> {
        let Some(process) = self.processes.get(&pid) else { return Vec::new() };
        if let Some(root) = process.with {
            return self.together(root);
        }
        let mut family = self.family(pid);
        family.retain(|pid| self.processes.get(pid).is_some_and(|other| other.node == process.node));
        family
    }

    /// A process and its descendants that belong to jobs.
    fn family(&self, pid: i32) -> Vec<i32> {
        let mut family = vec![pid];
        let mut at = 0;
        while at < family.len() {
            let children = self.processes.values().filter(|p| p.parent == family[at]).map(|p| p.kept.pid);
            let fresh: Vec<i32> = children.filter(|child| !family.contains(child)).collect();
            family.extend(fresh);
            at += 1;
        }
        family
    }

    /// Whether a process of a job has it as its parent.
    pub fn has_children(&self, pid: i32) -> bool {
        self.processes.values().any(|process| process.parent == pid)
    }

    /// It came home for a call that can only be made there.
    pub fn retreated(&mut self, pid: i32, reason: &str, now: Instant) {
        let Some(process) = self.processes.get_mut(&pid) else { return };
        let stay = RETREAT_STAY * (1 << process.retreats.min(6));
        process.retreats += 1;
        process.stay_until = Some(now + stay);
        process.cantmove = Some(format!("came home for {reason}: stays for {} s", stay.as_secs()));
    }

    /// A lock was changed.
    pub fn set_locked(&mut self, pid: i32, locked: bool) {
        if let Some(process) = self.processes.get_mut(&pid) {
            process.kept.locked = locked;
            self.changed = true;
        }
    }

    /// What to save, if anything has changed since the last time.
    pub fn take_unsaved(&mut self) -> Option<Saved> {
        std::mem::take(&mut self.changed).then(|| Saved {
            next: self.next,
            jobs: self.jobs.values().cloned().collect(),
            processes: self.processes.values().map(|p| p.kept.clone()).collect(),
        })
    }

    /// Takes in what was saved, as far as it still is there. Where it runs is told by the shepherds.
    pub fn restore(&mut self, home: &str, saved: Saved, stats: &BTreeMap<i32, Stat>) {
        self.next = self.next.max(saved.next);
        for kept in saved.processes.into_iter().take(MAX_PROCESSES) {
            let Some(stat) = stats.get(&kept.pid).filter(|stat| stat.start_time == kept.start_time) else {
                continue;
            };
            let Some(job) = saved.jobs.iter().find(|job| job.number == kept.job) else { continue };
            self.jobs.insert(job.number, job.clone());
            let user = self.user(kept.uid);
            self.processes.insert(kept.pid, Process::new(kept, home, user, stat, job.spec.command.join(" ")));
        }
    }

    /// PIDs of a job, by name or number.
    pub fn members(&self, job: &str) -> Vec<i32> {
        let named = |number: &u64| {
            self.jobs.get(number).is_some_and(|found| found.label() == job || number.to_string() == job)
        };
        self.processes.values().filter(|p| named(&p.kept.job)).map(|p| p.kept.pid).collect()
    }

    /// For lists.
    pub fn info(&self, home: &str, process: &Process) -> ProcessInfo {
        let state = match process.state {
            _ if process.moving.is_some() => "moving",
            'R' => "running",
            'T' => "stopped",
            // A deputy at home is held by its shepherd; that says nothing of its guest.
            't' if process.node == home => "traced",
            'D' => "waiting",
            'Z' => "ended",
            _ => "sleeping",
        };
        let job = self.jobs.get(&process.kept.job);
        ProcessInfo {
            pid: process.kept.pid,
            job: job.map_or_else(String::new, Job::label),
            user: process.user.clone(),
            uid: process.kept.uid,
            home: home.to_string(),
            node: process.node.clone(),
            state: state.into(),
            cpu_pct: (process.cpu_pct * 10.0).round() / 10.0,
            rss_bytes: process.rss_bytes,
            migrations: process.kept.migrations,
            locked: process.kept.locked,
            cantmove: process.cantmove.clone(),
            last_freeze_ms: process.kept.last_freeze_ms,
            visited: process.kept.visited.clone(),
            command: process.command.clone(),
        }
    }
}

impl Process {
    fn new(kept: Kept, home: &str, user: String, stat: &Stat, command: String) -> Process {
        Process {
            kept,
            node: home.to_string(),
            user,
            command,
            comm: stat.comm.clone(),
            state: stat.state,
            cpu_ms: stat.cpu_ms,
            cpu_pct: 0.0,
            rss_bytes: stat.rss_bytes,
            age_ms: 0,
            parent: stat.parent,
            with: None,
            moving: None,
            cantmove: None,
            moved_at: None,
            stay_until: None,
            retreats: 0,
            why: None,
            demand: Average::default(),
            demand_seen: None,
            total_cpu_ms: stat.cpu_ms,
            refusals: 0,
            sampled: None,
        }
    }

    /// So many of its threads want to run now.
    pub fn wants(&mut self, threads: f64, now: Instant) {
        let elapsed = self.demand_seen.map_or(1.0, |at| now.saturating_duration_since(at).as_secs_f64());
        self.demand.see(threads, elapsed);
        self.demand_seen = Some(now);
    }

    /// CPU time it has used so far where it runs.
    pub fn used(&mut self, cpu_ms: u64, now: Instant) {
        if let Some((at, before)) = self.sampled {
            let elapsed = now.saturating_duration_since(at).as_secs_f64() * 1000.0;
            if elapsed < 200.0 {
                return;
            }
            let used = cpu_ms.saturating_sub(before);
            self.total_cpu_ms = self.total_cpu_ms.saturating_add(used);
            let pct = used as f64 / elapsed * 100.0;
            // Half of what is new each second: smooth, but quick to see a change.
            self.cpu_pct = (self.cpu_pct + pct) / 2.0;
        }
        self.cpu_ms = cpu_ms;
        self.sampled = Some((now, cpu_ms));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stat(pid: i32, parent: i32, start_time: u64) -> Stat {
        Stat {
            pid,
            parent,
            state: 'S',
            start_time,
            cpu_ms: 0,
            rss_bytes: 4096,
            threads: 1,
            comm: format!("p{pid}"),
        }
    }

    fn table(stats: &[Stat]) -> BTreeMap<i32, Stat> {
        stats.iter().map(|stat| (stat.pid, stat.clone())).collect()
    }

    #[test]
    fn descendants_belong_to_the_job_even_as_orphans() {
        let (mut jobs, now) = (Jobs::default(), Instant::now());
        let spec = JobSpec { name: Some("build".into()), ..JobSpec::default() };
        jobs.register("n1", &stat(10, 1, 5), 1000, spec);
        jobs.scanned("n1", &table(&[stat(10, 1, 5), stat(11, 10, 6), stat(12, 11, 7), stat(20, 1, 5)]), now);
        assert_eq!(jobs.members("build"), [10, 11, 12]);
        jobs.scanned("n1", &table(&[stat(10, 1, 5), stat(12, 1, 7), stat(20, 1, 5)]), now);
        assert_eq!(jobs.members("1"), [10, 12], "12 has lost its parent but not its job");
        jobs.scanned("n1", &table(&[stat(10, 1, 99), stat(12, 1, 7)]), now);
        assert_eq!(jobs.members("build"), [12], "another process has that PID now");
        jobs.scanned("n1", &table(&[]), now);
        assert!(jobs.jobs.is_empty());
    }

    #[test]
    fn a_restarted_daemon_knows_its_jobs_again() {
        let (mut jobs, now) = (Jobs::default(), Instant::now());
        jobs.register("n1", &stat(10, 1, 5), 1000, JobSpec { locked: true, ..JobSpec::default() });
        jobs.register("n1", &stat(11, 1, 5), 1000, JobSpec::default());
        jobs.arrived(10, "n2", Some(3.0), now);
        let saved = jobs.take_unsaved().expect("changed");
        assert!(jobs.take_unsaved().is_none());
        let text = serde_json::to_string(&saved).expect("encodes");
        let mut again = Jobs::default();
        let saved = serde_json::from_str(&text).expect("decodes");
        again.restore("n1", saved, &table(&[stat(10, 1, 5), stat(11, 1, 77)]));
        assert_eq!(again.processes.len(), 1);
        let process = &again.processes[&10];
        assert!(process.kept.locked && process.kept.migrations == 1 && process.kept.visited == ["n1", "n2"]);
        let stat = stat(12, 1, 5);
        assert_eq!(again.register("n1", &stat, 0, JobSpec::default()), 3, "numbers are not used twice");
    }

    #[test]
    fn subtrees_move_together() {
        let (mut jobs, now) = (Jobs::default(), Instant::now());
        jobs.register("n1", &stat(10, 1, 5), 1000, JobSpec::default());
        let all = [stat(10, 1, 5), stat(11, 10, 6), stat(12, 11, 7), stat(13, 10, 8)];
        jobs.scanned("n1", &table(&all), now);
        assert_eq!(jobs.tops(&[10, 11, 12, 13]), [10]);
        assert_eq!(jobs.tops(&[11, 12, 13]), [11, 13]);
        assert!(jobs.has_children(11) && !jobs.has_children(12));
        jobs.arrived_together("n1", 11, &[11, 12], "n2", Some(1.0), now);
        assert_eq!(jobs.together(11), [11, 12]);
        assert_eq!(jobs.tops(&[10, 11, 12, 13]), [10, 11], "those at home, and those away");
        assert_eq!(jobs.scattered(10), [11, 12]);
        assert_eq!((jobs.moves_with(10), jobs.moves_with(12)), (vec![10, 13], vec![11, 12]));
        assert!(jobs.scattered(11).is_empty());
        // Its first process ends; the other comes home.
        jobs.scanned("n1", &table(&[stat(10, 1, 5), stat(12, 1, 7)]), now);
        assert_eq!(jobs.together(11), [12]);
        jobs.arrived_together("n1", 11, &[12], "n1", None, now);
        assert_eq!((jobs.processes[&12].with, jobs.processes[&12].node.as_str()), (None, "n1"));
    }

    #[test]
    fn children_that_were_born_just_before_a_move_are_away_too() {
        let (mut jobs, now) = (Jobs::default(), Instant::now());
        jobs.register("n1", &stat(10, 1, 5), 1000, JobSpec::default());
        jobs.arrived_together("n1", 10, &[10, 11, 12], "n2", Some(1.0), now);
        jobs.scanned("n1", &table(&[stat(10, 1, 5), stat(11, 10, 6), stat(12, 11, 7)]), now);
        assert_eq!(jobs.together(10), [10, 11, 12]);
        assert!(jobs.processes.values().all(|process| process.node == "n2"));
        assert_eq!(jobs.tops(&[10, 11, 12]), [10]);
    }

    #[test]
    fn use_of_cpu_and_retreats() {
        let (mut jobs, now) = (Jobs::default(), Instant::now());
        jobs.register("n1", &stat(10, 1, 5), 1000, JobSpec::default());
        let process = jobs.processes.get_mut(&10).expect("there");
        process.used(0, now);
        for second in 1..10 {
            process.used(second * 1000, now + Duration::from_secs(second));
        }
        assert!((process.cpu_pct - 100.0).abs() < 1.0);
        jobs.retreated(10, "fork", now);
        jobs.retreated(10, "fork", now);
        assert_eq!(jobs.processes[&10].stay_until, Some(now + Duration::from_secs(10)));
    }
}
