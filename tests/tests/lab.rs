//! The lab itself: what a node is, the faults, and that nothing of it is left.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use systest::lab::{Lab, moslab, unique_name, wait_for};
use systest::require_labs;

/// What a lab of this name has on the machine now, in words.
fn traces(name: &str) -> Vec<String> {
    let mut found = Vec::new();
    for folder in ["/run/moslab", "/var/lib/moslab"] {
        if fs::exists(format!("{folder}/{name}")).unwrap_or(true) {
            found.push(format!("{folder}/{name}"));
        }
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    found.extend(mounts.lines().filter(|line| line.contains(name)).map(|line| format!("mount {line}")));
    for line in fs::read_to_string("/proc/self/mounts").expect("mounts").lines() {
        let mut fields = line.split(' ').skip(1);
        if let (Some(path), Some("cgroup" | "cgroup2")) = (fields.next(), fields.next())
            && fs::exists(format!("{path}/moslab-{name}")).unwrap_or(false)
        {
            found.push(format!("{path}/moslab-{name}"));
        }
    }
    for entry in fs::read_dir("/proc").expect("/proc").flatten() {
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        let ours = command.contains(&format!("__keeper {name} "))
            || command.contains(&format!("/run/moslab/{name}/"));
        if ours {
            found.push(format!("process {}: {command}", entry.file_name().display()));
        }
    }
    found
}

/// Links and named namespaces of the machine itself.
fn network() -> BTreeSet<String> {
    let ip = |arguments: &[&str]| {
        let output = Command::new("ip").args(arguments).env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin").output();
        String::from_utf8_lossy(&output.expect("ip runs").stdout).into_owned()
    };
    let mut all: BTreeSet<String> = BTreeSet::new();
    for arguments in [&["-o", "link"][..], &["netns", "list"], &["route"], &["-o", "addr"]] {
        all.extend(
            ip(arguments).lines().map(|line| line.split("valid_lft").next().unwrap_or("").to_string()),
        );
    }
    all
}

#[test]
fn down_leaves_nothing() {
    require_labs!();
    let before = network();
    let lab = Lab::up(2);
    let name = lab.name().to_string();
    assert!(!traces(&name).is_empty(), "the traces of a running lab are seen");
    lab.sh("node1", "sleep 1000 >/dev/null 2>&1 & touch /tmp/a /home/b /srv/c").ok();
    assert_eq!(network(), before, "a running lab changes nothing in the machine's own network");
    lab.verb("down", &[]).ok();
    assert_eq!(traces(&name), Vec::<String>::new());
    assert_eq!(network(), before);
    // The same name can be used again, and `down` of nothing is no error.
    let again = moslab().args(["up", "-n", "1", "--name", &name]).status().expect("runs");
    assert!(again.success());
    lab.verb("down", &[]).ok();
    assert_eq!(lab.verb("down", &[]).status, 0);
    assert_eq!(traces(&name), Vec::<String>::new());
}

#[test]
fn a_node_has_its_own_things() {
    require_labs!();
    let lab = Lab::up(2);
    lab.sh("node1", "touch /tmp/t /home/h /srv/s /run/r /dev/shm/m").ok();
    for path in ["/tmp/t", "/home/h", "/srv/s", "/run/r", "/dev/shm/m"] {
        assert_eq!(lab.sh("node1", &format!("test -e {path}")).status, 0, "{path} on node1");
        assert_eq!(lab.sh("node2", &format!("test -e {path}")).status, 1, "{path} on node2");
        assert!(!fs::exists(path).unwrap_or(false), "{path} on the machine");
    }
    assert_eq!(lab.sh("node2", "hostname").ok(), "node2\n");
    let processes = lab.sh("node2", "ls /proc | grep -c '^[0-9]'").ok();
    assert!(processes.trim().parse::<u32>().expect("a number") < 15, "node2 sees {processes} processes");
    assert_eq!(lab.sh("node2", "ip route | grep -c default").stdout, "0\n", "no route out");
    assert!(lab.sh("node2", "ip -o addr show dev lo").ok().contains("127.0.0.1"));
}

#[test]
fn exec_is_like_a_login() {
    require_labs!();
    let lab = Lab::up(1);
    assert_eq!(lab.sh("node1", "exit 7").status, 7);
    assert_eq!(lab.sh("node1", "kill -TERM $$").status, 143);
    let missing = moslab().args(["exec", "--name", lab.name(), "node1", "--", "/none"]).output();
    assert_eq!(missing.expect("runs").status.code(), Some(127));
    let ran = lab.sh("node1", "echo out; echo err >&2");
    assert_eq!((ran.stdout.as_str(), ran.stderr.as_str()), ("out\n", "err\n"));
    let user = lab.user();
    let ran = lab.sh_as(&user, "node1", "id -un; pwd; echo $HOME; umask; command -v mosrun; test -w .").ok();
    let lines: Vec<&str> = ran.lines().collect();
    assert_eq!(lines[0], user);
    assert_eq!(lines[1], lines[2], "starts in its home");
    assert_eq!(lines[3], "0022");
    assert_eq!(lab.sh("node9", "true").status, 1);
    let mut cat = lab.command("node1", "cat; echo end");
    let mut cat = cat.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("runs");
    std::io::Write::write_all(&mut cat.stdin.take().expect("a pipe"), b"hello\n").expect("written");
    assert_eq!(cat.wait_with_output().expect("ends").stdout, b"hello\nend\n");
}

#[test]
fn signals_to_exec_reach_the_command() {
    require_labs!();
    let lab = Lab::up(1);
    let script = "echo $$ > /srv/pid; trap 'echo usr1' USR1; trap 'echo term; exit 3' TERM; echo ready\n\
                  while :; do sleep 0.1; done\n";
    fs::write(lab.srv("node1", "script"), script).expect("written");
    let running = lab.start("node1", "sh /srv/script > /srv/out 2>&1; echo $?");
    let said = |what: &str| {
        let path = lab.srv("node1", "out");
        wait_for(what, || fs::read_to_string(&path).ok()?.contains(what).then_some(()));
    };
    said("ready");
    // The shell around it has no trap: only what is sent to it ends it, so address the inner one.
    lab.sh("node1", "kill -USR1 $(cat /srv/pid)").ok();
    said("usr1");
    kill(Pid::from_raw(running.pid()), Signal::SIGTERM).expect("it runs");
    assert_eq!(running.end().status, 143);
}

#[test]
fn a_share_of_the_cpu_is_held() {
    require_labs!();
    let lab = Lab::up_with(1, &["--cpus-per-node", "0.25"]);
    let notes = lab.verb("status", &["--json"]).ok();
    if notes.contains("not enforced") {
        systest::skip("a_share_of_the_cpu_is_held", "no control group with the cpu controller");
        return;
    }
    let ran = lab.sh("node1", "timeout 2 sh -c 'while :; do :; done'; times").stdout;
    // The children's user time is the first field of the second line, as 0m0.500000s.
    let user = ran.lines().nth(1).and_then(|line| line.split(['m', 's']).nth(1)).expect("times");
    let user: f64 = user.parse().expect("seconds");
    assert!(user < 1.0, "2 s at a quarter of a CPU took {user} s of CPU time");
}

#[test]
fn nodes_die_and_come_back_with_their_files() {
    require_labs!();
    let lab = Lab::up(3);
    lab.sh("node2", "echo kept > /srv/file").ok();
    lab.verb("kill", &["node2"]).ok();
    assert_eq!(lab.sh("node2", "true").status, 1);
    lab.await_up("node1", 2);
    lab.verb("restart", &["node2"]).ok();
    assert_eq!(lab.sh("node2", "cat /srv/file").ok(), "kept\n");
    lab.await_up("node1", 3);
    lab.verb("restart", &["--daemon", "node3"]).ok();
    lab.await_up("node1", 3);
}

#[test]
fn a_partition_cuts_and_heals() {
    require_labs!();
    let lab = Lab::up(3);
    let reaches = |from: &str, to: &str| {
        let probe =
            format!("timeout 2 python3 -c \"import socket; socket.create_connection(('{to}', 7700), 1)\"");
        lab.sh(from, &probe).status == 0
    };
    assert!(reaches("node1", "node2"));
    lab.verb("partition", &["node2", "node3"]).ok();
    assert!(!reaches("node1", "node2"), "the cut holds");
    assert!(reaches("node3", "node2"), "nodes on the same side still meet");
    lab.await_up("node1", 1);
    lab.await_up("node2", 2);
    lab.verb("heal", &[]).ok();
    assert!(reaches("node1", "node2"));
    for node in ["node1", "node2", "node3"] {
        lab.await_up(node, 3);
    }
}

#[test]
fn labs_run_side_by_side() {
    require_labs!();
    let (one, two) = (Lab::up(2), Lab::up(2));
    one.sh("node1", "echo one > /srv/who").ok();
    assert_eq!(two.sh("node1", "cat /srv/who").status, 1);
    let twice = moslab().args(["up", "--name", one.name()]).output().expect("runs");
    assert!(!twice.status.success());
    assert!(String::from_utf8_lossy(&twice.stderr).contains("is up already"));
    drop(two);
    assert_eq!(one.sh("node1", "cat /srv/who").ok(), "one\n");
    one.await_up("node1", 2);
}

#[test]
fn whatever_dies_the_lab_can_be_cleared() {
    require_labs!();
    let lab = Lab::up(2);
    let state: serde_json::Value = serde_json::from_str(&lab.verb("status", &["--json"]).ok()).expect("JSON");
    let keeper = state["keeper"]["pid"].as_i64().expect("a PID") as i32;
    kill(Pid::from_raw(keeper), Signal::SIGKILL).expect("it runs");
    wait_for("the end of the nodes after their keeper's", || {
        traces(lab.name()).iter().all(|trace| !trace.starts_with("process")).then_some(())
    });
    assert_ne!(lab.sh("node1", "true").status, 0);
    // `up` of the same name sweeps, and works.
    assert!(moslab().args(["up", "-n", "2", "--name", lab.name()]).status().expect("runs").success());
    assert_eq!(lab.sh("node2", "hostname").ok(), "node2\n");
    lab.verb("down", &[]).ok();
    assert_eq!(traces(lab.name()), Vec::<String>::new());
}

#[test]
fn an_up_that_is_killed_leaves_nothing() {
    require_labs!();
    for (signal, waits) in [(Signal::SIGKILL, 30), (Signal::SIGINT, 60), (Signal::SIGTERM, 90)] {
        let name = unique_name();
        let mut up = moslab();
        up.args(["up", "-n", "3", "--name", &name]).stdout(Stdio::null()).stderr(Stdio::null());
        let mut up = up.process_group(0).spawn().expect("runs");
        std::thread::sleep(std::time::Duration::from_millis(waits));
        kill(Pid::from_raw(up.id() as i32), signal).expect("it is there, at least as a zombie");
        let status = up.wait().expect("ends");
        if status.success() {
            // It was faster than the signal: a lab that is up is no leftover.
            assert!(moslab().args(["down", "--name", &name]).status().expect("runs").success());
        }
        wait_for("the end of what a killed `up` had begun", || traces(&name).is_empty().then_some(()));
    }
}

#[test]
fn labs_work_inside_other_namespaces() {
    require_labs!();
    let name = unique_name();
    let moslab = systest::build::program("moslab");
    let script = format!(
        "set -e; m={}; $m up -n 2 --name {name}; $m exec --name {name} node2 -- hostname; $m down --name {name}",
        moslab.display()
    );
    let mut shell = Command::new("unshare");
    shell.args(["--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-c", &script]);
    let output = shell.env_remove("CARGO").output().expect("unshare runs");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.ends_with("node2\n"));
    assert_eq!(traces(&name), Vec::<String>::new());
}

#[test]
fn names_and_numbers_are_checked() {
    require_labs!();
    for arguments in [&["up", "--name", "../x"][..], &["up", "-n", "0"], &["up", "-n", "1000"]] {
        let output = moslab().args(arguments).output().expect("runs");
        assert!(!output.status.success(), "{arguments:?}");
        assert!(!output.stderr.is_empty(), "{arguments:?} says why");
    }
    assert_eq!(moslab().args(["nonsense"]).output().expect("runs").status.code(), Some(2));
    assert_eq!(Lab::named("nobody-here").verb("status", &[]).status, 1);
}
