//! Starting, saving, restoring and waiting, with deadlines, and nothing left behind.

use checkpoint::image::ProcessImage;
use checkpoint::image::objects::ObjectImage;
use checkpoint::image::stream::{Compress, Item, Options, StreamReader, StreamWriter};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The longest anything here may take.
const LIMIT: Duration = Duration::from_secs(240);

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

/// Records that a test did not run.
pub fn skip(test: &str, why: &str) {
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
            // The child of `migckpt restore`, which is what it restored, and that one's children.
            for pid in descendants(self.pid()) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The processes below one, parents first.
pub fn descendants(pid: i32) -> Vec<i32> {
    let mut found = vec![pid];
    let mut next = 0;
    while let Some(pid) = found.get(next) {
        for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            found.extend(children.split_ascii_whitespace().filter_map(|word| word.parse::<i32>().ok()));
        }
        next += 1;
    }
    found.split_off(1)
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
            if Instant::now() > deadline {
                panic!("process {} does not end; {}", self.pid(), doing(&descendants(self.pid())));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// What processes are in the middle of, for the reader of a failure.
fn doing(pids: &[i32]) -> String {
    let read = |path: String| fs::read_to_string(path).unwrap_or_default().trim().to_string();
    let mut text = String::new();
    for pid in pids {
        for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            let (task, status) = (task.path(), read(format!("{}/status", task.path().display())));
            let line =
                |key: &str| status.lines().find(|line| line.starts_with(key)).unwrap_or_default().to_string();
            let of = |file: &str| read(format!("{}/{file}", task.display()));
            text += &format!(
                "\n{pid} {} {} {} {} call {} in {}",
                task.display(),
                of("comm"),
                line("State"),
                line("SigPnd"),
                of("syscall"),
                of("wchan")
            );
        }
    }
    text
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

    /// Waits until what is being restored has been let go.
    pub fn await_restored(&self, pid: i32) {
        let deadline = Instant::now() + LIMIT;
        let is_let_go = || {
            let exe = fs::read_link(format!("/proc/{pid}/exe"));
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            exe.is_ok_and(|exe| exe != Path::new(env!("CARGO_BIN_EXE_migckpt")))
                && status.contains("TracerPid:\t0\n")
        };
        while !is_let_go() {
            assert!(Instant::now() < deadline, "it is not restored: {}", self.output());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Lets `change` see the state of every process in the image, and writes it again.
    pub fn change(&self, change: impl Fn(&mut ProcessImage)) {
        self.rewrite("img", "img", |images| images.iter_mut().for_each(&change));
    }

    /// Writes an image again, to another folder, with the states that `change` makes of those it has.
    pub fn rewrite(&self, from: &str, to: &str, change: impl Fn(&mut Vec<ProcessImage>)) {
        self.rewrite_with(from, to, change, |_| ());
    }

    /// The same, and with the objects that `of_object` makes of those it has.
    pub fn rewrite_with(
        &self,
        from: &str,
        to: &str,
        change: impl Fn(&mut Vec<ProcessImage>),
        of_object: impl Fn(&mut ObjectImage),
    ) {
        let old = fs::read(self.path(from).join("process.img")).expect("an image");
        let mut reader = StreamReader::new(old.as_slice()).expect("starts");
        let options = Options { compress: Compress::Off };
        let mut writer = StreamWriter::new(Vec::new(), options).expect("starts");
        let mut images = reader.states().expect("states");
        change(&mut images);
        for image in &images {
            writer.state(image).expect("written");
        }
        loop {
            match reader.next().expect("whole") {
                Item::Data { addr, bytes } => writer.data(addr, bytes),
                Item::Zero { addr, len } => writer.zero(addr, len),
                Item::Same { addr, len } => writer.same(addr, len),
                Item::Process(index) => writer.process(index),
                Item::Object(mut object) => {
                    of_object(&mut object);
                    writer.object(&object)
                }
                Item::End => break,
                other => panic!("{other:?} in the image"),
            }
            .expect("written");
        }
        let new = self.path(to).join("process.img");
        fs::write(new, writer.finish().expect("ends").0).expect("written");
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
