//! One test a kernel feature.

use super::harness::{Case, can_run, victim};
use std::time::Duration;

/// Prepares, saves, restores (as often as told), and lets it check itself.
fn survives_times(name: &str, times: usize) {
    if !can_run(name) {
        return;
    }
    let case = Case::new();
    let dir = case.dir.path().to_str().expect("UTF-8");
    let mut running = case.start(victim().to_str().expect("UTF-8"), &[name, dir]);
    case.await_file("ready");
    let pid = running.pid();
    case.dump(&mut running);
    let mut restored = case.restore();
    for _ in 1..times {
        std::thread::sleep(Duration::from_millis(300));
        let done = super::harness::run(&[
            "dump",
            &pid.to_string(),
            "--to",
            case.path("img").to_str().expect("UTF-8"),
        ]);
        assert!(done.status.success(), "dump: {}", String::from_utf8_lossy(&done.stderr));
        assert_eq!(restored.end().code(), Some(128 + 9), "{}", case.output());
        restored = case.restore();
    }
    std::thread::sleep(Duration::from_millis(200));
    std::fs::write(case.path("go"), b"").expect("lets it go on");
    let status = restored.end();
    let output = case.output();
    assert!(status.success() && output.contains(&format!("PASS {name}")), "{status}: {output}");
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

#[test]
fn threads() {
    survives("threads");
}

#[test]
fn threads_saved_again_and_again() {
    survives_times("threads", 4);
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
fn interrupted_calls() {
    survives("restart");
}
