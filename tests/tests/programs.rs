//! Real programs that no one here wrote, each moved among three nodes at random moments of a piece of work: the result
//! is what it is undisturbed. What cannot be moved is refused by name, and runs on.
//!
//! A program that this machine does not have is a counted skip. Ten moves each, as in the docs' table; one for long:
//!
//! ```sh
//! PROGRAMS_MOVES=10 cargo test --release -p systest --test programs -- --nocapture --test-threads 2
//! PROGRAMS_MOVES=200 PROGRAMS_SEED=7 cargo test --release -p systest --test programs node -- --nocapture
//! ```

use std::path::{Path, PathBuf};
use std::process::Command;
use systest::lab::{Lab, Ran, Running};
use systest::{can_run_labs, skip};
use works::{Attempt, Ended, Moments, Place, Program};

#[path = "../programs/mod.rs"]
mod works;

/// A lab whose first node is home, and `migrate`.
struct Away {
    lab: Lab,
    /// The work's folder, from outside.
    folder: PathBuf,
    running: Option<Running>,
    job: String,
}

impl Away {
    fn new() -> Away {
        let lab = Lab::up_with(3, &["--cpus-per-node", "0"]);
        lab.sh("node1", "mkdir -m 777 /srv/work").ok();
        let folder = lab.srv("node1", "work");
        Away { lab, folder, running: None, job: String::new() }
    }
}

/// The compiler that builds these tests is mostly in somebody's home, and not on the path of a login.
fn with_compiler(script: &str) -> String {
    let sysroot = Command::new("rustc").args(["--print", "sysroot"]).output();
    match sysroot.ok().and_then(|asked| String::from_utf8(asked.stdout).ok()) {
        Some(sysroot) if !sysroot.trim().is_empty() => {
            format!("PATH=\"$PATH:{}/bin\"; {script}", sysroot.trim())
        }
        _ => script.to_string(),
    }
}

fn ended(ran: Ran) -> Ended {
    let complaints = format!("status {}: {}", ran.status, ran.stderr);
    Ended { success: ran.status == 0, output: ran.stdout.into_bytes(), complaints }
}

/// Reasons that pass: it is just being started, has ended, or has come home by itself meanwhile.
fn passes(why: &str) -> bool {
    ["no such job", "no job", "no process", "ended", "(vfork or clone)", "it is at home already"]
        .iter()
        .any(|words| why.contains(words))
}

impl Place for Away {
    fn command(&self) -> &'static str {
        "migrate"
    }

    fn folder(&self) -> &Path {
        &self.folder
    }

    fn folder_inside(&self) -> &Path {
        Path::new("/srv/work")
    }

    fn script(&mut self, script: &str) -> Ended {
        ended(self.lab.sh("node1", &with_compiler(script)))
    }

    fn start(&mut self, program: &Program, script: &str) {
        self.job = program.name.replace('_', "-");
        self.running =
            Some(self.lab.start("node1", &with_compiler(&format!("exec mosrun -J {} {script}", self.job))));
    }

    fn runs(&mut self) -> bool {
        self.running.as_mut().is_some_and(Running::runs)
    }

    fn attempt(&mut self, moments: &mut Moments) -> Attempt {
        let to = ["node2", "node3", "home"][moments.below(3) as usize];
        let moved = self.lab.sh("node1", &format!("migrate job:{} {to}", self.job));
        match moved.status {
            0 if moved.stdout.contains("already") => Attempt::Later(moved.stdout),
            0 => Attempt::Moved,
            _ if passes(&moved.stderr) => Attempt::Later(moved.stderr),
            _ => Attempt::Refused(moved.stderr),
        }
    }

    fn end(&mut self) -> Ended {
        ended(self.running.take().expect("it was started").end())
    }
}

/// The tests in the list call this.
fn moved(program: &Program) {
    if !can_run_labs(program.name) {
        return;
    }
    if let Err(why) = works::run(program, &mut Away::new()) {
        skip(&format!("programs: {}", program.name), &why);
    }
}
