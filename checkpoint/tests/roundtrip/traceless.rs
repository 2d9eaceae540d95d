//! A dump that leaves the process running leaves no trace in it.
//!
//! A hundred times with all tests; for longer:
//!
//! ```sh
//! TRACELESS_ROUNDS=1000 cargo test --release -p checkpoint --test roundtrip traceless
//! ```

use super::harness::{Case, can_run, migckpt};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::BTreeMap;
use std::fs;
use std::process::Stdio;

/// Has something of each kind, stands still until SIGTERM, and tells whether its memory is whole.
const VICTIM: &str = r#"
import ctypes, hashlib, mmap, os, select, signal, threading
blob = bytearray(os.urandom(4 << 20))
shared = mmap.mmap(-1, 1 << 20)
shared[:] = os.urandom(1 << 20)
private = mmap.mmap(-1, 2 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
private[:4096] = os.urandom(4096)
digest = lambda: hashlib.sha256(bytes(blob) + shared[:] + private[:]).hexdigest()
before = digest()
reading, writing = os.pipe()
os.write(writing, b"x" * 1000)
file = os.open("file", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
os.write(file, b"0123456789"); os.lseek(file, 4, os.SEEK_SET)
polled = select.epoll(); polled.register(reading, select.EPOLLIN | select.EPOLLET)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGRTMIN + 3})
os.kill(os.getpid(), signal.SIGUSR2)
for _ in range(3):
    os.kill(os.getpid(), signal.SIGRTMIN + 3)
signal.signal(signal.SIGUSR1, lambda *a: None)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
signal.setitimer(signal.ITIMER_REAL, 5000, 7)
never = threading.Event()
for n in range(5):
    threading.Thread(target=never.wait, daemon=True).start()
asked = []
signal.signal(signal.SIGTERM, lambda *a: asked.append(1))
open("ready", "w").close()
woken = 0
while not asked:
    signal.pause()
    woken += 1
print("whole" if digest() == before else "changed", woken, os.read(reading, 2000) == b"x" * 1000,
      os.lseek(file, 0, os.SEEK_CUR), sorted(signal.sigpending()) == [signal.SIGUSR2, signal.SIGRTMIN + 3],
      sum(signal.sigtimedwait({signal.SIGRTMIN + 3}, 0) is not None for _ in range(9)), flush=True)
os._exit(0)
"#;

/// Lines of `status` that nothing but we could change while it stands still.
const STATUS: [&str; 15] = [
    "State",
    "TracerPid",
    "Threads",
    "SigPnd",
    "ShdPnd",
    "SigBlk",
    "SigIgn",
    "SigCgt",
    "CapEff",
    "CapPrm",
    "NoNewPrivs",
    "Seccomp",
    "Seccomp_filters",
    "Umask",
    "FDSize",
];

/// Everything about a process that can be seen from outside, by name.
fn look(pid: i32) -> BTreeMap<String, String> {
    let read = |path: &str| fs::read_to_string(format!("/proc/{pid}/{path}")).unwrap_or_default();
    let mut seen = BTreeMap::from([("maps".to_string(), read("maps"))]);
    let flags: Vec<String> =
        read("smaps").lines().filter(|line| line.starts_with("VmFlags")).map(str::to_string).collect();
    seen.insert("flags of mappings".into(), flags.join("\n"));
    seen.insert("timers".into(), read("timers"));
    let names = |path: &str| -> Vec<String> {
        let entries = fs::read_dir(format!("/proc/{pid}/{path}")).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    };
    for tid in names("task") {
        let status = read(&format!("task/{tid}/status"));
        let kept =
            status.lines().filter(|line| STATUS.iter().any(|key| line.starts_with(&format!("{key}:"))));
        seen.insert(format!("status of thread {tid}"), kept.collect::<Vec<_>>().join("\n"));
        seen.insert(format!("name of thread {tid}"), read(&format!("task/{tid}/comm")));
        seen.insert(format!("call of thread {tid}"), read(&format!("task/{tid}/syscall")));
    }
    for fd in names("fd") {
        let link = fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap_or_default();
        seen.insert(format!("fd {fd}"), format!("{} {}", link.display(), read(&format!("fdinfo/{fd}"))));
    }
    seen
}

#[test]
fn a_dump_leaves_no_trace() {
    if !can_run("traceless") {
        return;
    }
    let rounds = std::env::var("TRACELESS_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(100);
    let case = Case::new();
    let mut running = case.start("python3", &["-c", VICTIM]);
    case.await_file("ready");
    let pid = running.pid();
    // Until all of its threads stand where they stay.
    std::thread::sleep(std::time::Duration::from_millis(500));
    let before = look(pid);
    assert!(before.len() > 20, "{before:#?}");
    for round in 0..rounds {
        let mut dump = migckpt();
        dump.args(["dump", &pid.to_string(), "--to", "-", "--leave-running"]).stdout(Stdio::null());
        let output = dump.stderr(Stdio::piped()).output().expect("runs");
        assert!(output.status.success(), "round {round}: {}", String::from_utf8_lossy(&output.stderr));
        let mut after = look(pid);
        // A thread that has just been let go may not be back in its call yet.
        for _ in 0..200 {
            if after == before {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
            after = look(pid);
        }
        let changed: Vec<_> = before.iter().filter(|(key, value)| after.get(*key) != Some(value)).collect();
        assert!(changed.is_empty() && after.len() == before.len(), "round {round}: {changed:#?} {after:#?}");
    }
    kill(Pid::from_raw(pid), Signal::SIGTERM).expect("it is there");
    assert!(running.end().success());
    assert_eq!(case.output(), "whole 1 True 4 True 3\n");
}
