//! Nothing may be left in a process that was tracked, nor be seen in it meanwhile but the flags of its mappings.

use super::harness::{Case, Running, victim};
use super::model::Model;
use super::victims::{can_track, let_go, start};
use checkpoint::live::Tracker;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Descriptors, tracer, flags, and armed pages.
pub fn assert_none(pid: i32) {
    assert_eq!(registered(pid), 0, "mappings of {pid} are registered");
    assert_eq!(armed(pid), 0, "pages of {pid} are armed");
    assert_eq!(descriptors(pid), 0, "a userfaultfd is open in {pid}");
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    assert!(status.contains("TracerPid:\t0\n"), "it is traced: {status}");
}

/// Mappings with a userfaultfd.
pub fn registered(pid: i32) -> usize {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("smaps");
    let flags = smaps.lines().filter(|line| line.starts_with("VmFlags:"));
    flags.filter(|line| line.split(' ').any(|flag| matches!(flag, "um" | "uw" | "ui"))).count()
}

/// Pages that are write-protected for a userfaultfd (bit 57, Documentation/admin-guide/mm/pagemap.rst).
fn armed(pid: i32) -> usize {
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).expect("pagemap");
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("maps");
    let mut count = 0;
    for line in maps.lines().filter(|line| !line.ends_with("[vsyscall]")) {
        let (start, end) = line.split_once(' ').expect("a range").0.split_once('-').expect("a range");
        let hex = |text| u64::from_str_radix(text, 16).expect("hexadecimal");
        let mut words = vec![0; ((hex(end) - hex(start)) / 4096 * 8) as usize];
        let _ = pagemap.read_at(&mut words, hex(start) / 4096 * 8);
        count += words.chunks_exact(8).filter(|word| word[7] >> 1 & 1 == 1).count();
    }
    count
}

fn descriptors(pid: i32) -> usize {
    let dir = fs::read_dir(format!("/proc/{pid}/fd")).expect("fd");
    let links = dir.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    links.filter(|target| target.to_string_lossy().contains("userfaultfd")).count()
}

/// What the program can see of itself: mappings, signals, descriptors.
fn visible(pid: i32) -> (String, String, usize) {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("maps");
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    let signals = status.lines().filter(|line| line.starts_with("Sig") || line.starts_with("Shd"));
    (maps, signals.collect(), fs::read_dir(format!("/proc/{pid}/fd")).expect("fd").count())
}

#[test]
fn a_waiting_process_is_as_it_was() {
    if !can_track("a_waiting_process_is_as_it_was") {
        return;
    }
    let begun = Instant::now();
    let mut sleep = Running(Command::new("sleep").arg("2").spawn().expect("starts"));
    std::thread::sleep(Duration::from_millis(200));
    let before = visible(sleep.pid());
    for n in 0..20 {
        let mut tracker = Tracker::start(sleep.pid()).expect("tracks");
        let mut model = Model::default();
        model.round(&mut tracker).expect("a round");
        assert!(registered(sleep.pid()) > 0);
        assert_eq!(model.round(&mut tracker).expect("a round").data_pages, 0, "it does nothing");
        assert_eq!(visible(sleep.pid()), before, "while it is tracked");
        model.compare_frozen(&mut tracker).expect("the last pages");
        match n % 2 {
            0 => tracker.stop(),
            _ => drop(tracker),
        }
        assert_none(sleep.pid());
        assert_eq!(visible(sleep.pid()), before);
    }
    assert!(sleep.end().success());
    let took = begun.elapsed().as_secs_f64();
    assert!((2.0..3.0).contains(&took), "its sleep took {took} s");
}

/// Tracks until it is killed; for [`a_killed_tracker_leaves_nothing`].
#[test]
#[ignore = "run by another test, as a process of its own"]
fn track_for_ever() {
    let pid = std::env::var("LIVE_PID").expect("given").parse().expect("a PID");
    let mut tracker = Tracker::start(pid).expect("tracks");
    loop {
        Model::default().round(&mut tracker).expect("a round");
        fs::write(std::env::var("LIVE_READY").expect("given"), b"").expect("tells");
    }
}

