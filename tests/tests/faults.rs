//! A move in whose middle something dies: the job goes on at its source with nothing lost, and the
//! next move works.

use systest::lab::{Lab, Ran, wait_for};
use systest::{require_labs, worker};

const MIB: u32 = 192;
const STEPS: u32 = 1200;

/// A lab with a link so slow that a move takes seconds, and a worker on node 1.
fn slow_lab() -> Lab {
    let lab = Lab::up_with(3, &["--bandwidth", "400mbit", "--cpus-per-node", "0"]);
    worker::install(&lab, "node1");
    lab
}

/// Starts the worker, and a move of it to node 2; returns in the middle of that move.
fn in_mid_move(lab: &Lab, during: impl FnOnce(i64)) -> Ran {
    let job = lab.start("node1", &format!("mosrun -J w {}", worker::command(MIB, STEPS, 0.02)));
    let pid = lab.await_job("node1", "w");
    wait_for("the worker's memory", || {
        let status = lab.sh("node1", &format!("grep VmRSS /proc/{pid}/status")).stdout;
        let kib: u64 = status.split_whitespace().nth(1)?.parse().ok()?;
        (kib > u64::from(MIB) * 1024).then_some(())
    });
    let moving = lab.start("node1", "migrate job:w node2");
    // 192 MiB at 400 Mbit/s take four seconds.
    std::thread::sleep(std::time::Duration::from_millis(1500));
    during(pid);
    let moved = moving.end();
    assert_ne!(moved.status, 0, "the move cannot have succeeded: {}", moved.stdout);
    assert!(!moved.stderr.is_empty(), "a failed move says why");
    let process = lab.job("node1", "w").expect("the job goes on");
    assert_eq!(process["node"], "node1", "it is at its source");
    assert!(job_runs(lab, pid), "it runs there");
    let third = lab.sh("node1", "migrate job:w node3");
    assert_eq!(third.status, 0, "the next move works: {}", third.stderr);
    job.end()
}

/// Whether its CPU time grows or it at least sleeps between steps, and nobody traces it.
fn job_runs(lab: &Lab, pid: i64) -> bool {
    let status = lab.sh("node1", &format!("cat /proc/{pid}/status")).ok();
    status.contains("TracerPid:\t0\n") && !status.contains("State:\tT")
}

fn check(lab: &Lab, ran: Ran) {
    assert_eq!(ran.ok(), worker::expected(lab, "node1", MIB, STEPS));
}

#[test]
fn the_targets_daemon_is_killed() {
    require_labs!();
    let lab = slow_lab();
    let ran = in_mid_move(&lab, |_| {
        // Everything of migd on the target, its shepherds too.
        lab.sh("node2", "kill -9 $(pidof migd)").ok();
    });
    check(&lab, ran);
}

#[test]
fn the_target_node_is_killed() {
    require_labs!();
    let lab = slow_lab();
    let ran = in_mid_move(&lab, |_| {
        lab.verb("kill", &["node2"]).ok();
    });
    check(&lab, ran);
    lab.verb("restart", &["node2"]).ok();
    lab.await_up("node1", 3);
}

#[test]
fn the_link_is_cut() {
    require_labs!();
    let lab = slow_lab();
    let ran = in_mid_move(&lab, |_| {
        lab.verb("partition", &["node2"]).ok();
    });
    lab.verb("heal", &[]).ok();
    check(&lab, ran);
    // Whatever node 2 had of it is thrown away.
    wait_for("node 2 to be rid of its half", || {
        (!lab.sh("node2", "ps -eo args").stdout.contains("worker.py")).then_some(())
    });
}

#[test]
fn homes_own_daemon_is_restarted_while_the_job_is_away() {
    require_labs!();
    let lab = slow_lab();
    let job = lab.start("node1", &format!("mosrun -J w {}", worker::command(16, STEPS, 0.02)));
    lab.await_job("node1", "w");
    lab.migrate("w", "node2");
    lab.verb("restart", &["--daemon", "node1"]).ok();
    lab.await_job("node1", "w");
    lab.migrate("w", "home");
    assert_eq!(job.end().ok(), worker::expected(&lab, "node1", 16, STEPS));
}

#[test]
fn homes_shepherd_is_killed_in_the_middle_of_a_move() {
    require_labs!();
    let lab = slow_lab();
    let ran = in_mid_move(&lab, |pid| {
        lab.sh("node1", &format!("pkill -9 -f '[s]hepherd home.*--pid {pid} '")).ok();
    });
    check(&lab, ran);
}

#[test]
fn homes_shepherd_is_killed_while_the_job_is_away() {
    require_labs!();
    let lab = Lab::up(2);
    let job = lab.start("node1", "mosrun -J away sleep 1000; echo $?");
    let pid = lab.await_job("node1", "away");
    lab.migrate("away", "node2");
    lab.sh("node1", &format!("pkill -9 -f '[s]hepherd home.*--pid {pid} '")).ok();
    // The guest cannot outlive it, and nobody waits for a guest that is gone.
    assert_eq!(job.end().ok(), "137\n");
    let rid = |node: &str, of: &str| !lab.sh(node, "ps -eo args").stdout.contains(of);
    wait_for("the guest's end", || rid("node2", "sleep 1000").then_some(()));
    wait_for("the shepherds' end", || {
        (rid("node1", "migd shepherd") && rid("node2", "migd shepherd")).then_some(())
    });
    let job = lab.start("node1", "mosrun -J next sleep 3; echo $?");
    lab.await_job("node1", "next");
    lab.migrate("next", "node2");
    assert_eq!(job.end().ok(), "0\n");
}
