//! Ctrl-C and Ctrl-Z at a terminal, at home and after a move: as without mosrun.

use std::process::Command;
use systest::build::program;
use systest::lab::Lab;
use systest::pty::{INTERRUPT, SUSPEND, Terminal};
use systest::require_labs;

/// A person logged in on node 1.
fn login(lab: &Lab) -> Terminal {
    let mut command = Command::new(program("moslab"));
    command.args(["exec", "--name", lab.name(), "node1", "--", "bash", "--norc", "--noprofile", "-i"]);
    let mut terminal = Terminal::run(&command);
    // The prompt is told from the echo of its own setting by the quotes.
    terminal.press("PS1='rea''dy> '\r");
    terminal.expect("ready> ");
    terminal
}

/// Where a job is before its keys are pressed.
fn in_both_places(test: impl Fn(&Lab, &mut Terminal, Option<&str>)) {
    let lab = Lab::up(2);
    let mut terminal = login(&lab);
    for to in [None, Some("node2")] {
        test(&lab, &mut terminal, to);
    }
}

/// Starts a job in the foreground and moves it, if it is to be elsewhere.
fn start(lab: &Lab, terminal: &mut Terminal, job: &str, command: &str, to: Option<&str>) {
    terminal.press(&format!("mosrun -J {job} {command}\r"));
    lab.await_job("node1", job);
    if let Some(to) = to {
        lab.migrate(job, to);
    }
}

#[test]
fn ctrl_c_at_home_and_away() {
    require_labs!();
    in_both_places(|lab, terminal, to| {
        let job = if to.is_some() { "c-away" } else { "c-home" };
        start(lab, terminal, job, "sleep 1000", to);
        terminal.press(INTERRUPT);
        terminal.expect("ready> ");
        terminal.press("echo status=$?.\r");
        terminal.expect("status=130.");
        terminal.expect("ready> ");
    });
}

#[test]
fn ctrl_c_runs_the_jobs_own_handler() {
    require_labs!();
    in_both_places(|lab, terminal, to| {
        let job = if to.is_some() { "h-away" } else { "h-home" };
        let program = r#"perl -e '$SIG{INT} = sub { print "got it\n"; exit 5 }; sleep 1 while 1'"#;
        start(lab, terminal, job, program, to);
        // perl sets its handler after its start.
        std::thread::sleep(std::time::Duration::from_millis(500));
        terminal.press(INTERRUPT);
        terminal.expect("got it");
        terminal.expect("ready> ");
        terminal.press("echo status=$?.\r");
        terminal.expect("status=5.");
        terminal.expect("ready> ");
    });
}

#[test]
fn ctrl_z_stops_and_fg_continues() {
    require_labs!();
    in_both_places(|lab, terminal, to| {
        let job = if to.is_some() { "z-away" } else { "z-home" };
        start(lab, terminal, job, "sleep 1000", to);
        terminal.press(SUSPEND);
        terminal.expect("Stopped");
        terminal.expect("ready> ");
        let pid = lab.await_job("node1", job);
        let state = lab.sh("node1", &format!("ps -o state= -p {pid}")).ok();
        // `t` for a deputy: its shepherd holds it as well.
        assert!(matches!(state.trim(), "T" | "t"), "ps at home shows it stopped: {state}");
        terminal.press("fg\r");
        terminal.expect("sleep 1000");
        terminal.press(INTERRUPT);
        terminal.expect("ready> ");
        terminal.press("echo status=$?.\r");
        terminal.expect("status=130.");
        terminal.expect("ready> ");
    });
}

#[test]
fn keys_typed_reach_the_job() {
    require_labs!();
    in_both_places(|lab, terminal, to| {
        let job = if to.is_some() { "k-away" } else { "k-home" };
        let program = r#"perl -e '$_ = <STDIN>; print "read: $_"; exit 0'"#;
        start(lab, terminal, job, program, to);
        terminal.press("some words\r");
        terminal.expect("read: some words");
        terminal.expect("ready> ");
    });
}
