//! What is dumped and restored: the victims of the tests, which check themselves.

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The longest anything may take.
const LIMIT: Duration = Duration::from_secs(120);

/// A directory that goes with the benchmark.
pub struct Place {
    dir: tempfile::TempDir,
    victim: PathBuf,
}

impl Place {
    pub fn new() -> Place {
        let wanted = std::env::var_os("MIGCKPT_BENCH_DIR").map(PathBuf::from);
        let parent = wanted.unwrap_or_else(|| match Path::new("/dev/shm").is_dir() {
            true => PathBuf::from("/dev/shm"),
            false => std::env::temp_dir(),
        });
        let dir = tempfile::Builder::new().prefix("migckpt-bench").tempdir_in(parent).expect("a directory");
        Place { dir, victim: build_victim() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Starts a victim, and waits until it is ready.
    pub fn start(&self, case: &str) -> Subject {
        for name in ["ready", "go"] {
            let _ = std::fs::remove_file(self.path(name));
        }
        let mut command = Command::new(&self.victim);
        command.arg(case).arg(self.dir.path()).stdin(Stdio::null()).stdout(Stdio::null());
        let child = command.stderr(Stdio::null()).spawn().expect("starts the victim");
        let subject = Subject { child };
        until("the victim is ready", || self.path("ready").exists());
        // What it waits in is entered at once after that.
        std::thread::sleep(Duration::from_millis(50));
        subject
    }

    /// Saves it, by which it ends.
    pub fn dump(&self, mut subject: Subject, tree: bool) -> Duration {
        let mut command = migckpt();
        command.arg("dump").arg(subject.pid().to_string()).arg("--to").arg(self.path("img"));
        if tree {
            command.arg("--tree");
        }
        let took = timed(&mut command);
        subject.child.wait().expect("has ended");
        reap_orphans();
        took
    }

    /// Brings it back.
    pub fn restore(&self) -> (Restored<'_>, Duration) {
        let mut command = migckpt();
        command.arg("restore").arg("--detach").arg("--json").arg(self.path("img"));
        let begun = Instant::now();
        let output = command.stderr(Stdio::inherit()).output().expect("runs");
        let took = begun.elapsed();
        assert!(output.status.success(), "restore fails");
        let text = String::from_utf8_lossy(&output.stdout);
        let pid = text.split("\"pid\":").nth(1).and_then(|rest| {
            rest.trim_start_matches(' ').split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
        });
        let pid = pid.unwrap_or_else(|| panic!("no PID in {text}"));
        std::fs::remove_dir_all(self.path("img")).expect("removes the image");
        (Restored { pid, place: self }, took)
    }
}

/// A victim that was started.
pub struct Subject {
    child: Child,
}

impl Subject {
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A victim that was brought back.
pub struct Restored<'a> {
    pid: i32,
    place: &'a Place,
}

impl Restored<'_> {
    /// Lets it check itself, and waits for its end.
    pub fn check_and_end(self) {
        std::fs::write(self.place.path("go"), b"").expect("lets it go on");
        let pid = Pid::from_raw(self.pid);
        let mut status = None;
        until("the victim ends", || {
            status = match waitpid(pid, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) => None,
                other => Some(other),
            };
            status.is_some()
        });
        assert_eq!(status, Some(Ok(WaitStatus::Exited(pid, 0))), "the victim is not as it was");
    }
}

impl Drop for Restored<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
        }
    }
}

/// Those of a tree come to this process when their parents end.
fn reap_orphans() {
    until("all have ended", || {
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) => return false,
                Ok(_) => continue,
                Err(_) => return true,
            }
        }
    });
}

fn timed(command: &mut Command) -> Duration {
    let begun = Instant::now();
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).status().expect("runs");
    let took = begun.elapsed();
    assert!(status.success(), "{command:?} fails");
    took
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !holds() {
        assert!(Instant::now() < deadline, "waited too long until {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn migckpt() -> Command {
    Command::new(env!("CARGO_BIN_EXE_migckpt"))
}

fn build_victim() -> PathBuf {
    let profile = Path::new(env!("CARGO_BIN_EXE_migckpt")).parent().expect("target/PROFILE");
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args([
        "build",
        "--quiet",
        "--offline",
        "--release",
        "--package",
        "checkpoint",
        "--example",
        "victim",
    ]);
    let built = cargo.current_dir(env!("CARGO_MANIFEST_DIR")).status().expect("cargo can be run");
    assert!(built.success(), "the victim cannot be built");
    profile.join("examples/victim")
}
