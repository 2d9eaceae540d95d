//! Asynchronous I/O contexts (io_setup(2)): with the events that nobody has taken, and only if nothing is in flight.

use super::harness::{Case, Running, can_run, descendants, exists, migckpt, run, victim};
use super::victims::{survives_saved, survives_times};
use checkpoint::image::{Backing, ContextImage, ProcessImage, Vma};
use checkpoint::inventory::{Rules, inspect};
use std::fs;
use std::os::unix::fs::FileExt;
use std::process::Stdio;
use std::time::{Duration, Instant};

fn started(case: &Case, name: &str) -> Running {
    let dir = case.dir.path().to_str().expect("UTF-8");
    let running = case.start(victim().to_str().expect("UTF-8"), &[name, dir]);
    case.await_file("ready");
    // It says so with a file that it closes a moment later.
    std::thread::sleep(Duration::from_millis(50));
    running
}

/// Saves it without ending it; gives what was said if that was refused.
fn left_running(case: &Case, pid: i32, more: &[&str]) -> Result<(), String> {
    let image = case.path("img");
    let arguments = ["dump", &pid.to_string(), "--leave-running", "--to", image.to_str().expect("UTF-8")];
    let done = run(&[&arguments, more].concat());
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(
        matches!(done.status.code(), Some(0 | 4)) && !said.contains("panicked"),
        "{}: {said}",
        done.status
    );
    if done.status.success() { Ok(()) } else { Err(said) }
}

fn ends_well(case: &Case, mut running: Running, name: &str) {
    fs::write(case.path("go"), b"").expect("lets it go on");
    let status = running.end();
    let output = case.output();
    assert!(status.success() && output.contains(&format!("PASS {name}")), "{status}: {output}");
}

#[test]
fn contexts() {
    survives_times("aio", 2);
}

#[test]
fn contexts_of_a_family() {
    survives_saved("aio-family", 2, &["--tree"]);
}

/// It compares heads, tails and events with what they were, and how many requests there is room for.
#[test]
fn a_look_at_contexts_leaves_no_trace() {
    if !can_run("a_look_at_contexts_leaves_no_trace") {
        return;
    }
    let case = Case::new();
    let running = started(&case, "aio");
    let allowed = || {
        let status = fs::read_to_string(format!("/proc/{}/status", running.pid())).expect("status");
        status.lines().find(|line| line.starts_with("Cpus_allowed:")).map(str::to_string)
    };
    let before = allowed();
    for _ in 0..20 {
        assert_eq!(left_running(&case, running.pid(), &[]), Ok(()));
    }
    assert_eq!(allowed(), before);
    ends_well(&case, running, "aio");
}

/// Whatever is in flight when it is stopped is through before it is saved.
#[test]
fn direct_requests_under_way() {
    if !can_run("direct_requests_under_way") {
        return;
    }
    let case = Case::new();
    let running = started(&case, "aio-busy");
    for _ in 0..20 {
        assert_eq!(left_running(&case, running.pid(), &[]), Ok(()));
    }
    ends_well(&case, running, "aio-busy");
    survives_times("aio-busy", 3);
}

#[test]
fn requests_in_flight() {
    if !can_run("requests_in_flight") {
        return;
    }
    let case = Case::new();
    let running = started(&case, "aio-in-flight");
    for _ in 0..2 {
        let said = left_running(&case, running.pid(), &[]).expect_err("one is in flight");
        let named = "an asynchronous I/O context with requests in flight (1 or less)";
        assert!(said.contains(named) && said.contains("it runs on as before"), "{said}");
    }
    fs::write(case.path("go"), b"").expect("lets it go on");
    case.await_file("idle");
    assert_eq!(left_running(&case, running.pid(), &[]), Ok(()));
    fs::write(case.path("end"), b"").expect("lets it end");
    ends_well(&case, running, "aio-in-flight");
}

/// It would end with EINTR, and is not stopped.
#[test]
fn a_request_that_is_being_submitted() {
    if !can_run("a_request_that_is_being_submitted") {
        return;
    }
    let case = Case::new();
    let running = started(&case, "aio-submitting");
    let said = left_running(&case, running.pid(), &[]).expect_err("a thread waits");
    assert!(said.contains("waits in io_submit(2)") && said.contains("it was not stopped"), "{said}");
    ends_well(&case, running, "aio-submitting");
}

/// `struct aio_ring` without its events, of the first ring that a process has.
fn ends(pid: i32) -> [u8; 16] {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("maps");
    let line = maps.lines().find(|line| line.contains("/[aio]")).expect("a ring");
    let start = u64::from_str_radix(line.split_once('-').expect("a range").0, 16).expect("an address");
    let mut bytes = [0; 16];
    let memory = fs::File::open(format!("/proc/{pid}/mem")).expect("its memory");
    memory.read_exact_at(&mut bytes, start).expect("the ring");
    bytes
}

