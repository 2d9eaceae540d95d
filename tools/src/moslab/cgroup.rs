//! A node's share of the CPUs, and the list of its processes, by a control group.
//!
//! Version 1 (`cpu.cfs_quota_us`) and version 2 (`cpu.max`) are both in the field, also side by side
//! in one machine: whichever hierarchy has the `cpu` controller is used. Without one the nodes share
//! the CPUs as they come, and the lab says so. (Documentation/scheduler/sched-bwc.rst,
//! Documentation/admin-guide/cgroup-v2.rst.)

use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Length of one accounting period; the kernel's default.
const PERIOD_US: u64 = 100_000;
/// How long emptied groups may take until the kernel lets go of them.
const REMOVE_PATIENCE: Duration = Duration::from_secs(5);

/// Where the `cpu` controller is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CpuController {
    /// A version 1 hierarchy.
    V1(PathBuf),
    /// The version 2 hierarchy.
    V2(PathBuf),
}

impl CpuController {
    /// Looks through the mounts of this process.
    pub fn find() -> Option<CpuController> {
        let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
        let found = find_in(&mounts);
        found.filter(|controller| match controller {
            CpuController::V1(_) => true,
            CpuController::V2(root) => fs::read_to_string(root.join("cgroup.controllers"))
                .is_ok_and(|list| list.split_ascii_whitespace().any(|c| c == "cpu")),
        })
    }

    fn root(&self) -> &Path {
        match self {
            CpuController::V1(root) | CpuController::V2(root) => root,
        }
    }

    /// The lab's group.
    pub fn lab_dir(&self, lab: &str) -> PathBuf {
        self.root().join(format!("moslab-{lab}"))
    }

    /// Makes the lab's group, in which each node gets its own.
    pub fn make_lab(&self, lab: &str) -> Result<PathBuf> {
        let dir = self.lab_dir(lab);
        if let CpuController::V2(root) = self {
            delegate_cpu(root)?;
        }
        make(&dir)?;
        if let CpuController::V2(_) = self {
            delegate_cpu(&dir)?;
        }
        Ok(dir)
    }

    /// Makes a node's group with `cpus` CPUs' worth of time.
    pub fn make_node(&self, lab: &str, node: &str, cpus: f64) -> Result<PathBuf> {
        let dir = self.lab_dir(lab).join(node);
        make(&dir)?;
        let quota_us = (cpus * PERIOD_US as f64).round().max(1000.0) as u64;
        match self {
            CpuController::V1(_) => {
                write(&dir.join("cpu.cfs_period_us"), &PERIOD_US.to_string())?;
                write(&dir.join("cpu.cfs_quota_us"), &quota_us.to_string())?;
            }
            CpuController::V2(_) => write(&dir.join("cpu.max"), &format!("{quota_us} {PERIOD_US}"))?,
        }
        Ok(dir)
    }
}

fn find_in(mounts: &str) -> Option<CpuController> {
    let mut v2 = None;
    for line in mounts.lines() {
        let mut fields = line.split(' ').skip(1);
        let (Some(path), Some(kind), Some(options)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        match kind {
            "cgroup" if options.split(',').any(|o| o == "cpu") => {
                return Some(CpuController::V1(PathBuf::from(path)));
            }
            "cgroup2" => v2 = Some(CpuController::V2(PathBuf::from(path))),
            _ => {}
        }
    }
    v2
}

fn delegate_cpu(dir: &Path) -> Result<()> {
    let file = dir.join("cgroup.subtree_control");
    let has = fs::read_to_string(&file)
        .is_ok_and(|list| list.split_ascii_whitespace().any(|controller| controller == "cpu"));
    if has { Ok(()) } else { write(&file, "+cpu") }
}

fn make(dir: &Path) -> Result<()> {
    match fs::create_dir(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(error).with_context(|| format!("the control group {} cannot be made", dir.display()))
        }
        _ => Ok(()),
    }
}

fn write(file: &Path, value: &str) -> Result<()> {
    fs::write(file, value).with_context(|| format!("{value:?} cannot be written to {}", file.display()))
}

/// Puts the calling process into a group.
pub fn enter(dir: &Path) -> Result<()> {
    write(&dir.join("cgroup.procs"), "0")
}

/// Every process in a group and the groups below it.
pub fn members(dir: &Path) -> Vec<i32> {
    let mut found = Vec::new();
    for dir in tree(dir) {
        let list = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
        found.extend(list.lines().filter_map(|line| line.parse::<i32>().ok()));
    }
    found
}

/// Removes a group and those below it, waiting a moment for the last process to be gone.
pub fn remove(dir: &Path) -> Result<()> {
    let until = Instant::now() + REMOVE_PATIENCE;
    for dir in tree(dir).iter().rev() {
        loop {
            match fs::remove_dir(dir) {
                Ok(()) => break,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => break,
                Err(error) if Instant::now() > until => {
                    return Err(error)
                        .with_context(|| format!("the control group {} cannot be removed", dir.display()));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }
    Ok(())
}

/// The group and those one level below: the lab's and its nodes'. Parents come first.
fn tree(dir: &Path) -> Vec<PathBuf> {
    let mut all = vec![dir.to_path_buf()];
    if let Ok(entries) = fs::read_dir(dir) {
        all.extend(
            entries
                .flatten()
                .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                .map(|entry| entry.path()),
        );
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_1_with_the_controller_wins_over_an_empty_version_2() {
        let mounts = "cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n\
                      cgroup /sys/fs/cgroup/cpuset cgroup rw,cpuset 0 0\n\
                      cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,cpu,cpuacct 0 0\n";
        assert_eq!(find_in(mounts), Some(CpuController::V1(PathBuf::from("/sys/fs/cgroup/cpu,cpuacct"))));
        assert_eq!(
            find_in("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n"),
            Some(CpuController::V2(PathBuf::from("/sys/fs/cgroup")))
        );
        assert_eq!(find_in("proc /proc proc rw 0 0\n"), None);
    }
}
