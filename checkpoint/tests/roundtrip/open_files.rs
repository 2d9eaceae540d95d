//! Open files of every kind: prepared by a Python program that looks, when it was saved and restored
//! twice, whether all is as it was, and prints what is not.

use super::harness::{Case, Running, can_run, installed, run};
use std::fs;
use std::time::Duration;

/// What every program here begins with. `pause` tells that all is prepared, and returns when it has
/// been saved and restored; `other` runs a program that has none of our files, and gives what it prints.
pub const PRELUDE: &str = r#"
import ctypes, errno, fcntl, os, select, signal, struct, subprocess, sys, time
libc = ctypes.CDLL(None, use_errno=True)
wrong = []
def check(what, got, wanted):
    if got != wanted:
        wrong.append(f"{what}: {got} instead of {wanted}")
def wait_for(name):
    deadline = time.time() + 100
    while not os.path.exists(name) and time.time() < deadline:
        time.sleep(0.01)
def pause():
    open("ready", "w").close()
    wait_for("go")
def other(code):
    code = "import fcntl, os, struct\n" + code
    return subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL).stdout.decode().strip()
def info(fd, key):
    lines = open(f"/proc/self/fdinfo/{fd}").read().splitlines()
    return [line[len(key):] for line in lines if line.startswith(key)]
def end():
    print("\n".join(wrong) if wrong else "as it was", flush=True)
    os._exit(0)
"#;

/// Starts the program and waits until it is prepared.
pub fn prepared(case: &Case, program: &str) -> Running {
    let running = case.start("python3", &["-c", &format!("{PRELUDE}{program}\nend()\n")]);
    case.await_file("ready");
    // It says so a moment before it waits.
    std::thread::sleep(Duration::from_millis(50));
    running
}

fn save(case: &Case, pid: i32, more: &[&str]) {
    let (pid, image) = (pid.to_string(), case.path("img"));
    let done = run(&[&["dump", &pid, "--to", image.to_str().expect("UTF-8")], more].concat());
    assert!(done.status.success(), "dump: {}", String::from_utf8_lossy(&done.stderr));
}

/// Saves and restores it twice, lets it look, and takes what it says.
fn found_after(program: &str, more: &[&str]) -> Option<String> {
    let name = std::thread::current().name().unwrap_or("open_files").to_string();
    if !can_run(&name) || !installed(&name, "python3") {
        return None;
    }
    let case = Case::new();
    let mut running = prepared(&case, program);
    let pid = running.pid();
    save(&case, pid, more);
    running.end();
    let mut restored = case.restore();
    case.await_restored(pid);
    save(&case, pid, more);
    assert_eq!(restored.end().code(), Some(128 + 9), "{}", case.output());
    let mut restored = case.restore();
    fs::write(case.path("go"), b"").expect("lets it go on");
    let status = restored.end();
    assert!(status.success(), "{status}: {}", case.output());
    Some(case.output())
}

#[track_caller]
pub fn survives(program: &str) {
    if let Some(output) = found_after(program, &[]) {
        assert_eq!(output, "as it was\n");
    }
}

#[track_caller]
pub fn survives_as_tree(program: &str) {
    if let Some(output) = found_after(program, &["--tree"]) {
        assert_eq!(output, "as it was\n");
    }
}

/// Locks of every kind, and what a stranger can have of the files.
const LOCKS: &str = r#"
def ranged(command, fd, kind, start, length):
    return fcntl.fcntl(fd, command, struct.pack("hhqqi4x", kind, 0, start, length, 0))
a = os.open("a", os.O_RDWR | os.O_CREAT); os.write(a, b"x" * 100)
again = os.open("a", os.O_RDONLY)
fcntl.lockf(a, fcntl.LOCK_EX, 10, 5)
fcntl.lockf(a, fcntl.LOCK_SH, 10, 50)
fcntl.lockf(a, fcntl.LOCK_EX, 0, 1000)
b = os.open("b", os.O_RDWR | os.O_CREAT)
fcntl.flock(b, fcntl.LOCK_EX)
copy = os.dup(b)
c = os.open("c", os.O_RDWR | os.O_CREAT)
fcntl.flock(c, fcntl.LOCK_SH)
ranged(37, c, fcntl.F_WRLCK, 3, 4)
ranged(37, c, fcntl.F_RDLCK, 100, 0)
d = os.open("d", os.O_RDONLY | os.O_CREAT)
fcntl.fcntl(d, fcntl.F_SETLEASE, fcntl.F_RDLCK)
e = os.open("e", os.O_RDWR | os.O_CREAT)
fcntl.fcntl(e, fcntl.F_SETLEASE, fcntl.F_WRLCK)
def held():
    def words(fd):
        return sorted(" ".join(line.split()[1:4] + line.split()[-2:]) for line in info(fd, "lock:"))
    return [words(fd) for fd in (a, again, b, copy, c, d, e)]