/// While requests in flight are waited for, the ring is full of others.
#[test]
fn whoever_looks_at_contexts_is_killed() {
    if !can_run("whoever_looks_at_contexts_is_killed") {
        return;
    }
    let case = Case::new();
    let running = started(&case, "aio-in-flight");
    let pid = running.pid();
    let state = || {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
        let line = |key: &str| status.lines().find(|line| line.starts_with(key)).map(str::to_string);
        let open = fs::read_dir(format!("/proc/{pid}/fd")).expect("its files").count();
        let mapped = fs::read_to_string(format!("/proc/{pid}/maps")).expect("maps");
        (ends(pid), line("Cpus_allowed:"), open, mapped)
    };
    let before = state();
    for _ in 0..5 {
        let mut dump = migckpt();
        dump.args(["dump", &pid.to_string(), "--to"]).arg(case.path("img")).stderr(Stdio::null());
        let mut dump = dump.spawn().expect("runs");
        while ends(pid) == before.0 {
            assert_eq!(dump.try_wait().expect("waits"), None, "it has not moved the ring");
        }
        std::thread::sleep(Duration::from_millis(2));
        dump.kill().expect("killed");
        dump.wait().expect("waits");
        assert_ne!(ends(pid), before.0);
        let done = run(&["recover", &pid.to_string()]);
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        assert_eq!(state(), before);
    }
    fs::write(case.path("end"), b"").expect("lets it end");
    ends_well(&case, running, "aio-in-flight");
}

/// Files of a guest are at home, and a child's mapping is of nothing without its parent.
#[test]
fn contexts_that_cannot_be_carried() {
    if !can_run("contexts_that_cannot_be_carried") {
        return;
    }
    let case = Case::new();
    let running = started(&case, "aio-family");
    let found = inspect(running.pid(), Rules::Homed).expect("looks").blockers;
    assert!(found.iter().any(|blocker| blocker.what.ends_with(": an asynchronous I/O context")), "{found:?}");
    let child = *descendants(running.pid()).last().expect("its child");
    let said = left_running(&case, child, &[]).expect_err("its parent's ring");
    assert!(said.contains("the ring of an asynchronous I/O context of another process"), "{said}");
    ends_well(&case, running, "aio-family");
}

type Lie = fn(&mut ProcessImage);

/// The one that has events in it, and is more than a page long.
fn long(image: &mut ProcessImage) -> &mut ContextImage {
    image.mm.contexts.iter_mut().find(|context| context.events.len() == 50 * 32).expect("the image has one")
}

fn ring(image: &mut ProcessImage) -> &mut Vma {
    let start = long(image).start;
    image.mm.vmas.iter_mut().find(|vma| vma.start == start).expect("its mapping")
}

const LIES: [(&str, Lie); 14] = [
    ("a place behind the last", |image| long(image).head = 2047),
    ("the largest number", |image| long(image).head = u32::MAX),
    ("half an event", |image| long(image).events.truncate(40)),
    ("as many events as there are places", |image| long(image).events = vec![1; 2047 * 32]),
    ("more events than there can be requests", |image| long(image).events = vec![1; 2046 * 32]),
    ("in flight", |image| long(image).in_flight = 1),
    ("elsewhere", |image| long(image).start += 4096),
    ("nowhere", |image| long(image).start = u64::MAX),
    ("twice", |image| {
        let twin = long(image).clone();
        image.mm.contexts.push(twin);
    }),
    ("of nobody", |image| image.mm.contexts.clear()),
    ("private", |image| ring(image).shared = false),
    ("of a file", |image| ring(image).backing = Backing::Anon),
    ("longer than a ring can be", |image| lengthen(image, (256 << 20) + 4096)),
    ("for more requests than the machine has", |image| lengthen(image, 256 << 20)),
];

/// Without whatever is in the way.
fn lengthen(image: &mut ProcessImage, length: u64) {
    let vma = ring(image);
    (vma.start, vma.end) = (1 << 32, (1 << 32) + length);
    let vma = vma.clone();
    long(image).start = 1 << 32;
    image.mm.contexts.retain(|context| context.start == 1 << 32);
    image.mm.vmas.retain(|other| *other == vma);
}

#[test]
fn contexts_that_lie() {
    if !can_run("contexts_that_lie") {
        return;
    }
    let case = Case::new();
    let mut running = started(&case, "aio");
    let pid = running.pid();
    case.dump(&mut running);
    fs::create_dir(case.path("lie")).expect("made");
    let in_use = || fs::read_to_string("/proc/sys/fs/aio-nr").expect("told");
    for (what, lie) in LIES {
        case.rewrite("img", "lie", |images| lie(&mut images[0]));
        let done = run(&["restore", "--dry-run", case.path("lie").to_str().expect("UTF-8")]);
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(matches!(done.status.code(), Some(1 | 4)), "{what}: {}: {said}", done.status);
        assert!(said.contains("why:") && !said.contains("panicked"), "{what}: {said}");
        assert!(!exists(pid), "{what}: a process is left: {said}");
        println!("{what}: {said}");
    }
    // The kernel frees a context some time after its process (free_ioctx).
    let deadline = Instant::now() + Duration::from_secs(10);
    while in_use().trim() != "0" && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    ends_well(&case, case.restore(), "aio");
}
