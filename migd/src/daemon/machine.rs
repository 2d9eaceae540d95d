//! What this node has to offer: CPUs, memory, speed, pressure.
//!
//! A node may be a container or a share of a machine, so limits of control groups count (both versions;
//! see cgroups(7)). What cannot be read counts as absent; nothing here fails.

use super::files;
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The standard node's speed.
pub const STANDARD_SPEED: u32 = 10_000;
/// Rounds of the calibration loop a standard node does in a microsecond.
const STANDARD_ROUNDS_PER_US: f64 = 250.0;
const SPEED_FILE: &str = "speed.json";

/// What is offered.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Offer {
    /// CPUs; a share of one counts as that share.
    pub cpus: f64,
    /// Bytes.
    pub mem_total_bytes: u64,
    /// Bytes.
    pub mem_available_bytes: u64,
    /// PSI `some avg10` of CPU, per cent.
    pub psi_cpu_pct: f64,
    /// PSI `some avg10` of memory, per cent.
    pub psi_memory_pct: f64,
}

/// Where the limits of this daemon's control group are.
#[derive(Debug, Clone, Default)]
pub struct Machine {
    cpu_groups: Vec<PathBuf>,
    memory_groups: Vec<PathBuf>,
    unified: Vec<PathBuf>,
    told_cpus: Option<f64>,
    told_mem: Option<u64>,
}

impl Machine {
    /// Looks where the limits are; `cpus` and `mem` override what is found.
    pub fn find(cpus: Option<f64>, mem: Option<u64>) -> Machine {
        let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let folders = |controller: &str| {
            let path = group_path(&groups, controller)?;
            let mount = group_mount(&mounts, controller)?;
            Some(upwards(&mount, &path))
        };
        Machine {
            cpu_groups: folders("cpu").unwrap_or_default(),
            memory_groups: folders("memory").unwrap_or_default(),
            unified: folders("").unwrap_or_default(),
            told_cpus: cpus,
            told_mem: mem,
        }
    }

    /// What is offered now. `own_rss` are bytes that this node's processes use, which count against a
    /// share of memory that was told rather than found.
    pub fn offer(&self, own_rss: u64) -> Offer {
        let (mut total, mut available) = meminfo(&fs::read_to_string("/proc/meminfo").unwrap_or_default());
        for (limit, used) in self.memory_limits() {
            total = total.min(limit);
            available = available.min(limit.saturating_sub(used));
        }
        if let Some(told) = self.told_mem {
            total = told;
            available = available.min(told.saturating_sub(own_rss));
        }
        Offer {
            cpus: self.cpus(),
            mem_total_bytes: total,
            mem_available_bytes: available,
            psi_cpu_pct: pressure("cpu"),
            psi_memory_pct: pressure("memory"),
        }
    }

    fn cpus(&self) -> f64 {
        if let Some(told) = self.told_cpus {
            return told;
        }
        let mut cpus = std::thread::available_parallelism().map_or(1.0, |n| n.get() as f64);
        for folder in &self.unified {
            cpus = cpus.min(quota_v2(&read(folder, "cpu.max")).unwrap_or(cpus));
        }
        for folder in &self.cpu_groups {
            let (quota, period) = (read(folder, "cpu.cfs_quota_us"), read(folder, "cpu.cfs_period_us"));
            cpus = cpus.min(quota_v1(&quota, &period).unwrap_or(cpus));
        }
        cpus
    }

    fn memory_limits(&self) -> impl Iterator<Item = (u64, u64)> {
        let v2 = self.unified.iter().map(|folder| (folder, "memory.max", "memory.current"));
        let v1 = self
            .memory_groups
            .iter()
            .map(|folder| (folder, "memory.limit_in_bytes", "memory.usage_in_bytes"));
        v2.chain(v1).filter_map(|(folder, limit, used)| {
            Some((read(folder, limit).trim().parse().ok()?, read(folder, used).trim().parse().ok()?))
        })
    }
}

fn read(folder: &Path, name: &str) -> String {
    fs::read_to_string(folder.join(name)).unwrap_or_default()
}

/// The path of our group in `/proc/self/cgroup`; the empty controller is the unified hierarchy.
fn group_path(groups: &str, controller: &str) -> Option<String> {
    groups.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?);
        controllers.split(',').any(|name| name == controller).then(|| path.to_string())
    })
}

/// Where that hierarchy is mounted (`/proc/PID/mountinfo`, proc(5)).
fn group_mount(mounts: &str, controller: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let (place, kind) = line.split_once(" - ")?;
        let mut kind = kind.split(' ');
        let (name, options) = (kind.next()?, kind.nth(1).unwrap_or_default());
        let fits = match controller {
            "" => name == "cgroup2",
            _ => name == "cgroup" && options.split(',').any(|option| option == controller),
        };
        fits.then(|| place.split(' ').nth(4).map(PathBuf::from)).flatten()
    })
}

