//! The process that owns a lab: its bridge, its nodes, its control groups and its files.
//!
//! `moslab up` starts it (`moslab __keeper`), reads its progress from its standard output, and says
//! `release` on its standard input when the lab may outlive the command. Until then, the end of that
//! input (the command was interrupted or killed) ends the lab. `moslab demo` never releases it.

use super::binaries::own_program;
use super::cgroup::{self, CpuController};
use super::control::{self, Answer, Order};
use super::daemon;
use super::identity::ProcessId;
use super::node::NodeConfig;
use super::place::{PORT, Place, node_name};
use super::state::{LabState, NodeState};
use super::{mounts, net, sweep};
use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::time::{Duration, Instant};

/// How long a node's daemon may take to answer and to see the others.
const JOIN_PATIENCE: Duration = Duration::from_secs(30);
/// A client that connects and says nothing.
const CLIENT_PATIENCE: Duration = Duration::from_secs(5);

/// What `up` asks for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Options {
    /// How many nodes.
    pub nodes: u32,
    /// CPUs each may use.
    pub cpus_per_node: Option<f64>,
    /// Rate of each node's link.
    pub bandwidth: Option<String>,
    /// Where the commands are built.
    pub binaries: PathBuf,
    /// The nodes' ordinary user.
    pub user: String,
}

/// One node as its keeper has it.
struct Running {
    outer: Child,
    orders: ChildStdin,
    said: BufReader<ChildStdout>,
}

struct Keeper {
    place: Place,
    options: Options,
    state: LabState,
    cpu: Option<CpuController>,
    running: Vec<Option<Running>>,
    islands: u32,
    /// The command that started us still decides over our life.
    tied: bool,
}

/// `moslab __keeper`: the whole life of a lab.
pub fn main(place: Place, options: Options) -> Result<u8> {
    // What the command that started us had blocked is not ours to keep, nor our nodes'.
    SigSet::all().thread_unblock()?;
    nix::unistd::setsid().context("the keeper gets no session of its own")?;
    let mut asked_to_end = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        asked_to_end.add(signal);
    }
    asked_to_end.thread_block()?;
    let signals = SignalFd::with_flags(&asked_to_end, SfdFlags::SFD_CLOEXEC)?;
    let mut keeper = Keeper::new(place, options)?;
    keeper.state.save(&keeper.place)?;
    let result = keeper.bring_up().and_then(|listener| {
        say("ready");
        keeper.serve(&listener, &signals)
    });
    keeper.tear_down();
    match result {
        Ok(()) => Ok(0),
        Err(error) => {
            say(&format!("failed {error:#}"));
            Err(error)
        }
    }
}

fn say(line: &str) {
    // Once the command that started us is gone, nobody listens.
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{}", line.replace('\n', " "));
    let _ = out.flush();
}

impl Keeper {
    fn new(place: Place, options: Options) -> Result<Keeper> {
        let own = ProcessId::of(std::process::id() as i32).context("/proc does not show this process")?;
        let nodes = (1..=options.nodes).map(|number| NodeState {
            name: node_name(number),
            number,
            address: place.address(number),
            init: None,
            island: 0,
        });
        let state = LabState {
            name: place.name().to_string(),
            phase: "starting".into(),
            keeper: own,
            user: options.user.clone(),
            cpus_per_node: options.cpus_per_node,
            bandwidth: options.bandwidth.clone(),
            cgroups: Vec::new(),
            notes: Vec::new(),
            nodes: nodes.collect(),
        };
        let running = state.nodes.iter().map(|_| None).collect();
        Ok(Keeper { place, options, state, cpu: None, running, islands: 0, tied: true })
    }

