//! Files with a name that are written through memory (MAP_SHARED) while who writes them is away: their bytes come
//! home, into the very files that were mapped, and nobody else at home uses them unnoticed.

use std::fs;
use std::time::{Duration, Instant};
use systest::lab::{Lab, Running, wait_for};
use systest::require_labs;

/// A lab whose balancer leaves the processes alone.
fn lab(nodes: u32, options: &[&str]) -> Lab {
    let lab = Lab::up_with(nodes, &[&["--cpus-per-node", "0"], options].concat());
    lab.sh("node1", "mosctl policy set balance=off && mkdir -m 777 /srv/work").ok();
    lab
}

/// Starts a script in `/srv/work` of node 1 as a job, and waits until it says that it is ready.
fn start(lab: &Lab, job: &str, text: &str) -> Running {
    fs::write(lab.srv("node1", "work/script"), text).expect("written");
    let command = format!("cd /srv/work && mosrun -J {job} python3 script; echo $?");
    let running = lab.start("node1", &command);
    wait_for("the script", || exists(lab, "ready").then_some(()));
    lab.await_job("node1", job);
    running
}

fn exists(lab: &Lab, name: &str) -> bool {
    lab.srv("node1", "work").join(name).exists()
}

fn say(lab: &Lab, name: &str) {
    fs::write(lab.srv("node1", "work").join(name), b"").expect("written");
}

fn contents(lab: &Lab, name: &str) -> Vec<u8> {
    fs::read(lab.srv("node1", "work").join(name)).expect("it can be read")
}

