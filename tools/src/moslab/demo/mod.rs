//! `moslab demo`: the main job from start to finish, told step by step.
//!
//! Three nodes come up; an ordinary user of node 1 starts eight jobs of real programs there; the
//! balancer spreads them; one is moved by hand, one is pinned, one visits every node and comes home.
//! The demo succeeds only if every output is on node 1 and is, byte by byte, what an unmigrated run
//! of the same command wrote. The lab is tied to this process: whatever ends it ends the lab.

mod inputs;
mod jobs;
mod report;
mod watch;

use super::binaries::own_program;
use super::lifecycle::{self, Wishes};
use super::login;
use super::place::Place;
use super::state::LabState;
use super::sweep;
use anyhow::{Context, Result, bail};
use jobs::{BY_HAND, Line, PINNED, TRAVELLER};
use report::Report;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use watch::{Seen, Watch};

/// How many nodes: enough that "everywhere" means more than there and back.
const NODES: u32 = 3;
/// The jobs' folder inside node 1; `/srv` is each node's own.
const FOLDER: &str = "/srv/demo";
/// How long the jobs may take until the daemon has them.
const START_PATIENCE: Duration = Duration::from_secs(10);
/// How long the balancer may take to use both other nodes.
const SPREAD_PATIENCE: Duration = Duration::from_secs(60);
/// How long all jobs together may take.
const JOBS_PATIENCE: Duration = Duration::from_secs(240);
/// How often the job is moved by hand until it has been the hand that moved it.
const TRIES_BY_HAND: u32 = 5;

/// Options of `moslab demo`.
#[derive(Debug, clap::Args)]
pub struct DemoArgs {
    /// The lab's name
    #[arg(long, value_name = "LAB", default_value = "demo")]
    name: String,
    /// Print the result as JSON; the story goes to standard error
    #[arg(long)]
    json: bool,
}

/// Runs it; 0 only if every promise was kept and nothing is left behind.
pub fn main(arguments: &DemoArgs) -> Result<u8> {
    let place = Place::new(&arguments.name)?;
    let lines = jobs::lines()?;
    let signals = lifecycle::catch_ending_signals()?;
    let story = Story { started: Instant::now() };
    story.tell(&format!("bringing up {NODES} nodes, each with its own address, files and daemon"));
    let wishes = Wishes { nodes: NODES, cpus_per_node: None, bandwidth: None };
    let lab = lifecycle::up(&place, &wishes, Some(&signals))?;
    for note in &lab.notes {
        story.tell(&format!("note: {note}"));
    }
    lifecycle::end_when_asked(&place, signals);
    let result = Demo::new(&place, story).and_then(|mut demo| demo.run(&lines));
    lab.end(&place)?;
    let mut report = result?;
    if sweep::anything_left(&place) {
        report.failures.push("the lab has left something behind".into());
    }
    show(&report, arguments.json)?;
    Ok(u8::from(!report.failures.is_empty()))
}

fn show(report: &Report, json: bool) -> Result<()> {
    let table = report::table(&report.jobs);
    if json {
        println!("{}", serde_json::to_string_pretty(report)?);
        return Ok(());
    }
    println!("\n{table}");
    for failure in &report.failures {
        println!("NOT TRUE: {failure}");
    }
    let end = if report.failures.is_empty() {
        "every job ended, every output is identical, and nothing of the lab is left"
    } else {
        "the demo has failed"
    };
    println!("{end} ({:.0} s)", report.seconds);
    Ok(())
}

/// Tells what happens, with the time.
struct Story {
    started: Instant,
}

impl Story {
    fn tell(&self, what: &str) {
        eprintln!("[{:6.1} s] {what}", self.started.elapsed().as_secs_f64());
    }
}

struct Demo {
    place: Place,
    story: Story,
    nodes: Vec<String>,
    init: i32,
    user: String,
    /// [`FOLDER`] as seen from outside.
    dir: PathBuf,
    failures: Vec<String>,
}

impl Demo {
    fn new(place: &Place, story: Story) -> Result<Demo> {
        let state = LabState::of_running(place)?;
        let (home, init) = state.running_node("1")?;
        Ok(Demo {
            place: place.clone(),
            story,
            nodes: state.nodes.iter().map(|node| node.name.clone()).collect(),
            init: init.pid,
            user: state.user.clone(),
            dir: place.node_dir(&home.name).join("srv/demo"),
            failures: Vec::new(),
        })
    }

