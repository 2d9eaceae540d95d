//! The edges of a tree: very deep ones, restorers that are killed, calls of vfork(2), children that end
//! while they are saved.

use super::harness::{Case, can_run, exists, migckpt, run};
use super::programs::same_output_with;
use super::trees_memory::child_of;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::process::Stdio;
use std::time::{Duration, Instant};

/// Each waits for its child and adds one to its status, that many generations deep.
const CHAIN: &str = r#"
import os, sys, time
DEPTH = 200
def generation(n):
    if n == DEPTH:
        open("ready", "w").close()
        while not os.path.exists("go"):
            time.sleep(0.02)
        return 0
    pid = os.fork()
    if pid == 0:
        code = 250
        try:
            code = generation(n + 1)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) + 1
sys.setrecursionlimit(10000)
print(generation(0), flush=True)
"#;

#[test]
fn two_hundred_generations() {
    if !can_run("two hundred generations") {
        return;
    }
    let case = Case::new();
    let mut running = case.start("python3", &["-c", CHAIN]);
    case.await_file("ready");
    let (root, image) = (running.pid(), case.path("img"));
    for turn in [1, 2] {
        let pid = if turn == 1 { root } else { child_of(running.pid()) };
        let to = image.to_str().expect("UTF-8");
        let saved = run(&["dump", &pid.to_string(), "--to", to, "--tree"]);
        assert!(saved.status.success(), "{}", String::from_utf8_lossy(&saved.stderr));
        running.end();
        running = case.restore();
        case.await_restored(root);
        fs::remove_dir_all(&image).expect("removed");
    }
    fs::write(case.path("go"), "").expect("written");
    assert!(running.end().success(), "{}", case.output());
    assert_eq!(case.output(), "200\n");
}

/// A root with children and a zombie, whose memory takes a moment.
const SMALL: &str = "import os, time\nos.setpgid(0, 0)\nfor n in range(6):\n  if not os.fork():\n    x = bytearray(os.urandom(1 << 21))\n\
    \x20   open(f'at{n}', 'w').close()\n    time.sleep(600)\nif not os.fork(): os._exit(3)\n\
    x = bytearray(os.urandom(1 << 23))\n\
    while not all(os.path.exists(f'at{n}') for n in range(6)): time.sleep(0.01)\nopen('ready', 'w').close()\ntime.sleep(600)";

/// Wherever a restorer is killed, nothing of what it was making is left.
#[test]
fn a_killed_restorer_leaves_nothing() {
    if !can_run("a killed restorer") {
        return;
    }
    let case = Case::new();
    let mut running = case.start("python3", &["-c", SMALL]);
    case.await_file("ready");
    let (pid, image) = (running.pid(), case.path("img"));
    let to = image.to_str().expect("UTF-8");
    let saved = run(&["dump", &pid.to_string(), "--to", to, "--tree"]);
    assert!(saved.status.success(), "{}", String::from_utf8_lossy(&saved.stderr));
    running.end();
    let shown = run(&["inspect", to, "--json"]);
    let shown: serde_json::Value = serde_json::from_slice(&shown.stdout).expect("JSON");
    let descendants = shown["descendants"].as_array().expect("a list");
    let mut pids: Vec<i32> =
        descendants.iter().filter_map(|one| one["pid"].as_i64()).map(|pid| pid as i32).collect();
    pids.push(pid);
    let gone = || pids.iter().all(|&pid| !exists(pid));
    let mut made = 0;
    for step in 0..60u64 {
        let mut restore = migckpt();
        restore.arg("restore").arg(&image).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut restore = restore.spawn().expect("runs");
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_millis(step * 4) {
            std::thread::sleep(Duration::from_micros(500));
        }
        let traced = fs::read_to_string(format!("/proc/{pid}/status"))
            .is_ok_and(|status| !status.contains("TracerPid:\t0\n"));
        made += usize::from(traced && pids.iter().filter(|&&pid| exists(pid)).count() > 1);
        restore.kill().expect("is killed");
        restore.wait().expect("ends");
        let is_let_go = fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| !exe.ends_with("migckpt"))
            && fs::read_to_string(format!("/proc/{pid}/status"))
                .is_ok_and(|status| status.contains("TracerPid:\t0\n"));
        let deadline = Instant::now() + Duration::from_secs(10);
        while !gone() && !is_let_go && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
        }
        let left: Vec<&i32> = pids.iter().filter(|&&pid| exists(pid)).collect();
        if !left.is_empty() && begun.elapsed() < Duration::from_secs(10) {
            // It was through, and they are their own masters.
            break;
        }
        assert!(left.is_empty(), "killed after {} ms it leaves {left:?}", step * 4);
    }
    for &pid in &pids {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
    assert!(made > 0, "no restorer was killed while it was at it");
}

