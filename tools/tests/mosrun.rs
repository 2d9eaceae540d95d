//! `mosrun` beside the same command without it: nothing may differ but that the daemon knows.

mod support;

use migd::api::{ErrorKind, Response};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};
use support::{Daemon, assert_three_parts, err, out, refuse};

const MOSRUN: &str = env!("CARGO_BIN_EXE_mosrun");

/// Runs a shell's text in which `$RUN` stands for mosrun, or for nothing.
fn shell(daemon: &Daemon, with: bool, text: &str) -> Output {
    let mut command = Command::new("bash");
    command.args(["-c", text]).stdin(Stdio::null()).current_dir(daemon.folder());
    command.env("RUN", if with { MOSRUN } else { "" }).env("MIGD_SOCKET", &daemon.socket);
    command.output().expect("runs")
}

/// The same text with and without mosrun: same output, same errors, same status.
fn same(daemon: &Daemon, text: &str) -> String {
    let (plain, with) = (shell(daemon, false, text), shell(daemon, true, text));
    assert_eq!(out(&plain), out(&with), "{text}");
    assert_eq!(err(&plain), err(&with), "{text}");
    assert_eq!(plain.status, with.status, "{text}");
    out(&with)
}

#[test]
fn the_status_is_the_commands() {
    let daemon = Daemon::taking_jobs();
    assert_eq!(same(&daemon, "$RUN sh -c 'exit 7'; echo $?"), "7\n");
    assert_eq!(same(&daemon, "$RUN sh -c 'kill -TERM $$'; echo $?"), "143\n");
    assert_eq!(same(&daemon, "exec 2>/dev/null; $RUN sh -c 'kill -KILL $$'; echo $?"), "137\n");
    assert_eq!(same(&daemon, "$RUN sleep 0.1 & wait $!; echo $?"), "0\n");
    assert_eq!(same(&daemon, "$RUN sleep 60 & kill $!; wait $!; echo $?"), "143\n");
    assert_eq!(same(&daemon, "$RUN true && echo yes; $RUN false || echo no"), "yes\nno\n");
}

#[test]
fn pipelines_work() {
    let daemon = Daemon::taking_jobs();
    assert_eq!(same(&daemon, "echo x | $RUN cat"), "x\n");
    assert_eq!(same(&daemon, "seq 1000 | $RUN sort -n | $RUN tail -n 1"), "1000\n");
    // A writer without a reader dies of SIGPIPE, and does not go on for ever.
    assert_eq!(same(&daemon, "$RUN yes | head -n 2; echo ${PIPESTATUS[0]}"), "y\ny\n141\n");
    assert_eq!(
        same(&daemon, "trap '' PIPE; $RUN yes 2>/dev/null | head -n 1; echo ${PIPESTATUS[0]}"),
        "y\n1\n"
    );
}

#[test]
fn arguments_are_handed_on_byte_by_byte() {
    let daemon = Daemon::taking_jobs();
    let text = r#"$RUN printf '%s|' -- -h --json '' ' a  b ' $'\xff\n' '*'"#;
    let (plain, with) = (shell(&daemon, false, text), shell(&daemon, true, text));
    assert_eq!(plain.stdout, with.stdout);
    assert!(with.status.success());
    let spec = &daemon.requests()[0];
    assert_eq!(spec["command"][0], "printf");
    assert_eq!(spec["command"][4], "--json");
}

#[test]
fn what_a_child_inherits_is_unchanged() {
    let daemon = Daemon::taking_jobs();
    let status =
        "grep -vE '^(Pid|PPid|Tgid|Ngid|NSpid|NStgid|NSpgid|NSsid|Vm|Rss|SigQ|voluntary|nonvoluntary|x86)'";
    for setup in [
        "true",
        "trap '' PIPE",
        "trap '' HUP INT QUIT TERM PIPE CHLD USR1",
        "umask 027; ulimit -n 333; ulimit -c 0; ulimit -s 4096",
        "cd /usr/lib",
        "export A=1 B='x y'; nice -n 0 true",
        "set -m",
    ] {
        for probe in [
            &format!("$RUN cat /proc/self/status | {status}"),
            "$RUN cat /proc/self/limits",
            "$RUN env | grep -vE '^(_|RUN)='",
            "$RUN pwd -P",
            "$RUN sh -c umask",
            // Process group, session, terminal, niceness: fields of proc_pid_stat(5).
            "$RUN sh -c 'set -- $(cat /proc/$$/stat); [ $5 = $$ ] && echo leader; echo $6 $7 ${19}'",
            "$RUN cat /proc/self/cgroup /proc/self/oom_score_adj",
        ] {
            same(&daemon, &format!("({setup}; {probe})"));
        }
    }
    // `; true` keeps the shell from exec'ing the command itself.
    let parent = "$RUN sh -c '[ $PPID = '$$' ] && echo child'; true";
    assert_eq!(same(&daemon, parent), "child\n");
}

