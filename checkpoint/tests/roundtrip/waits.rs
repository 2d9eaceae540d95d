//! Calls that a freeze interrupts while signals with handlers are pending: what comes of them.

use super::harness::{Case, can_run, run, victim};
use checkpoint::sys::thread_kick::signal_thread;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::time::{Duration, Instant};

fn await_stop(pid: Pid) {
    let stopped = || fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") T "));
    let deadline = Instant::now() + Duration::from_secs(20);
    while !stopped() {
        assert!(Instant::now() < deadline, "process {pid} does not stop");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Stopped, with a signal pending on each thread, whose handler runs when it goes on: in the process
/// itself, or in what was restored from it.
fn with_handlers(restored: bool) {
    let case = Case::new();
    let dir = case.dir.path().to_str().expect("UTF-8");
    let mut running = case.start(victim().to_str().expect("UTF-8"), &["handlers", dir]);
    case.await_file("ready");
    let pid = Pid::from_raw(running.pid());
    kill(pid, Signal::SIGSTOP).expect("stops");
    await_stop(pid);
    for line in fs::read_to_string(case.path("threads")).expect("threads").lines() {
        let (tid, signal) = line.split_once(' ').expect("two numbers");
        let number: i32 = signal.parse().expect("a number");
        let signal = Signal::try_from(number).expect("a signal");
        signal_thread(tid.parse().expect("a TID"), signal).expect("sent");
    }
    if restored {
        case.dump(&mut running);
        running = case.restore();
    } else {
        let image = case.path("img");
        let done =
            run(&["dump", &pid.to_string(), "--leave-running", "--to", image.to_str().expect("UTF-8")]);
        assert!(done.status.success(), "dump: {}", String::from_utf8_lossy(&done.stderr));
    }
    await_stop(pid);
    fs::write(case.path("go"), b"").expect("lets it go on");
    kill(pid, Signal::SIGCONT).expect("continues");
    let status = running.end();
    assert!(status.success() && case.output().contains("PASS handlers"), "{status}: {}", case.output());
}

#[test]
fn handlers_in_interrupted_calls() {
    if can_run("handlers_in_interrupted_calls") {
        with_handlers(true);
    }
}

#[test]
fn handlers_in_interrupted_calls_of_the_original() {
    if can_run("handlers_in_interrupted_calls_of_the_original") {
        with_handlers(false);
    }
}

/// A program that is saved again and again and goes on: no call ends with an error because of it, and
/// none waits for longer.
fn saved_while_it_runs(name: &str) {
    let case = Case::new();
    let dir = case.dir.path().to_str().expect("UTF-8");
    let mut running = case.start(victim().to_str().expect("UTF-8"), &[name, dir]);
    case.await_file("ready");
    let (pid, image) = (running.pid().to_string(), case.path("img"));
    fs::write(case.path("go"), b"").expect("lets it go on");
    for _ in 0..4 {
        std::thread::sleep(Duration::from_millis(300));
        let done = run(&["dump", &pid, "--leave-running", "--to", image.to_str().expect("UTF-8")]);
        assert!(done.status.success(), "dump: {}", String::from_utf8_lossy(&done.stderr));
    }
    let status = running.end();
    assert!(
        status.success() && case.output().contains(&format!("PASS {name}")),
        "{status}: {}",
        case.output()
    );
}

#[test]
fn saved_while_it_waits() {
    if can_run("saved_while_it_waits") {
        saved_while_it_runs("restart");
    }
}

/// Its filter allows no restart_syscall(2).
#[test]
fn saved_while_it_waits_under_a_filter() {
    if can_run("saved_while_it_waits_under_a_filter") {
        saved_while_it_runs("filters");
    }
}
