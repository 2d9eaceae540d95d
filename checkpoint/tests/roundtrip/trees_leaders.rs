//! Sessions and groups whose leaders are gone or are zombies, orphans that a subreaper has adopted, who is
//! whose child, and by which signal children tell of their end.

use super::harness::{Case, can_run, run};
use super::trees_memory::child_of;
use std::fs;

/// Each process waits; the root tells twice whether all stand as they did.
const LEADERS: &str = r#"
import ctypes, os, signal, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_GET_CHILD_SUBREAPER = 1, 36, 37
SYS_CLONE = 56
__WALL = 0x40000000
def wait_for(name):
    while not os.path.exists(name):
        time.sleep(0.01)
def tell(name):
    with open("." + name, "w") as f:
        f.write(str(os.getpid()))
    os.rename("." + name, name)
def told(name):
    wait_for(name)
    return int(open(name).read())
root = os.getpid()
libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
def member(name):
    tell(name)
    wait_for("go")
    os._exit(9)
def stat(pid):
    tail = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()
    state, ppid, pgid, sid, exit_signal = tail[0], int(tail[1]), int(tail[2]), int(tail[3]), int(tail[35])
    parents = [t for t in os.listdir(f"/proc/{ppid}/task") if str(pid) in open(f"/proc/{ppid}/task/{t}/children").read().split()]
    # The root's session and group are those of whoever restores it.
    home = (os.getpgid(0), os.getsid(0))
    return (state == "Z", ppid, "root's" if pgid == home[0] else pgid, "root's" if sid == home[1] else sid, exit_signal, parents)
def fork(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), flush=True)
        os._exit(3)
    return pid
names = []
def lost_session():
    os.setsid()
    fork(lambda: member("in lost session"))
    fork(lambda: (os.setpgid(0, 0), member("group in lost session")))
    told("in lost session"), told("group in lost session")
    os._exit(0)
os.waitpid(fork(lost_session), 0)
names += ["in lost session", "group in lost session"]
def leader_of_group():
    os.setpgid(0, 0)
    wait_for("group has members")
    os._exit(0)
leader = fork(leader_of_group)
while os.getpgid(leader) != leader:
    time.sleep(0.01)
for name in ["in lost group", "also in lost group"]:
    os.setpgid(fork(lambda: member(name)), leader)
    told(name)
names += ["in lost group", "also in lost group"]
tell("group has members")
os.waitpid(leader, 0)
def zombie_leader():
    os.setsid()
    fork(lambda: member("in zombie's session"))
    told("in zombie's session")
    tell("zombie")
    os._exit(5)
fork(zombie_leader)
names += ["in zombie's session", "zombie"]
def living_leader():
    os.setsid()
    def between():
        fork(lambda: member("adopted"))
        told("adopted")
        os._exit(0)
    os.waitpid(fork(between), 0)
    member("leader")
fork(living_leader)
names += ["adopted", "leader"]
def early():
    fork(lambda: member("older"))
    told("older")
    os.setsid()
    fork(lambda: member("younger"))
    member("parent of both")
fork(early)
names += ["older", "younger", "parent of both"]
def clone(signal, work):
    pid = libc.syscall(SYS_CLONE, signal, 0, 0, 0, 0)
    if pid == 0:
        work()
        os._exit(3)
    return pid
clone(0, lambda: member("silent"))
clone(int(signal.SIGUSR1), lambda: member("loud"))
def silent_zombie():
    tell("silent zombie")
    os._exit(6)
clone(0, silent_zombie)
names += ["silent", "loud", "silent zombie"]
stay = threading.Event()
def thread():
    def of_thread():
        libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        member("of a thread")
    fork(of_thread)
    stay.wait()
other = threading.Thread(target=thread)
other.start()
names += ["of a thread"]
pids = {name: told(name) for name in names}
for name in ["zombie", "silent zombie"]:
    while not stat(pids[name])[0]:
        time.sleep(0.01)
wrong = []
def check(what, got, wanted):
    if got != wanted:
        wrong.append(f"{what}: {got} instead of {wanted}")
before = {name: stat(pid) for name, pid in pids.items()}
chld = []
signal.signal(signal.SIGCHLD, lambda *a: chld.append(1))
signal.signal(signal.SIGUSR1, lambda *a: chld.append(2))
open("ready", "w").close()
for turn in [1, 2]:
    wait_for(f"look{turn}")
    for name, pid in pids.items():
        check(f"{name}, time {turn}", stat(pid), before[name])
    subreaper = ctypes.c_int()
    libc.prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(subreaper), 0, 0, 0)
    check("subreaper", subreaper.value, 1)
    check("signals of children's ends", chld, [])
    tell(f"looked{turn}")
# The thread's end is the death of its child's parent.
stay.set()
other.join()
check("child of a thread", os.waitpid(pids["of a thread"], 0)[1], int(signal.SIGTERM))
tell("go")
for name, wanted in [("zombie", 5), ("silent zombie", 6), ("silent", 9), ("loud", 9), ("in lost session", 9), ("in lost group", 9), ("adopted", 9), ("in zombie's session", 9)]:
    check(name, os.waitpid(pids[name], __WALL)[1], wanted << 8)
check("told by SIGUSR1", 2 in chld, True)
try:
    while True:
        os.waitpid(-1, __WALL)
except ChildProcessError:
    pass
print("\n".join(wrong) if wrong else "as it was", flush=True)
"#;

#[test]
fn lost_leaders_and_orphans() {
    if !can_run("lost leaders") {
        return;
    }
    let case = Case::new();
    let mut running = case.start("python3", &["-c", LEADERS]);
    case.await_file("ready");
    let image = case.path("img");
    let to = image.to_str().expect("UTF-8");
    // What the second dump meets is what the first restore made.
    for turn in [1, 2] {
        let pid = if turn == 1 { running.pid() } else { child_of(running.pid()) };
        let saved = run(&["dump", &pid.to_string(), "--to", to, "--tree"]);
        assert!(saved.status.success(), "{}", String::from_utf8_lossy(&saved.stderr));
        running.end();
        running = case.restore();
        fs::write(case.path(&format!("look{turn}")), "").expect("written");
        case.await_file(&format!("looked{turn}"));
        fs::remove_dir_all(&image).expect("removed");
    }
    assert!(running.end().success(), "{}", case.output());
    assert_eq!(case.output(), "as it was\n");
}