    fn bring_up(&mut self) -> Result<UnixListener> {
        unshare(CloneFlags::CLONE_NEWNET).context("no network namespace for the lab's bridge")?;
        net::make_bridge(0)?;
        self.make_cgroups();
        self.make_files()?;
        self.state.save(&self.place)?;
        for index in 0..self.state.nodes.len() {
            self.start_node(index)?;
            say(&format!("started {}", self.state.nodes[index].name));
        }
        self.await_joined()?;
        let listener = UnixListener::bind(self.place.control_socket())?;
        self.state.phase = "up".into();
        self.state.save(&self.place)?;
        Ok(listener)
    }

    fn make_cgroups(&mut self) {
        let Some(_) = self.options.cpus_per_node else { return };
        let made = match CpuController::find() {
            None => Err(anyhow::anyhow!("this machine has no control group with the cpu controller")),
            Some(cpu) => cpu.make_lab(self.place.name()).map(|dir| (cpu, dir)),
        };
        match made {
            Ok((cpu, dir)) => {
                self.state.cgroups.push(dir);
                self.cpu = Some(cpu);
            }
            Err(error) => self.note(format!("the nodes' CPU shares are not enforced: {error:#}")),
        }
    }

    fn note(&mut self, what: String) {
        say(&format!("note {what}"));
        self.state.notes.push(what);
    }

    /// The nodes' folders, the cluster's key, and the names they know.
    fn make_files(&self) -> Result<()> {
        let mut hosts = String::from("127.0.0.1 localhost\n::1 localhost\n");
        for node in &self.state.nodes {
            hosts.push_str(&format!("{} {}\n", node.address, node.name));
        }
        let first = self.place.node_dir(&self.state.nodes[0].name).join("etc/cluster.key");
        for node in &self.state.nodes {
            let dir = self.place.node_dir(&node.name);
            mounts::make_folders(&dir)?;
            fs::write(dir.join("names/hosts"), &hosts)?;
            fs::write(dir.join("names/hostname"), format!("{}\n", node.name))?;
            super::login::prepare_user(&dir, &self.options.user)?;
            if node.number == 1 {
                migd::cluster_key::create(&first)?;
            } else {
                migd::cluster_key::install(&first, &dir.join("etc/cluster.key"))?;
            }
        }
        Ok(())
    }

    fn node_config(&self, index: usize) -> Result<NodeConfig> {
        let node = &self.state.nodes[index];
        let cgroup = match (&self.cpu, self.options.cpus_per_node) {
            (Some(cpu), Some(cpus)) => Some(cpu.make_node(self.place.name(), &node.name, cpus)?),
            _ => None,
        };
        let peers = self.state.nodes.iter().filter(|peer| peer.number != node.number);
        Ok(NodeConfig {
            name: node.name.clone(),
            address: node.address,
            join: peers.map(|peer| format!("{}:{PORT}", peer.address)).collect(),
            dir: self.place.node_dir(&node.name),
            log: self.place.node_log(&node.name),
            binaries: self.options.binaries.clone(),
            cgroup,
            bandwidth: self.options.bandwidth.clone(),
            cpus: self.options.cpus_per_node,
        })
    }

    fn start_node(&mut self, index: usize) -> Result<()> {
        let config = self.node_config(index)?;
        let path = self.place.node_config(&config.name);
        fs::write(&path, serde_json::to_vec(&config)?)?;
        let log = fs::OpenOptions::new().create(true).append(true).open(&config.log)?;
        let mut outer = own_program()
            .arg("__node-init")
            .arg(&path)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .context("the node's init cannot be started")?;
        let (orders, said) = (outer.stdin.take(), outer.stdout.take());
        let (Some(mut orders), Some(said)) = (orders, said) else { bail!("the node's init has no pipes") };
        let mut said = BufReader::new(said);
        let result = self.lead_in(index, &config, &mut orders, &mut said);
        // Kept in any case, so that a failure half-way leaves no process behind.
        self.running[index] = Some(Running { outer, orders, said });
        result.with_context(|| {
            format!("{} did not start: {}", config.name, daemon::tail(&config.log).trim())
        })?;
        self.state.save(&self.place)
    }

