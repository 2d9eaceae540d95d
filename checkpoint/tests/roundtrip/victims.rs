//! One test a kernel feature.

use super::harness::{Case, can_run, descendants, exists, run, skip, victim};
use std::time::Duration;

/// Prepares, saves, restores (as often as told), and lets it check itself.
pub fn survives_times(name: &str, times: usize) {
    survives_saved(name, times, &[]);
}

/// The same, saved with further arguments.
pub fn survives_saved(name: &str, times: usize, arguments: &[&str]) {
    if !can_run(name) {
        return;
    }
    let case = Case::new();
    let dir = case.dir.path().to_str().expect("UTF-8");
    let mut running = case.start(victim().to_str().expect("UTF-8"), &[name, dir]);
    case.await_file("ready");
    let pid = running.pid();
    let save = || {
        let below = descendants(pid);
        let image = case.path("img");
        let what = ["dump", &pid.to_string(), "--to", image.to_str().expect("UTF-8")];
        let done = run(&[&what, arguments].concat());
        assert!(done.status.success(), "dump: {}", String::from_utf8_lossy(&done.stderr));
        // Their numbers are free when somebody has waited for them.
        while below.iter().any(|&pid| exists(pid)) {
            std::thread::sleep(Duration::from_millis(20));
        }
        std::thread::sleep(Duration::from_millis(if below.is_empty() { 0 } else { 200 }));
    };
    save();
    assert!(!running.end().success(), "it has ended before it was saved");
    let mut restored = case.restore();
    for _ in 1..times {
        case.await_restored(pid);
        std::thread::sleep(Duration::from_millis(300));
        save();
        assert_eq!(restored.end().code(), Some(128 + 9), "{}", case.output());
        restored = case.restore();
    }
    std::thread::sleep(Duration::from_millis(200));
    std::fs::write(case.path("go"), b"").expect("lets it go on");
    let status = restored.end();
    let output = case.output();
    assert!(status.success() && output.contains(&format!("PASS {name}")), "{status}: {output}");
    let not_had: Vec<&str> = output.lines().filter_map(|line| line.strip_prefix("NOT HAD ")).collect();
    if !not_had.is_empty() {
        skip(name, &format!("of it, what cannot be had here: {}", not_had.join(", ")));
    }
}

fn survives(name: &str) {
    survives_times(name, 1);
}

#[test]
fn memory() {
    survives("memory");
}

#[test]
fn memory_saved_again_and_again() {
    survives_times("memory", 4);
}

/// Whether the CPU has protection keys.
fn has_keys(test: &str) -> bool {
    let has = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default().contains(" ospke");
    if !has {
        skip(test, "this CPU or kernel has no protection keys");
    }
    has
}

#[test]
fn protection_keys() {
    if has_keys("protection_keys") {
        survives_times("pkeys", 3);
    }
}

#[test]
fn protection_keys_of_a_family() {
    if has_keys("protection_keys_of_a_family") {
        survives_saved("pkeys-family", 3, &["--tree"]);
    }
}

#[test]
fn stacks_that_grow() {
    survives_times("stacks", 3);
}

#[test]
fn settings() {
    survives_times("traits", 3);
}

#[test]
fn threads() {
    survives("threads");
}

#[test]
fn threads_saved_again_and_again() {
    survives_times("threads", 4);
}

#[test]
fn schedules_of_threads() {
    survives_times("schedules", 3);
}

#[test]
fn what_threads_have_of_the_leader_and_what_of_their_own() {
    survives_times("heirs", 2);
    survives_times("heirs-of-another", 2);
}

#[test]
fn locks_shared_by_processes() {
    survives_saved("futexes", 3, &["--tree"]);
}

#[test]
fn signals() {
    survives_times("signals", 2);
}

#[test]
fn a_handler_on_an_alternate_stack() {
    survives_times("altstack", 2);
}

#[test]
fn timers() {
    survives("timers");
}

#[test]
fn timers_and_their_clocks() {
    survives_times("deadlines", 3);
}

#[test]
fn registrations_for_barriers() {
    survives_times("membarrier", 2);
}

#[test]
fn files() {
    survives("files");
}

#[test]
fn identity() {
    survives_times("identity", 2);
}

#[test]
fn identity_of_a_user_without_rights() {
    survives_times("nobody", 2);
}

#[test]
fn seccomp_filters() {
    survives_times("filters", 3);
}

#[test]
fn strict_seccomp() {
    survives_times("strict", 3);
}

#[test]
fn credentials_of_threads() {
    survives_times("thread-credentials", 3);
}

#[test]
fn waits_until_a_time_and_for_locks() {
    survives_times("waits", 3);
}

#[test]
fn a_sleep_on_cpu_time() {
    survives_times("cpu-sleep", 3);
}

#[test]
fn interrupted_calls() {
    survives_times("restart", 4);
}
