//! Memory and files without a name that the processes of a subtree share: one object before, one away, one at
//! home again, and no byte of it stale.

use std::fs;
use std::time::Duration;
use systest::lab::{Lab, wait_for};
use systest::require_labs;

/// A lab whose balancer leaves the processes alone.
fn lab(nodes: u32, options: &[&str]) -> Lab {
    let lab = Lab::up_with(nodes, &[&["--cpus-per-node", "0"], options].concat());
    lab.sh("node1", "mosctl policy set balance=off").ok();
    lab
}

/// Puts the script on node 1, in a folder of its own to which the command changes first.
fn script(lab: &Lab, text: &str) -> &'static str {
    let folder = lab.srv("node1", "work");
    fs::create_dir_all(&folder).expect("made");
    fs::write(folder.join("script"), text).expect("written");
    "cd /srv/work && "
}

/// Waits until home's daemon knows all processes of the job.
fn await_processes(lab: &Lab, job: &str, count: usize) {
    wait_for("the job's processes", || {
        (lab.processes("node1").iter().filter(|process| process["job"] == job).count() == count).then_some(())
    });
}

/// A parent and two children. Each of them counts in its own place of every memory, writes a pattern, and
/// checks that the others' counters never go back; in the end all agree on all.
const SHARERS: &str = include_str!("../programs/sharers.py");

/// Moves them about, also in vain: what stands ready and is given up is as it was.
fn moved(user: Option<&str>) {
    let lab = lab(3, &[]);
    let cd = script(&lab, SHARERS);
    lab.sh("node1", "chmod 777 /srv/work").ok();
    let command = format!("{cd} mosrun -J sharers python3 script");
    let command = match user {
        Some(_) => format!("exec runuser -u {} -- sh -c '{command}'", lab.user()),
        None => command,
    };
    let running = lab.start("node1", &command);
    wait_for("the sharers", || lab.srv("node1", "work/ready").exists().then_some(()));
    await_processes(&lab, "sharers", 3);
    for to in ["node2", "node3", "home", "node3", "home", "node2"] {
        lab.sh("node1", &format!("migrate --dry-run job:sharers {to}")).ok();
        lab.migrate("sharers", to);
        std::thread::sleep(Duration::from_millis(200));
    }
    lab.migrate("sharers", "home");
    lab.migrate("sharers", "node3");
    fs::write(lab.srv("node1", "work/stop"), b"").expect("written");
    assert_eq!(running.end().ok(), "as it should be\n");
}

#[test]
fn memory_shared_by_a_subtree_stays_one() {
    require_labs!();
    moved(None);
}

#[test]
fn memory_shared_by_a_users_subtree_stays_one() {
    require_labs!();
    moved(Some("the lab's"));
}

/// A parent and its child with much memory in common, which both add up again and again.
const MUCH: &str = "
import hashlib, mmap, os, sys, time
size = int(sys.argv[1]) << 20
memfd = os.memfd_create('much'); os.ftruncate(memfd, size)
maps = [mmap.mmap(memfd, size), mmap.mmap(-1, size)]
block = os.urandom(1 << 20)
for at in range(0, size, 1 << 20):
    maps[0][at:at + (1 << 20)] = block[at >> 20:] + block[:at >> 20]
    maps[1][at:at + (1 << 20)] = block
sums = [hashlib.sha256(m).hexdigest() for m in maps]
pid = os.fork()
open('ready', 'a').write('x')
while not os.path.exists('stop'):
    time.sleep(0.01)
ok = [hashlib.sha256(m).hexdigest() for m in maps] == sums
if pid == 0: os._exit(0 if ok else 1)
print(ok, os.waitpid(pid, 0)[1], os.fstat(memfd).st_blocks * 512 == size, flush=True)
";

/// A lab with a link so slow that a move takes seconds, and the two of them on node 1.
fn with_much() -> (Lab, systest::lab::Running) {
    let lab = lab(3, &["--bandwidth", "400mbit"]);
    let cd = script(&lab, MUCH);
    let running = lab.start("node1", &format!("{cd} mosrun -J much python3 script 80; echo $?"));
    let ready = lab.srv("node1", "work/ready");
    wait_for("the two of them", || fs::read(&ready).ok().filter(|said| said.len() == 2));
    await_processes(&lab, "much", 2);
    (lab, running)
}

fn stop_well(lab: &Lab, running: systest::lab::Running) {
    fs::write(lab.srv("node1", "work/stop"), b"").expect("written");
    assert_eq!(running.end().ok(), "True 0 True\n0\n");
}

#[test]
fn homes_shepherd_is_killed_while_shared_memory_moves() {
    require_labs!();
    let (lab, running) = with_much();
    let root = lab.await_job("node1", "much");
    let moving = lab.start("node1", "migrate job:much node2");
    // 160 MiB at 400 Mbit/s take more than three seconds.
    std::thread::sleep(Duration::from_millis(1500));
    lab.sh("node1", &format!("pkill -9 -f '[s]hepherd home.*--pid {root} '")).ok();
    assert_ne!(moving.end().status, 0);
    wait_for("them to run on", || {
        let status = lab.sh("node1", &format!("cat /proc/{root}/status")).stdout;
        status.contains("TracerPid:\t0\n").then_some(())
    });
    lab.migrate("much", "node2");
    lab.migrate("much", "home");
    stop_well(&lab, running);
}

#[test]
fn the_host_is_lost_while_shared_memory_moves() {
    require_labs!();
    let (lab, running) = with_much();
    let moving = lab.start("node1", "migrate job:much node2");
    std::thread::sleep(Duration::from_millis(1500));
    lab.sh("node2", "pkill -9 -f '[s]hepherd host'").ok();
    assert_ne!(moving.end().status, 0);
    lab.migrate("much", "node3");
    stop_well(&lab, running);
}

/// The way home is given up in its middle: they go on away, and come home later.
#[test]
fn a_home_coming_of_shared_memory_takes_too_long() {
    require_labs!();
    let (lab, running) = with_much();
    lab.migrate("much", "node2");
    // At home the memory was given back; the memfd is the first file that it has opened.
    let root = lab.await_job("node1", "much");
    assert_eq!(lab.sh("node1", &format!("stat -Lc %b /proc/{root}/fd/3")).ok(), "0\n");
    let ran = lab.sh("node1", "migrate --timeout 1s job:much home");
    assert_ne!(ran.status, 0, "{}", ran.stdout);
    let node = |lab: &Lab| lab.job("node1", "much").expect("there")["node"].clone();
    assert_eq!(node(&lab), "node2");
    lab.migrate("much", "node3");
    lab.migrate("much", "home");
    lab.migrate("much", "node2");
    stop_well(&lab, running);
}
