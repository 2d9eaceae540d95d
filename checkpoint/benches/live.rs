//! What tracking costs: the process that is tracked, and who tracks it.
//!
//! `cargo bench -p checkpoint --bench live` runs everything nine times; with `-- --short` once, with less.
//! Nothing here fails by being slow. It needs root, and leaves nothing behind.

#[path = "engine/subject.rs"]
#[allow(dead_code)]
mod subject;
#[path = "engine/table.rs"]
#[allow(dead_code)]
mod table;

use checkpoint::live::{Change, LiveError, Round, Tracker};
use checkpoint::sys::{process_vm, userfaultfd};
use checkpoint::tracee::Tracee;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use subject::{Place, Subject};
use table::{Figure, Table};

/// Between two rounds.
const ROUND: Duration = Duration::from_millis(10);

/// What is measured, of how much.
struct Plan {
    runs: usize,
    mebibytes: Vec<u64>,
    measured: Duration,
}

fn main() -> ExitCode {
    let is_short = std::env::args().any(|word| word == "--short");
    let plan = match is_short {
        true => Plan { runs: 1, mebibytes: vec![64], measured: Duration::from_millis(200) },
        false => Plan { runs: 9, mebibytes: vec![64, 1024, 4096], measured: Duration::from_millis(700) },
    };
    if !nix::unistd::geteuid().is_root() || !userfaultfd::can_track() {
        eprintln!("skipped live benchmark: needs root, and Linux 6.7");
        return ExitCode::SUCCESS;
    }
    let place = Place::new();
    let mut table = Table::new();
    for rate in [0u64, 1000, 10_000, 100_000] {
        slow_down(&place, &mut table, &plan, rate);
    }
    for &mebibytes in &plan.mebibytes {
        looks(&place, &mut table, plan.runs, mebibytes);
    }
    println!("\n{table}");
    ExitCode::SUCCESS
}

fn round(tracker: &mut Tracker) -> Round {
    tracker.round(ignore).expect("a round")
}

fn ignore(change: Change<'_>) -> Result<(), LiveError> {
    std::hint::black_box(&change);
    Ok(())
}

/// Rounds over a process that does nothing.
fn looks(place: &Place, table: &mut Table, runs: usize, mebibytes: u64) {
    let subject = place.start(&format!("mebibytes-{mebibytes}"));
    let mut times: [Vec<Duration>; 6] = Default::default();
    let mut raw_ratios = Vec::new();
    for _ in 0..runs {
        let raw = raw_read(&subject, mebibytes);
        let begun = Instant::now();
        let mut tracker = Tracker::start(subject.pid()).expect("tracks");
        times[0].push(begun.elapsed());
        let first = round(&mut tracker).took;
        times[1].push(first);
        raw_ratios.push(first.as_secs_f64() / raw.as_secs_f64());
        times[2].push(round(&mut tracker).took);
        let frozen = Tracee::freeze(subject.pid()).expect("freezes");
        times[3].push(tracker.last(ignore).expect("the last look").took);
        frozen.thaw().expect("goes on");
        let begun = Instant::now();
        tracker.stop();
        times[4].push(begun.elapsed());
        let mut tracker = Tracker::start(subject.pid()).expect("tracks");
        round(&mut tracker);
        let begun = Instant::now();
        drop(tracker);
        times[5].push(begun.elapsed());
    }
    let names = ["start", "first round", "quiet round", "last look", "stop", "close without disarming"];
    for (name, times) in names.iter().zip(times) {
        table.add(Figure::time(&format!("{mebibytes} MiB: {name}"), times));
    }
    table.add(Figure::percent(&format!("{mebibytes} MiB: first round ÷ raw read"), raw_ratios));
}

/// The same memory, read and thrown away.
fn raw_read(subject: &Subject, mebibytes: u64) -> Duration {
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", subject.pid())).expect("maps");
    let range = |line: &str| {
        let (start, end) = line.split_once(' ')?.0.split_once('-')?;
        Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
    };
    let largest = maps.lines().filter_map(range).max_by_key(|(start, end)| (end - start).min(1 << 40));
    let (start, end) = largest.expect("a mapping");
    assert!(end - start >= mebibytes << 20);
    let mut buffer = vec![0; 1 << 20];
    let begun = Instant::now();
    for at in (start..start + (mebibytes << 20)).step_by(1 << 20) {
        process_vm::read(subject.pid(), at, &mut buffer).expect("reads");
    }
    begun.elapsed()
}

/// Steps of a victim that dirties so many pages a second, without and with rounds one after the other, A-B-B-A: by
/// the clock, which counts what else runs on the machine, and by its own CPU time, faults included.
fn slow_down(place: &Place, table: &mut Table, plan: &Plan, rate: u64) {
    // One victim for all runs, so that its memory is warm.
    let subject = place.start(&format!("busy-steady-{rate}"));
    let counter = place.path("steps");
    let now = || Moment::of(&counter, subject.pid());
    let plain = || {
        let begun = now();
        std::thread::sleep(plan.measured);
        now().since(&begun)
    };
    let tracked = || {
        let mut tracker = Tracker::start(subject.pid()).expect("tracks");
        round(&mut tracker);
        let begun = now();
        while begun.clock.elapsed() < plan.measured {
            // As over a link, on which a round takes a moment.
            std::thread::sleep(ROUND);
            round(&mut tracker);
        }
        let speeds = now().since(&begun);
        tracker.stop();
        speeds
    };
    let (mut by_clock, mut by_cpu) = (Vec::new(), Vec::new());
    for _ in 0..plan.runs {
        let (first, second, third, fourth) = (plain(), tracked(), tracked(), plain());
        by_clock.push((first.0 + fourth.0) / (second.0 + third.0));
        by_cpu.push((first.1 + fourth.1) / (second.1 + third.1));
    }
    let name = format!("{rate} pages/s of 256 MiB: time ÷ untracked");
    table.add(Figure::percent(&format!("{name}, by the clock"), by_clock));
    table.add(Figure::percent(&format!("{name}, CPU time"), by_cpu));
}

/// How far the victim is.
struct Moment {
    clock: Instant,
    cpu_ns: u64,
    steps: u64,
}

impl Moment {
    fn of(counter: &Path, pid: i32) -> Moment {
        let steps = std::fs::read(counter).expect("reads");
        let steps = u64::from_ne_bytes(steps[..8].try_into().expect("eight bytes"));
        let times = std::fs::read_to_string(format!("/proc/{pid}/schedstat")).expect("schedstat");
        let cpu_ns = times.split(' ').next().and_then(|word| word.parse().ok()).expect("a number");
        Moment { clock: Instant::now(), cpu_ns, steps }
    }

    /// Steps a second, by the clock and by CPU time.
    fn since(&self, begun: &Moment) -> (f64, f64) {
        let steps = (self.steps - begun.steps) as f64;
        let clock = self.clock.duration_since(begun.clock).as_secs_f64();
        (steps / clock, steps / ((self.cpu_ns - begun.cpu_ns) as f64 / 1e9))
    }
}
