//! The monitor on a real terminal: it is taken, drawn on, and given back at every end.

mod support;

use migd::api::Response;
use std::io::{Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use support::{Daemon, snapshot};

const MOSMON: &str = env!("CARGO_BIN_EXE_mosmon");
const TAKEN: &str = "\u{1b}[?1049h";
const GIVEN_BACK: &str = "\u{1b}[?1049l";

/// `script(1)`, which every Debian has, makes the terminal.
struct Screen {
    script: Child,
    seen: Arc<Mutex<Vec<u8>>>,
}

impl Screen {
    fn start(daemon: &Daemon) -> Screen {
        // The shell tells its own PID, which mosmon takes over.
        let command =
            format!("stty rows 30 cols 100; echo $$ > {}/pid; exec {MOSMON}", daemon.folder().display());
        let mut script = Command::new("script")
            .args(["-q", "-e", "-f", "-c", &command, "/dev/null"])
            .env("MIGD_SOCKET", &daemon.socket)
            .env("TERM", "xterm-256color")
            .env("SHELL", "/bin/sh")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Or a test that fails would leave its runner's standard error open.
            .stderr(Stdio::null())
            .spawn()
            .expect("script runs");
        let mut out = script.stdout.take().expect("piped");
        let seen = Arc::<Mutex<Vec<u8>>>::default();
        let keep = Arc::clone(&seen);
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = out.read(&mut buffer) {
                keep.lock().expect("lock").extend_from_slice(&buffer[..n]);
            }
        });
        Screen { script, seen }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.seen.lock().expect("lock")).into_owned()
    }

    fn wait_for(&self, what: &str) {
        let until = Instant::now() + Duration::from_secs(20);
        while !self.text().contains(what) {
            assert!(Instant::now() < until, "{what:?} does not come:\n{:?}", self.text());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn press(&mut self, keys: &str) {
        let input = self.script.stdin.as_mut().expect("piped");
        input.write_all(keys.as_bytes()).and_then(|()| input.flush()).expect("typed");
    }

    /// Waits for its end, which must have given the terminal back.
    fn end(mut self) -> ExitStatus {
        let until = Instant::now() + Duration::from_secs(20);
        let status = loop {
            if let Some(status) = self.script.try_wait().expect("waits") {
                break status;
            }
            if Instant::now() > until {
                let _ = self.script.kill();
                panic!("it does not end:\n{:?}", self.text());
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        self.wait_for(GIVEN_BACK);
        assert!(!self.text().contains("panicked"), "{}", self.text());
        status
    }
}

/// A failed test leaves no terminal behind; without it mosmon ends as well (SIGHUP).
impl Drop for Screen {
    fn drop(&mut self) {
        let _ = self.script.kill();
        let _ = self.script.wait();
    }
}

fn watching() -> Daemon {
    Daemon::start(|request| match request["request"].as_str() {
        Some("watch" | "snapshot") => vec![Response::Snapshot(snapshot())],
        _ => vec![Response::Done],
    })
}

#[test]
fn keys_reach_the_daemon_and_q_ends_it() {
    let daemon = watching();
    let mut screen = Screen::start(&daemon);
    for wanted in [TAKEN, "processes", "xz -9 big"] {
        screen.wait_for(wanted);
    }
    screen.press("H");
    let until = Instant::now() + Duration::from_secs(20);
    let moved = |requests: &[serde_json::Value]| {
        requests.iter().any(|r| r["request"] == "migrate" && r["what"] == "42" && r["to"] == "home")
    };
    while !moved(&daemon.requests()) {
        assert!(Instant::now() < until, "{:?}", daemon.requests());
        std::thread::sleep(Duration::from_millis(20));
    }
    screen.press("q");
    assert!(screen.end().success());
}

#[test]
fn a_signal_ends_it_and_is_its_status() {
    let daemon = watching();
    let screen = Screen::start(&daemon);
    screen.wait_for("xz -9 big");
    let pid = std::fs::read_to_string(daemon.folder().join("pid")).expect("told");
    let pid = nix::unistd::Pid::from_raw(pid.trim().parse().expect("a PID"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("sent");
    assert_eq!(screen.end().code(), Some(143));
}

#[test]
fn a_daemon_that_goes_is_said() {
    let daemon = Daemon::start(|request| match request["request"].as_str() {
        Some("snapshot") => vec![Response::Snapshot(snapshot())],
        // The stream breaks before it has begun.
        _ => Vec::new(),
    });
    let mut screen = Screen::start(&daemon);
    // Only what changes is sent; this word stands where nothing stood before.
    screen.wait_for("trying");
    screen.press("q");
    assert!(screen.end().success());
}

#[test]
fn a_terminal_that_goes_takes_it_along() {
    let daemon = watching();
    let screen = Screen::start(&daemon);
    screen.wait_for("xz -9 big");
    let pid = std::fs::read_to_string(daemon.folder().join("pid")).expect("told");
    // As a window that is closed: script, which holds the other end, is killed.
    drop(screen);
    let until = Instant::now() + Duration::from_secs(10);
    let runs = || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
        !stat.is_empty() && !stat.contains(") Z ")
    };
    while runs() {
        assert!(Instant::now() < until, "mosmon {} runs on without a terminal", pid.trim());
        std::thread::sleep(Duration::from_millis(20));
    }
}
