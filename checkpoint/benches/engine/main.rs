//! How fast the engine is, beside what the kernel itself can do in the same run.
//!
//! `cargo bench -p checkpoint` runs everything nine times; `cargo bench -p checkpoint -- --short` once
//! with less, to see that it works. `--only WORD` runs the figures whose names have the word. Images go
//! to a directory in memory (`/dev/shm`) unless `MIGCKPT_BENCH_DIR` names another: a disk would be
//! measured otherwise.
//!
//! Nothing here fails by being slow. It needs root, and leaves nothing behind.

mod bare;
mod copy;
mod subject;
mod table;

use std::process::ExitCode;
use std::time::Duration;
use subject::Place;
use table::{Figure, Table};

/// What is measured, of how much.
struct Plan {
    runs: usize,
    threads: u64,
    mappings: u64,
    processes: u64,
    mebibytes: u64,
}

const FULL: Plan = Plan { runs: 9, threads: 1000, mappings: 10_000, processes: 500, mebibytes: 1024 };
const SHORT: Plan = Plan { runs: 1, threads: 100, mappings: 1000, processes: 20, mebibytes: 64 };

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let only = arguments.iter().position(|word| word == "--only").and_then(|at| arguments.get(at + 1));
    let plan = if arguments.iter().any(|word| word == "--short") { SHORT } else { FULL };
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped engine benchmark: needs root (PIDs of one's choice, ptrace)");
        return ExitCode::SUCCESS;
    }
    // What is restored outlives its restorer, and is waited for here.
    nix::sys::prctl::set_child_subreaper(true).expect("becomes a subreaper");
    let place = Place::new();
    let mut table = Table::new();
    let wanted = |name: &str| only.is_none_or(|only| name.contains(only.as_str()));
    for (name, case, tree, goal_ms) in [
        ("4 MiB".to_string(), "mebibytes-4".to_string(), false, 20.0),
        (format!("{} threads", plan.threads), format!("threads-{}", plan.threads), false, 150.0),
        (format!("{} mappings", plan.mappings), format!("mappings-{}", plan.mappings), false, 200.0),
        (format!("{} processes", plan.processes), format!("processes-{}", plan.processes), true, 1000.0),
    ] {
        if wanted(&name) {
            round_trips(&place, &mut table, plan.runs, (&name, &case, tree, goal_ms));
        }
    }
    let name = format!("{} threads", plan.threads);
    if wanted(&name) {
        against_bare_stops(&place, &mut table, &plan, &name);
    }
    let name = format!("{} MiB", plan.mebibytes);
    if wanted(&name) {
        against_a_copy(&place, &mut table, &plan, &name);
    }
    print!("{table}");
    ExitCode::SUCCESS
}

/// Dump and restore, until both commands have ended.
fn round_trips(place: &Place, table: &mut Table, runs: usize, what: (&str, &str, bool, f64)) {
    let (name, case, tree, goal_ms) = what;
    let mut times: [Vec<Duration>; 3] = Default::default();
    // One more, first, to warm up.
    for run in 0..=runs {
        let subject = place.start(case);
        let dump = place.dump(subject, tree);
        let (restored, restore) = place.restore();
        restored.check_and_end();
        if run > 0 {
            times[0].push(dump);
            times[1].push(restore);
            times[2].push(dump + restore);
        }
    }
    let [dump, restore, both] = times;
    table.add(Figure::time(&format!("{name}: dump"), dump));
    table.add(Figure::time(&format!("{name}: restore"), restore));
    table.add(Figure::time(&format!("{name}: dump and restore"), both).goal_ms(goal_ms));
}

/// What the stops of many threads cost by themselves.
fn against_bare_stops(place: &Place, table: &mut Table, plan: &Plan, name: &str) {
    let case = format!("threads-{}", plan.threads);
    let mut times = Vec::new();
    for run in 0..=plan.runs {
        let took = bare::stops(place.start(&case));
        if run > 0 {
            times.push(took);
        }
    }
    table.add(Figure::time(&format!("{name}: two stops, registers and the end, nothing else"), times));
}

/// The speed of a dump beside that of reading the same memory with process_vm_readv(2) and writing it to
/// the same place.
fn against_a_copy(place: &Place, table: &mut Table, plan: &Plan, name: &str) {
    let case = format!("mebibytes-{}", plan.mebibytes);
    let mut times: [Vec<Duration>; 3] = Default::default();
    for run in 0..=plan.runs {
        let subject = place.start(&case);
        let copy = copy::memory(subject.pid(), &place.path("copy"));
        let dump = place.dump(subject, false);
        let (restored, restore) = place.restore();
        restored.check_and_end();
        if run > 0 {
            times[0].push(copy);
            times[1].push(dump);
            times[2].push(restore);
        }
    }
    let [copy, dump, restore] = times;
    let bytes = plan.mebibytes << 20;
    let ratio: Vec<f64> =
        copy.iter().zip(&dump).map(|(copy, dump)| copy.as_secs_f64() / dump.as_secs_f64()).collect();
    table.add(Figure::speed(&format!("{name}: copy with process_vm_readv"), copy, bytes));
    table.add(Figure::speed(&format!("{name}: dump"), dump, bytes));
    table.add(Figure::speed(&format!("{name}: restore"), restore, bytes));
    table
        .add(Figure::percent(&format!("{name}: speed of the dump, of the copy's"), ratio).goal_percent(80.0));
}
