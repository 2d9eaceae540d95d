//! Real programs, saved and restored in the middle of their work, several times: the result is that
//! of an undisturbed run. Ten times each, as in the docs' table:
//!
//! ```sh
//! PROGRAMS_MOVES=10 PROGRAMS_SEED=7 cargo test --release -p checkpoint --test programs -- --nocapture --test-threads 2
//! ```

use harness::{Case, Running, can_run, run, skip};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use works::{Attempt, Ended, Moments, Place, Program};

#[path = "roundtrip/harness.rs"]
#[allow(dead_code, reason = "the other tests use the rest")]
mod harness;
#[path = "../../tests/programs/mod.rs"]
mod works;

/// A folder on this machine, and `migckpt`.
struct Alone {
    case: Case,
    folder: PathBuf,
    /// The process that waits for the work, or the work itself.
    running: Option<Running>,
    /// The work's first process.
    root: i32,
    tree: bool,
}

impl Alone {
    fn new() -> Alone {
        let case = Case::new();
        let folder = case.dir.path().to_path_buf();
        Alone { case, folder, running: None, root: 0, tree: false }
    }

    fn complaints(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.case.path("errors")).unwrap_or_default()).into_owned()
    }
}

/// Reasons that pass: its restore is not over yet, it is just being started, or it has ended.
fn passes(why: &str) -> bool {
    ["is traced by", "(vfork or clone)", "ended", "no process"].iter().any(|words| why.contains(words))
}

impl Place for Alone {
    fn command(&self) -> &'static str {
        "migckpt"
    }

    fn folder(&self) -> &Path {
        &self.folder
    }

    fn folder_inside(&self) -> &Path {
        &self.folder
    }

    fn script(&mut self, script: &str) -> Ended {
        let mut shell = Command::new("timeout");
        shell.args(["240", "sh", "-c", script]).current_dir(&self.folder).stdin(Stdio::null());
        let output = shell.output().expect("a shell");
        let complaints = String::from_utf8_lossy(&output.stderr).into_owned();
        Ended { success: output.status.success(), output: output.stdout, complaints }
    }

    fn start(&mut self, program: &Program, script: &str) {
        let _ = fs::remove_file(self.case.path("errors"));
        let running = self.case.start("sh", &["-c", &format!("exec {script}")]);
        (self.root, self.tree) = (running.pid(), program.tree);
        self.running = Some(running);
    }

    fn runs(&mut self) -> bool {
        self.running.as_mut().is_some_and(|running| matches!(running.0.try_wait(), Ok(None)))
    }

    fn attempt(&mut self, _: &mut Moments) -> Attempt {
        if fs::read_link(format!("/proc/{}/exe", self.root)).is_ok_and(|exe| exe.ends_with("migckpt")) {
            // Its restore has hardly begun.
            return Attempt::Later("its restore has begun".into());
        }
        let (root, image) = (self.root.to_string(), self.case.path("img"));
        let image = image.to_str().expect("UTF-8");
        let mut dump = vec!["dump", &root, "--to", image];
        if self.tree {
            dump.push("--tree");
        }
        let done = run(&dump);
        if !done.status.success() {
            let why = String::from_utf8_lossy(&done.stderr).into_owned();
            return if passes(&why) { Attempt::Later(why) } else { Attempt::Refused(why) };
        }
        self.running.as_mut().expect("it runs").end();
        let check = run(&["verify", image]);
        assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stderr));
        self.running = Some(self.case.restore());
        Attempt::Moved
    }

    fn end(&mut self) -> Ended {
        let status = self.running.as_mut().expect("it was started").end();
        let complaints = format!("{status}: {}", self.complaints());
        Ended { success: status.success(), output: Vec::new(), complaints }
    }
}

/// The tests in the list call this.
fn moved(program: &Program) {
    if !can_run(program.name) {
        return;
    }
    if let Err(why) = works::run(program, &mut Alone::new()) {
        skip(program.name, &why);
    }
}

/// Verification stressors of stress-ng beside those of the list, for `migckpt` alone: trees and calls that a
/// guest of another node cannot have there.
fn stressed(name: &'static str, command: &'static str) {
    let mut program = Program::new(name);
    (program.needs, program.command, program.tree) = (&["stress-ng"], command, true);
    // What it says, without PIDs and times.
    program.result = "cat out errors | sed -e 's/\\[[0-9]*\\]//' -e 's/completed in .*//'";
    // Until a child of vfork(2) has run another program or ended.
    program.refused = &[("migckpt", "in vfork(2)"), ("migckpt", "a pipe to another process")];
    moved(&program);
}

/// Processes by clone(2) with flags of every kind.
#[test]
fn stress_clone() {
    stressed("stress_clone", "exec stress-ng --verify --clone 2 --clone-ops 200");
}

/// Children that have ended and that nobody has waited for, by the thousand.
#[test]
fn stress_zombie() {
    stressed("stress_zombie", "exec stress-ng --verify --zombie 1 --zombie-ops 3000");
}

/// Sessions, and children whose parents have ended.
#[test]
fn stress_daemon() {
    stressed("stress_daemon", "exec stress-ng --verify --daemon 2 --daemon-ops 4000");
}

/// Locks, FIFOs, eventfds, sigsuspend, signalfd.
#[test]
fn stress_files() {
    let command = "exec stress-ng --verify --flock 1 --flock-ops 400000 --lockf 1 --lockf-ops 12000 --fifo 1 \
                   --fifo-ops 240000 --eventfd 1 --eventfd-ops 32000 --sigsuspend 1 --sigsuspend-ops 32000 \
                   --sigfd 1 --sigfd-ops 500000";
    stressed("stress_files", command);
}
