//! What cannot be restored is said by name, and leaves no process and an image as it was.

use super::harness::{Case, can_run, exists, migckpt, run};
use std::fs;
use std::process::Stdio;
use std::time::{Duration, Instant};

fn saved(case: &Case, program: &str, arguments: &[&str]) -> i32 {
    let mut running = case.start(program, arguments);
    std::thread::sleep(Duration::from_millis(200));
    let pid = running.pid();
    case.dump(&mut running);
    pid
}

fn restore(case: &Case, more: &[&str]) -> (Option<i32>, String) {
    let image = case.path("img");
    let output = run(&[&["restore", image.to_str().expect("UTF-8")], more].concat());
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn a_number_in_use() {
    if !can_run("a_number_in_use") {
        return;
    }
    let case = Case::new();
    let pid = saved(&case, "sleep", &["1"]);
    let first = case.restore();
    std::thread::sleep(Duration::from_millis(200));
    let (code, text) = restore(&case, &[]);
    assert_eq!(code, Some(4), "{text}");
    assert!(text.contains(&format!("{pid} is in use by sleep")), "{text}");
    drop(first);
}

#[test]
fn its_end_is_its_own() {
    if !can_run("its_end_is_its_own") {
        return;
    }
    let case = Case::new();
    saved(&case, "python3", &["-c", "import time,os;time.sleep(0.6);os._exit(77)"]);
    assert_eq!(restore(&case, &[]).0, Some(77));
    let case = Case::new();
    saved(&case, "python3", &["-c", "import time,os;time.sleep(0.6);os.kill(os.getpid(),15)"]);
    assert_eq!(restore(&case, &[]).0, Some(128 + 15));
}

#[test]
fn signals_are_passed_on() {
    if !can_run("signals_are_passed_on") {
        return;
    }
    let case = Case::new();
    let pid = saved(&case, "sleep", &["30"]);
    let mut restored = case.restore();
    std::thread::sleep(Duration::from_millis(500));
    assert!(exists(pid));
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(restored.pid()), nix::sys::signal::Signal::SIGTERM)
        .expect("signals");
    assert_eq!(restored.end().code(), Some(128 + 15));
    assert!(!exists(pid));
}

#[test]
fn detached_it_goes_on_alone() {
    if !can_run("detached_it_goes_on_alone") {
        return;
    }
    let case = Case::new();
    let pid = saved(&case, "sleep", &["30"]);
    let (code, text) = restore(&case, &["--detach"]);
    assert_eq!(code, Some(0), "{text}");
    assert!(exists(pid));
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    assert!(status.contains("TracerPid:\t0"), "{status}");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)
        .expect("kills");
}

#[test]
fn a_stopped_process_stays_stopped() {
    if !can_run("a_stopped_process_stays_stopped") {
        return;
    }
    let case = Case::new();
    let mut running = case.start("sleep", &["1"]);
    std::thread::sleep(Duration::from_millis(200));
    let pid = nix::unistd::Pid::from_raw(running.pid());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).expect("stops");
    std::thread::sleep(Duration::from_millis(100));
    case.dump(&mut running);
    let mut restored = case.restore();
    std::thread::sleep(Duration::from_millis(1500));
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    assert!(status.contains("State:\tT"), "{status}");
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGCONT).expect("continues");
    assert!(restored.end().success());
}

#[test]
fn a_damaged_image() {
    if !can_run("a_damaged_image") {
        return;
    }
    let case = Case::new();
    let pid = saved(&case, "sleep", &["30"]);
    let file = case.path("img/process.img");
    let whole = fs::read(&file).expect("reads the image");
    let step = whole.len() / 12 + 1;
    for at in (0..whole.len()).step_by(step) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        fs::write(&file, &bytes).expect("writes");
        let (code, text) = restore(&case, &[]);
        assert_eq!(code, Some(1), "byte {at}: {text}");
        fs::write(&file, &whole[..at]).expect("writes");
        let (code, text) = restore(&case, &[]);
        assert_eq!(code, Some(1), "cut at {at}: {text}");
        assert!(!exists(pid), "a process was left");
    }
    // And the whole one still works.
    fs::write(&file, &whole).expect("writes");
    assert_eq!(restore(&case, &["--detach"]).0, Some(0));
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)
        .expect("kills");
}

#[test]
fn a_replaced_file() {
    if !can_run("a_replaced_file") {
        return;
    }
    let case = Case::new();
    let program = case.path("program");
    fs::copy("/bin/sleep", &program).expect("copies");
    let pid = saved(&case, program.to_str().expect("UTF-8"), &["2"]);
    let other = case.path("other");
    fs::copy(&program, &other).expect("copies");
    fs::rename(&other, &program).expect("replaces");
    let (code, text) = restore(&case, &[]);
    assert_eq!(code, Some(4), "{text}");
    assert!(text.contains("program has been replaced"), "{text}");
    assert!(!exists(pid));
    assert_eq!(restore(&case, &["--other-files"]).0, Some(0));
}