#[test]
fn descriptors_are_what_they_were() {
    let daemon = Daemon::taking_jobs();
    // `; true` keeps the shell from exec'ing ls, whose descriptors would be listed instead; and no
    // pipeline, whose ends the shell itself would hold for a moment.
    let list = "bash -c 'ls -l /proc/$$/fd > list; true'";
    for redirections in [
        "",
        "5</dev/null 7>/dev/zero",
        "<&-",
        ">&-",
        "2>&-",
        "<&- >&-",
        "<&- >&- 2>&-",
        "<&- 3</dev/zero",
        "9<>/dev/null >&- 2>/dev/full",
    ] {
        let list = |with: bool| {
            let text = format!("$RUN {list} {redirections}");
            assert!(shell(&daemon, with, &text).status.success(), "{text}");
            let text = std::fs::read_to_string(daemon.folder().join("list")).expect("a list");
            // Numbers of pipes differ from run to run.
            let entry = |line: &str| {
                let (before, to) = line.split_once(" -> ")?;
                let to = to.split(":[").next().unwrap_or_default();
                Some(format!("{} -> {to}", before.rsplit(' ').next().unwrap_or_default()))
            };
            text.lines().filter_map(entry).collect::<Vec<_>>()
        };
        let (plain, with) = (list(false), list(true));
        assert_eq!(plain, with, "with `{redirections}`");
        assert!(!plain.is_empty() || redirections == "<&- >&- 2>&-");
    }
}

#[test]
fn the_daemon_sees_the_exec_and_what_was_asked() {
    let daemon = Daemon::taking_jobs();
    let args = ["-b", "-L", "-J", "sums", "-m", "1.5G", "-c", "-j", "n1,n3-n4", "--max-downtime", "250ms"];
    let mut child = Command::new(MOSRUN)
        .args(args)
        .args(["--", "sleep", "5"])
        .env("MIGD_SOCKET", &daemon.socket)
        .spawn()
        .expect("runs");
    let registered = daemon.registered(1);
    let program = registered[0].program.clone().expect("alive");
    assert_eq!(registered[0].pid, child.id() as i32, "the job is the caller's child itself");
    assert!(program.ends_with("sleep"), "the connection ends with the exec, not before: {program:?}");
    child.kill().expect("killed");
    child.wait().expect("ended");
    let spec = &daemon.requests()[0];
    for (field, wanted) in [
        ("name", serde_json::json!("sums")),
        ("start_on", serde_json::json!("best")),
        ("locked", serde_json::json!(true)),
        ("mem_bytes", serde_json::json!(3_u64 << 29)),
        ("cpu_bound", serde_json::json!(true)),
        ("any_of", serde_json::json!(["n1", "n3-n4"])),
        ("max_downtime_ms", serde_json::json!(250)),
        ("home", serde_json::json!(false)),
        ("command", serde_json::json!(["sleep", "5"])),
    ] {
        assert_eq!(spec[field], wanted, "{field}");
    }
}

#[test]
fn h_alone_is_help_and_with_a_command_home() {
    let daemon = Daemon::taking_jobs();
    let help = daemon.run(MOSRUN, &["-h"]);
    assert!(help.status.success() && out(&help).contains("Usage: mosrun"));
    assert!(daemon.requests().is_empty());
    assert!(daemon.run(MOSRUN, &["-h", "true"]).status.success());
    assert_eq!(daemon.requests()[0]["home"], true);
    let help = daemon.run(MOSRUN, &["--help"]);
    assert!(help.status.success() && !out(&help).contains("checkpoint"));
    for flag in ["-V", "--version"] {
        let version = daemon.run(MOSRUN, &[flag]);
        assert!(version.status.success() && out(&version).starts_with("mosrun "), "{version:?}");
    }
}

