//! `migrate`, `mosps`, `mosctl` and `mosmon --once` against a daemon that answers what it is told to:
//! what they ask, what they print, and their exit codes.

mod support;

use migd::api::{DoctorCheck, ErrorKind, Explanation, MigrationInfo, Response, WhyReport};
use serde_json::{Value, json};
use std::process::{Command, Stdio};
use support::{Daemon, assert_three_parts, err, out, refuse, snapshot};

const MIGRATE: &str = env!("CARGO_BIN_EXE_migrate");
const MOSPS: &str = env!("CARGO_BIN_EXE_mosps");
const MOSCTL: &str = env!("CARGO_BIN_EXE_mosctl");
const MOSMON: &str = env!("CARGO_BIN_EXE_mosmon");

fn reports() -> Vec<MigrationInfo> {
    snapshot().migrations
}

fn parsed(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn migrate_prints_one_line_or_json() {
    let daemon = Daemon::start(|_| vec![Response::Migrated { reports: reports() }]);
    let output = daemon.run(MIGRATE, &["42", "node2"]);
    assert!(output.status.success());
    let line =
        "process 42 node1 -> node2: 3.0 MiB in 768 pages, 1 round, total 1.25 s, frozen 45.5 ms, ratio 3.0\n";
    assert_eq!((out(&output).as_str(), err(&output).as_str()), (line, ""));
    let found = parsed(&out(&daemon.run(MIGRATE, &["42", "node2", "--json"])));
    assert_eq!(found[0]["freeze_ms"], 45.5);
    let output = daemon.run(MIGRATE, &["job:work", "best", "--dry-run", "--stop", "--timeout", "1.5s"]);
    assert!(out(&output).starts_with("dry run: "));
    let asked = daemon.requests().pop().expect("asked");
    assert_eq!((&asked["what"], &asked["to"]), (&json!("job:work"), &json!("best")));
    assert_eq!(
        (&asked["dry_run"], &asked["stop"], &asked["timeout_ms"]),
        (&json!(true), &json!(true), &json!(1500))
    );
}

#[test]
fn migrate_that_need_not_wait_or_move() {
    let daemon = Daemon::start(|request| match request["no_wait"].as_bool() {
        Some(true) => vec![Response::Done],
        _ => vec![Response::Migrated { reports: Vec::new() }],
    });
    assert!(out(&daemon.run(MIGRATE, &["42", "best", "--no-wait"])).contains("is asked to move"));
    assert!(out(&daemon.run(MIGRATE, &["42", "balance"])).contains("stays"));
    assert_eq!(parsed(&out(&daemon.run(MIGRATE, &["42", "balance", "--json"]))), json!([]));
}

#[test]
fn every_kind_of_refusal_has_its_exit_code() {
    for (kind, code) in [
        (ErrorKind::Failed, 1),
        (ErrorKind::Usage, 2),
        (ErrorKind::Refused, 3),
        (ErrorKind::NotMigratable, 4),
        (ErrorKind::NodeDown, 5),
    ] {
        let daemon = Daemon::start(move |_| vec![refuse(kind, &[])]);
        for (tool, name, args) in [
            (MIGRATE, "migrate", &["42", "node2"][..]),
            (MIGRATE, "migrate", &["42", "node2", "--explain", "--json"]),
            (MOSPS, "mosps", &[]),
            (MOSPS, "mosps", &["--watch", "0.1"]),
            (MOSCTL, "mosctl", &["expel"]),
            (MOSCTL, "mosctl", &["pin", "42"]),
            (MOSMON, "mosmon", &["--once"]),
        ] {
            let output = daemon.run(tool, args);
            assert_eq!(output.status.code(), Some(code), "{name} {args:?}");
            assert_three_parts(&output, name);
            assert_eq!(out(&output), "");
        }
    }
}

#[test]
fn a_refused_migration_names_every_blocker() {
    let blockers = [("fd", "fd 5: established TCP connection to 10.0.0.9:80"), ("policy", "it is pinned")];
    let daemon = Daemon::start(move |_| vec![refuse(ErrorKind::NotMigratable, &blockers)]);
    let output = daemon.run(MIGRATE, &["42", "node2"]);
    assert_eq!(output.status.code(), Some(4));
    for (kind, what) in blockers {
        assert!(err(&output).contains(&format!("  why:  {kind}: {what}\n")), "{}", err(&output));
    }
}

#[test]
fn explain_lists_blockers_and_costs() {
    let daemon = Daemon::start(|request| {
        assert_eq!(request["request"], "explain");
        let blocked = request["to"] == "node2";
        let blocker = migd::api::Blocker { kind: "fd".into(), what: "fd 5: TCP".into() };
        let blockers = if blocked { vec![blocker] } else { Vec::new() };
        let to = request["to"].as_str().unwrap_or_default().to_string();
        let (predicted_bytes, predicted_ms, predicted_freeze_ms) = (64 << 20, 200, 150);
        vec![Response::Explain(Explanation {
            pid: 42,
            pids: vec![42],
            to,
            blockers,
            predicted_bytes,
            predicted_ms,
            predicted_freeze_ms,
        })]
    });
    let output = daemon.run(MIGRATE, &["42", "node3", "--explain"]);
    assert!(output.status.success());
    assert_eq!(
        out(&output),
        "process 42 can move to node3: predicted 64.0 MiB to carry, 200 ms in all, frozen for 150 ms\n"
    );
    let output = daemon.run(MIGRATE, &["42", "node2", "--explain"]);
    assert_eq!(output.status.code(), Some(4));
    assert!(out(&output).contains("fd         fd 5: TCP"), "{}", out(&output));
    assert_three_parts(&output, "migrate");
    let output = daemon.run(MIGRATE, &["42", "node2", "--explain", "--json"]);
    assert_eq!(output.status.code(), Some(4));
    assert_eq!(parsed(&out(&output))["blockers"][0]["what"], "fd 5: TCP");
}

#[test]
fn mosps_has_a_row_a_process() {
    let daemon = Daemon::start(|_| vec![Response::Snapshot(snapshot())]);
    let text = out(&daemon.run(MOSPS, &["-a"]));
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 3, "{text}");
    for word in ["PID", "JOB", "USER", "HOME", "NODE", "STATE", "CPU%", "RSS", "MOVES", "FREEZE", "CANTMOVE"]
    {
        assert!(lines[0].contains(word), "{text}");
    }
    assert!(lines[1].contains("xz -9 big") && lines[1].contains("5.0M") && lines[1].contains("45.5 ms"));
    assert!(lines[2].contains("fd 5: a TCP connection") && !text.contains('\u{1b}'), "{text}");
    let found = parsed(&out(&daemon.run(MOSPS, &["-a", "--json"])));
    let fields = [
        "pid",
        "job",
        "user",
        "home",
        "node",
        "state",
        "cpu_pct",
        "rss_bytes",
        "migrations",
        "locked",
        "cantmove",
        "last_freeze_ms",
        "command",
    ];
    for process in found.as_array().expect("an array") {
        for field in fields {
            assert!(process.get(field).is_some(), "{field} is missing in {process}");
        }
    }
    assert_eq!((&found[0]["cantmove"], &found[0]["last_freeze_ms"]), (&Value::Null, &json!(45.5)));
    for job in ["work", "job:work"] {
        let found = parsed(&out(&daemon.run(MOSPS, &["-a", "-J", job, "--json"])));
        assert_eq!(found.as_array().map(Vec::len), Some(1), "{job}");
    }
}