    fn run(&mut self, lines: &[Line]) -> Result<Report> {
        self.story.tell(&format!("writing the inputs into {FOLDER} of {}, as {}", self.nodes[0], self.user));
        let (uid, gid) = login::ids(&self.place.node_dir(&self.nodes[0]), &self.user)?;
        inputs::write(&self.dir, uid, gid)?;
        self.run_plainly(lines)?;
        let watch = Watch::start(self.init);
        self.story.tell("starting the jobs with mosrun");
        let mut running =
            lines.iter().map(|line| self.spawn(&line.moved(), false)).collect::<Result<Vec<Child>>>()?;
        let deadline = Instant::now() + JOBS_PATIENCE;
        self.await_seen(&watch, lines);
        self.await_spread(&watch);
        self.move_by_hand(&watch);
        let pinned_on = self.pin();
        self.travel(&watch);
        self.await_ends(&watch, lines, &mut running, deadline);
        let seen = watch.look_now(self.init);
        let (jobs, failures) = report::rows(&seen, lines, &self.dir);
        self.failures.extend(failures);
        self.failures.extend(report::promises(&seen, &self.nodes, &pinned_on));
        self.failures.extend(self.strays());
        let failures = std::mem::take(&mut self.failures);
        Ok(Report { jobs, failures, seconds: self.story.started.elapsed().as_secs_f64() })
    }

    /// The twin that never moves: the same commands, two at a time, before anything else.
    fn run_plainly(&self, lines: &[Line]) -> Result<()> {
        let prepared = self.on_node1(&self.user, &in_folder(jobs::PREPARE))?;
        if !prepared.status.success() {
            let said = String::from_utf8_lossy(&prepared.stderr).into_owned();
            bail!("the inputs cannot be prepared ({}): {}", prepared.status, said.trim());
        }
        self.story.tell(&format!("running the {} commands plainly, for comparison", lines.len()));
        let at_a_time = std::thread::available_parallelism()?.get();
        for group in lines.chunks(at_a_time) {
            let started = Instant::now();
            let plain = group.iter().map(|line| self.spawn(&line.plain(), true));
            for (line, child) in group.iter().zip(plain.collect::<Result<Vec<_>>>()?) {
                let output = child.wait_with_output()?;
                let seconds = started.elapsed().as_secs_f64();
                self.story.tell(&format!("    {}: {seconds:.1} s", line.jobs.join(" | ")));
                if !output.status.success() {
                    let said = String::from_utf8_lossy(&output.stderr);
                    bail!("`{}` failed without any migration: {}", line.plain(), said.trim());
                }
            }
        }
        Ok(())
    }

    /// Starts a command line in the jobs' folder on node 1, as the user.
    fn spawn(&self, command: &str, unlimited: bool) -> Result<Child> {
        let mut exec = self.exec(&self.user, unlimited);
        exec.args(["sh", "-c", &in_folder(command)]);
        exec.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        exec.spawn().context("moslab exec cannot be started")
    }

    fn exec(&self, user: &str, unlimited: bool) -> Command {
        let mut exec = own_program();
        exec.args(["exec", "--name", self.place.name(), "--user", user]);
        if unlimited {
            exec.arg("--unlimited");
        }
        exec.args([self.nodes[0].as_str(), "--"]);
        exec
    }

    fn on_node1(&self, user: &str, command: &str) -> Result<Output> {
        let mut exec = self.exec(user, true);
        exec.args(["sh", "-c", command]).stdin(Stdio::null());
        exec.output().context("moslab exec cannot be started")
    }

    /// A command of the user's on node 1 that has to succeed; tells what it printed.
    fn must(&mut self, command: &str) -> bool {
        self.story.tell(&format!("$ {command}"));
        let output = match self.on_node1(&self.user, command) {
            Ok(output) => output,
            Err(error) => {
                self.failures.push(format!("`{command}`: {error:#}"));
                return false;
            }
        };
        let said =
            format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        for line in said.lines().take(8) {
            self.story.tell(&format!("    {line}"));
        }
        if !output.status.success() {
            self.failures.push(format!("`{command}` ended with {}: {}", output.status, said.trim()));
        }
        output.status.success()
    }

