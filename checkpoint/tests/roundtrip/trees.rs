//! Processes with their descendants.

use super::harness::{Case, can_run, exists, installed, migckpt, run};
use super::programs::same_output_with;
use std::fs;
use std::time::{Duration, Instant};

const TREE: &[&str] = &["--tree"];

/// Makes a tree with one of everything, says that it is `ready`, waits for `go`, and looks whether all
/// is as it was. What differs is printed.
const FAMILY: &str = r#"
import os, signal, socket, struct, sys, time
def wait_for(name):
    while not os.path.exists(name):
        time.sleep(0.01)
def stat(pid):
    tail = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()
    return tail[0], int(tail[1]), int(tail[2]), int(tail[3])
wrong = []
def check(what, got, wanted):
    if got != wanted:
        wrong.append(f"{what}: {got} instead of {wanted}")
shared = os.open("shared", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
os.write(shared, b"0123456789")
down_r, down_w = os.pipe()
up_r, up_w = os.pipe()
os.write(down_w, b"in the pipe")
children = {}
def child(name, work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(name, repr(error), flush=True)
            os._exit(99)
        os._exit(0)
    children[name] = pid
def worker():
    wait_for("go")
    got = os.read(down_r, 100)
    os.lseek(shared, 3, os.SEEK_SET)
    os.write(up_w, got + b"|" + str(os.getppid() == root).encode())
    os._exit(7)
def leader():
    os.setsid()
    grandchild = os.fork()
    if grandchild == 0:
        wait_for("go")
        time.sleep(0.3)
        os._exit(11)
    open("grandchild", "w").write(str(grandchild))
    os.rename("grandchild", "grandchild.done")
    wait_for("go")
    got = os.waitpid(grandchild, 0)
    os._exit(12 if got == (grandchild, 11 << 8) and os.getsid(0) == os.getpid() else 13)
def group():
    os.setpgid(0, 0)
    wait_for("go")
def stopped():
    wait_for("go")
    os._exit(21)
def threads():
    import threading
    out = []
    ts = [threading.Thread(target=lambda n=n: (wait_for("go"), out.append(n))) for n in range(5)]
    [t.start() for t in ts]; [t.join() for t in ts]
    os._exit(31 if sorted(out) == list(range(5)) else 32)
root = os.getpid()
child("worker", worker)
child("leader", leader)
child("group", group)
child("threads", threads)
wait_for("grandchild.done")
member = os.fork()
if member == 0:
    wait_for("go")
    os._exit(0)
while stat(children["group"])[2] != children["group"]:
    time.sleep(0.01)
os.setpgid(member, children["group"])
child("stopped", stopped)
os.kill(children["stopped"], signal.SIGSTOP)
os.waitpid(children["stopped"], os.WUNTRACED)
zombie = os.fork()
if zombie == 0:
    os._exit(42)
killed = os.fork()
if killed == 0:
    os.kill(os.getpid(), signal.SIGTERM)
while stat(zombie)[0] != "Z" or stat(killed)[0] != "Z":
    time.sleep(0.01)
before = {name: stat(pid) for name, pid in children.items()}
before["member"] = stat(member)
before["zombie"] = stat(zombie)
chld = []
signal.signal(signal.SIGCHLD, lambda *a: chld.append(1))
open("ready", "w").close()
wait_for("restored")
for name, old in before.items():
    pid = dict(children, member=member, zombie=zombie)[name]
    new = stat(pid)
    check(name + " state", new[0] == "T", old[0] == "T")
    check(name + " parent", new[1], old[1])
    if name != "zombie":
        own = old[2] != before["worker"][2]
        check(name + " group", new[2], old[2] if own else os.getpgid(0))
        check(name + " session", new[3], old[3] if name == "leader" else os.getsid(0))
os.close(down_r)
open("go", "w").close()
check("zombie", os.waitpid(zombie, 0)[1], 42 << 8)
check("killed", os.waitpid(killed, 0)[1], signal.SIGTERM)
check("pipe", os.read(up_r, 100), b"in the pipe|True")
check("worker", os.waitpid(children["worker"], 0)[1], 7 << 8)
check("shared position", os.lseek(shared, 0, os.SEEK_CUR), 3)
check("leader", os.waitpid(children["leader"], 0)[1], 12 << 8)
check("group", os.waitpid(children["group"], 0)[1], 0)
check("member", os.waitpid(member, 0)[1], 0)
check("threads", os.waitpid(children["threads"], 0)[1], 31 << 8)
os.kill(children["stopped"], signal.SIGCONT)
check("stopped", os.waitpid(children["stopped"], 0)[1], 21 << 8)
os.close(up_w)
check("end of the pipe", os.read(up_r, 100), b"")
check("handler", len(chld) >= 1, True)
print("\n".join(wrong) if wrong else "as it was", flush=True)
"#;

/// Whether it comes true within some seconds.
fn soon(is_so: impl Fn() -> bool) -> bool {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !is_so() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

#[test]
fn a_tree_with_one_of_everything() {
    if !can_run("a tree") {
        return;
    }
    let case = Case::new();
    let mut running = case.start("python3", &["-c", FAMILY]);
    case.await_file("ready");
    let (pid, image) = (running.pid().to_string(), case.path("img"));
    let image = image.to_str().expect("UTF-8");
    let refused = run(&["dump", &pid, "--to", image]);
    assert_eq!(refused.status.code(), Some(4), "without --tree it is refused");
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(why.contains("child processes") && why.contains("--tree"), "{why}");
    let saved = run(&["dump", &pid, "--to", image, "--tree"]);
    assert!(saved.status.success(), "{}", String::from_utf8_lossy(&saved.stderr));
    assert!(!running.end().success());
    let shown = run(&["inspect", image, "--json"]);
    let shown: serde_json::Value = serde_json::from_slice(&shown.stdout).expect("JSON");
    let descendants = shown["descendants"].as_array().expect("a list");
    assert_eq!(descendants.len(), 9, "{descendants:#?}");
    for member in descendants {
        let pid = member["pid"].as_i64().expect("a PID") as i32;
        // Its parent's end has made it somebody else's, who has to take note of it.
        assert!(soon(|| !exists(pid)), "{member} is left");
    }
    assert!(run(&["verify", image]).status.success());
    let mut restored = case.restore();
    fs::write(case.path("restored"), "").expect("written");
    assert!(restored.end().success(), "{}", case.output());
    assert_eq!(case.output(), "as it was\n");
}

#[test]
fn a_tree_that_is_left_running() {
    if !can_run("a tree left running") {
        return;
    }
    let case = Case::new();
    let mut running = case.start("python3", &["-c", FAMILY]);
    case.await_file("ready");
    let (pid, image) = (running.pid().to_string(), case.path("img"));
    for _ in 0..5 {
        let _ = fs::remove_dir_all(&image);
        let to = image.to_str().expect("UTF-8");
        let saved = run(&["dump", &pid, "--to", to, "--tree", "--leave-running"]);
        assert!(saved.status.success(), "{}", String::from_utf8_lossy(&saved.stderr));
    }
    // The image cannot be used while its processes live, and nothing of them changes by that.
    let refused = run(&["restore", image.to_str().expect("UTF-8")]);
    assert_eq!(refused.status.code(), Some(4), "{}", String::from_utf8_lossy(&refused.stderr));
    fs::write(case.path("restored"), "").expect("written");
    assert!(running.end().success(), "{}", case.output());
    assert_eq!(case.output(), "as it was\n");
}

#[test]
fn a_failure_leaves_none_of_a_tree() {
    if !can_run("a tree's failure") {
        return;
    }
    let case = Case::new();
    let mut running = case.start("python3", &["-c", FAMILY]);
    case.await_file("ready");
    let (pid, image) = (running.pid().to_string(), case.path("img"));
    let image = image.to_str().expect("UTF-8");
    assert!(run(&["dump", &pid, "--to", image, "--tree"]).status.success());
    running.end();
    // A file that all of them have open is gone: found when the root's memory is there already.
    fs::rename(case.path("shared"), case.path("elsewhere")).expect("renamed");
    let failed = run(&["restore", image]);
    assert!(!failed.status.success());
    let shown: serde_json::Value =
        serde_json::from_slice(&run(&["inspect", image, "--json"]).stdout).expect("JSON");
    let descendants = shown["descendants"].as_array().expect("a list");
    for member in descendants {
        let pid = member["pid"].as_i64().expect("a PID") as i32;
        // Its parent's end has made it somebody else's, who has to take note of it.
        assert!(soon(|| !exists(pid)), "{member} is left");
    }
    assert!(!exists(pid.parse().expect("a PID")));
    // And the image is as good as before.
    fs::rename(case.path("elsewhere"), case.path("shared")).expect("renamed");
    let mut restored = case.restore();
    fs::write(case.path("restored"), "").expect("written");
    assert!(restored.end().success(), "{}", case.output());
    assert_eq!(case.output(), "as it was\n");
}

#[test]
fn whoever_would_stop_itself_is_refused() {
    if !can_run("a tree around migckpt") {
        return;
    }
    let case = Case::new();
    let script = format!("{} dump $$ --tree --to img; echo $?", migckpt().get_program().display());
    let mut running = case.start("sh", &["-c", &script]);
    assert!(running.end().success());
    assert!(
        case.output().contains("would stop itself") && case.output().ends_with("4\n"),
        "{}",
        case.output()
    );
}

#[test]
fn a_pipeline() {
    let script = "cat input input | sort -n -k 4 | awk '{ n[$5]++; s += $3 } END { for (k in n) print k, n[k]; print s }' | sort | tail -n 40";
    same_output_with(TREE, "a pipeline", "sh", &["-c", script], 200_000, 2);
}

#[test]
fn a_shell_with_jobs() {
    let script = "work() { i=0; while [ $i -lt $1 ]; do i=$((i + 1)); x=$(((x * 31 + i) % 65521)); done; echo $1 $x; return $2; }
        work 150000 3 > a & one=$!; work 200000 0 > b & two=$!; work 100 5 > c & three=$!
        wait $one; echo first $?; wait $two; echo second $?; wait $three; echo third $?
        cat a b c; for n in 1 2 3 4 5 6; do expr $n \\* 7; work 20000 0; done";
    same_output_with(TREE, "bash", "bash", &["-c", script], 10, 2);
}

#[test]
fn make_with_four_jobs() {
    if !installed("make -j4", "make") {
        return;
    }
    let makefile = "all: $(foreach n,1 2 3 4 5 6 7 8,o$n)\n\t@cat $^ | sort\n\
        o%:\n\t@awk 'BEGIN { x = $*; for (i = 0; i < 9000000; i++) x = (x * 48271) % 2147483647; print $*, x }' > $@\n";
    let script = "rm -f o? && printf '%s' \"$0\" > Makefile && make -s -j4 all";
    same_output_with(TREE, "make -j4", "sh", &["-c", script, makefile], 10, 2);
}