before = held()
check("prepared", sum(map(len, before)), 10)
pause()
check("locks", held(), before)
ask = """
def free(name, start, kind):
    f = os.open(name, os.O_RDWR)
    got = fcntl.fcntl(f, fcntl.F_GETLK, struct.pack("hhqqi4x", kind, 0, start, 1, 0))
    return struct.unpack("hhqqi4x", got)[0] == fcntl.F_UNLCK, struct.unpack("hhqqi4x", got)[4]
print([free("a", at, fcntl.F_WRLCK) for at in (4, 5, 14, 15, 50, 59, 60, 1000, 5000)],
      [free("a", at, fcntl.F_RDLCK)[0] for at in (5, 50, 1000)],
      [free("c", at, fcntl.F_WRLCK) for at in (2, 3, 6, 7, 100, 5000)])
def flock(name, how):
    f = os.open(name, os.O_RDWR)
    try:
        fcntl.flock(f, how | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
print(flock("b", fcntl.LOCK_SH), flock("c", fcntl.LOCK_SH), flock("c", fcntl.LOCK_EX))
"""
us = os.getpid()
check("for others", other(ask),
    str([(True, 0), (False, us), (False, us), (True, 0), (False, us), (False, us), (True, 0), (False, us), (False, us)])
    + " " + str([False, True, False])
    + " " + str([(True, 0), (False, -1), (False, -1), (True, 0), (False, -1), (False, -1)])
    + "\nFalse True False")
# A lease is given up when somebody opens the file.
told = []
signal.signal(signal.SIGIO, lambda *a: told.append(1))
def breaking(name, flags, fd):
    child = subprocess.Popen([sys.executable, "-c", f"import os; os.open('{name}', {flags})"])
    deadline = time.time() + 20
    while not told and time.time() < deadline:
        time.sleep(0.01)
    check("told of " + name, len(told), 1)
    told.clear()
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    check("opened " + name, child.wait(), 0)
breaking("d", os.O_WRONLY, d)
breaking("e", os.O_RDONLY, e)
# A copy is closed: the lock stays. The other is closed: it is gone.
os.close(b)
check("one copy closed", other("fcntl.flock(os.open('b', 0), fcntl.LOCK_SH | fcntl.LOCK_NB)\nprint(1)"), "")
os.close(copy)
check("both closed", other("fcntl.flock(os.open('b', 0), fcntl.LOCK_SH | fcntl.LOCK_NB)\nprint(1)"), "1")
# Closing any descriptor of the file gives up POSIX locks.
os.close(again)
check("closed", info(a, "lock:"), [])
"#;

#[test]
fn locks_and_leases() {
    survives(LOCKS);
}

/// A lock that two processes have, a lock of each, and a third that waits for one of them.
const LOCKS_OF_A_TREE: &str = r#"
shared = os.open("shared", os.O_RDWR | os.O_CREAT)
own = os.open("own", os.O_RDWR | os.O_CREAT); os.write(own, b"x" * 100)
child = os.fork()
if child == 0:
    fcntl.flock(shared, fcntl.LOCK_EX)
    fcntl.lockf(own, fcntl.LOCK_EX, 10, 50)
    open("locked", "w").close()
    wait_for("ask")
    os._exit(len(info(own, "lock:")))
wait_for("locked")
fcntl.lockf(own, fcntl.LOCK_EX, 10, 0)
waiter = os.fork()
if waiter == 0:
    mine = os.open("shared", os.O_RDWR)
    os.close(shared)
    open("waits", "w").close()
    fcntl.flock(mine, fcntl.LOCK_EX)
    os.write(mine, b"had it")
    fcntl.lockf(own, fcntl.LOCK_EX, 10, 0)
    os._exit(9)
wait_for("waits")
time.sleep(0.2)
pause()
check("nobody else has it", os.path.getsize("shared"), 0)
check("own", len(info(own, "lock:")), 1)
check("it is the child's as well", len(info(shared, "lock:")), 1)
os.close(shared)
time.sleep(0.2)
check("the child has it still", os.path.getsize("shared"), 0)
open("ask", "w").close()
check("child", os.waitpid(child, 0)[1], 1 << 8)
deadline = time.time() + 20
while os.path.getsize("shared") == 0 and time.time() < deadline:
    time.sleep(0.01)
