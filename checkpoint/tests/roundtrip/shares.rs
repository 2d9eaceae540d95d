//! Processes that share what threads share, and threads that do not.

use super::harness::{Case, can_run, run, victim};
use super::trees_memory::child_of;
use std::fs;

/// Saved with its descendants, restored, and that saved and restored again; then it checks itself, and ends
/// with this status.
fn survives_twice(name: &str, wanted: i32) {
    if !can_run(name) {
        return;
    }
    let case = Case::new();
    let dir = case.dir.path().to_str().expect("UTF-8");
    let mut running = case.start(victim().to_str().expect("UTF-8"), &[name, dir]);
    case.await_file("ready");
    let (root, image) = (running.pid(), case.path("img"));
    let to = image.to_str().expect("UTF-8");
    for turn in [1, 2] {
        let pid = if turn == 1 { root } else { child_of(running.pid()) };
        assert_eq!(pid, root);
        let saved = run(&["dump", &pid.to_string(), "--to", to, "--tree"]);
        assert!(saved.status.success(), "{}", String::from_utf8_lossy(&saved.stderr));
        running.end();
        running = case.restore();
        await_let_go(&case, root, wanted == 0);
        fs::remove_dir_all(&image).expect("removed");
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    fs::write(case.path("go"), b"").expect("lets it go on");
    let status = running.end();
    let output = case.output();
    assert!(status.code() == Some(wanted) && output.contains(&format!("PASS {name}")), "{status}: {output}");
}

/// Of a leader that has ended `/proc` tells no program: that it has ended again is the sign.
fn await_let_go(case: &Case, pid: i32, leads: bool) {
    if leads {
        return case.await_restored(pid);
    }
    let has_ended =
        || fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z "));
    for _ in 0..4000 {
        if has_ended() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert!(has_ended(), "it is not restored: {}", case.output());
    std::thread::sleep(std::time::Duration::from_millis(200));
}

#[test]
fn processes_that_share() {
    survives_twice("shares", 0);
}

#[test]
fn threads_with_directories_of_their_own() {
    survives_twice("apart", 0);
}

#[test]
fn a_leader_that_has_ended() {
    survives_twice("leaderless", 7);
}
