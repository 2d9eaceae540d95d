//! `moslab bench`: what a move costs, against a raw copy of the same number of bytes over the same
//! link in the same run.
//!
//! A victim of each size and kind of memory goes from node 1 to node 2 and home. The raw copy is one
//! TCP stream between the same two nodes, from warm memory into fresh memory: nothing that moves a
//! process can be faster while it copies everything. The victim measures its own freeze as the longest
//! gap in its `CLOCK_REALTIME`, so that no figure rests on the mover's word alone. Medians of several
//! runs; a busy machine shows in the raw copy as well, so compare the ratios.

mod raw;
mod start;
mod victim;

pub use raw::{RawReceive, RawSend, raw_receive, raw_send};
pub use start::{StartTime, start_time};
pub use victim::{Kind, Victim, victim};

use super::binaries::own_program;
use super::lifecycle::{self, Wishes};
use super::place::Place;
use super::state::LabState;
use super::{daemon, sweep};
use anyhow::{Context, Result, bail};
use migd::api::{MigrateRequest, MigrationInfo, Request, Response};
use migd::client::Client;
use serde::Serialize;
use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Sizes of a full run, MiB.
const SIZES_MIB: [u64; 3] = [64, 256, 1024];
/// How long a victim may take to fill its memory.
const FILL_PATIENCE: Duration = Duration::from_secs(120);
/// Where a victim writes, inside node 1 and seen from outside it.
const OUTPUT: &str = "srv/victim.out";

/// Options of `moslab bench`.
#[derive(Debug, clap::Args)]
pub struct BenchArgs {
    /// The lab's name
    #[arg(long, value_name = "LAB", default_value = "bench")]
    name: String,
    /// Print the figures as JSON
    #[arg(long)]
    json: bool,
    /// Sizes of the victims, MiB
    #[arg(long, value_name = "MIB", value_delimiter = ',', default_values_t = SIZES_MIB)]
    sizes: Vec<u64>,
    /// Runs of each, of which the median counts
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    repeat: u32,
    /// Rate of each node's link, as `tc` takes it (default: as fast as it goes)
    #[arg(long, value_name = "RATE")]
    bandwidth: Option<String>,
}

/// One victim's figures, medians.
#[derive(Debug, Clone, Serialize)]
pub struct Figures {
    /// Its memory, MiB.
    pub size_mib: u64,
    /// `random` (incompressible) or `text`.
    pub memory: Kind,
    /// `out` (to node 2) or `home` (back).
    pub direction: &'static str,
    /// Memory bytes carried.
    pub bytes: u64,
    /// Bytes on the wire.
    pub wire_bytes: u64,
    /// The whole move, milliseconds.
    pub total_ms: f64,
    /// Freeze time as the mover has it, milliseconds.
    pub freeze_ms: f64,
    /// Freeze time as the victim's own clock has it, milliseconds.
    pub felt_ms: f64,
    /// The raw copy, milliseconds.
    pub raw_ms: f64,
    /// Freeze time ÷ raw copy.
    pub freeze_ratio: f64,
    /// Whole move ÷ raw copy.
    pub total_ratio: f64,
}

/// All figures.
#[derive(Debug, Clone, Serialize)]
pub struct Results {
    /// The moves.
    pub moves: Vec<Figures>,
    /// Starting a program plainly, milliseconds (median).
    pub plain_start_ms: f64,
    /// Starting it with mosrun, milliseconds (median).
    pub mosrun_start_ms: f64,
    /// What mosrun adds, milliseconds.
    pub mosrun_adds_ms: f64,
}

/// Runs it.
pub fn main(arguments: &BenchArgs) -> Result<u8> {
    let place = Place::new(&arguments.name)?;
    let signals = lifecycle::catch_ending_signals()?;
    let wishes = Wishes { nodes: 2, cpus_per_node: Some(0.0), bandwidth: arguments.bandwidth.clone() };
    let lab = lifecycle::up(&place, &wishes, Some(&signals))?;
    lifecycle::end_when_asked(&place, signals);
    let results = Bench::new(&place).and_then(|bench| bench.run(arguments));
    lab.end(&place)?;
    let results = results?;
    if sweep::anything_left(&place) {
        bail!("the lab has left something behind");
    }
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&results)?);
    } else {
        print!("{}", table(&results));
    }
    Ok(0)
}

