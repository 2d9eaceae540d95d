//! Processes with their descendants, moved as a whole: out, from host to host, home again.

use serde_json::Value;
use std::fs;
use std::time::Duration;
use systest::lab::{Lab, wait_for};
use systest::require_labs;

/// A lab whose balancer leaves the children alone.
fn lab(nodes: u32) -> Lab {
    let lab = Lab::up_with(nodes, &["--cpus-per-node", "0"]);
    lab.sh("node1", "mosctl policy set balance=off").ok();
    lab
}

/// The processes of a job, as home's daemon has them.
fn processes(lab: &Lab, job: &str) -> Vec<Value> {
    let all = lab.processes("node1").into_iter();
    all.filter(|process| process["job"] == job && process["home"] == "node1").collect()
}

/// Lets the lab's node 1 run a script as a job, with `/srv/work` as a clean working directory.
fn script(lab: &Lab, node: &str, text: &str) -> String {
    let folder = lab.srv(node, "work");
    fs::create_dir_all(&folder).expect("made");
    fs::write(folder.join("script"), text).expect("written");
    "cd /srv/work && ".to_string()
}

/// Waits until the job has so many processes.
fn await_processes(lab: &Lab, job: &str, count: usize) {
    wait_for("the job's processes", || (processes(lab, job).len() >= count).then_some(()));
}

const COUNTING: &str = "
work() { i=0; x=$2; while [ $i -lt $1 ]; do i=$((i + 1)); x=$(((x * 31 + i) % 65521)); done; echo $2 $x; }
work 2500000 3 > a & work 2500000 5 > b & work 2500000 7 > c &
wait
cat a b c
";

#[test]
fn children_that_compute_go_out_and_come_home() {
    require_labs!();
    let lab = lab(3);
    let cd = script(&lab, "node1", COUNTING);
    let plain = lab.sh("node1", &format!("{cd} sh script")).ok();
    let running = lab.start("node1", &format!("{cd} mosrun -J tree sh script"));
    await_processes(&lab, "tree", 4);
    lab.migrate("tree", "node2");
    let there = processes(&lab, "tree");
    assert!(there.len() == 4 && there.iter().all(|p| p["node"] == "node2"), "{there:#?}");
    lab.migrate("tree", "node3");
    lab.migrate("tree", "home");
    lab.migrate("tree", "node3");
    lab.migrate("tree", "home");
    assert!(processes(&lab, "tree").iter().all(|p| p["node"] == "node1"));
    assert_eq!(running.end().ok(), plain);
    let rid = |node: &str| !lab.sh(node, "ps -eo args").stdout.contains("script");
    wait_for("the guests to be gone", || (rid("node2") && rid("node3")).then_some(()));
}

/// A worker, a session with a grandchild, groups, threads, a stopped child, zombies, a pipe, a shared file.
const FAMILY: &str = include_str!("../programs/family.py");

#[test]
fn a_family_with_one_of_everything() {
    require_labs!();
    let lab = lab(3);
    let cd = script(&lab, "node1", FAMILY);
    let running = lab.start("node1", &format!("{cd} mosrun -J family python3 script"));
    wait_for("the family", || lab.srv("node1", "work/ready").exists().then_some(()));
    await_processes(&lab, "family", 8);
    for to in ["node2", "node3", "home", "node3", "home", "node2"] {
        lab.migrate("family", to);
    }
    // Away: they look at each other, end, and are waited for; for a `kill` they come home.
    fs::write(lab.srv("node1", "work/restored"), b"").expect("written");
    assert_eq!(running.end().ok(), "as it was\n");
}

#[test]
fn children_end_and_are_waited_for_away() {
    require_labs!();
    let lab = lab(2);
    // `wait` and `cat` of dash need no fork but `cat` itself, for which all come home.
    let text = "
work() { i=0; while [ $i -lt $1 ]; do i=$((i + 1)); done; return $2; }
work 1500000 3 & one=$!
work 1600000 0 & two=$!
work 5000000 5 & three=$!
wait $one; echo first $?
wait $two; echo second $?
wait $three; echo third $?
";
    let cd = script(&lab, "node1", text);
    let running = lab.start("node1", &format!("{cd} mosrun -J ends sh script"));
    await_processes(&lab, "ends", 4);
    lab.migrate("ends", "node2");
    // The first two end there; the script has waited for them.
    wait_for("the first two ends", || (processes(&lab, "ends").len() == 2).then_some(()));
    lab.migrate("ends", "home");
    assert_eq!(running.end().ok(), "first 3\nsecond 0\nthird 5\n");
}

