//! A lab of its own for a test, gone when the test is over, however it ends.

use crate::build::program;
use serde_json::Value;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// How long anything that a test waits for may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// How long a command may run. Nothing here takes half of it; without it, one hang would stop all tests.
const COMMAND_LIMIT: Duration = Duration::from_secs(240);

/// A running lab.
#[derive(Debug)]
pub struct Lab {
    name: String,
    keeper: Option<Keeper>,
}

/// Takes a lab down when this program is killed: it ends with its standard input.
#[derive(Debug)]
struct Keeper(Child);

impl Keeper {
    fn of(lab: &str) -> Keeper {
        let mut keeper = Command::new("sh");
        // Not by the keys of a terminal.
        keeper.process_group(0).args(["-c", r#"cat >/dev/null; exec "$1" down --name "$2""#, "sh"]);
        keeper.arg(program("moslab")).arg(lab).env_remove("CARGO");
        keeper.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        Keeper(keeper.spawn().expect("sh can be run"))
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // The lab is down already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a command in a node has done.
#[derive(Debug, Clone)]
pub struct Ran {
    /// Its exit status, 128+N for signal N.
    pub status: i32,
    /// What it printed.
    pub stdout: String,
    /// What it complained about.
    pub stderr: String,
}

impl Ran {
    fn from(output: Output) -> Ran {
        Ran {
            status: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Runs a command to its end, within [`COMMAND_LIMIT`].
    #[track_caller]
    pub fn of(command: &mut Command) -> Ran {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Ran::ended(command.spawn().expect("it can be run"))
    }

    /// Waits for a child's end, within [`COMMAND_LIMIT`].
    #[track_caller]
    fn ended(child: Child) -> Ran {
        let pid = nix::unistd::Pid::from_raw(child.id() as i32);
        let (tell, told) = std::sync::mpsc::channel();
        std::thread::spawn(move || tell.send(child.wait_with_output()));
        match told.recv_timeout(COMMAND_LIMIT) {
            Ok(output) => Ran::from(output.expect("it can be waited for")),
            Err(_) => {
                // Its streams may stay open in what it has started; the thread above is left alone.
                let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
                panic!("a command has not ended within {COMMAND_LIMIT:?}");
            }
        }
    }

    /// The output of a command that has to succeed.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.status, 0, "it failed: {}{}", self.stdout, self.stderr);
        self.stdout
    }
}

/// A lab's name that no other test uses.
pub fn unique_name() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    format!("t{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// `moslab`, ready for its arguments.
pub fn moslab() -> Command {
    let mut command = Command::new(program("moslab"));
    command.stdin(Stdio::null()).env_remove("CARGO");
    command
}

impl Lab {
    /// Brings up so many nodes.
    #[track_caller]
    pub fn up(nodes: u32) -> Lab {
        Lab::up_with(nodes, &[])
    }

    /// Brings up so many nodes, with more options of `moslab up`.
    #[track_caller]
    pub fn up_with(nodes: u32, options: &[&str]) -> Lab {
        let name = unique_name();
        let lab = Lab { keeper: Some(Keeper::of(&name)), name };
        let mut up = moslab();
        up.args(["up", "--name", &lab.name, "-n", &nodes.to_string()]).args(options);
        Ran::of(&mut up).ok();
        lab
    }

    /// A lab that somebody else has brought up, or not at all.
    pub fn named(name: &str) -> Lab {
        Lab { name: name.to_string(), keeper: None }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A verb of `moslab` on this lab.
    pub fn verb(&self, verb: &str, arguments: &[&str]) -> Ran {
        Ran::of(moslab().args([verb, "--name", &self.name]).args(arguments))
    }

    /// A shell script in a node as root, not started yet.
    pub fn command(&self, node: &str, script: &str) -> Command {
        self.command_as("root", node, script)
    }

    /// A shell script in a node as some user, not started yet.
    pub fn command_as(&self, user: &str, node: &str, script: &str) -> Command {
        let mut command = moslab();
        command.args(["exec", "--name", &self.name, "--user", user, node, "--", "sh", "-c", script]);
        command
    }

    /// Runs a shell script in a node as root.
    pub fn sh(&self, node: &str, script: &str) -> Ran {
        Ran::of(&mut self.command(node, script))
    }

    /// Runs a shell script in a node as some user.
    pub fn sh_as(&self, user: &str, node: &str, script: &str) -> Ran {
        Ran::of(&mut self.command_as(user, node, script))
    }

    /// Starts a shell script in a node; its output is kept.
    pub fn start(&self, node: &str, script: &str) -> Running {
        let mut command = self.command(node, script);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Running { child: Some(command.spawn().expect("moslab can be run")) }
    }

    /// The ordinary user of its nodes.
    pub fn user(&self) -> String {
        let state: Value = serde_json::from_str(&self.verb("status", &["--json"]).ok()).expect("JSON");
        state["user"].as_str().expect("a user").to_string()
    }

    /// A file or folder of a node's `/srv`, seen from outside.
    pub fn srv(&self, node: &str, name: &str) -> PathBuf {
        PathBuf::from(format!("/var/lib/moslab/{}/{node}/srv/{name}", self.name))
    }

    /// The processes that a node's daemon knows.
    pub fn processes(&self, node: &str) -> Vec<Value> {
        let ran = self.sh(node, "mosps -a --json");
        match serde_json::from_str(&ran.ok()).expect("mosps prints JSON") {
            Value::Array(list) => list,
            other => panic!("mosps printed no list: {other}"),
        }
    }

    /// The process of a job, as its home's daemon has it now.
    pub fn job(&self, home: &str, job: &str) -> Option<Value> {
        self.processes(home).into_iter().find(|process| process["job"] == job)
    }

    /// Waits until a job is known at home; its PID there.
    #[track_caller]
    pub fn await_job(&self, home: &str, job: &str) -> i64 {
        wait_for(&format!("job {job}"), || self.job(home, job)?["pid"].as_i64())
    }

    /// Waits until a node's daemon counts so many nodes as up.
    #[track_caller]
    pub fn await_up(&self, node: &str, wanted: usize) {
        wait_for(&format!("{wanted} nodes up as {node} sees it"), || {
            let ran = self.sh(node, "mosctl nodes --json");
            let list: Value = serde_json::from_str(&ran.stdout).ok()?;
            let up = list.as_array()?.iter().filter(|n| n["state"] == "up").count();
            (up == wanted).then_some(())
        });
    }

    /// Moves a job by hand; it has to succeed.
    #[track_caller]
    pub fn migrate(&self, job: &str, to: &str) -> String {
        self.sh("node1", &format!("migrate job:{job} {to}")).ok()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for node in ["node1", "node2", "node3"] {
                let log = self.verb("logs", &[node]);
                let lines: Vec<&str> = log.stdout.lines().rev().take(30).collect();
                let tail: Vec<&str> = lines.into_iter().rev().collect();
                eprintln!("--- the end of {node}'s log:\n{}", tail.join("\n"));
            }
        }
        let down = self.verb("down", &[]);
        drop(self.keeper.take());
        if down.status != 0 && !std::thread::panicking() {
            panic!("the lab does not go: {}", down.stderr);
        }
    }
}

/// A script that runs in a node.
#[derive(Debug)]
pub struct Running {
    child: Option<Child>,
}

impl Running {
    /// The PID of its `moslab exec`, outside.
    pub fn pid(&self) -> i32 {
        self.child.as_ref().map_or(0, |child| child.id() as i32)
    }

    /// Whether it still runs.
    pub fn runs(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    /// Waits for its end.
    #[track_caller]
    pub fn end(mut self) -> Ran {
        Ran::ended(self.child.take().expect("it was started"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // It has ended already, or the lab's end takes what it leaves.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Asks again and again until there is an answer, or the patience is at its end.
#[track_caller]
pub fn wait_for<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < until, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(30));
    }
}
