//! Many of one thing, saved and brought back twice.

use super::harness::{Case, can_run, run, victim};

/// Prepares, saves, restores, saves what was restored, restores that, and lets it check itself.
fn survives_twice(name: &str, tree: bool) {
    if !can_run(name) {
        return;
    }
    let case = Case::new();
    let dir = case.dir.path().to_str().expect("UTF-8");
    let image = case.path("img");
    let image = image.to_str().expect("UTF-8");
    let mut running = case.start(victim().to_str().expect("UTF-8"), &[name, dir]);
    case.await_file("ready");
    let pid = running.pid();
    let number = pid.to_string();
    for _ in 0..2 {
        let mut arguments = vec!["dump", &number, "--to", image];
        if tree {
            arguments.push("--tree");
        }
        let saved = run(&arguments);
        assert!(saved.status.success(), "dump: {}", String::from_utf8_lossy(&saved.stderr));
        assert!(!running.end().success(), "it has ended before it was saved");
        running = case.restore();
        case.await_restored(pid);
    }
    std::fs::write(case.path("go"), b"").expect("lets it go on");
    let status = running.end();
    let output = case.output();
    assert!(status.success() && output.contains(&format!("PASS {name}")), "{status}: {output}");
}

#[test]
fn a_thousand_threads() {
    survives_twice("threads-1000", false);
}

#[test]
fn ten_thousand_mappings() {
    survives_twice("mappings-10000", false);
}

#[test]
fn five_hundred_processes() {
    survives_twice("processes-500", true);
}