#[test]
fn a_job_whose_children_outlive_it() {
    require_labs!();
    let lab = lab(2);
    let text = "
import os, sys, time
if os.fork() == 0:
    while os.getppid() != 1: time.sleep(0.05)
    time.sleep(0.5)
    open('orphan', 'w').write('done')
    os._exit(0)
while not os.path.exists('go'): time.sleep(0.05)
sys.exit(3)
";
    let cd = script(&lab, "node1", text);
    let running = lab.start("node1", &format!("{cd} mosrun -J orphan python3 script; echo $?"));
    await_processes(&lab, "orphan", 2);
    lab.migrate("orphan", "node2");
    fs::write(lab.srv("node1", "work/go"), b"").expect("written");
    assert_eq!(running.end().ok(), "3\n");
    wait_for("the orphan's work", || lab.srv("node1", "work/orphan").exists().then_some(()));
    wait_for("the shepherds' end", || {
        let rid = |node: &str| !lab.sh(node, "ps -eo args").stdout.contains("migd shepherd");
        (rid("node1") && rid("node2")).then_some(())
    });
}

/// Runs the script as a job; moves it out, on and home without rest until it ends; compares what it has
/// said with what it says when nobody disturbs it.
fn as_unmoved(lab: &Lab, cd: &str, command: &str, moves_at_least: usize) {
    let plain = lab.sh("node1", &format!("{cd} {command}")).ok();
    let mut running = lab.start("node1", &format!("{cd} mosrun -J moved {command}"));
    lab.await_job("node1", "moved");
    let mut moves = 0;
    for to in ["node2", "node3", "home", "node3", "node2"].iter().cycle() {
        if !running.runs() {
            break;
        }
        // It may have come home by itself, or be on its way, or have ended.
        moves += usize::from(lab.sh("node1", &format!("migrate job:moved {to}")).status == 0);
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(running.end().ok(), plain);
    assert!(moves >= moves_at_least, "it was moved {moves} times only");
    wait_for("the guests to be gone", || {
        let rid = |node: &str| !lab.sh(node, "ps -eo args").stdout.contains("migd shepherd");
        (rid("node1") && rid("node2") && rid("node3")).then_some(())
    });
}

#[test]
fn make_with_four_jobs() {
    require_labs!();
    let lab = lab(3);
    let makefile = "all: o1 o2 o3 o4 o5 o6 o7 o8\n\t@cat $^ | sort\n\
        o%:\n\t@awk 'BEGIN { x = $*; for (i = 0; i < 4000000; i++) x = (x * 48271) % 2147483647; print $*, x }' > $@\n";
    let cd = script(&lab, "node1", makefile);
    as_unmoved(&lab, &cd, "sh -c 'rm -f o?; make -f script -s -j4 all'", 2);
}

#[test]
fn a_pipeline() {
    require_labs!();
    let lab = lab(3);
    let input: String = (0..100_000u64).map(|n| format!("{} {}\n", n * 7919 % 20_011, n % 13)).collect();
    let cd = script(&lab, "node1", &input);
    let command = "sh -c 'cat script script script script | sort -n | awk \"{ s += \\$1 * NR; n[\\$2]++ } \
                   END { print s; for (k in n) print k, n[k] }\" | sort'";
    as_unmoved(&lab, &cd, command, 1);
}

#[test]
fn a_shell_with_jobs() {
    require_labs!();
    let lab = lab(3);
    let text = "
work() { i=0; while [ $i -lt $1 ]; do i=$((i + 1)); x=$(((x * 31 + i) % 65521)); done; echo $1 $x; return $2; }
work 150000 3 > a & one=$!; work 200000 0 > b & two=$!; work 100 5 > c & three=$!
wait $one; echo first $?; wait $two; echo second $?; wait $three; echo third $?
cat a b c; for n in 1 2 3; do expr $n \\* 7; work 50000 0; done
";
    let cd = script(&lab, "node1", text);
    as_unmoved(&lab, &cd, "bash script", 2);
}

/// Three children with some memory each, that end after so many seconds; their parent tells how.
const WAITING: &str = "
import os, sys, time
kids = []
for n in range(3):
    pid = os.fork()
    if pid == 0:
        blob = os.urandom(1 << 20) * int(sys.argv[2])
        end = time.time() + float(sys.argv[1])
        while time.time() < end: time.sleep(0.02)
        os._exit(n)
    kids.append(pid)
for n, pid in enumerate(kids):
    print(n, os.waitpid(pid, 0)[1], flush=True)
";

/// The PIDs at home of the root and its children.
fn pids(lab: &Lab, job: &str) -> Vec<i64> {
    let mut pids: Vec<i64> =
        processes(lab, job).iter().filter_map(|process| process["pid"].as_i64()).collect();
    pids.sort_unstable();
    pids
}

#[test]
fn a_child_moves_while_its_parent_waits_at_home() {
    require_labs!();
    let lab = lab(2);
    let cd = script(&lab, "node1", WAITING);
    let running = lab.start("node1", &format!("{cd} mosrun -J middle python3 script 12 1"));
    await_processes(&lab, "middle", 4);
    let all = pids(&lab, "middle");
    lab.sh("node1", &format!("migrate {} node2", all[1])).ok();
    let there = processes(&lab, "middle").into_iter().filter(|p| p["node"] == "node2").count();
    assert_eq!(there, 1);
    // The whole moves whole: the one that is away comes home for it.
    lab.sh("node1", &format!("migrate {} node2", all[0])).ok();
    let there = processes(&lab, "middle").into_iter().filter(|p| p["node"] == "node2").count();
    assert_eq!(there, 4);
    // A signal to a deputy at home reaches its guest; its parent, away, hears of the end there.
    lab.sh("node1", &format!("kill -TERM {}", all[2])).ok();
    wait_for("the end of the second child", || (processes(&lab, "middle").len() == 3).then_some(()));
    assert_eq!(running.end().ok(), "0 0\n1 15\n2 512\n");
}

/// A parent with memory that its children have too, some pages of which they have written.
const COMMON: &str = "
import hashlib, mmap, os, time
size = 48 << 20
m = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
block = os.urandom(1 << 20)
for at in range(0, size, 1 << 20):
    m[at:at + (1 << 20)] = block[at >> 20:] + block[:at >> 20]
kids = []
for n in range(3):
    pid = os.fork()
    if pid == 0:
        for at in range(n * 4096, size, 64 << 12): m[at:at + 3] = b'kid'
        sum = hashlib.sha256(m).hexdigest()
        while not os.path.exists('stop'): time.sleep(0.02)
        os._exit(0 if hashlib.sha256(m).hexdigest() == sum else 1)
    kids.append(pid)
for at in range(5 << 12, size, 64 << 12): m[at:at + 6] = b'parent'
sum = hashlib.sha256(m).hexdigest()
open('ready', 'w').close()
while not os.path.exists('stop'): time.sleep(0.02)
print(hashlib.sha256(m).hexdigest() == sum, [os.waitpid(pid, 0)[1] for pid in kids], flush=True)
";

#[test]
fn memory_in_common_goes_over_the_link_once() {
    require_labs!();
    let lab = lab(3);
    let cd = script(&lab, "node1", COMMON);
    let running = lab.start("node1", &format!("{cd} mosrun -J common python3 script"));
    wait_for("the family", || lab.srv("node1", "work/ready").exists().then_some(()));
    await_processes(&lab, "common", 4);
    std::thread::sleep(Duration::from_millis(500));
    let sent = |to: &str| {
        let said = lab.sh("node1", &format!("migrate --json job:common {to}")).ok();
        let said: Value = serde_json::from_str(&said).expect("JSON");
        let report = said.get(0).or_else(|| said["reports"].get(0)).unwrap_or(&said);
        let bytes = |name: &str| report[name].as_u64().unwrap_or_else(|| panic!("no {name}: {said}"));
        (bytes("bytes") >> 20, bytes("wire_bytes") >> 20)
    };
    let (all, first) = sent("node2");
    assert!(all > 4 * 48 && first < 80, "{first} of {all} MiB went over the link");
    for to in ["node3", "home", "node2"] {
        sent(to);
    }
    fs::write(lab.srv("node1", "work/stop"), b"").expect("written");
    assert_eq!(running.end().ok(), "True [0, 0, 0]\n");
}

#[test]
fn homes_shepherd_is_killed_in_the_middle_of_a_move() {
    require_labs!();
    let lab = Lab::up_with(2, &["--bandwidth", "400mbit", "--cpus-per-node", "0"]);
    lab.sh("node1", "mosctl policy set balance=off").ok();
    let cd = script(&lab, "node1", WAITING);
    let running = lab.start("node1", &format!("{cd} mosrun -J mid python3 script 40 60"));
    await_processes(&lab, "mid", 4);
    std::thread::sleep(Duration::from_secs(2));
    let root = pids(&lab, "mid")[0];
    let moving = lab.start("node1", "migrate job:mid node2");
    // 180 MiB at 400 Mbit/s take some seconds.
    std::thread::sleep(Duration::from_millis(1500));
    lab.sh("node1", &format!("pkill -9 -f '[s]hepherd home.*--pid {root} '")).ok();
    assert_ne!(moving.end().status, 0);
    wait_for("all of them to run on", || {
        let runs = |pid: &i64| {
            let status = lab.sh("node1", &format!("cat /proc/{pid}/status")).stdout;
            status.contains("TracerPid:\t0\n") && status.contains("SigBlk:\t0000000000000000\n")
        };
        pids(&lab, "mid").iter().all(runs).then_some(())
    });
    assert_eq!(pids(&lab, "mid").len(), 4);
    lab.migrate("mid", "node2");
    lab.migrate("mid", "home");
    assert_eq!(running.end().ok(), "0 0\n1 256\n2 512\n");
}

#[test]
fn the_host_is_lost_with_a_subtree() {
    require_labs!();
    let lab = lab(2);
    let cd = script(&lab, "node1", WAITING);
    let running = lab.start("node1", &format!("{cd} mosrun -J lost python3 script 1000 1; echo $?"));
    await_processes(&lab, "lost", 4);
    lab.migrate("lost", "node2");
    lab.sh("node2", "pkill -9 -f '[s]hepherd host'").ok();
    // None of them is left, at either side, and nobody waits for one.
    assert_eq!(running.end().ok(), "137\n");
    wait_for("all of it to be gone", || {
        let rid = |node: &str| {
            let shown = lab.sh(node, "ps -eo args").stdout;
            !shown.contains("python3 script") && !shown.contains("migd shepherd")
        };
        (rid("node1") && rid("node2")).then_some(())
    });
}

/// A parent that stops its child, lets it go on and ends it, and is told of each.
const SIGNALLING: &str = "
import os, signal, time
def wait_for(name):
    while not os.path.exists(name): time.sleep(0.05)
pid = os.fork()
if pid == 0:
    signal.signal(signal.SIGCONT, lambda *a: open('conts', 'a').write('c'))
    while True: time.sleep(0.05)
wait_for('away')
os.kill(pid, signal.SIGSTOP)
print('stopped', os.waitpid(pid, os.WUNTRACED)[1] == signal.SIGSTOP << 8 | 0x7f, flush=True)
wait_for('seen')
os.kill(pid, signal.SIGCONT)
print('continued', os.WIFCONTINUED(os.waitpid(pid, os.WCONTINUED)[1]), flush=True)
wait_for('home')
os.kill(pid, signal.SIGUSR1)
print('ended', os.waitpid(pid, 0)[1] == signal.SIGUSR1, flush=True)
";

#[test]
fn they_signal_each_other_where_they_are() {
    require_labs!();
    let lab = lab(2);
    let cd = script(&lab, "node1", SIGNALLING);
    let running = lab.start("node1", &format!("{cd} mosrun -J sig python3 script"));
    await_processes(&lab, "sig", 2);
    let child = pids(&lab, "sig")[1];
    std::thread::sleep(Duration::from_millis(500));
    lab.migrate("sig", "node2");
    let say = |name: &str| fs::write(lab.srv("node1", &format!("work/{name}")), b"").expect("written");
    say("away");
    let state = || lab.sh("node1", &format!("ps -o state= -p {child}")).stdout;
    wait_for("its deputy to stop too", || state().starts_with(['T', 't']).then_some(()));
    let all = processes(&lab, "sig");
    assert!(all.iter().all(|process| process["node"] == "node2"), "none came home for a signal: {all:#?}");
    lab.migrate("sig", "home");
    wait_for("it to be stopped at home", || state().starts_with('T').then_some(()));
    lab.migrate("sig", "node2");
    say("seen");
    let conts = lab.srv("node1", "work/conts");
    wait_for("its handler of SIGCONT", || fs::read(&conts).ok().filter(|said| !said.is_empty()));
    lab.migrate("sig", "home");
    say("home");
    assert_eq!(running.end().ok(), "stopped True\ncontinued True\nended True\n");
    assert_eq!(fs::read(&conts).expect("there"), b"c", "one SIGCONT was sent");
}
