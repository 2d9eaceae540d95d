//! The thread that looks at this node every second: runnable threads, CPU use, memory, job processes.

use super::Daemon;
use super::machine::{Machine, STANDARD_SPEED};
use super::processes::{self, Stat};
use loadsched::Average;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// How often.
const EVERY: Duration = Duration::from_secs(1);
/// Within that time it looks so often who wants to run, if a look is cheap: one alone says little.
const LOOKS: u32 = 4;
const CHEAP: Duration = Duration::from_millis(5);
/// The daemon and its shepherds are part of the measuring, not of the load.
const OURS: &str = "migd";

/// Starts the thread; it ends with the daemon.
pub fn start(daemon: &Arc<Daemon>) -> io::Result<()> {
    let weak = Arc::downgrade(daemon);
    let machine = Machine::find(daemon.config.cpus, daemon.config.mem_bytes);
    std::thread::Builder::new().name("sampler".into()).spawn(move || run(&weak, &machine))?;
    Ok(())
}

struct Before {
    at: Instant,
    cpu_ms: HashMap<(i32, u64), u64>,
    runnable: Average,
}

/// Runnable threads by process, added up over several looks.
#[derive(Default)]
struct Seen {
    looks: u32,
    runnable: BTreeMap<i32, usize>,
}

impl Seen {
    fn look(&mut self, stats: &BTreeMap<i32, Stat>, daemon: &Daemon) {
        self.looks += 1;
        for (pid, count) in processes::runnable(stats, daemon.units) {
            *self.runnable.entry(pid).or_default() += count;
        }
    }

    fn mean(&self, pid: i32) -> f64 {
        self.runnable.get(&pid).copied().unwrap_or(0) as f64 / f64::from(self.looks.max(1))
    }
}

fn run(daemon: &Weak<Daemon>, machine: &Machine) {
    let mut before = Before { at: Instant::now(), cpu_ms: HashMap::new(), runnable: Average::default() };
    loop {
        let begun = Instant::now();
        let mut seen = Seen::default();
        loop {
            let Some(daemon) = daemon.upgrade() else { return };
            let started = Instant::now();
            let stats = processes::scan(daemon.units).unwrap_or_default();
            seen.look(&stats, &daemon);
            let cheap = started.elapsed() <= CHEAP;
            if !cheap || seen.looks >= LOOKS {
                sample(&daemon, machine, &stats, &seen, &mut before);
                daemon.save_now.notify_one();
                break;
            }
            drop(daemon);
            std::thread::sleep(EVERY / LOOKS);
        }
        std::thread::sleep(EVERY.saturating_sub(begun.elapsed()).max(Duration::from_millis(50)));
    }
}

fn sample(daemon: &Daemon, machine: &Machine, stats: &BTreeMap<i32, Stat>, seen: &Seen, before: &mut Before) {
    let now = Instant::now();
    let elapsed = now.saturating_duration_since(before.at).as_secs_f64().max(0.001);
    let counts = |pid: &i32| stats.get(pid).is_none_or(|stat| stat.comm != OURS);
    let all: f64 = seen.runnable.keys().filter(|pid| counts(pid)).map(|pid| seen.mean(*pid)).sum();
    before.runnable.see(all, elapsed);
    let cpu_ms: HashMap<(i32, u64), u64> =
        stats.values().map(|stat| ((stat.pid, stat.start_time), stat.cpu_ms)).collect();
    let used_ms: u64 =
        cpu_ms.iter().map(|(id, ms)| ms.saturating_sub(before.cpu_ms.get(id).copied().unwrap_or(*ms))).sum();
    (before.at, before.cpu_ms) = (now, cpu_ms);
    let rss: u64 = stats.values().map(|stat| stat.rss_bytes).sum();
    let offer = machine.offer(rss);

    let uptime_ms = processes::uptime_ms();
    let (look, nameless) = {
        let mut state = daemon.lock();
        state.measured = now;
        let info = &mut state.own;
        info.cpus = offer.cpus;
        let speed = f64::from(info.speed.max(1)) / f64::from(STANDARD_SPEED);
        info.load = round(before.runnable.value() / speed / offer.cpus.max(0.01));
        info.cpu_pct = round((used_ms as f64 / 10.0 / elapsed / offer.cpus.max(0.01)).min(100.0));
        info.mem_total_bytes = offer.mem_total_bytes;
        info.mem_available_bytes = offer.mem_available_bytes;
        info.psi_cpu_some_pct = offer.psi_cpu_pct;
        info.psi_memory_some_pct = offer.psi_memory_pct;
        let look = state.jobs.scanned(&daemon.config.name, stats, now);
        for process in state.jobs.processes.values_mut() {
            let Some(stat) = stats.get(&process.kept.pid) else { continue };
            process.age_ms = stat.age_ms(daemon.units, uptime_ms);
            if process.node == daemon.config.name && process.moving.is_none() {
                process.wants(seen.mean(stat.pid), now);
            }
        }
        for guest in state.guests.values_mut() {
            guest.sampled(stats);
        }
        (look, state.jobs.nameless())
    };
    let looked: Vec<_> =
        look.iter().map(|pid| (*pid, processes::command_line(*pid), processes::owner(*pid))).collect();
    let names = nameless.into_iter().map(|uid| (uid, user_name(uid))).collect();
    let mut state = daemon.lock();
    state.jobs.name_users(names);
    for (pid, command, uid) in looked {
        state.jobs.looked(pid, command, uid);
    }
}

fn round(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

/// The user's name, or the number if it has none. May ask the network: never on a task's path.
pub fn user_name(uid: u32) -> String {
    let user = nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(uid));
    user.ok().flatten().map_or_else(|| uid.to_string(), |user| user.name)
}
