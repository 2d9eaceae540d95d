//! What a job looks like to its shell and its user, at home and after a move: as without mosrun.

use std::time::{Duration, Instant};
use systest::lab::{Lab, wait_for};
use systest::{require_labs, worker};

#[test]
fn a_job_that_has_not_moved_is_a_plain_process() {
    require_labs!();
    let lab = Lab::up(2);
    let status = lab.sh("node1", "mosrun grep -E '^(TracerPid|Seccomp|PPid):' /proc/self/status").ok();
    assert!(status.contains("TracerPid:\t0\n"), "{status}");
    assert!(status.contains("Seccomp:\t0\n"), "{status}");
    let same = "cd /srv; umask 027; ulimit -n 100; export A=b; f() { $1 sh -c 'pwd; umask; ulimit -n; echo $A; id'; };";
    let plain = lab.sh("node1", &format!("{same} f ''")).ok();
    assert_eq!(lab.sh("node1", &format!("{same} f mosrun")).ok(), plain);
}

#[test]
fn what_starting_with_mosrun_costs_can_be_measured() {
    require_labs!();
    let lab = Lab::up(1);
    let median = |command: &str| -> f64 {
        let ran = lab.sh("node1", &format!("moslab __start-time {command}")).ok();
        ran.trim().parse().expect("milliseconds")
    };
    // The figures are the benchmark's; here, that both can be had.
    for command in ["true", "mosrun true"] {
        assert!(median(command) > 0.0);
    }
}

#[test]
fn ends_are_reported_as_they_are() {
    require_labs!();
    let lab = Lab::up(1);
    assert_eq!(lab.sh("node1", "mosrun sh -c 'kill -TERM $$'; echo $?").ok(), "143\n");
    assert_eq!(lab.sh("node1", "mosrun sh -c 'exit 9'; echo $?").ok(), "9\n");
    assert_eq!(lab.sh("node1", "mosrun sleep 0.5 & wait $!; echo $?").ok(), "0\n");
    assert_eq!(lab.sh("node1", "echo x | mosrun cat").ok(), "x\n");
    assert_eq!(lab.sh("node1", "mosrun /none; echo $?").stdout, "127\n");
    assert_eq!(lab.sh("node1", "mosrun /etc/hosts; echo $?").stdout, "126\n");
}

/// Works in a handler on an alternate stack, then says whether that stack is as it was.
const ON_AN_ALTERNATE_STACK: &str = "
import ctypes, mmap, os, signal
libc = ctypes.CDLL(None, use_errno=True)
class Stack(ctypes.Structure):
    _fields_ = [('sp', ctypes.c_void_p), ('flags', ctypes.c_int), ('size', ctypes.c_size_t)]
class Action(ctypes.Structure):
    _fields_ = [('handler', ctypes.c_void_p), ('mask', ctypes.c_ubyte * 128), ('flags', ctypes.c_int), ('r', ctypes.c_void_p)]
room = mmap.mmap(-1, 1 << 20)
at = ctypes.addressof(ctypes.c_char.from_buffer(room))
def known():
    found = Stack()
    assert libc.sigaltstack(None, ctypes.byref(found)) == 0
    return found.sp == at, found.size, found.flags
@ctypes.CFUNCTYPE(None, ctypes.c_int)
def handler(number):
    print(known())
    open('inside', 'w')
    x = 0
    while not os.path.exists('go'):
        for i in range(20000): x = (x * 31 + i) % 65521
assert libc.sigaltstack(ctypes.byref(Stack(at, 0, 1 << 20)), None) == 0
action = Action(ctypes.cast(handler, ctypes.c_void_p), flags=0x08000000)
assert libc.sigaction(int(signal.SIGUSR1), ctypes.byref(action), None) == 0
assert libc['raise'](int(signal.SIGUSR1)) == 0
print(known())
";

