//! A small Python program that does one thing, says so, and waits.

// Each test program uses a part of it.
#![allow(dead_code)]

use std::cell::RefCell;
use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

/// Before every program: what the tests' own caller left open is closed; `tell` prints a line, `libc`
/// is the C library.
const PRELUDE: &str = "import ctypes, os, sys, time\n\
                       os.closerange(3, 65536)\n\
                       libc = ctypes.CDLL(None, use_errno=True)\n\
                       def tell(*words): print(*words, flush=True)\n";

/// It ends with the test.
pub struct Victim {
    child: Child,
    lines: RefCell<BufReader<ChildStdout>>,
}

impl Victim {
    /// Starts a program.
    pub fn python(code: &str) -> Victim {
        Victim::start(Command::new("python3").args(["-c", &format!("{PRELUDE}{code}")]))
    }

    /// Starts any command.
    pub fn start(command: &mut Command) -> Victim {
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("the program starts");
        let lines = BufReader::new(child.stdout.take().expect("a pipe"));
        Victim { child, lines: RefCell::new(lines) }
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// The next line it says.
    pub fn line(&self) -> String {
        let mut line = String::new();
        self.lines.borrow_mut().read_line(&mut line).expect("it says something");
        assert!(!line.is_empty(), "it has ended");
        line.trim_end().to_string()
    }

    pub fn maps(&self) -> String {
        fs::read_to_string(format!("/proc/{}/maps", self.pid())).expect("maps")
    }

    pub fn status(&self, key: &str) -> String {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("status");
        let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        line.expect("the line").trim().to_string()
    }

    /// Numbers and targets of its descriptors.
    pub fn descriptors(&self) -> Vec<String> {
        let dir = fs::read_dir(format!("/proc/{}/fd", self.pid())).expect("fd");
        let mut all: Vec<String> = dir
            .map(|entry| {
                let path = entry.expect("an entry").path();
                format!("{} {}", path.display(), fs::read_link(&path).expect("a link").display())
            })
            .collect();
        all.sort();
        all
    }

    pub fn wait_for_state(&self, state: char) {
        let deadline = Instant::now() + Duration::from_secs(5);
        while !self.status("State").starts_with(state) {
            assert!(Instant::now() < deadline, "it is {} and not {state}", self.status("State"));
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until it sleeps and is not on a CPU any more, after it said that it is ready; tells how
    /// often it was on one.
    pub fn settled(&self) -> Vec<String> {
        let switches = || {
            let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("status");
            let lines = status.lines().filter(|line| line.contains("ctxt_switches"));
            lines.map(str::to_string).collect::<Vec<_>>()
        };
        let mut before = switches();
        for _ in 0..100 {
            std::thread::sleep(Duration::from_millis(30));
            let now = switches();
            if std::mem::replace(&mut before, now.clone()) == now {
                break;
            }
        }
        before
    }

    /// Waits for its end.
    pub fn end(&mut self) -> std::process::ExitStatus {
        self.child.wait().expect("waits")
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
