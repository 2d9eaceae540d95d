//! Starting, saving, restoring and waiting, with deadlines, and nothing left behind.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The longest anything here may take.
const LIMIT: Duration = Duration::from_secs(120);

/// Where programs are.
pub const PROGRAMS: &str = "/usr/bin:/bin";

/// Records that a test did not run, and why; `true` if it can.
pub fn can_run(test: &str) -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        skip(test, "needs root (PIDs of one's choice, ptrace)");
    }
    root
}

/// Whether a program is there; records that a test did not run otherwise.
pub fn installed(test: &str, program: &str) -> bool {
    let found = PROGRAMS.split(':').any(|dir| Path::new(dir).join(program).exists());
    if !found {
        skip(test, &format!("{program} is not installed"));
    }
    found
}

fn skip(test: &str, why: &str) {
    let line = format!("skipped {test}: {why}\n");
    eprint!("{line}");
    if let Some(path) = std::env::var_os("SYSTEST_SKIPS")
        && let Ok(mut file) = File::options().create(true).append(true).open(path)
    {
        let _ = std::io::Write::write_all(&mut file, line.as_bytes());
    }
}

pub fn migckpt() -> Command {
    Command::new(env!("CARGO_BIN_EXE_migckpt"))
}

/// The victim program; `cargo test` builds examples, but not when one test file is named.
pub fn victim() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let profile = Path::new(env!("CARGO_BIN_EXE_migckpt")).parent().expect("target/PROFILE");
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.args(["build", "--quiet", "--offline", "--package", "checkpoint", "--example", "victim"]);
        if profile.ends_with("release") {
            cargo.arg("--release");
        }
        let built = cargo.current_dir(env!("CARGO_MANIFEST_DIR")).status().expect("cargo can be run");
        assert!(built.success(), "the victim cannot be built");
        profile.join("examples/victim")
    })
}

/// A directory of a test, writable for everybody, and the process that is restored in it.
pub struct Case {
    pub dir: tempfile::TempDir,
}

/// A child that is killed with the test, by the program that waits for it too.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.0.try_wait() {
            // `migckpt restore` has one child: what it restored.
            let children = format!("/proc/{0}/task/{0}/children", self.0.id());
            let children = fs::read_to_string(children).unwrap_or_default();
            for child in children.split_ascii_whitespace().filter_map(|word| word.parse().ok()) {
                let _ = kill(Pid::from_raw(child), Signal::SIGKILL);
            }
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Running {
    pub fn pid(&self) -> i32 {
        self.0.id() as i32
    }

    /// Waits for its end.
    pub fn end(&mut self) -> ExitStatus {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.0.try_wait().expect("waits") {
                return status;
            }
            assert!(Instant::now() < deadline, "process {} does not end", self.pid());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Case {
    pub fn new() -> Case {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().expect("a directory");
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).expect("for everybody");
        Case { dir }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Starts a program with nothing but the standard streams open, its output in the file `out`.
    pub fn start(&self, program: &str, arguments: &[&str]) -> Running {
        let out = File::create(self.path("out")).expect("the output's file");
        let mut command = Command::new(victim());
        command.arg("exec").arg(program).args(arguments);
        // The programs themselves: a shim of a version manager is a shell script with children.
        command.env("PATH", PROGRAMS).current_dir(self.dir.path()).stdin(Stdio::null());
        command.stdout(out.try_clone().expect("a copy")).stderr(out);
        let running = Running(command.spawn().expect("starts"));
        // Until the program itself has taken over, what is open is what we were started with.
        let exe = format!("/proc/{}/exe", running.pid());
        let deadline = Instant::now() + LIMIT;
        let other = Path::new(program) != victim();
        while other && fs::read_link(&exe).is_ok_and(|exe| exe == victim()) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
        }
        running
    }

    /// Saves it to `img`; it ends by that.
    pub fn dump(&self, victim: &mut Running) {
        let mut dump = migckpt();
        dump.arg("dump").arg(victim.pid().to_string()).arg("--to").arg(self.path("img"));
        let output = dump.output().expect("runs");
        assert!(output.status.success(), "dump: {}", String::from_utf8_lossy(&output.stderr));
        assert!(!victim.end().success(), "it has ended before it was saved");
    }

    /// Restores it from `img`.
    pub fn restore(&self) -> Running {
        let mut command = migckpt();
        command.arg("restore").arg(self.path("img")).stdin(Stdio::null());
        let errors = File::create(self.path("errors")).expect("a file");
        Running(command.stdout(Stdio::null()).stderr(errors).spawn().expect("runs"))
    }

    pub fn output(&self) -> String {
        fs::read_to_string(self.path("out")).unwrap_or_default()
            + &fs::read_to_string(self.path("errors")).unwrap_or_default()
    }

    pub fn await_file(&self, name: &str) {
        let deadline = Instant::now() + LIMIT;
        while !self.path(name).exists() {
            assert!(Instant::now() < deadline, "there is no {name}: {}", self.output());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Runs `migckpt` to its end.
pub fn run(arguments: &[&str]) -> Output {
    migckpt().args(arguments).stdin(Stdio::null()).output().expect("runs")
}

/// Whether there is such a process.
pub fn exists(pid: i32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}