/// The group's folder and those above it, where limits hold as well.
fn upwards(mount: &Path, path: &str) -> Vec<PathBuf> {
    let path = Path::new(path.trim_start_matches('/'));
    path.ancestors().map(|above| mount.join(above)).filter(|folder| folder.is_dir()).take(16).collect()
}

fn quota_v2(text: &str) -> Option<f64> {
    let (quota, period) = text.trim().split_once(' ')?;
    quota_v1(quota, period)
}

fn quota_v1(quota: &str, period: &str) -> Option<f64> {
    let (quota, period): (f64, f64) = (quota.trim().parse().ok()?, period.trim().parse().ok()?);
    (quota > 0.0 && period > 0.0).then(|| quota / period)
}

fn meminfo(text: &str) -> (u64, u64) {
    let field = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
            .map_or(0, |kib| kib.saturating_mul(1024))
    };
    (field("MemTotal:"), field("MemAvailable:"))
}

fn pressure(what: &str) -> f64 {
    let text = fs::read_to_string(format!("/proc/pressure/{what}")).unwrap_or_default();
    pressure_of(&text).unwrap_or(0.0)
}

fn pressure_of(text: &str) -> Option<f64> {
    let some = text.lines().find_map(|line| line.strip_prefix("some "))?;
    let number: f64 = some.split(' ').find_map(|field| field.strip_prefix("avg10="))?.parse().ok()?;
    number.is_finite().then_some(number)
}

#[derive(Serialize, Deserialize)]
struct SavedSpeed {
    speed: u32,
}

/// The node's speed: remembered, or measured now and remembered. Takes some 50 ms the first time.
pub fn speed(state_dir: &Path) -> u32 {
    let path = state_dir.join(SPEED_FILE);
    let saved = fs::read_to_string(&path).ok().and_then(|t| serde_json::from_str::<SavedSpeed>(&t).ok());
    if let Some(saved) = saved.filter(|saved| saved.speed > 0) {
        return saved.speed;
    }
    let speed = measure();
    save_speed(state_dir, speed);
    speed
}

/// Remembers a speed.
pub fn save_speed(state_dir: &Path, speed: u32) {
    if let Err(error) = files::write_json(&state_dir.join(SPEED_FILE), &SavedSpeed { speed }) {
        tracing::warn!(%error, "the speed could not be saved");
    }
}

/// The best of many short bursts, so that a busy machine looks no slower than it is; rounded to a
/// tenth of the standard node, so that equal machines look equal.
fn measure() -> u32 {
    let mut best = 0.0f64;
    for _ in 0..25 {
        let (started, mut rounds, mut x) = (Instant::now(), 0u64, 1u64);
        while started.elapsed() < Duration::from_millis(2) {
            for _ in 0..1000 {
                x = std::hint::black_box(x.wrapping_mul(0x5851_f42d_4c95_7f2d).rotate_left(13) ^ 0x9e37);
            }
            rounds += 1000;
        }
        best = best.max(rounds as f64 / started.elapsed().as_micros().max(1) as f64);
    }
    let tenths = (best / STANDARD_ROUNDS_PER_US * 10.0).round().clamp(1.0, 1000.0);
    tenths as u32 * (STANDARD_SPEED / 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_of_both_versions_are_found() {
        let groups = "4:memory:/a/b\n3:cpu,cpuacct:/lab/node1\n0::/x\n";
        assert_eq!(group_path(groups, "cpu").as_deref(), Some("/lab/node1"));
        assert_eq!(group_path(groups, "").as_deref(), Some("/x"));
        assert_eq!(group_path("0::/x", "memory"), None);
        let mounts = "30 24 0:26 / /sys/fs/cgroup/cpu rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
                      31 24 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(group_mount(mounts, "cpu"), Some("/sys/fs/cgroup/cpu".into()));
        assert_eq!(group_mount(mounts, ""), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(group_mount(mounts, "memory"), None);
    }

    #[test]
    fn limits_are_read() {
        assert_eq!(quota_v2("50000 100000\n"), Some(0.5));
        assert_eq!(quota_v2("max 100000\n"), None);
        assert_eq!(quota_v1("-1\n", "100000\n"), None);
        assert_eq!(
            meminfo("MemTotal:  2048 kB\nMemFree: 1 kB\nMemAvailable:   1024 kB\n"),
            (2 << 20, 1 << 20)
        );
        assert_eq!(pressure_of("some avg10=1.50 avg60=0.00 avg300=0.00 total=7\n"), Some(1.5));
        assert_eq!(pressure_of(""), None);
    }

    #[test]
    fn this_machine_offers_something() {
        let offer = Machine::find(None, None).offer(0);
        assert!(offer.cpus > 0.0 && offer.mem_total_bytes > 0 && offer.mem_available_bytes > 0, "{offer:?}");
        let share = Machine::find(Some(0.5), Some(64 << 20)).offer(16 << 20);
        assert_eq!((share.cpus, share.mem_total_bytes, share.mem_available_bytes), (0.5, 64 << 20, 48 << 20));
        assert!((1000..=1_000_000).contains(&measure()));
    }
}