#[test]
fn a_handler_on_an_alternate_stack_goes_out_and_home() {
    require_labs!();
    let lab = Lab::up(2);
    std::fs::write(lab.srv("node1", "script"), ON_AN_ALTERNATE_STACK).expect("written");
    let running = lab.start("node1", "cd /srv && mosrun -J stack python3 script");
    wait_for("the handler", || lab.srv("node1", "inside").exists().then_some(()));
    for _ in 0..2 {
        lab.migrate("stack", "node2");
        lab.migrate("stack", "home");
    }
    lab.migrate("stack", "node2");
    std::fs::write(lab.srv("node1", "go"), b"").expect("written");
    assert_eq!(running.end().ok(), "(True, 1048576, 1)\n(True, 1048576, 0)\n");
}

#[test]
fn ends_are_reported_as_they_are_after_a_move() {
    require_labs!();
    let lab = Lab::up(2);
    // Each waits for a sign that it has been moved, then ends in its own way.
    let end = |job: &str, last: &str| {
        let perl = format!("select undef, undef, undef, 0.05 until -e '/srv/go-{job}'; {last}");
        let running = lab.start("node1", &format!("mosrun -J {job} perl -e \"{perl}\" & wait $!; echo $?"));
        lab.await_job("node1", job);
        lab.migrate(job, "node2");
        std::fs::write(lab.srv("node1", &format!("go-{job}")), b"").expect("written");
        running.end().ok()
    };
    assert_eq!(end("exit", "exit 9"), "9\n");
    assert_eq!(end("term", "kill 15, \\$\\$; sleep 10"), "143\n");
    assert_eq!(end("well", "print qq(said\\n)"), "said\n0\n");
}

#[test]
fn sleep_and_pipes_go_on_after_a_move() {
    require_labs!();
    let lab = Lab::up(2);
    let sleeper = lab.start("node1", "mosrun -J sleep5 sleep 5 & wait $!; echo $?");
    let started = Instant::now();
    lab.await_job("node1", "sleep5");
    lab.migrate("sleep5", "node2");
    assert_eq!(sleeper.end().ok(), "0\n");
    let took = started.elapsed();
    assert!(took > Duration::from_millis(4500) && took < Duration::from_secs(15), "sleep 5 took {took:?}");

    let cat = lab.start(
        "node1",
        "(echo before; while ! test -e /srv/go; do sleep 0.1; done; echo after) | mosrun -J cat cat",
    );
    lab.await_job("node1", "cat");
    lab.migrate("cat", "node2");
    std::fs::write(lab.srv("node1", "go"), b"").expect("written");
    assert_eq!(cat.end().ok(), "before\nafter\n");
}

#[test]
fn signals_sent_at_home_reach_the_job_away() {
    require_labs!();
    let lab = Lab::up(2);
    let perl = r#"perl -e '$| = 1; $SIG{USR1} = sub { print "usr1\n" }; $SIG{TERM} = sub { print "term\n"; exit 4 }; print "ready\n"; sleep 1 while 1'"#;
    let running = lab.start("node1", &format!("mosrun -J sig {perl} > /srv/out; echo $?"));
    let out = lab.srv("node1", "out");
    let says = |what: &str| {
        wait_for(what, || std::fs::read_to_string(&out).ok()?.contains(what).then_some(()));
    };
    says("ready");
    let pid = lab.await_job("node1", "sig");
    lab.migrate("sig", "node2");
    lab.sh("node1", &format!("kill -USR1 {pid}")).ok();
    says("usr1");
    lab.sh("node1", &format!("kill -STOP {pid}")).ok();
    wait_for("the stop", || {
        // `t` for a deputy: its shepherd holds it as well.
        let state = lab.sh("node1", &format!("ps -o state= -p {pid}")).stdout;
        let known = lab.job("node1", "sig")?["state"] == "stopped";
        (state.starts_with(['T', 't']) && known).then_some(())
    });
    lab.sh("node1", &format!("kill -CONT {pid}")).ok();
    lab.sh("node1", &format!("kill -TERM {pid}")).ok();
    says("term");
    assert_eq!(running.end().ok(), "4\n");

    let running = lab.start("node1", "mosrun -J kill9 sleep 1000; echo $?");
    let pid = lab.await_job("node1", "kill9");
    lab.migrate("kill9", "node2");
    lab.sh("node1", &format!("kill -KILL {pid}")).ok();
    assert_eq!(running.end().ok(), "137\n");
    wait_for("the guest's end", || {
        (lab.sh("node2", "ps -eo args").stdout.matches("sleep 1000").count() == 0).then_some(())
    });
}