struct Bench {
    place: Place,
    state: LabState,
    /// Node 1's PID 1, through which its daemon is asked.
    init: i32,
}

impl Bench {
    fn new(place: &Place) -> Result<Bench> {
        let state = LabState::of_running(place)?;
        let (_, init) = state.running_node("1")?;
        Ok(Bench { place: place.clone(), init: init.pid, state })
    }

    fn run(&self, arguments: &BenchArgs) -> Result<Results> {
        let mut moves = Vec::new();
        for &size_mib in &arguments.sizes {
            for kind in [Kind::Random, Kind::Text] {
                eprintln!("{size_mib} MiB of {kind} memory, {} runs", arguments.repeat);
                let runs = (0..arguments.repeat)
                    .map(|run| self.one_run(size_mib, kind, run))
                    .collect::<Result<Vec<_>>>()?;
                for direction in 0..2 {
                    let of_direction: Vec<&Figures> = runs.iter().map(|run| &run[direction]).collect();
                    moves.push(middle(&of_direction).context("no runs")?);
                }
            }
        }
        let plain_start_ms = self.start_ms(&["true"])?;
        let mosrun_start_ms = self.start_ms(&["mosrun", "true"])?;
        let mosrun_adds_ms = mosrun_start_ms - plain_start_ms;
        Ok(Results { moves, plain_start_ms, mosrun_start_ms, mosrun_adds_ms })
    }

    /// A raw copy, then the same bytes as a process: out and home.
    fn one_run(&self, size_mib: u64, kind: Kind, run: u32) -> Result<[Figures; 2]> {
        let raw_ms = self.raw_copy(size_mib << 20, kind)?;
        let job = format!("bench-{size_mib}-{kind}-{run}");
        let mut victim = self.start_victim(size_mib, kind, &job)?;
        let result = self.there_and_back(&job).map(|[out, home]| {
            [("out", out), ("home", home)].map(|(direction, (info, felt_ms))| Figures {
                size_mib,
                memory: kind,
                direction,
                bytes: info.bytes,
                wire_bytes: info.wire_bytes,
                total_ms: info.total_ms,
                freeze_ms: info.freeze_ms,
                felt_ms,
                raw_ms,
                freeze_ratio: info.freeze_ms / raw_ms,
                total_ratio: info.total_ms / raw_ms,
            })
        });
        // `moslab exec` passes it on to the victim, at home again or not.
        let pid = nix::unistd::Pid::from_raw(victim.id() as i32);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        victim.wait()?;
        result
    }

    fn there_and_back(&self, job: &str) -> Result<[(MigrationInfo, f64); 2]> {
        let away = &self.state.nodes[1].name;
        Ok([self.migrate(job, away)?, self.migrate(job, "home")?])
    }

    /// One move, and the longest gap that the victim noted meanwhile.
    fn migrate(&self, job: &str, to: &str) -> Result<(MigrationInfo, f64)> {
        let before = victim::gaps(&self.output())?.len();
        let request = MigrateRequest {
            what: format!("job:{job}"),
            to: to.to_string(),
            dry_run: false,
            stop: false,
            no_wait: false,
            timeout_ms: None,
            progress: false,
        };
        let socket = daemon::socket(self.init);
        let response = Client::connect(Some(&socket))?.call(&Request::Migrate(request))?;
        let Response::Migrated { reports } = response else { bail!("no report of the move to {to}") };
        let report = reports.into_iter().next().context("the move has no report")?;
        if let Some(error) = &report.error {
            bail!("the move to {to} failed: {error}");
        }
        // The victim looks at its clock every millisecond; away, its note has to travel.
        std::thread::sleep(Duration::from_millis(300));
        let felt = victim::gaps(&self.output())?.split_off(before).into_iter().fold(0.0, f64::max);
        Ok((report, felt))
    }

    fn output(&self) -> PathBuf {
        self.place.node_dir(&self.state.nodes[0].name).join(OUTPUT)
    }

