//! A node's own processes: the one that makes its namespaces, and its PID 1.
//!
//! `moslab __node-init CONFIG` leaves the machine's namespaces and starts `moslab __node-pid1 CONFIG`
//! as the first process of the new ones, then only waits for its end. PID 1 builds the node's view,
//! configures its network when the keeper says that the link is there, starts `migd`, and from then on
//! reaps and takes orders, one word a line on its standard input. The end of that input means that the
//! keeper is gone: PID 1 exits, and the kernel kills everything in the node.

use super::binaries::own_program;
use super::place::{INSIDE, PORT};
use super::{cgroup, mounts, net};
use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, sethostname, setsid};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Stdin, Write};
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A PID namespace's own limit where the kernel has one (6.14), so that guests keep their numbers.
const PID_MAX: &str = "4194304";
/// All nodes are the same machine: measured one by one while it is busy, they would seem to differ.
const EQUAL_SPEED: u32 = 10_000;

/// All that a node has to know about itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NodeConfig {
    /// Its name, also its host name.
    pub name: String,
    /// Its address.
    pub address: Ipv4Addr,
    /// `IP:PORT` of the daemons it joins.
    pub join: Vec<String>,
    /// Its files.
    pub dir: PathBuf,
    /// Its daemon's messages.
    pub log: PathBuf,
    /// Where the commands are built.
    pub binaries: PathBuf,
    /// Its control group, if it has one.
    pub cgroup: Option<PathBuf>,
    /// Rate of its link.
    pub bandwidth: Option<String>,
    /// CPUs it may use.
    pub cpus: Option<f64>,
}

/// `moslab __node-init`: makes the namespaces, starts PID 1, waits for its end.
pub fn init(config: &Path) -> Result<u8> {
    // The keeper blocks the signals it reads; nothing in a node may inherit that.
    SigSet::all().thread_unblock()?;
    let namespaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWPID;
    unshare(namespaces).context("the node's namespaces cannot be made; moslab needs root")?;
    let mut first =
        own_program().arg("__node-pid1").arg(config).spawn().context("the node's PID 1 cannot be started")?;
    tell(&format!("init {}", first.id()))?;
    let status = first.wait()?;
    Ok(if status.success() { 0 } else { 1 })
}

/// `moslab __node-pid1`: PID 1 of the node.
pub fn pid1(config: &Path) -> Result<u8> {
    if std::process::id() != 1 {
        bail!("this is moslab's own business; use `moslab up`");
    }
    let config: NodeConfig = serde_json::from_slice(&fs::read(config)?)?;
    let mut orders = BufReader::new(std::io::stdin());
    // The init that started us tells our PID first, on the same pipe.
    if next_order(&mut orders)?.as_deref() != Some("mount") {
        return Ok(0);
    }
    setsid().context("no session of its own")?;
    if let Some(group) = &config.cgroup {
        cgroup::enter(group)?;
    }
    let log = OpenOptions::new().create(true).append(true).open(&config.log)?;
    sethostname(&config.name).context("the host name cannot be set")?;
    mounts::build(&config)?;
    // Before 6.14 this is one number for the whole machine and not ours to raise; it does without.
    let _ = own_pid_max();
    tell("mounted")?;
    if next_order(&mut orders)?.as_deref() != Some("network") {
        return Ok(0);
    }
    net::configure_node(config.address, config.bandwidth.as_deref())?;
    Node { config, log, daemon: None }.run(orders)
}

fn own_pid_max() -> std::io::Result<()> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= (6, 14) { fs::write("/proc/sys/kernel/pid_max", PID_MAX) } else { Ok(()) }
}

fn tell(line: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}

/// One line from the keeper; `None` when it is gone.
fn next_order(orders: &mut BufReader<Stdin>) -> Result<Option<String>> {
    let mut line = String::new();
    let read = orders.read_line(&mut line)?;
    Ok((read > 0).then(|| line.trim().to_string()))
}

struct Node {
    config: NodeConfig,
    log: File,
    daemon: Option<Pid>,
}

impl Node {
    fn run(mut self, mut orders: BufReader<Stdin>) -> Result<u8> {
        let mut children = SigSet::empty();
        children.add(Signal::SIGCHLD);
        children.thread_block()?;
        let deaths = SignalFd::with_flags(&children, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        self.start_daemon(&children)?;
        tell("ready")?;
        loop {
            let stdin = std::io::stdin();
            let mut fds = [
                PollFd::new(deaths.as_fd(), PollFlags::POLLIN),
                PollFd::new(stdin.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno).context("PID 1 cannot wait"),
            }
            let ordered = fds[1].revents().is_some_and(|events| !events.is_empty());
            while let Ok(Some(_)) = deaths.read_signal() {}
            self.reap();
            if !ordered {
                continue;
            }
            match next_order(&mut orders)?.as_deref() {
                None => return Ok(0),
                Some("restart-daemon") => {
                    self.stop_daemon();
                    self.start_daemon(&children)?;
                    tell("restarted")?;
                }
                Some(other) => self.note(&format!("an order that is not known: {other:?}")),
            }
        }
    }

    fn start_daemon(&mut self, blocked: &SigSet) -> Result<()> {
        let mut command = Command::new(format!("{INSIDE}/bin/migd"));
        let address = format!("{}:{PORT}", self.config.address);
        let speed = EQUAL_SPEED.to_string();
        let cpus = self.config.cpus.map(|cpus| cpus.to_string());
        command
            .args(["--name", &self.config.name, "--listen", &address, "--advertise", &address])
            .args(["--speed", &speed])
            .args(cpus.iter().flat_map(|cpus| ["--cpus", cpus]))
            .args(["--key", &format!("{INSIDE}/etc/cluster.key")])
            .args(["--state-dir", &format!("{INSIDE}/state")])
            .args(self.config.join.iter().flat_map(|peer| ["--join", peer]))
            .env_clear()
            .env("PATH", super::login::PATH)
            .env("RUST_LOG", std::env::var("RUST_LOG").unwrap_or_else(|_| "info".into()))
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(self.log.try_clone()?)
            .stderr(self.log.try_clone()?);
        // The mask would be inherited, and a daemon that never hears of its children's ends is deaf.
        blocked.thread_unblock()?;
        let started = command.spawn();
        blocked.thread_block()?;
        match started {
            Ok(child) => self.daemon = Some(Pid::from_raw(child.id() as i32)),
            Err(error) => self.note(&format!("migd cannot be started: {error}")),
        }
        Ok(())
    }

    fn stop_daemon(&mut self) {
        let Some(daemon) = self.daemon.take() else { return };
        let _ = kill(daemon, Signal::SIGKILL);
        let _ = waitpid(daemon, None);
    }

    fn reap(&mut self) {
        // Ends when there is no dead child left: ECHILD, or StillAlive.
        loop {
            let status = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) | Err(_) => return,
                Ok(status) => status,
            };
            if self.daemon.is_some() && status.pid() == self.daemon {
                self.daemon = None;
                self.note(&format!("migd has ended: {status:?}"));
            }
        }
    }

    fn note(&mut self, what: &str) {
        // The log's disk may be full; there is nobody else to tell.
        let _ = writeln!(self.log, "moslab: {what}");
    }
}