const VFORK: &str = r#"
import ctypes, os, sys, time
# vfork(2) with the return address kept in a register: its child has the same stack.
code = bytes([0xb8, 58, 0, 0, 0, 0x5a, 0x0f, 0x05, 0x52, 0x85, 0xc0, 0x74, 0x01, 0xc3,   # pop rdx; vfork; push rdx; parent: ret
    0x31, 0xc0, 0x50, 0x57, 0x48, 0x89, 0xe7, 0x31, 0xf6, 0xb8, 35, 0, 0, 0, 0x0f, 0x05,  # nanosleep(seconds)
    0x31, 0xff, 0xb8, 60, 0, 0, 0, 0x0f, 0x05])                                             # exit(0)
import mmap
area = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 7)
area.write(code)
call = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(area)))
open("ready", "w").close()
child = call(int(sys.argv[1]))
print("waited", os.waitpid(child, 0)[1], flush=True)
while not os.path.exists("go"):
    time.sleep(0.01)
"#;

#[test]
fn a_vfork_is_waited_for() {
    if !can_run("a vfork") {
        return;
    }
    let case = Case::new();
    let running = case.start("python3", &["-c", VFORK, "30"]);
    case.await_file("ready");
    std::thread::sleep(Duration::from_millis(200));
    let (pid, image) = (running.pid().to_string(), case.path("img"));
    let to = image.to_str().expect("UTF-8");
    let refused = run(&["dump", &pid, "--to", to, "--tree"]);
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(4), "{why}");
    assert!(why.contains("is in vfork(2), until its child runs another program or ends"), "{why}");
    drop(running);
    // One that comes out of it in time.
    let case = Case::new();
    let mut running = case.start("python3", &["-c", VFORK, "1"]);
    case.await_file("ready");
    let (root, image) = (running.pid(), case.path("img"));
    let to = image.to_str().expect("UTF-8");
    let saved = run(&["dump", &root.to_string(), "--to", to, "--tree"]);
    assert!(saved.status.success(), "{}", String::from_utf8_lossy(&saved.stderr));
    running.end();
    running = case.restore();
    fs::write(case.path("go"), "").expect("written");
    assert!(running.end().success(), "{}", case.output());
    assert_eq!(case.output(), "waited 0\n");
}

/// Processes with threads that come and go as fast as they can, saved again and again: each of them may end
/// at any moment.
const SHORT_LIVES: &str = "import os, sys, threading, time\ntotal = 0\nfor n in range(int(sys.argv[1])):\n\
    \x20 pids = []\n  for k in range(4):\n    pid = os.fork()\n    if not pid:\n\
    \x20     for t in range(3): threading.Thread(target=time.sleep, args=(0.002,), daemon=True).start()\n\
    \x20     time.sleep(0.001 * k); os._exit(n * 7 % 100)\n    pids.append(pid)\n\
    \x20 total += sum(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids)\nprint(total)";

#[test]
fn children_that_end_while_they_are_saved() {
    same_output_with(&["--tree"], "short lives", "python3", &["-c", SHORT_LIVES, "700"], 10, 3);
}
