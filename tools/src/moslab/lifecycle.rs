//! `up` and `down`: starting a lab's keeper, and making sure that nothing of a lab is left.

use super::binaries::own_program;
use super::control::{self, Order};
use super::identity::ProcessId;
use super::keeper::Options;
use super::place::{self, MAX_NODES, Place};
use super::state::LabState;
use super::{binaries, login, sweep};
use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

/// What the user may choose.
#[derive(Debug, Clone)]
pub struct Wishes {
    /// How many nodes.
    pub nodes: u32,
    /// CPUs each may use; absent: an equal share, 0: no limit.
    pub cpus_per_node: Option<f64>,
    /// Rate of each node's link.
    pub bandwidth: Option<String>,
}

/// A lab that is up, tied to this process as long as this value is neither released nor dropped.
#[derive(Debug)]
pub struct Started {
    keeper: Child,
    tie: Option<ChildStdin>,
    /// What could not be had.
    pub notes: Vec<String>,
}

impl Started {
    /// Lets the lab outlive this process.
    pub fn release(mut self) -> Result<()> {
        if let Some(mut tie) = self.tie.take() {
            tie.write_all(b"release\n")?;
        }
        Ok(())
    }

    /// Ends the lab and waits until it is gone.
    pub fn end(mut self, place: &Place) -> Result<()> {
        drop(self.tie.take());
        self.keeper.wait()?;
        sweep::sweep_locked(place)
    }
}

/// Starts a lab and waits until every node sees every other. `signals` end it half-way.
pub fn up(place: &Place, wishes: &Wishes, signals: Option<&SignalFd>) -> Result<Started> {
    if !nix::unistd::geteuid().is_root() {
        bail!("a lab needs namespaces, links and control groups: run moslab as root");
    }
    if wishes.nodes == 0 || wishes.nodes > MAX_NODES {
        bail!("a lab has 1 to {MAX_NODES} nodes, not {}", wishes.nodes);
    }
    let options = Options {
        nodes: wishes.nodes,
        cpus_per_node: share(wishes)?,
        bandwidth: wishes.bandwidth.clone(),
        binaries: binaries::folder()?,
        user: login::ordinary_user()?,
    };
    let mut keeper = claim(place, &options)?;
    let (tie, said) = (keeper.stdin.take(), keeper.stdout.take());
    let mut started = Started { keeper, tie, notes: Vec::new() };
    match said.context("the keeper has no output").and_then(|said| follow(&mut started, said, signals)) {
        Ok(()) => Ok(started),
        Err(error) => {
            started.end(place)?;
            Err(error)
        }
    }
}

/// An equal share of the CPUs unless the user said another.
fn share(wishes: &Wishes) -> Result<Option<f64>> {
    match wishes.cpus_per_node {
        Some(0.0) => Ok(None),
        Some(cpus) if cpus > 0.0 && cpus.is_finite() => Ok(Some(cpus)),
        Some(cpus) => bail!("--cpus-per-node {cpus} is no number of CPUs; use 0.5, 2 or 0 for no limit"),
        None => {
            let cpus = std::thread::available_parallelism()?.get() as f64;
            Ok(Some(((cpus / f64::from(wishes.nodes)) * 100.0).floor().max(1.0) / 100.0))
        }
    }
}

/// Takes the lab's name and starts its keeper.
fn claim(place: &Place, options: &Options) -> Result<Child> {
    let _lock = place::lock()?;
    if let Some(state) = LabState::load(place).unwrap_or_default()
        && state.keeper.alive()
    {
        bail!(
            "lab {0:?} is up already; use it, end it with `moslab down --name {0}`, or take another --name",
            place.name()
        );
    }
    sweep::sweep(place)?;
    for dir in [place.run_dir(), place.files_dir()] {
        fs::create_dir_all(&dir).with_context(|| format!("{} cannot be made", dir.display()))?;
    }
    let log = fs::File::create(place.keeper_log())?;
    let keeper = own_program()
        .args(["__keeper", place.name(), &serde_json::to_string(options)?])
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .context("the lab's keeper cannot be started")?;
    await_claimed(place, keeper)
}

/// The lock is held until the state names the keeper, so that nobody sweeps a lab being born.
fn await_claimed(place: &Place, mut keeper: Child) -> Result<Child> {
    for _ in 0..5000 {
        if let Ok(Some(state)) = LabState::load(place)
            && state.keeper.pid == keeper.id() as i32
        {
            return Ok(keeper);
        }
        if keeper.try_wait()?.is_some() {
            // It has said why, on its output.
            return Ok(keeper);
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    bail!("the lab's keeper says nothing; its log is {}", place.keeper_log().display())
}

/// Reads the keeper's progress until it is ready.
fn follow(started: &mut Started, said: ChildStdout, signals: Option<&SignalFd>) -> Result<()> {
    let mut said = BufReader::new(said);
    loop {
        if said.buffer().is_empty() {
            wait_for_line(&said, signals)?;
        }
        let mut line = String::new();
        if said.read_line(&mut line)? == 0 {
            bail!("the lab's keeper ended without a word");
        }
        match line.trim_end().split_once(' ').unwrap_or((line.trim_end(), "")) {
            ("ready", _) => return Ok(()),
            ("failed", why) => bail!("the lab did not start: {why}"),
            ("note", note) => started.notes.push(note.to_string()),
            _ => {}
        }
    }
}

fn wait_for_line(said: &BufReader<ChildStdout>, signals: Option<&SignalFd>) -> Result<()> {
    let mut fds = vec![PollFd::new(said.get_ref().as_fd(), PollFlags::POLLIN)];
    fds.extend(signals.map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)));
    match poll(&mut fds, PollTimeout::NONE) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(errno) => return Err(errno).context("waiting for the keeper failed"),
    }
    if fds.get(1).and_then(PollFd::revents).is_some_and(|events| !events.is_empty()) {
        return Err(Interrupted.into());
    }
    Ok(())
}

/// A signal asked us to end.
#[derive(Debug, thiserror::Error)]
#[error("interrupted; the lab is gone")]
pub struct Interrupted;

/// Blocks the signals that end a command, and makes them readable.
pub fn catch_ending_signals() -> Result<SignalFd> {
    let mut ending = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT] {
        ending.add(signal);
    }
    ending.thread_block()?;
    Ok(SignalFd::with_flags(&ending, SfdFlags::SFD_CLOEXEC)?)
}

/// A signal ends the lab, then us.
pub fn end_when_asked(place: &Place, signals: SignalFd) {
    let place = place.clone();
    std::thread::spawn(move || {
        if signals.read_signal().is_ok() {
            eprintln!("moslab: interrupted; ending the lab");
            if let Err(error) = down(&place) {
                eprintln!("moslab: {error:#}");
            }
            std::process::exit(130);
        }
    });
}

/// Ends a lab; one that is not there is no error, but it is said.
pub fn down(place: &Place) -> Result<bool> {
    if !nix::unistd::geteuid().is_root() {
        bail!("only root can end a lab: run moslab as root");
    }
    if !sweep::anything_left(place) {
        return Ok(false);
    }
    if let Ok(state) = LabState::of_running(place) {
        // If it does not answer, the sweep kills it and does its work.
        let _ = control::order(place, &Order::Down);
        await_end(state.keeper);
    }
    sweep::sweep_locked(place)?;
    Ok(true)
}

/// The state goes before its keeper does, which is the last of a lab.
fn await_end(keeper: ProcessId) {
    for _ in 0..1000 {
        if !keeper.alive() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}
