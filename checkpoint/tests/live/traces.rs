//! Nothing may be left in a process that was tracked, nor be seen in it meanwhile but the flags of its mappings.

use std::fs;

/// Descriptors, tracer and flags.
pub fn assert_none(pid: i32) {
    assert_eq!(registered(pid), 0, "mappings of {pid} are registered");
    assert_eq!(descriptors(pid), 0, "a userfaultfd is open in {pid}");
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    assert!(status.contains("TracerPid:\t0\n"), "it is traced: {status}");
}

/// Mappings with a userfaultfd.
pub fn registered(pid: i32) -> usize {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("smaps");
    let flags = smaps.lines().filter(|line| line.starts_with("VmFlags:"));
    flags.filter(|line| line.split(' ').any(|flag| matches!(flag, "um" | "uw" | "ui"))).count()
}

fn descriptors(pid: i32) -> usize {
    let dir = fs::read_dir(format!("/proc/{pid}/fd")).expect("fd");
    let links = dir.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    links.filter(|target| target.to_string_lossy().contains("userfaultfd")).count()
}