check("the waiter has it", open("shared").read(), "had it")
time.sleep(0.1)
check("and waits for ours", os.waitpid(waiter, os.WNOHANG), (0, 0))
fcntl.lockf(own, fcntl.LOCK_UN)
check("waiter", os.waitpid(waiter, 0)[1], 9 << 8)
"#;

#[test]
fn locks_of_a_tree() {
    survives_as_tree(LOCKS_OF_A_TREE);
}

#[test]
fn a_lock_that_somebody_has_taken_meanwhile() {
    if !can_run("a_lock_that_somebody_has_taken_meanwhile") {
        return;
    }
    for take in ["fcntl.flock(f, fcntl.LOCK_EX)", "fcntl.lockf(f, fcntl.LOCK_EX)"] {
        let case = Case::new();
        let open = format!("f = os.open('lock', os.O_RDWR | os.O_CREAT)\n{take}\n");
        let mut running = prepared(&case, &format!("{open}pause()"));
        let pid = running.pid();
        save(&case, pid, &[]);
        running.end();
        fs::remove_file(case.path("ready")).expect("removes");
        let thief = prepared(&case, &format!("{open}pause()"));
        let done = run(&["restore", case.path("img").to_str().expect("UTF-8")]);
        let text = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.code(), Some(4), "{text}");
        let wanted = format!("cannot be taken again: process {} uses it", thief.pid());
        assert!(text.contains(&wanted) && text.contains("/lock (fd 3 of process"), "{text}");
        assert!(!super::harness::exists(pid), "a process was left");
        drop(thief);
        fs::write(case.path("go"), b"").expect("lets it go on");
        assert!(case.restore().end().success());
        assert_eq!(case.output(), "as it was\n");
    }
}

/// Who is signalled when there is something to read, and with what signal.
const OWNERS: &str = r#"
os.setpgid(0, 0)
SETSIG, GETSIG, SETOWN_EX, GETOWN_EX = 10, 11, 15, 16
reading, writing = os.pipe()
own_r, own_w = os.pipe()
group_r, group_w = os.pipe()
quiet_r, quiet_w = os.pipe()
signals = signal.SIGRTMIN + 2, signal.SIGUSR1, signal.SIGIO
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
child = os.fork()
if child == 0:
    got = signal.sigtimedwait({signals[0]}, 60)
    os._exit(got.si_fd if hasattr(got, "si_fd") else 7)
def own(fd, kind, pid, number=0, flags=os.O_ASYNC):
    fcntl.fcntl(fd, SETSIG, int(number))
    fcntl.fcntl(fd, SETOWN_EX, struct.pack("ii", kind, pid))
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | flags)
own(reading, 1, child, signals[0])
own(own_r, 0, libc.gettid(), signals[1])
own(group_r, 2, os.getpgid(0))
own(quiet_r, 1, os.getpid(), signals[1], 0)
def told():
    return [(fcntl.fcntl(fd, GETSIG), fcntl.fcntl(fd, GETOWN_EX, bytes(8)), fcntl.fcntl(fd, fcntl.F_GETFL))
            for fd in (reading, own_r, group_r, quiet_r)]
before = told()
pause()
now = told()
check("owners", now[:2] + now[3:], before[:2] + before[3:])
check("a group", now[2], (0, struct.pack("ii", 2, os.getpgid(0)), before[2][2]))
check("nothing yet", signal.sigpending(), set())
os.write(quiet_w, b"x")
check("nothing without O_ASYNC", signal.sigpending(), set())
os.write(own_w, b"x")
check("a thread", signal.sigtimedwait({signals[1]}, 5).si_signo, signals[1])
os.write(group_w, b"x")
check("a group is told", signal.sigtimedwait({signals[2]}, 5).si_signo, signals[2])
os.write(writing, b"x")
check("the child", os.waitpid(child, 0)[1], 7 << 8)
"#;

#[test]
fn owners_are_signalled() {
    survives_as_tree(OWNERS);
}

#[test]
fn another_root() {
    // Its working directory is outside.
    survives(
        r#"
os.mkdir("jail")
with open("jail/inside", "w") as f: f.write("kept")
kept = open("jail/inside")
os.chroot("jail")
pause()
check("the file it has open", kept.read(), "kept")
check("its root", open("/inside").read(), "kept")
check("what is outside", os.path.exists("/etc"), False)
check("its directory", os.path.exists("jail"), True)
"#,
    );
    // And here within.
    survives(
        r#"
os.mkdir("deep")
os.chroot(".")
os.chdir("/deep")
def pause():
    open("/ready", "w").close()
    wait_for("/go")
pause()
check("its directory", os.getcwd(), "/deep")
check("its root", sorted(os.listdir("/"))[:1], ["deep"])
"#,
    );
}
