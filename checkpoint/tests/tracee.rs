//! Freezing and injecting on the live kernel: nothing may be left in a process that goes on.

use checkpoint::tracee::{Recovered, Tracee, recover};
use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

struct Victim(Child);

impl Victim {
    fn start(program: &str, args: &[&str]) -> Victim {
        let child = Command::new(program).args(args).stdout(Stdio::piped()).spawn().expect("starts");
        std::thread::sleep(Duration::from_millis(300));
        Victim(child)
    }

    fn pid(&self) -> i32 {
        self.0.id() as i32
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn maps(pid: i32) -> String {
    fs::read_to_string(format!("/proc/{pid}/maps")).expect("maps")
}

fn status_line(pid: i32, key: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    status.lines().find(|line| line.starts_with(key)).expect("the line").to_string()
}

#[test]
fn leaves_no_trace() {
    let victim = Victim::start("sleep", &["60"]);
    let pid = victim.pid();
    let before = (maps(pid), status_line(pid, "SigBlk"));
    for _ in 0..200 {
        let mut tracee = Tracee::freeze(pid).expect("freezes");
        tracee.install_stub(&[]).expect("stub");
        let got = tracee.syscall(0, libc::SYS_getpid, [0; 6]).expect("injects");
        assert_eq!(got, i64::from(pid));
        tracee.thaw().expect("thaws");
    }
    assert_eq!(before, (maps(pid), status_line(pid, "SigBlk")));
    assert!(status_line(pid, "TracerPid").ends_with("\t0"));
}

#[test]
fn one_that_executes_programs_all_the_time_is_read() {
    // Each executes the next one, the same.
    let next = "exec sh -c \"$0\" \"$0\"";
    let victim = Victim::start("sh", &["-c", next, next]);
    let pid = victim.pid();
    for _ in 0..300 {
        let tracee = Tracee::freeze(pid).expect("freezes");
        let first = maps(pid);
        let start = first.split('-').next().and_then(|text| u64::from_str_radix(text, 16).ok());
        let mut magic = [0; 4];
        tracee
            .read_mem(start.expect("an address"), &mut magic)
            .expect("is the memory of the program that it is");
        assert_eq!(&magic, b"\x7fELF");
        tracee.thaw().expect("thaws");
    }
}

#[test]
fn an_interrupted_sleep_ends_in_time() {
    let start = std::time::Instant::now();
    let mut victim = Victim::start("sleep", &["2"]);
    for _ in 0..20 {
        let mut tracee = Tracee::freeze(victim.pid()).expect("freezes");
        tracee.install_stub(&[]).expect("stub");
        tracee.thaw().expect("thaws");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(victim.0.wait().expect("waits").success());
    let took = start.elapsed().as_secs_f64();
    assert!((2.0..4.0).contains(&took), "{took} s");
}

#[test]
fn threads_are_frozen_and_go_on() {
    let code = "import threading,time\ndef f():\n  while True: time.sleep(0.01)\n\
                [threading.Thread(target=f,daemon=True).start() for _ in range(8)]\ntime.sleep(60)";
    let victim = Victim::start("python3", &["-c", code]);
    for _ in 0..20 {
        let mut tracee = Tracee::freeze(victim.pid()).expect("freezes");
        assert_eq!(tracee.thread_count(), 9);
        tracee.install_stub(&[]).expect("stub");
        for i in 0..9 {
            let tid = tracee.tid(i);
            assert_eq!(tracee.syscall(i, libc::SYS_gettid, [0; 6]).expect("injects"), i64::from(tid));
        }
        tracee.thaw().expect("thaws");
    }
    assert_eq!(recover(victim.pid()).expect("looks"), Recovered::Untouched);
}

#[test]
fn no_call_is_made_on_the_programs_stack() {
    let victim = Victim::start("sleep", &["60"]);
    let mut tracee = Tracee::freeze(victim.pid()).expect("freezes");
    tracee.install_stub(&[]).expect("stub");
    // All of memory is the alternate stack: sigaltstack(2) refuses another to a caller that is on it.
    let all = [[0; 8], [0; 8], (1u64 << 47).to_le_bytes()].concat();
    let none = [[0; 8], 2u64.to_le_bytes(), [0; 8]].concat();
    for stack in [&all, &all, &none] {
        let at = tracee.scratch();
        tracee.write_mem(at, stack).expect("written");
        let got = tracee.syscall(0, libc::SYS_sigaltstack, [at, 0, 0, 0, 0, 0]).expect("injects");
        assert_eq!(got, 0);
    }
    tracee.thaw().expect("thaws");
}

#[test]
fn a_dead_tracer_loses_nothing() {
    let victim = Victim::start("sleep", &["60"]);
    let pid = victim.pid();
    let before = maps(pid);
    // A tracer thread that ends leaves its tracee just as a killed tracer process does.
    std::thread::spawn(move || {
        let mut tracee = Tracee::freeze(pid).expect("freezes");
        tracee.install_stub(&[]).expect("stub");
        tracee.syscall(0, libc::SYS_getpid, [0; 6]).expect("injects");
        std::mem::forget(tracee);
    })
    .join()
    .expect("the tracer ends");
    assert_ne!(before, maps(pid));
    assert_eq!(recover(pid).expect("recovers"), Recovered::Thawed);
    assert_eq!(before, maps(pid));
    std::thread::sleep(Duration::from_millis(100));
    assert!(status_line(pid, "State").contains("sleeping"));
}

/// A freeze that failed in the middle has left threads traced: the next one of the same tracer takes them as they
/// are, whether they run, stand, or have a signal to tell of.
#[test]
fn what_a_failed_freeze_has_left_is_frozen() {
    let mut victim = Victim::start("sleep", &["1"]);
    let pid = victim.pid();
    for state in ["running", "stopped", "at a signal"] {
        checkpoint::sys::ptrace::seize(pid, 0).expect("seizes");
        match state {
            "stopped" => checkpoint::sys::ptrace::interrupt(pid).expect("interrupts"),
            "at a signal" => {
                // SAFETY: no pointers. It does nothing by itself.
                assert_eq!(unsafe { libc::kill(pid, libc::SIGURG) }, 0);
            }
            _ => {}
        }
        std::thread::sleep(Duration::from_millis(20));
        let mut tracee = Tracee::freeze(pid).expect(state);
        tracee.install_stub(&[]).expect("stub");
        tracee.thaw().expect("thaws");
        assert!(status_line(pid, "TracerPid").ends_with("\t0"), "{state}");
    }
    assert!(victim.0.wait().expect("ends").success());
}