#[test]
fn a_filter_that_asks_a_supervisor() {
    if !can_run("a_filter_that_asks_a_supervisor") {
        return;
    }
    let code = "import ctypes, struct, time\nlibc = ctypes.CDLL(None)\n\
        code = struct.pack('<HBBIHBBIHBBIHBBI', 32, 0, 0, 0, 21, 0, 1, 140, 6, 0, 0, 0x7fc00000, 6, 0, 0, 0x7fff0000)\n\
        place = ctypes.create_string_buffer(code)\n\
        program = struct.pack('<QQ', 4, ctypes.addressof(place))\n\
        libc.prctl(38, 1, 0, 0, 0)\n\
        assert libc.prctl(22, 2, program, 0, 0) == 0\n\
        open('ready', 'w'); time.sleep(60)";
    let case = Case::new();
    let running = case.start("python3", &["-c", code]);
    case.await_file("ready");
    let done = run(&["dump", &running.pid().to_string(), "--to", case.path("img").to_str().expect("UTF-8")]);
    let text = String::from_utf8_lossy(&done.stderr).into_owned();
    assert_eq!(done.status.code(), Some(4), "{text}");
    assert!(text.contains("its seccomp filter asks a supervisor"), "{text}");
    assert!(exists(running.pid()));
}

#[test]
fn through_a_pipe() {
    if !can_run("through_a_pipe") {
        return;
    }
    let case = Case::new();
    let mut running =
        case.start("python3", &["-c", "import time\nfor i in range(8): print(i,flush=True); time.sleep(.1)"]);
    std::thread::sleep(Duration::from_millis(300));
    let mut dump = migckpt();
    dump.arg("dump").arg(running.pid().to_string()).args(["--to", "-"]).stdout(Stdio::piped());
    let mut dump = dump.stderr(Stdio::null()).spawn().expect("runs");
    let mut command = migckpt();
    command.args(["restore", "-"]).stdin(dump.stdout.take().expect("a pipe")).stderr(Stdio::piped());
    let mut restore = command.spawn().expect("runs");
    // Or the pipe has a reader more.
    drop(command);
    running.end();
    assert!(dump.wait().expect("waits").success());
    assert!(restore.wait().expect("waits").success());
    assert_eq!(case.output(), "0\n1\n2\n3\n4\n5\n6\n7\n");
}

/// What a program in Python has made of itself is named, and it runs on.
fn refused(name: &str, code: &str, words: &str) {
    if !can_run(name) {
        return;
    }
    let begin = "import ctypes, os, time\nlibc = ctypes.CDLL(None, use_errno=True)\n";
    let end = "\nopen('ready', 'w'); time.sleep(60)";
    let case = Case::new();
    let running = case.start("python3", &["-c", &format!("{begin}{code}{end}")]);
    case.await_file("ready");
    let image = case.path("img");
    let done = run(&["dump", &running.pid().to_string(), "--to", image.to_str().expect("UTF-8")]);
    let text = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(!done.status.success() && text.contains(words), "{:?}: {text}", done.status.code());
    assert!(exists(running.pid()));
    let status = || fs::read_to_string(format!("/proc/{}/status", running.pid())).expect("status");
    assert!(status().contains("TracerPid:\t0"), "{}", status());
    // Where it had to be stopped to be asked, it goes back to sleep when it gets a CPU.
    let deadline = Instant::now() + Duration::from_secs(10);
    while !status().contains("State:\tS") {
        assert!(Instant::now() < deadline, "{}", status());
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_local_descriptor_table() {
    let code = "entry = (ctypes.c_uint * 4)(0, 0, 0xfffff, 0x51)\n\
        assert libc.syscall(154, 1, ctypes.byref(entry), 16) == 0";
    refused("a_local_descriptor_table", code, "it has a local descriptor table (modify_ldt)");
}

#[test]
fn keys_of_its_own() {
    let code = "assert libc.syscall(248, b'user', b'a key', b'its value', 9, ctypes.c_long(-2)) > 0";
    refused("keys_of_its_own", code, "it has keys of its own");
}

#[test]
fn calls_that_it_handles_itself() {
    // The selector allows all of them for now.
    let code = "selector = ctypes.create_string_buffer(8)\n\
        assert libc.prctl(59, 1, ctypes.c_long(0), ctypes.c_long(0), ctypes.byref(selector)) == 0";
    refused("calls_that_it_handles_itself", code, "it handles its own system calls");
}