#[test]
fn own_failures_have_their_own_codes() {
    let daemon = Daemon::taking_jobs();
    let folder = daemon.folder().to_string_lossy().into_owned();
    std::fs::write(daemon.folder().join("data"), "no program").expect("written");
    for (args, code) in [
        (&["no-such-command-anywhere"][..], 127),
        (&[""], 127),
        (&[&format!("{folder}/data")], 126),
        (&[&folder], 126),
        (&["--bogus", "true"], 2),
        (&[], 2),
        (&["-b"], 2),
        (&["-b", "-r", "n1", "true"], 2),
        (&["-m", "lots", "true"], 2),
        (&["-A", "10m", "true"], 2),
        (&["--restart", "never", "true"], 2),
        (&["-R", "image"], 2),
    ] {
        let output = daemon.run(MOSRUN, args);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {}", err(&output));
        assert_three_parts(&output, "mosrun");
    }
    let output = daemon.run(MOSRUN, &["-A", "10m", "true"]);
    assert!(err(&output).contains("not in this version"));
}

#[test]
fn a_message_nobody_can_read_changes_nothing() {
    let daemon = Daemon::taking_jobs();
    for sink in ["2>/dev/full", "2>&-", "2> >(true)", "2>/dev/null"] {
        let text = format!("trap '' PIPE; {MOSRUN} no-such-command-anywhere {sink}; echo $?");
        assert_eq!(out(&shell(&daemon, true, &text)), "127\n", "{sink}");
    }
}

#[test]
fn without_a_daemon() {
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("none").to_string_lossy().into_owned();
    let run =
        |args: &[&str]| Command::new(MOSRUN).args(["--socket", &socket]).args(args).output().expect("runs");
    let output = run(&["echo", "ran"]);
    assert_eq!((output.status.code(), out(&output).as_str()), (Some(125), ""));
    assert_three_parts(&output, "mosrun");
    assert!(err(&output).contains("systemctl start migd"), "{}", err(&output));
    let output = run(&["-F", "sh", "-c", "echo ran; exit 3"]);
    assert_eq!((output.status.code(), out(&output).as_str()), (Some(3), "ran\n"));
    assert!(err(&output).starts_with("mosrun: running plainly"), "{}", err(&output));
}

#[test]
fn a_daemon_that_refuses_or_dies_starts_nothing() {
    for answer in [
        || vec![refuse(ErrorKind::Refused, &[])],
        || vec![refuse(ErrorKind::NodeDown, &[])],
        Vec::<Response>::new,
    ] {
        let daemon = Daemon::start(move |_| answer());
        let output = daemon.run(MOSRUN, &["echo", "ran"]);
        assert_eq!((output.status.code(), out(&output).as_str()), (Some(125), ""));
        assert_three_parts(&output, "mosrun");
    }
    let daemon = Daemon::start(|_| vec![refuse(ErrorKind::Refused, &[])]);
    let output = daemon.run(MOSRUN, &["-F", "echo", "ran"]);
    assert_eq!(out(&output), "", "what is refused is not run past the daemon");
    let daemon = Daemon::start(|_| Vec::new());
    assert_eq!(out(&daemon.run(MOSRUN, &["-F", "echo", "ran"])), "ran\n");
}

#[test]
fn it_costs_a_few_milliseconds() {
    let daemon = Daemon::taking_jobs();
    // The least of many: other work on the machine only ever adds.
    let least = |program: &str, args: &[&str]| {
        let once = || {
            let started = Instant::now();
            assert!(daemon.run(program, args).status.success());
            started.elapsed()
        };
        (0..30).map(|_| once()).min().unwrap_or_default()
    };
    let (plain, with) = (least("true", &[]), least(MOSRUN, &["true"]));
    let cost = with.saturating_sub(plain);
    assert!(cost < Duration::from_millis(10), "mosrun costs {cost:?}");
}