/// Moves two processes that wait for what the other writes, and compares with what they do unmoved.
fn written_in_turns(as_user: bool) {
    let lab = lab(3, &[]);
    fs::write(lab.srv("node1", "work/script"), include_str!("../programs/mapped.py")).expect("written");
    let job = |command: &str| match as_user {
        true => format!("exec runuser -u {} -- sh -c 'cd /srv/work && {command}'", lab.user()),
        false => format!("cd /srv/work && {command}"),
    };
    let plain = lab.sh("node1", &job("python3 script 1500")).ok();
    let expected = contents(&lab, "mapped");
    fs::remove_file(lab.srv("node1", "work/mapped")).expect("removed");
    let mut running = lab.start("node1", &job("mosrun -J mapped python3 script 1500"));
    lab.await_job("node1", "mapped");
    let mut moves = 0;
    for to in ["node2", "node3", "home", "node3", "home"].iter().cycle() {
        if !running.runs() {
            break;
        }
        // It may have ended just now.
        moves += usize::from(lab.sh("node1", &format!("migrate job:mapped {to}")).status == 0);
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(running.end().ok(), plain);
    assert!(contents(&lab, "mapped") == expected, "the file has other bytes than unmoved");
    assert!(moves >= 5, "they were moved {moves} times only");
}

#[test]
fn files_mapped_shared_by_a_subtree_stay_one() {
    require_labs!();
    written_in_turns(false);
}

#[test]
fn files_mapped_shared_by_a_users_subtree_stay_one() {
    require_labs!();
    written_in_turns(true);
}

/// Maps files as a JVM does, without keeping a descriptor.
const MAPPING: &str = "
import ctypes, os, struct, time
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
def mapped(name, size, shared=True):
    f = os.open(name, os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(f, size)
    at = libc.mmap(None, size, 3, 1 if shared else 2, f, 0)
    os.close(f)
    return memoryview((ctypes.c_char * size).from_address(at)).cast('B')
def say(name): open(name, 'w').close()
def wait_for(name):
    while not os.path.exists(name): time.sleep(0.02)
";

/// What others do to the names of its files while it is away is not its affair.
const NAMES: &str = "
renamed, removed, cut = all = [mapped(name, 3 * 4096) for name in ('renamed', 'removed', 'cut')]
for memory in all: memory[:5] = b'begin'
private = mapped('private', 4096, shared=False)
os.remove('private')
say('ready')
wait_for('away')
for memory in all: memory[4096:4100] = b'away'
cut[8192:8196] = b'lost'
say('written')
wait_for('changed')
for memory in (renamed, removed): memory[5000:5003] = b'new'
say('done')
wait_for('home')
for memory in (renamed, removed):
    print(bytes(memory[:5]), bytes(memory[4096:4100]), bytes(memory[5000:5003]), flush=True)
print(bytes(cut[:5]), bytes(private[:3]), flush=True)
";

#[test]
fn mapped_files_that_are_renamed_removed_and_cut_at_home() {
    require_labs!();
    let lab = lab(3, &[]);
    let running = start(&lab, "names", &format!("{MAPPING}{NAMES}"));
    lab.migrate("names", "node2");
    say(&lab, "away");
    wait_for("what it writes away", || exists(&lab, "written").then_some(()));
    let change = "mv renamed other && echo stranger > renamed && rm removed && truncate -s 4096 cut";
    lab.sh("node1", &format!("cd /srv/work && {change}")).ok();
    say(&lab, "changed");
    wait_for("what it writes then", || exists(&lab, "done").then_some(()));
    lab.migrate("names", "node3");
    lab.migrate("names", "home");
    let other = contents(&lab, "other");
    assert_eq!((other.len(), &other[..5], &other[4096..4100]), (3 * 4096, &b"begin"[..], &b"away"[..]));
    assert_eq!(&other[5000..5003], b"new");
    assert_eq!(contents(&lab, "renamed"), b"stranger\n");
    assert_eq!(contents(&lab, "cut").len(), 4096, "nothing is written behind its end");
    assert!(!exists(&lab, "removed"));
    // The removed one goes with it from now on.
    for to in ["node2", "home"] {
        lab.migrate("names", to);
    }
    say(&lab, "home");
    let as_written = "b'begin' b'away' b'new'\n";
    assert_eq!(running.end().ok(), format!("{as_written}{as_written}b'begin' b'\\x00\\x00\\x00'\n0\n"));
}

#[test]
fn who_else_uses_a_mapped_file_is_named() {
    require_labs!();
    let lab = lab(2, &[]);
    let ends = "memory = mapped('data', 4096)\nsay('ready')\nwait_for('stop')\nprint(bytes(memory[:3]))\n";
    let running = start(&lab, "own", &format!("{MAPPING}{ends}"));
    let mapping = format!("{MAPPING}m = mapped('data', 4096)\nsay('other')\ntime.sleep(1000)\n");
    fs::write(lab.srv("node1", "work/mapping"), mapping).expect("written");
    let others = [
        ("exec python3 mapping", "maps as well"),
        ("exec 3>>data; > other; exec sleep 1000", "has open to be written"),
    ];
    for (command, words) in others {
        let other = lab.start("node1", &format!("cd /srv/work && echo $$ > pid && {command}"));
        wait_for("the other", || exists(&lab, "other").then_some(()));
        let pid = String::from_utf8(contents(&lab, "pid")).expect("a number");
        let expected = format!(
            "/srv/work/data: a file mapped shared and writable, which process {} {words}",
            pid.trim()
        );
        let refused = lab.sh("node1", "migrate job:own node2");
        assert_eq!(refused.status, 4, "{}{}", refused.stdout, refused.stderr);
        assert!(refused.stderr.contains(&expected), "{expected:?} is not in: {}", refused.stderr);
        let explained = lab.sh("node1", "migrate job:own node2 --explain");
        let said = format!("{}{}", explained.stdout, explained.stderr);
        assert!(said.contains(&expected), "{expected:?} is not in: {said}");
        lab.sh("node1", &format!("kill -9 {pid}")).ok();
        other.end();
        fs::remove_file(lab.srv("node1", "work/other")).expect("removed");
    }
    // One that only reads is in nobody's way.
    let reader = lab.start("node1", "cd /srv/work && exec 3<data && exec sleep 1000");
    lab.migrate("own", "node2");
    drop(reader);
    lab.migrate("own", "home");
    say(&lab, "stop");
    assert_eq!(running.end().ok(), "b'\\x00\\x00\\x00'\n0\n");
}

/// Holds a robust futex in a file, which its kernel marks when it ends. A guest that has moved on ends too.
const ROBUST: &str = "
memory, head = mapped('robust', 4096), (ctypes.c_long * 3)()
at, tid, count = ctypes.addressof(ctypes.c_char.from_buffer(memory)), libc.syscall(186), 0
struct.pack_into('<QI', memory, 64, ctypes.addressof(head), tid)
head[:] = [at + 64, 8, 0]
assert libc.syscall(273, head, ctypes.c_size_t(24)) == 0
say('ready')
while not os.path.exists('stop'):
    count += 1
    struct.pack_into('<Q', memory, 128, count)
    time.sleep(0.0002)
    found = struct.unpack_from('<I', memory, 72)[0], struct.unpack_from('<Q', memory, 128)[0]
    if found != (tid, count): print('found', found, 'instead of', (tid, count), flush=True); break
# As it stands: Python would free the list.
os._exit(0)
";

#[test]
fn the_end_of_a_guest_that_has_moved_on_is_not_seen() {
    require_labs!();
    let lab = lab(3, &[]);
    let running = start(&lab, "robust", &format!("{MAPPING}{ROBUST}"));
    for to in ["node2", "home", "node3", "node2", "home", "node2", "home"] {
        lab.migrate("robust", to);
        std::thread::sleep(Duration::from_millis(100));
    }
    say(&lab, "stop");
    assert_eq!(running.end().ok(), "0\n");
    // The last end is seen, by the kernel's FUTEX_OWNER_DIED.
    assert_eq!(contents(&lab, "robust")[75] & 0x40, 0x40);
}

/// Without a word of the guest's, and long before the kernel would have done it by itself.
#[test]
fn what_is_written_away_is_soon_seen_at_home() {
    require_labs!();
    let lab = lab(2, &[]);
    let text = "memory = mapped('data', 4096)\nsay('ready')\ncount = 0\n\
        while not os.path.exists('stop'):\n  count += 1; struct.pack_into('<Q', memory, 0, count); time.sleep(0.01)\n";
    let running = start(&lab, "seen", &format!("{MAPPING}{text}"));
    lab.migrate("seen", "node2");
    let count = || words(&contents(&lab, "data"))[0];
    for _ in 0..3 {
        let (began, before) = (Instant::now(), count());
        wait_for("it to be seen at home", || (count() > before).then_some(()));
        let took = began.elapsed();
        assert!(took < Duration::from_secs(10), "it took {took:?}");
    }
    say(&lab, "stop");
    assert_eq!(running.end().ok(), "0\n");
}

/// Counts in 64 pages; every word that it has written tells when, and where it is. The memory makes a move long.
const COUNTING: &str = "
much = os.urandom(1 << 20) * 80
memory, count = mapped('counts', 64 * 4096), 0
while not os.path.exists('stop'):
    count += 1
    for page in range(64): struct.pack_into('<Q', memory, page * 4096 + 8 * (count % 500), count)
    if count == 600: say('ready')
    time.sleep(0.001)
print(count, flush=True)
";

fn words(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes"))).collect()
}

/// Nothing is in the file but what was written there, and nothing is older than it was before.
fn check_counts(now: &[u8], before: &[u8]) {
    assert_eq!(now.len(), 64 * 4096);
    for (at, (now, before)) in words(now).into_iter().zip(words(before)).enumerate() {
        let place = at as u64 % 512;
        assert!(now == 0 && place >= 500 || now % 500 == place, "word {at} is {now}");
        assert!(now >= before, "word {at} went back from {before} to {now}");
    }
}

#[test]
fn the_host_is_lost_with_a_mapped_file() {
    require_labs!();
    let lab = lab(3, &["--bandwidth", "400mbit"]);
    let running = start(&lab, "counts", &format!("{MAPPING}{COUNTING}"));
    // On the way out it loses nothing.
    let moving = lab.start("node1", "migrate job:counts node2");
    std::thread::sleep(Duration::from_millis(1000));
    lab.sh("node2", "pkill -9 -f '[s]hepherd host'").ok();
    assert_ne!(moving.end().status, 0);
    lab.migrate("counts", "node3");
    let before = contents(&lab, "counts");
    check_counts(&before, &vec![0; 64 * 4096]);
    std::thread::sleep(Duration::from_millis(500));
    // On the way home it is lost, and what was written back is there.
    let moving = lab.start("node1", "migrate job:counts home");
    std::thread::sleep(Duration::from_millis(1000));
    lab.sh("node3", "pkill -9 -f '[s]hepherd host'").ok();
    assert_ne!(moving.end().status, 0);
    assert_eq!(running.end().ok(), "137\n");
    check_counts(&contents(&lab, "counts"), &before);
}

#[test]
fn the_link_is_cut_from_a_mapped_file() {
    require_labs!();
    let lab = lab(2, &["--bandwidth", "400mbit"]);
    let running = start(&lab, "counts", &format!("{MAPPING}{COUNTING}"));
    lab.migrate("counts", "node2");
    let before = contents(&lab, "counts");
    let moving = lab.start("node1", "migrate job:counts home");
    std::thread::sleep(Duration::from_millis(1000));
    lab.verb("partition", &["node2"]).ok();
    assert_ne!(moving.end().status, 0);
    assert_eq!(running.end().ok(), "137\n");
    let after = contents(&lab, "counts");
    check_counts(&after, &before);
    lab.verb("heal", &[]).ok();
    wait_for("node 2 to be rid of its half", || {
        (!lab.sh("node2", "ps -eo args").stdout.contains("python3 script")).then_some(())
    });
    assert!(contents(&lab, "counts") == after, "nothing comes later");
}

/// Writes more than its file system has room for; at home it would have been told by a SIGBUS.
const FULL: &str = "
memory = mapped('small/file', 1 << 20)
memory[:5] = b'begin'
say('ready')
wait_for('away')
for at in range(0, 1 << 20, 4096): memory[at:at + 4] = b'away'
say('written')
wait_for('stop')
print(bytes(memory[:4]))
";

#[test]
fn what_cannot_be_written_back_is_named() {
    require_labs!();
    let lab = lab(2, &[]);
    lab.sh("node1", "mkdir /srv/work/small && mount -t tmpfs -o size=128k small /srv/work/small").ok();
    let running = start(&lab, "full", &format!("{MAPPING}{FULL}"));
    let pid = lab.await_job("node1", "full");
    lab.migrate("full", "node2");
    say(&lab, "away");
    wait_for("what it writes", || exists(&lab, "written").then_some(()));
    let refused = lab.sh("node1", "migrate job:full home");
    assert_ne!(refused.status, 0, "{}", refused.stdout);
    for words in ["/srv/work/small/file, which process", "cannot be written back", "No space left"] {
        assert!(refused.stderr.contains(words), "{words:?} is not in: {}", refused.stderr);
    }
    let job = lab.job("node1", "full").expect("it runs on");
    assert_eq!((&job["node"], &job["pid"]), (&"node2".into(), &pid.into()));
    // It is told once, as by msync(2).
    lab.migrate("full", "home");
    say(&lab, "stop");
    assert_eq!(running.end().ok(), "b'away'\n0\n");
}