#[test]
fn mosps_watches_until_its_reader_has_gone() {
    let daemon = Daemon::start(|_| vec![Response::Snapshot(snapshot()); 500]);
    let text = format!("{MOSPS} -a --json --watch 0.1 | head -n 3; echo ${{PIPESTATUS[0]}}");
    let output = Command::new("bash")
        .args(["-c", &text])
        .env("MIGD_SOCKET", &daemon.socket)
        .stdin(Stdio::null())
        .output()
        .expect("runs");
    let text = out(&output);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 4, "{text}");
    assert!(parsed(lines[2]).is_array(), "one document a line");
    assert_eq!(lines[3], "141");
    assert_eq!(daemon.requests()[0]["interval_ms"], 100);
    for wrong in ["nan", "inf", "-1", "x"] {
        let output = daemon.run(MOSPS, &[&format!("--watch={wrong}")]);
        assert_eq!(output.status.code(), Some(2), "{wrong}");
        assert_three_parts(&output, "mosps");
    }
}

#[test]
fn what_cannot_be_written_is_said() {
    let daemon = Daemon::start(|_| vec![Response::Snapshot(snapshot())]);
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("opens");
    let output = Command::new(MOSPS)
        .env("MIGD_SOCKET", &daemon.socket)
        .stdout(full)
        .stderr(Stdio::piped())
        .output()
        .expect("runs");
    assert_eq!(output.status.code(), Some(1));
    assert_three_parts(&output, "mosps");
}