    fn await_seen(&mut self, watch: &Watch, lines: &[Line]) {
        let until = Instant::now() + START_PATIENCE;
        let jobs: Vec<&str> = lines.iter().flat_map(|line| line.jobs.iter().copied()).collect();
        loop {
            let seen = watch.seen();
            let missing: Vec<&str> = jobs.iter().copied().filter(|job| seen.job(job).is_none()).collect();
            if missing.is_empty() {
                return self.story.tell(&format!("node 1's daemon has all {} jobs", jobs.len()));
            }
            if Instant::now() > until {
                return self.story.tell(&format!("not seen by node 1's daemon: {}", missing.join(", ")));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn await_spread(&mut self, watch: &Watch) {
        self.story.tell("waiting for the balancer, with nobody's help");
        let until = Instant::now() + SPREAD_PATIENCE;
        let mut told = 0;
        while Instant::now() < until {
            let seen = watch.seen();
            for migration in seen.migrations.values().filter(|m| m.phase == "done").skip(told) {
                self.story.tell(&format!(
                    "    {} went to {} ({}): {} bytes in {:.0} ms, frozen {:.0} ms",
                    migration.job,
                    migration.to,
                    migration.cause,
                    migration.bytes,
                    migration.total_ms,
                    migration.freeze_ms
                ));
                told += 1;
            }
            let reached = seen.balanced_to();
            if self.nodes.iter().skip(1).all(|node| reached.contains(node)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        self.story.tell("    the balancer has not used every node");
    }

    /// To a node where it is not. Between the look and the order the balancer may have moved it to that
    /// very node, and there is nothing left to do: then to another.
    fn move_by_hand(&mut self, watch: &Watch) {
        for _ in 0..TRIES_BY_HAND {
            let seen = watch.look_now(self.init);
            let here = seen.job(BY_HAND).map(|process| process.node.clone()).unwrap_or_default();
            let target = self.nodes.iter().skip(1).find(|node| **node != here).cloned();
            let Some(target) = target else { return };
            if !self.must(&format!("migrate job:{BY_HAND} {target}")) {
                return;
            }
            if watch.look_now(self.init).moved_by_hand(BY_HAND) {
                return;
            }
        }
    }

    fn pin(&mut self) -> String {
        let target = self.nodes[self.nodes.len() - 1].clone();
        self.must(&format!("mosctl pin job:{PINNED} {target}"));
        target
    }

    fn travel(&mut self, watch: &Watch) {
        let stops: Vec<String> = self.nodes.iter().skip(1).chain(self.nodes.first()).cloned().collect();
        for stop in stops {
            let seen = watch.look_now(self.init);
            // The balancer may have been faster.
            if seen.job(TRAVELLER).is_some_and(|process| process.node == stop) {
                self.story.tell(&format!("    {TRAVELLER} is on {stop} already"));
                continue;
            }
            self.must(&format!("migrate job:{TRAVELLER} {stop}"));
        }
    }

    fn await_ends(&mut self, watch: &Watch, lines: &[Line], running: &mut Vec<Child>, deadline: Instant) {
        self.story.tell("waiting for all jobs to end");
        for (line, child) in lines.iter().zip(running.drain(..)) {
            match wait_until(child, deadline) {
                Ok(Some(output)) if output.status.success() => {
                    self.story.tell(&format!("    {} ended well", line.jobs.join(" | ")));
                }
                Ok(Some(output)) => {
                    let said = String::from_utf8_lossy(&output.stderr);
                    self.failures.push(format!("`{}`: {}: {}", line.moved(), output.status, said.trim()));
                }
                Ok(None) => {
                    let where_now = describe(&watch.seen(), &line.jobs);
                    self.failures.push(format!("`{}` has not ended in time ({where_now})", line.moved()));
                }
                Err(error) => self.failures.push(format!("`{}`: {error:#}", line.moved())),
            }
        }
    }

    /// The outputs are on node 1 and nowhere else.
    fn strays(&self) -> Vec<String> {
        let others = self.nodes.iter().skip(1);
        let stray = others.filter(|node| self.place.node_dir(node).join("srv/demo").exists());
        stray.map(|node| format!("files of the jobs are on {node}")).collect()
    }
}

fn in_folder(command: &str) -> String {
    format!("cd {FOLDER} && {command}")
}

fn describe(seen: &Seen, jobs: &[&str]) -> String {
    let one = |job: &&str| match seen.job(job) {
        Some(process) => format!("{job}: {} on {}", process.state, process.node),
        None => format!("{job}: never seen"),
    };
    jobs.iter().map(one).collect::<Vec<_>>().join("; ")
}

/// Waits for a child until the deadline; then it is left to the end of its lab.
fn wait_until(mut child: Child, deadline: Instant) -> Result<Option<Output>> {
    while child.try_wait()?.is_none() {
        if Instant::now() > deadline {
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(Some(child.wait_with_output()?))
}
