//! What this kernel and host support, and what to do about what is missing. Nothing is changed.

use super::Daemon;
use crate::api::DoctorCheck;
use crate::cluster_key::ClusterKey;
use std::fs;
use std::path::Path;

/// Looks at everything.
pub fn examine(daemon: &Daemon) -> Vec<DoctorCheck> {
    let mut checks = vec![
        kernel(),
        namespaces(),
        userfaultfd(),
        fuse(),
        privilege(),
        setting(
            "pid_max",
            "/proc/sys/kernel/pid_max",
            |n| n >= 4_194_304,
            "`sysctl kernel.pid_max=4194304`: new threads of guests need numbers that are free at home",
        ),
        setting(
            "ptrace scope",
            "/proc/sys/kernel/yama/ptrace_scope",
            |n| n < 3,
            "`sysctl kernel.yama.ptrace_scope=1` and restart: with 3 nobody may trace, root neither",
        ),
        seccomp(),
        pressure(),
    ];
    checks.push(key(daemon));
    checks.push(members(daemon));
    checks.push(speed(daemon));
    checks
}

fn check(name: &str, status: &str, found: impl Into<String>, next: impl Into<String>) -> DoctorCheck {
    let next = if status == "ok" { String::new() } else { next.into() };
    DoctorCheck { name: name.into(), status: status.into(), found: found.into(), next }
}

fn either(good: bool) -> &'static str {
    if good { "ok" } else { "missing" }
}

fn version(release: &str) -> (u32, u32) {
    let mut parts = release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
}

/// `PAGEMAP_SCAN` and asynchronous write protection came with 6.7, `clone3 set_tid` with 5.5.
fn kernel() -> DoctorCheck {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    let status = match version(release) {
        v if v >= (6, 7) => "ok",
        v if v >= (5, 14) => "degraded",
        _ => "missing",
    };
    check("kernel", status, release, "6.7 or newer is best: it scans page maps and tracks writes cheaply")
}

fn namespaces() -> DoctorCheck {
    let missing: Vec<&str> = ["pid", "mnt", "uts", "time", "net", "ipc"]
        .into_iter()
        .filter(|name| !Path::new(&format!("/proc/self/ns/{name}")).exists())
        .collect();
    let found = if missing.is_empty() { "pid, mnt, uts, time, net, ipc".into() } else { missing.join(", ") };
    let next = "a kernel with these namespaces: guests live in them, and clocks must not jump";
    check("namespaces", either(missing.is_empty()), found, next)
}

fn userfaultfd() -> DoctorCheck {
    let device = Path::new("/dev/userfaultfd").exists();
    let call = Path::new("/proc/sys/vm/unprivileged_userfaultfd").exists();
    let found = match (device, call) {
        (true, _) => "/dev/userfaultfd",
        (_, true) => "the system call",
        _ => "none",
    };
    check("userfaultfd", either(device || call), found, "a kernel with CONFIG_USERFAULTFD")
}

fn fuse() -> DoctorCheck {
    let device = Path::new("/dev/fuse").exists();
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default().contains("fuse");
    let found = match (device, known) {
        (true, true) => "/dev/fuse",
        (false, _) => "no /dev/fuse",
        (true, false) => "/dev/fuse, but the file system is not known to the kernel",
    };
    check("fuse", either(device && known), found, "`modprobe fuse`: guests see home's files through it")
}

/// Capabilities that building guests and parking deputies takes (capabilities(7), by number).
const NEEDED: [(u32, &str); 5] =
    [(21, "SYS_ADMIN"), (19, "SYS_PTRACE"), (6, "SETGID"), (7, "SETUID"), (5, "KILL")];

fn privilege() -> DoctorCheck {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let held = status
        .lines()
        .find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok())
        .unwrap_or(0);
    let missing: Vec<&str> =
        NEEDED.iter().filter(|(bit, _)| held >> bit & 1 == 0).map(|(_, name)| *name).collect();
    let found = if missing.is_empty() {
        "all that are needed".to_string()
    } else {
        format!("not held: {}", missing.join(", "))
    };
    check("capabilities", either(missing.is_empty()), found, "run migd as root, with these capabilities")
}

fn setting(name: &str, path: &str, good: impl Fn(u64) -> bool, next: &str) -> DoctorCheck {
    match fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u64>().ok()) {
        Some(value) => check(name, if good(value) { "ok" } else { "degraded" }, value.to_string(), next),
        None => check(name, "ok", "this kernel does not have it", ""),
    }
}

fn seccomp() -> DoctorCheck {
    let actions = fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail").unwrap_or_default();
    let good = actions.split_ascii_whitespace().any(|action| action == "user_notif");
    let found = if good { "user_notif" } else { "no user_notif" };
    check("seccomp notification", either(good), found, "a kernel from 5.0 on with CONFIG_SECCOMP_FILTER")
}

fn pressure() -> DoctorCheck {
    let good = Path::new("/proc/pressure/memory").exists();
    let (status, found) = if good { ("ok", "/proc/pressure") } else { ("degraded", "none") };
    check("pressure", status, found, "boot with psi=1: memory pressure is seen before it hurts")
}

fn key(daemon: &Daemon) -> DoctorCheck {
    match ClusterKey::load(&daemon.config.key) {
        Ok(_) => check("cluster key", "ok", daemon.config.key.display().to_string(), ""),
        Err(error) => check("cluster key", "missing", error.to_string(), "`mosctl cluster init` or `join`"),
    }
}

fn members(daemon: &Daemon) -> DoctorCheck {
    let nodes = daemon.lock().nodes();
    let up = nodes.iter().filter(|node| node.state == "up").count();
    let found =
        format!("{up} of {} nodes up; we are {} at {}", nodes.len(), daemon.config.name, daemon.address);
    let status = if up > 1 && up == nodes.len() { "ok" } else { "degraded" };
    check("members", status, found, "`mosctl cluster join ADDRESS`, or see why those that are down are")
}

fn speed(daemon: &Daemon) -> DoctorCheck {
    let own = daemon.lock().own_info();
    let found = format!("speed {}, {} CPUs, {} MiB", own.speed, own.cpus, own.mem_total_bytes >> 20);
    check("capacity", "ok", found, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_versions_are_compared_as_numbers() {
        assert_eq!(version("6.18.2-cloud"), (6, 18));
        assert!(version("6.18") > version("6.7.1"));
        assert_eq!(version(""), (0, 0));
    }

    #[test]
    fn what_is_missing_says_what_to_do() {
        for check in [kernel(), namespaces(), userfaultfd(), fuse(), privilege(), seccomp(), pressure()] {
            assert!(["ok", "degraded", "missing"].contains(&check.status.as_str()));
            assert_eq!(check.status == "ok", check.next.is_empty(), "{check:?}");
        }
    }
}