#[test]
fn mosctl_asks_what_its_verbs_say() {
    let daemon = Daemon::start(|_| vec![Response::Done]);
    for (args, wanted) in [
        (&["stay"][..], json!({"request": "node_switch", "switch": "stay"})),
        (&["nostay"], json!({"request": "node_switch", "switch": "nostay"})),
        (&["lstay"], json!({"request": "node_switch", "switch": "lstay"})),
        (&["nolstay"], json!({"request": "node_switch", "switch": "nolstay"})),
        (&["block"], json!({"request": "node_switch", "switch": "block"})),
        (&["noblock"], json!({"request": "node_switch", "switch": "noblock"})),
        (&["quiet"], json!({"request": "node_switch", "switch": "quiet"})),
        (&["noquiet"], json!({"request": "node_switch", "switch": "noquiet"})),
        (&["expel"], json!({"request": "expel"})),
        (&["bring"], json!({"request": "bring"})),
        (&["setspeed", "20000"], json!({"request": "set_speed", "speed": 20000})),
        (&["pin", "42"], json!({"request": "pin", "what": "42", "node": null})),
        (&["pin", "job:x", "node2"], json!({"request": "pin", "what": "job:x", "node": "node2"})),
        (&["unpin", "42"], json!({"request": "unpin", "what": "42"})),
        (&["policy", "set", "a=b=c"], json!({"request": "policy_set", "key": "a", "value": "b=c"})),
    ] {
        let output = daemon.run(MOSCTL, args);
        assert!(output.status.success(), "{args:?}: {}", err(&output));
        assert_eq!(daemon.requests().pop(), Some(wanted), "{args:?}");
        let with_json: Vec<&str> = args.iter().copied().chain(["--json"]).collect();
        assert_eq!(parsed(&out(&daemon.run(MOSCTL, &with_json))), json!({"done": true}));
    }
    for wrong in [&["policy", "set", "novalue"][..], &["setspeed", "fast"], &["frobnicate"], &[], &["pin"]] {
        let output = daemon.run(MOSCTL, wrong);
        assert_eq!(output.status.code(), Some(2), "{wrong:?}");
        assert_three_parts(&output, "mosctl");
    }
}

#[test]
fn mosctl_shows_nodes() {
    let daemon = Daemon::start(|_| vec![Response::Snapshot(snapshot())]);
    let text = out(&daemon.run(MOSCTL, &["status"]));
    assert!(text.contains("node        node1") && text.contains("1 of 2 nodes up"), "{text}");
    let text = out(&daemon.run(MOSCTL, &["nodes"]));
    assert!(text.contains("10.0.0.2:7700") && text.contains("down") && text.contains("block"), "{text}");
    assert_eq!(text, out(&daemon.run(MOSCTL, &["cluster", "members"])));
    for name in ["node2", "2", "10.0.0.2", "10.0.0.2:7700"] {
        assert_eq!(out(&daemon.run(MOSCTL, &["whois", name])), "2 node2 10.0.0.2:7700 down\n");
    }
    assert!(out(&daemon.run(MOSCTL, &["whois", "here"])).starts_with("1 node1"));
    let output = daemon.run(MOSCTL, &["whois", "node9"]);
    assert_eq!(output.status.code(), Some(1));
    assert_three_parts(&output, "mosctl");
    assert_eq!(parsed(&out(&daemon.run(MOSCTL, &["nodes", "--json"])))[1]["blocked"], true);
    assert_eq!(parsed(&out(&daemon.run(MOSCTL, &["status", "--json"])))["nodes_up"], 1);
}