    fn start_victim(&self, size_mib: u64, kind: Kind, job: &str) -> Result<Child> {
        let output = self.output();
        fs::write(&output, b"")?;
        let command = format!("exec mosrun -J {job} moslab __victim {size_mib} {kind} >> /{OUTPUT}");
        let mut child = self.exec(1).args(["sh", "-c", &command]).spawn()?;
        let until = Instant::now() + FILL_PATIENCE;
        while !victim::is_ready(&output)? {
            if let Some(status) = child.try_wait()? {
                bail!("the victim ended with {status}");
            }
            if Instant::now() > until {
                bail!("the victim has not filled {size_mib} MiB in {FILL_PATIENCE:?}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(child)
    }

    fn raw_copy(&self, bytes: u64, kind: Kind) -> Result<f64> {
        let address = format!("{}:{}", self.state.nodes[1].address, raw::PORT);
        let bytes = bytes.to_string();
        let mut receiver = self
            .exec(2)
            .args(["moslab", "__raw-receive", &address, &bytes])
            .stdout(Stdio::piped())
            .spawn()?;
        raw::await_listening(&mut receiver)?;
        let sent = self
            .exec(1)
            .args(["moslab", "__raw-send", &address, &bytes, &kind.to_string()])
            .stderr(Stdio::inherit())
            .output()?;
        let status = receiver.wait()?;
        if !status.success() || !sent.status.success() {
            bail!("the raw copy failed");
        }
        Ok(String::from_utf8_lossy(&sent.stdout).trim().parse()?)
    }

    fn start_ms(&self, command: &[&str]) -> Result<f64> {
        let output = self.exec(1).args(["moslab", "__start-time"]).args(command).output()?;
        if !output.status.success() {
            bail!("`{}` cannot be timed: {}", command.join(" "), String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8_lossy(&output.stdout).trim().parse()?)
    }

    fn exec(&self, node: u32) -> Command {
        let mut command = own_program();
        command.args(["exec", "--name", self.place.name(), &format!("node{node}"), "--"]);
        command.stdin(Stdio::null());
        command
    }
}

/// The run whose total is the median of all; its figures belong together.
fn middle(runs: &[&Figures]) -> Option<Figures> {
    let mut sorted = runs.to_vec();
    sorted.sort_by(|a, b| a.total_ms.total_cmp(&b.total_ms));
    sorted.get(sorted.len() / 2).map(|figures| (*figures).clone())
}

fn table(results: &Results) -> String {
    let mut text = format!(
        "{:>5} {:6} {:4} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>8} {:>8}\n",
        "MiB",
        "memory",
        "way",
        "MiB sent",
        "on wire",
        "total ms",
        "freeze ms",
        "felt ms",
        "raw ms",
        "freeze/r",
        "total/r"
    );
    for f in &results.moves {
        text.push_str(&format!(
            "{:>5} {:6} {:4} {:>9.1} {:>9.1} {:>9.1} {:>9.1} {:>9.1} {:>9.1} {:>8.2} {:>8.2}\n",
            f.size_mib,
            f.memory.to_string(),
            f.direction,
            f.bytes as f64 / 1048576.0,
            f.wire_bytes as f64 / 1048576.0,
            f.total_ms,
            f.freeze_ms,
            f.felt_ms,
            f.raw_ms,
            f.freeze_ratio,
            f.total_ratio
        ));
    }
    text.push_str(&format!(
        "\nstart of a program: {:.2} ms plainly, {:.2} ms with mosrun: {:+.2} ms\n",
        results.plain_start_ms, results.mosrun_start_ms, results.mosrun_adds_ms
    ));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_keeps_figures_of_one_run_together() {
        let run = |total_ms, freeze_ms| Figures {
            size_mib: 1,
            memory: Kind::Text,
            direction: "out",
            bytes: 0,
            wire_bytes: 0,
            total_ms,
            freeze_ms,
            felt_ms: 0.0,
            raw_ms: 1.0,
            freeze_ratio: freeze_ms,
            total_ratio: total_ms,
        };
        let runs = [run(9.0, 1.0), run(5.0, 7.0), run(1.0, 9.0)];
        let middle = middle(&runs.iter().collect::<Vec<_>>()).expect("three runs");
        assert_eq!((middle.total_ms, middle.freeze_ms), (5.0, 7.0));
    }
}