/// A second thread that waits for a signal sent to it alone.
const THREAD_WAITS: &str = "
import signal, threading
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
def wait():
    print('thread got', int(signal.sigwait({signal.SIGUSR1})), flush=True)
thread = threading.Thread(target=wait)
thread.start()
print('ready', flush=True)
thread.join()
";

#[test]
fn a_signal_to_a_single_thread_reaches_it_away() {
    require_labs!();
    let lab = Lab::up(2);
    std::fs::write(lab.srv("node1", "waits.py"), THREAD_WAITS).expect("written");
    let running = lab.start("node1", "mosrun -J one python3 /srv/waits.py");
    let pid = lab.await_job("node1", "one");
    wait_for("its second thread", || {
        (lab.sh("node1", &format!("ls /proc/{pid}/task")).stdout.lines().count() == 2).then_some(())
    });
    lab.migrate("one", "node2");
    // tgkill(2) has no command.
    let send = format!(
        "python3 -c \"import ctypes, os; tid = max(map(int, os.listdir('/proc/{pid}/task'))); \
         print(ctypes.CDLL(None).syscall({}, {pid}, tid, {}))\"",
        libc::SYS_tgkill,
        libc::SIGUSR1
    );
    assert_eq!(lab.sh("node1", &send).ok(), "0\n");
    assert_eq!(running.end().ok(), format!("ready\nthread got {}\n", libc::SIGUSR1));
}

#[test]
fn a_gibibyte_goes_out_and_comes_back() {
    require_labs!();
    let lab = Lab::up_with(2, &["--cpus-per-node", "0"]);
    worker::install(&lab, "node1");
    let expected = worker::expected(&lab, "node1", 1024, 400);
    let command = worker::command(1024, 400, 0.05);
    let running = lab.start("node1", &format!("mosrun -J big {command}"));
    let pid = lab.await_job("node1", "big");
    let resident = || -> u64 {
        let status = lab.sh("node1", &format!("grep VmRSS /proc/{pid}/status")).ok();
        status.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("VmRSS")
    };
    wait_for("the memory to be filled", || (resident() > 1024 * 1024).then_some(()));
    lab.migrate("big", "node2");
    wait_for("home's memory to be given back", || (resident() < 64 * 1024).then_some(()));
    let shown = lab.sh("node1", &format!("ps -o pid=,args= -p {pid}")).ok();
    assert_eq!(shown.trim(), format!("{pid} {command}"), "ps at home still shows it");
    lab.migrate("big", "home");
    wait_for("the memory to be at home again", || (resident() > 1024 * 1024).then_some(()));
    let ran = running.end();
    assert_eq!(ran.clone().ok(), expected);
}

/// Whatever of a move fails because its process has ended meanwhile, that it has ended is what is told.
#[test]
fn a_job_that_ends_while_it_is_moved_has_ended() {
    require_labs!();
    const JOBS: usize = 60;
    let lab = Lab::up_with(2, &["--cpus-per-node", "0"]);
    // It has ended before, while or after the shepherd looks at it, freezes it, sends it.
    let script = format!(
        "for i in $(seq {JOBS}); do
            mosrun -J brief$i sh -c \"sleep 0.0$((i % 10)); exit 7\" & job=$!
            sleep 0.0$((RANDOM % 6))
            migrate job:brief$i node2 > /dev/null 2>> /srv/refusals
            wait $job; echo $?
        done"
    );
    let ran = lab.sh("node1", &format!("bash -c '{script}'"));
    assert_eq!(ran.ok(), "7\n".repeat(JOBS), "each ends as it would have");
    let refusals = std::fs::read_to_string(lab.srv("node1", "refusals")).unwrap_or_default();
    let strange = refusals.lines().filter(|line| line.contains("why:")).find(|line| {
        !["ended", "no such job", "no job", "no process"].iter().any(|known| line.contains(known))
    });
    assert_eq!(strange, None, "{refusals}");
}