    /// The steps in which a node and its keeper have to wait for each other.
    fn lead_in(
        &mut self,
        index: usize,
        config: &NodeConfig,
        orders: &mut ChildStdin,
        said: &mut impl BufRead,
    ) -> Result<()> {
        let init: i32 = expect(said, "init ")?.parse()?;
        self.state.nodes[index].init = ProcessId::of(init);
        self.state.save(&self.place)?;
        writeln!(orders, "mount")?;
        expect(said, "mounted")?;
        net::attach(&config.name, init, self.state.nodes[index].island, config.bandwidth.as_deref())?;
        writeln!(orders, "network")?;
        expect(said, "ready")?;
        Ok(())
    }

    fn await_joined(&mut self) -> Result<()> {
        let until = Instant::now() + JOIN_PATIENCE;
        for index in 0..self.state.nodes.len() {
            self.await_daemon(index, self.state.nodes.len(), until)?;
        }
        Ok(())
    }

    /// Waits until a node's daemon sees so many nodes up.
    fn await_daemon(&mut self, index: usize, wanted: usize, until: Instant) -> Result<()> {
        let node = &self.state.nodes[index];
        let init = node.init.context("the node has no PID 1")?;
        loop {
            let seen = daemon::snapshot(init.pid).map(|s| s.nodes.iter().filter(|n| n.state == "up").count());
            match seen {
                Ok(seen) if seen >= wanted => return Ok(()),
                _ if self.tied && input_ended() => bail!("interrupted"),
                _ if !init.alive() => bail!("{} has died", node.name),
                Ok(seen) if Instant::now() > until => {
                    bail!("{} sees {seen} of {wanted} nodes after {JOIN_PATIENCE:?}", node.name)
                }
                Err(error) if Instant::now() > until => {
                    let log = daemon::tail(&self.place.node_log(&node.name));
                    bail!("the daemon of {} does not answer ({error:#}); its log ends with: {log}", node.name)
                }
                _ => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    fn serve(&mut self, listener: &UnixListener, signals: &SignalFd) -> Result<()> {
        loop {
            let stdin = std::io::stdin();
            let mut fds = vec![
                PollFd::new(listener.as_fd(), PollFlags::POLLIN),
                PollFd::new(signals.as_fd(), PollFlags::POLLIN),
            ];
            if self.tied {
                fds.push(PollFd::new(stdin.as_fd(), PollFlags::POLLIN));
            }
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno).context("the keeper cannot wait"),
            }
            let ready = |at: usize| fds.get(at).and_then(PollFd::revents).is_some_and(|r| !r.is_empty());
            let (client, signal, command) = (ready(0), ready(1), ready(2));
            if signal {
                return Ok(());
            }
            if command {
                let mut word = [0u8; 16];
                match std::io::stdin().read(&mut word) {
                    Ok(n) if n > 0 => self.tied = false,
                    _ => return Ok(()),
                }
            }
            if client && self.serve_client(listener) {
                return Ok(());
            }
        }
    }

    /// One order of one client; true: the lab is to end.
    fn serve_client(&mut self, listener: &UnixListener) -> bool {
        let Ok((stream, _)) = listener.accept() else { return false };
        let timeouts = stream
            .set_read_timeout(Some(CLIENT_PATIENCE))
            .and_then(|()| stream.set_write_timeout(Some(CLIENT_PATIENCE)));
        let Ok(order) = timeouts.map_err(Into::into).and_then(|()| control::read_line::<Order>(&stream))
        else {
            return false;
        };
        let down = matches!(order, Order::Down);
        let error = self.obey(order).err().map(|error| format!("{error:#}"));
        if down {
            self.tear_down();
        }
        // The client may have given up waiting.
        let _ = control::write_line(&stream, &Answer { error });
        down
    }

    fn obey(&mut self, order: Order) -> Result<()> {
        match order {
            Order::Down => Ok(()),
            Order::Kill { node } => {
                let index = self.index(&node)?;
                self.kill_node(index)
            }
            Order::Partition { nodes } => self.partition(&nodes),
            Order::Heal => {
                for index in 0..self.state.nodes.len() {
                    self.put_on_island(index, 0)?;
                }
                Ok(())
            }
            Order::Restart { node, daemon_only } => {
                let index = self.index(&node)?;
                self.restart(index, daemon_only)
            }
        }
    }

    fn index(&self, node: &str) -> Result<usize> {
        let number = self.state.node(node)?.number;
        Ok(number as usize - 1)
    }

    fn kill_node(&mut self, index: usize) -> Result<()> {
        if let Some(Running { mut outer, orders, .. }) = self.running[index].take() {
            if let Some(init) = self.state.nodes[index].init {
                sweep::kill(init);
            }
            // A PID 1 that was not known yet reads the end of its orders and ends.
            drop(orders);
            // Its PID 1 is the only child; the kernel has ended the rest before it reports that end.
            let _ = outer.wait();
            // The kernel takes a dead namespace's link away later, and a new one needs its name.
            net::detach(&self.state.nodes[index].name);
        }
        self.state.nodes[index].init = None;
        self.state.save(&self.place)
    }

    fn partition(&mut self, nodes: &[String]) -> Result<()> {
        let indexes = nodes.iter().map(|node| self.index(node)).collect::<Result<Vec<_>>>()?;
        let island = self.islands + 1;
        net::make_bridge(island)?;
        self.islands = island;
        indexes.into_iter().try_for_each(|index| self.put_on_island(index, island))
    }

    fn put_on_island(&mut self, index: usize, island: u32) -> Result<()> {
        let node = &mut self.state.nodes[index];
        if node.island != island {
            if node.init.is_some_and(ProcessId::alive) {
                net::move_to(&node.name, island)?;
            }
            node.island = island;
        }
        self.state.save(&self.place)
    }

    fn restart(&mut self, index: usize, daemon_only: bool) -> Result<()> {
        if daemon_only {
            let Some(running) = self.running[index].as_mut() else { bail!("the node is down") };
            writeln!(running.orders, "restart-daemon").context("the node's init takes no orders")?;
            // Or the old one would answer what is asked next.
            expect(&mut running.said, "restarted")?;
        } else {
            self.kill_node(index)?;
            self.start_node(index)?;
        }
        let island = self.state.nodes[index].island;
        let together = self.state.nodes.iter().filter(|n| n.island == island && n.init.is_some()).count();
        self.await_daemon(index, together, Instant::now() + JOIN_PATIENCE)
    }

    /// Ends everything. What cannot be removed is told, and swept by the next `up` or `down`.
    fn tear_down(&mut self) {
        for index in 0..self.running.len() {
            if let Err(error) = self.kill_node(index) {
                eprintln!("moslab: {}: {error:#}", self.state.nodes[index].name);
            }
        }
        for dir in std::mem::take(&mut self.state.cgroups) {
            if let Err(error) = cgroup::remove(&dir) {
                eprintln!("moslab: {error:#}");
            }
        }
        if let Err(error) = sweep::remove_files(&self.place) {
            eprintln!("moslab: {error:#}");
        }
    }
}

/// Reads the one line that is due now, and returns what follows `prefix`.
fn expect(said: &mut impl BufRead, prefix: &str) -> Result<String> {
    let mut line = String::new();
    said.read_line(&mut line)?;
    match line.trim_end().strip_prefix(prefix) {
        Some(rest) => Ok(rest.to_string()),
        None if line.is_empty() => bail!("it ended"),
        None => bail!("it said {line:?} instead of {prefix:?}"),
    }
}

/// Whether the command that started us has gone.
fn input_ended() -> bool {
    let stdin = std::io::stdin();
    let mut fds = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
    matches!(poll(&mut fds, PollTimeout::ZERO), Ok(n) if n > 0)
}