#[test]
fn a_killed_tracker_leaves_nothing() {
    if !can_track("a_killed_tracker_leaves_nothing") {
        return;
    }
    let place = Case::new();
    let mut writer = start(&place, "busy-writer");
    for _ in 0..10 {
        let _ = fs::remove_file(place.path("tracked"));
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command.args(["--ignored", "--exact", "traces::track_for_ever"]).stdout(Stdio::null());
        command.env("LIVE_PID", writer.pid().to_string()).env("LIVE_READY", place.path("tracked"));
        let tracker = Running(command.spawn().expect("starts"));
        place.await_file("tracked");
        assert!(registered(writer.pid()) > 0);
        drop(tracker);
        assert_none(writer.pid());
    }
    let_go(&place);
    assert!(writer.end().success(), "{}", place.output());
}

/// A child that is born while the descriptor is in its parent inherits it, and must not keep it.
#[test]
fn children_of_other_threads_keep_nothing() {
    if !can_track("children_of_other_threads_keep_nothing") {
        return;
    }
    let place = Case::new();
    let mut forker = start(&place, "busy-forking");
    for _ in 0..8 {
        let begun = Instant::now();
        let mut tracker = Tracker::start(forker.pid()).expect("tracks");
        let mut model = Model::default();
        while begun.elapsed() < Duration::from_millis(1100) {
            model.round(&mut tracker).expect("a round");
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(tracker);
        assert_none(forker.pid());
    }
    let_go(&place);
    assert!(forker.end().success(), "{}", place.output());
}

/// No privilege of the process' own is needed, nor room among its descriptors left for it.
#[test]
fn an_unprivileged_process() {
    if !can_track("an_unprivileged_process") {
        return;
    }
    let place = Case::new();
    let mut command = Command::new(victim());
    command.args(["busy-reads", place.dir.path().to_str().expect("UTF-8")]).uid(65534).gid(65534);
    let mut reader = Running(command.stdin(Stdio::null()).spawn().expect("starts"));
    place.await_file("ready");
    let mut tracker = Tracker::start(reader.pid()).expect("tracks");
    let mut model = Model::default();
    for _ in 0..5 {
        model.round(&mut tracker).expect("a round");
        model.compare_frozen(&mut tracker).expect("the last pages");
    }
    tracker.stop();
    assert_none(reader.pid());
    let_go(&place);
    assert!(reader.end().success());
}

#[test]
fn no_room_for_a_descriptor_is_an_error() {
    if !can_track("no_room_for_a_descriptor_is_an_error") {
        return;
    }
    let sleep = Running(Command::new("sleep").arg("60").spawn().expect("starts"));
    std::thread::sleep(Duration::from_millis(300));
    let mut limit = Command::new("prlimit");
    let limited = limit.args(["--nofile=0:0", "--pid", &sleep.pid().to_string()]).status().expect("runs");
    assert!(limited.success());
    let before = visible(sleep.pid());
    let refused = Tracker::start(sleep.pid()).map(drop).expect_err("there is no room");
    assert!(
        refused.to_string().contains("userfaultfd") && refused.to_string().contains("EMFILE"),
        "{refused}"
    );
    assert_eq!(visible(sleep.pid()), before);
    assert_none(sleep.pid());
}

#[test]
fn a_stopped_process_stays_stopped() {
    if !can_track("a_stopped_process_stays_stopped") {
        return;
    }
    let sleep = Running(Command::new("sleep").arg("60").spawn().expect("starts"));
    let pid = nix::unistd::Pid::from_raw(sleep.pid());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).expect("stops");
    std::thread::sleep(Duration::from_millis(100));
    let mut tracker = Tracker::start(sleep.pid()).expect("tracks");
    Model::default().round(&mut tracker).expect("a round");
    drop(tracker);
    assert_none(sleep.pid());
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    assert!(status.contains("State:\tT (stopped)"), "{status}");
}
