//! Stops of children: which of them their parent has heard of.

use super::harness::{Case, can_run, run};
use super::trees_memory::child_of;
use std::fs;

/// Children that were stopped and let go on, each waited for as far as its name says; the root tells twice
/// which reports are still to come, and takes them at last.
const STOPS: &str = r#"
import ctypes, os, signal, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
WALL = 0x40000000
chld = []
signal.signal(signal.SIGCHLD, lambda *a: chld.append(1))
def wait_for(name):
    while not os.path.exists(name):
        time.sleep(0.01)
def untold(pid):
    info = ctypes.create_string_buffer(128)
    flags = os.WSTOPPED | os.WCONTINUED | os.WNOHANG | os.WNOWAIT | WALL
    if libc.waitid(1, pid, info, flags) < 0:
        return "none such"
    signo, _, code, _, _, _, status = struct.unpack("7i", info.raw[:28])
    return (code, status) if signo else None
def state(pid):
    return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0]
def until(pid, stopped):
    while (state(pid) == "T") != stopped:
        time.sleep(0.005)
def child():
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        time.sleep(600)
        os._exit(1)
    return pid
def stop(pid, by=signal.SIGSTOP):
    os.kill(pid, by)
    until(pid, True)
def take(pid, flag):
    assert os.waitid(os.P_PID, pid, flag | os.WNOHANG) is not None
def go_on(pid):
    os.kill(pid, signal.SIGCONT)
    until(pid, False)
names = ["never", "stopped", "told of", "gone on", "told, gone on", "told of both", "by TTIN", "by TTIN, told"]
pids = {name: child() for name in names}
for name, pid in pids.items():
    if name == "never":
        continue
    if "TTIN" in name:
        os.setpgid(pid, pid)
    stop(pid, signal.SIGTTIN if "TTIN" in name else signal.SIGSTOP)
    if "told" in name:
        take(pid, os.WSTOPPED)
    if name.endswith("gone on") or name.endswith("both"):
        go_on(pid)
    if name.endswith("both"):
        take(pid, os.WCONTINUED)
wrong = []
def check(what, got, wanted):
    if got != wanted:
        wrong.append(f"{what}: {got} instead of {wanted}")
wanted = {"never": None, "stopped": (5, 19), "told of": None, "gone on": (6, 18), "told, gone on": (6, 18), "told of both": None,
          "by TTIN": (5, 21), "by TTIN, told": None}
stopped = {"stopped", "told of", "by TTIN", "by TTIN, told"}
for name in names:
    check(f"{name} before", untold(pids[name]), wanted[name])
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
# A child stands before its parent is told (do_signal_stop, kernel/signal.c).
while signal.sigtimedwait([signal.SIGCHLD], 0.5):
    pass
chld.clear()
open("ready", "w").close()
for turn in [1, 2]:
    wait_for(f"look{turn}")
    for name, pid in pids.items():
        check(f"{name}, time {turn}", untold(pid), wanted[name])
        check(f"{name} stands, time {turn}", state(pid) == "T", name in stopped)
    check(f"pending, time {turn}", signal.sigpending(), set())
    open(f"looked{turn}", "w").close()
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
check("signals of stops", chld, [])
for name, pid in pids.items():
    if name in stopped:
        go_on(pid)
        check(f"{name} goes on", untold(pid), (6, 18))
    os.kill(pid, signal.SIGKILL)
    check(f"the end of {name}", os.waitpid(pid, 0)[1], 9)
print("\n".join(wrong) if wrong else "as it was", flush=True)
"#;

#[test]
fn stops_that_are_told_and_untold() {
    if !can_run("stops that are told and untold") {
        return;
    }
    let case = Case::new();
    let mut running = case.start("python3", &["-c", STOPS]);
    case.await_file("ready");
    let (root, image) = (running.pid(), case.path("img"));
    let to = image.to_str().expect("UTF-8");
    // What the second dump meets is what the first restore made.
    for turn in [1, 2] {
        let pid = if turn == 1 { root } else { child_of(running.pid()) };
        let saved = run(&["dump", &pid.to_string(), "--to", to, "--tree"]);
        assert!(saved.status.success(), "{}", String::from_utf8_lossy(&saved.stderr));
        running.end();
        running = case.restore();
        case.await_restored(root);
        fs::write(case.path(&format!("look{turn}")), "").expect("written");
        case.await_file(&format!("looked{turn}"));
        fs::remove_dir_all(&image).expect("removed");
    }
    assert!(running.end().success(), "{}", case.output());
    assert_eq!(case.output(), "as it was\n");
}

#[test]
fn a_tree_that_is_left_running_has_its_stops_untold() {
    if !can_run("stops of a tree left running") {
        return;
    }
    let case = Case::new();
    let mut running = case.start("python3", &["-c", STOPS]);
    case.await_file("ready");
    let (root, image) = (running.pid().to_string(), case.path("img"));
    let saved = run(&["dump", &root, "--to", image.to_str().expect("UTF-8"), "--tree", "--leave-running"]);
    assert!(saved.status.success(), "{}", String::from_utf8_lossy(&saved.stderr));
    for turn in [1, 2] {
        fs::write(case.path(&format!("look{turn}")), "").expect("written");
    }
    assert!(running.end().success(), "{}", case.output());
    assert_eq!(case.output(), "as it was\n");
}