#[test]
fn mosctl_tells_why_policy_history_and_health() {
    let daemon = Daemon::start(|request| {
        let response = match request["request"].as_str() {
            Some("why") => Response::Why(WhyReport {
                pid: 42,
                decision: "stay".into(),
                reason: "no node is better by enough".into(),
                numbers: [("gain_ms".to_string(), 12.5)].into(),
                ..WhyReport::default()
            }),
            Some("policy_show") => Response::Policy { settings: [("balance".into(), "true".into())].into() },
            Some("history") => Response::History { migrations: reports() },
            _ => {
                let check = |name: &str, status: &str, next: &str| DoctorCheck {
                    name: name.into(),
                    status: status.into(),
                    found: "as found".into(),
                    next: next.into(),
                };
                Response::Doctor {
                    checks: vec![check("fuse", "ok", ""), check("uffd", "missing", "load it")],
                }
            }
        };
        vec![response]
    });
    let text = out(&daemon.run(MOSCTL, &["why", "42"]));
    assert!(text.contains("process 42: stay: no node is better") && text.contains("gain_ms"), "{text}");
    assert_eq!(out(&daemon.run(MOSCTL, &["policy", "show"])), "balance=true\n");
    assert!(out(&daemon.run(MOSCTL, &["history", "--since", "1h"])).contains("process 42 node1 -> node2"));
    assert_eq!(daemon.requests().pop().map(|r| r["since_secs"].clone()), Some(json!(3600)));
    let output = daemon.run(MOSCTL, &["doctor"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(out(&output).contains("next: load it"), "{}", out(&output));
    assert_three_parts(&output, "mosctl");
    let found = parsed(&out(&daemon.run(MOSCTL, &["doctor", "--json"])));
    assert_eq!(found[1]["status"], "missing");
}

#[test]
fn a_cluster_is_made_and_joined() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let run = |args: &[&str]| Command::new(MOSCTL).args(args).output().expect("runs");
    let (key, installed, state) = (path("key"), path("etc/cluster.key"), path("state"));
    assert!(run(&["cluster", "init", "--key", &key]).status.success());
    let again = run(&["cluster", "init", "--key", &key]);
    assert_eq!(again.status.code(), Some(1), "a key is never overwritten");
    assert_three_parts(&again, "mosctl");
    let join = |address: &str, key: &str| {
        run(&["cluster", "join", address, "--key", key, "--install", &installed, "--state-dir", &state])
    };
    assert_eq!(join("nowhere", &key).status.code(), Some(2));
    assert!(!std::path::Path::new(&installed).exists(), "nothing was changed");
    for _ in 0..2 {
        let joined = join("10.0.0.1", &key);
        assert!(joined.status.success(), "{}", err(&joined));
    }
    assert_eq!(std::fs::read(&installed).expect("installed"), std::fs::read(&key).expect("made"));
    // Where and as the daemon looks for it.
    let settings = migd::config::Settings { state_dir: Some(state.clone().into()), ..Default::default() };
    assert_eq!(settings.resolve().expect("resolves").seeds, ["10.0.0.1:7700"]);
    let other = path("other");
    assert!(run(&["cluster", "init", "--key", &other]).status.success());
    let wrong = join("10.0.0.1", &other);
    assert_eq!(wrong.status.code(), Some(1), "another cluster's key does not replace this one's");
    std::fs::write(path("cut"), "-----BEGIN").expect("written");
    assert_three_parts(&join("10.0.0.1", &path("cut")), "mosctl");
}

#[test]
fn mosmon_once_has_everything() {
    let daemon = Daemon::start(|_| vec![Response::Snapshot(snapshot())]);
    let text = out(&daemon.run(MOSMON, &["--once"]));
    for wanted in ["node2", "down", "xz -9 big", "frozen 45.5 ms"] {
        assert!(text.contains(wanted), "{wanted}: {text}");
    }
    assert!(!text.contains('\u{1b}'));
    let found = parsed(&out(&daemon.run(MOSMON, &["--once", "--json"])));
    for part in ["nodes", "processes", "migrations"] {
        assert!(found[part].as_array().is_some_and(|list| !list.is_empty()), "{part}");
    }
    let output = daemon.run(MOSMON, &[]);
    assert_eq!(output.status.code(), Some(1), "there is no terminal");
    assert_three_parts(&output, "mosmon");
}

#[test]
fn without_a_daemon_all_say_how_to_start_one() {
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("none").to_string_lossy().into_owned();
    for (tool, name, args) in [
        (MIGRATE, "migrate", &["1", "best"][..]),
        (MOSPS, "mosps", &[]),
        (MOSCTL, "mosctl", &["status"]),
        (MOSMON, "mosmon", &["--once"]),
    ] {
        let output = Command::new(tool).args(args).args(["--socket", &socket]).output().expect("runs");
        assert_eq!(output.status.code(), Some(1), "{name}");
        assert_three_parts(&output, name);
        assert!(err(&output).contains("systemctl start migd"));
        for flag in ["-V", "--version", "--help"] {
            assert!(Command::new(tool).arg(flag).output().expect("runs").status.success(), "{name} {flag}");
        }
    }
}
