//! A daemon that answers what it is told to, and remembers what it was asked.
#![allow(dead_code, reason = "every test file uses its own part of this")]

use migd::api::{ApiError, Blocker, ErrorKind, Response, Snapshot};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use serde_json::Value;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Answers a request with lines; then the connection stays open unless there were none.
pub type Answer = dyn Fn(&Value) -> Vec<Response> + Send + Sync;

/// What became of the process behind a `register`.
#[derive(Debug, Clone)]
pub struct Registered {
    /// By the kernel's word.
    pub pid: i32,
    /// Its program when it closed the connection.
    pub program: Option<PathBuf>,
}

#[derive(Default)]
struct Seen {
    requests: Mutex<Vec<Value>>,
    registered: Mutex<Vec<Registered>>,
    ended: AtomicBool,
}

pub struct Daemon {
    pub socket: PathBuf,
    seen: Arc<Seen>,
    folder: tempfile::TempDir,
}

impl Daemon {
    pub fn start(answer: impl Fn(&Value) -> Vec<Response> + Send + Sync + 'static) -> Daemon {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = folder.path().join("sock");
        let seen = Arc::<Seen>::default();
        listen(&socket, Arc::new(answer), Arc::clone(&seen));
        Daemon { socket, seen, folder }
    }

    /// One that takes every job in.
    pub fn taking_jobs() -> Daemon {
        Daemon::start(|_| vec![Response::Registered { job: 1 }])
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn requests(&self) -> Vec<Value> {
        self.seen.requests.lock().expect("lock").clone()
    }

    /// Waits until so many registered processes have closed their connections.
    pub fn registered(&self, n: usize) -> Vec<Registered> {
        let until = Instant::now() + Duration::from_secs(10);
        loop {
            let found = self.seen.registered.lock().expect("lock").clone();
            if found.len() >= n || Instant::now() > until {
                return found;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Runs a tool against this daemon.
    pub fn run(&self, program: &str, args: &[&str]) -> Output {
        Command::new(program)
            .args(args)
            .env("MIGD_SOCKET", &self.socket)
            .stdin(Stdio::null())
            .output()
            .expect("runs")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.seen.ended.store(true, Ordering::Relaxed);
        // Wakes the accepting thread.
        let _ = UnixStream::connect(&self.socket);
    }
}

fn listen(socket: &Path, answer: Arc<Answer>, seen: Arc<Seen>) {
    let listener = UnixListener::bind(socket).expect("listens");
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            if seen.ended.load(Ordering::Relaxed) {
                return;
            }
            let (answer, seen) = (Arc::clone(&answer), Arc::clone(&seen));
            std::thread::spawn(move || serve(stream, &*answer, &seen));
        }
    });
}

fn serve(stream: UnixStream, answer: &Answer, seen: &Seen) {
    let Ok(pid) = getsockopt(&stream, PeerCredentials).map(|peer| peer.pid()) else { return };
    let Ok(mut writer) = stream.try_clone() else { return };
    let mut registering = false;
    for line in BufReader::new(stream).lines() {
        let Ok(line) = line else { break };
        let request: Value = serde_json::from_str(&line).expect("JSON lines");
        registering |= request["request"] == "register";
        let answers = answer(&request);
        seen.requests.lock().expect("lock").push(request);
        if answers.is_empty() {
            break;
        }
        for answer in answers {
            let line = serde_json::to_string(&answer).expect("encodes") + "\n";
            if writer.write_all(line.as_bytes()).is_err() {
                return;
            }
        }
    }
    if registering {
        let program = std::fs::read_link(format!("/proc/{pid}/exe")).ok();
        seen.registered.lock().expect("lock").push(Registered { pid, program });
    }
}

pub fn refuse(kind: ErrorKind, blockers: &[(&str, &str)]) -> Response {
    let blocker = |(kind, what): &(&str, &str)| Blocker { kind: (*kind).into(), what: (*what).into() };
    Response::Error(ApiError {
        kind,
        what: "it was not done".into(),
        why: "for a reason".into(),
        next: "do something else".into(),
        blockers: blockers.iter().map(blocker).collect(),
    })
}

/// Two nodes, two processes, one migration, as the daemon encodes them.
pub fn snapshot() -> Snapshot {
    let text = serde_json::json!({
        "node": "node1",
        "nodes": [
            {"name": "node1", "number": 1, "address": "10.0.0.1:7700", "state": "up", "load": 1.5,
             "speed": 10000, "cpus": 2.0, "mem_total_bytes": 8_u64 << 30, "mem_available_bytes": 4_u64 << 30},
            {"name": "node2", "number": 2, "address": "10.0.0.2:7700", "state": "down", "blocked": true},
        ],
        "processes": [
            {"pid": 42, "job": "work", "user": "root", "uid": nix::unistd::getuid().as_raw(),
             "home": "node1", "node": "node2", "state": "running", "cpu_pct": 99.5,
             "rss_bytes": 5_u64 << 20, "migrations": 1, "last_freeze_ms": 45.5,
             "visited": ["node1", "node2"], "command": "xz -9 big"},
            {"pid": 43, "job": "other", "user": "ada", "uid": 54321, "home": "node1", "node": "node1",
             "state": "sleeping", "locked": true, "cantmove": "fd 5: a TCP connection",
             "command": "evil\u{1b}[2J\nname"},
        ],
        "migrations": [
            {"id": 1, "pid": 42, "job": "work", "from": "node1", "to": "node2", "phase": "done",
             "cause": "user", "bytes": 3_u64 << 20, "wire_bytes": 1_u64 << 20, "pages": 768, "rounds": 1,
             "total_ms": 1250.0, "freeze_ms": 45.5},
        ],
    });
    serde_json::from_value(text).expect("decodes")
}

pub fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Exactly what failed, why and what next, and no panic.
pub fn assert_three_parts(output: &Output, tool: &str) {
    let text = err(output);
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines.first().is_some_and(|line| line.starts_with(&format!("{tool}: "))), "{text}");
    assert!(lines.iter().any(|line| line.starts_with("  why:  ")), "{text}");
    assert!(lines.last().is_some_and(|line| line.starts_with("  next: ")), "{text}");
    assert!(!text.contains("panicked"), "{text}");
}
