//! Starting shepherds, talking to them, and finding them again after a restart.
//!
//! A shepherd listens on a socket in the runtime directory, `home-PID.sock` or `host-TOKEN.sock`; the
//! daemon connects. A shepherd outlives the daemon; the daemon learns of its end by the connection's.

use super::Daemon;
use super::moves::{self, Cause};
use super::processes::Stat;
use super::rescue;
use super::state::InFlight;
use crate::api::{MAX_LINE, ProcessInfo};
use crate::config::Config;
use crate::shepherd::control::{EXPELLED, HomeEvent, HomeOrder, HostEvent, HostOrder};
use crate::shepherd::home::record;
use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, posix_spawn};
use nix::sys::signal::SigSet;
use nix::sys::wait::waitpid;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;
use std::io;
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;

/// How long a new shepherd may take to listen.
const START_LIMIT: Duration = Duration::from_secs(5);
/// Orders that wait for one shepherd.
const ORDERS: usize = 16;
/// The number under which a host shepherd expects its connection.
const SESSION_FD: i32 = 4;

/// A home shepherd.
#[derive(Debug, Clone)]
pub struct HomeShepherd {
    orders: mpsc::Sender<HomeOrder>,
}

/// A host shepherd and its guest.
#[derive(Debug)]
pub struct Guest {
    orders: Option<mpsc::Sender<HostOrder>>,
    /// PID at home and home's name.
    pub at_home: Option<(i32, String)>,
    pid: Option<i32>,
    uid: u32,
    user: String,
    state: String,
    command: String,
    cpu_pct: f64,
    rss_bytes: u64,
    cpu_ms: Option<(Instant, u64)>,
    /// The others of its subtree.
    others: Vec<Guest>,
}

/// Where the control sockets lie.
pub fn folder(config: &Config) -> PathBuf {
    config.run_dir.join("shepherds")
}

fn home_socket(config: &Config, pid: i32) -> PathBuf {
    folder(config).join(format!("home-{pid}.sock"))
}

impl HomeShepherd {
    /// Hands over an order.
    pub fn order(&self, order: HomeOrder) -> bool {
        self.orders.try_send(order).is_ok()
    }
}

impl Guest {
    fn new() -> Guest {
        Guest {
            orders: None,
            at_home: None,
            pid: None,
            uid: 0,
            user: String::new(),
            state: "arriving".into(),
            command: String::new(),
            cpu_pct: 0.0,
            rss_bytes: 0,
            cpu_ms: None,
            others: Vec::new(),
        }
    }

    /// The others of its subtree, by their PIDs at home and here.
    fn know_others(&mut self, others: Vec<(i32, i32)>) {
        let home = self.at_home.as_ref().map(|(_, home)| home.clone()).unwrap_or_default();
        let (uid, user) = (self.uid, self.user.clone());
        let mut known = std::mem::take(&mut self.others);
        self.others = others
            .into_iter()
            .map(|(at_home, pid)| match known.iter().position(|guest| guest.pid == Some(pid)) {
                Some(at) => known.swap_remove(at),
                None => Guest {
                    at_home: Some((at_home, home.clone())),
                    pid: Some(pid),
                    uid,
                    user: user.clone(),
                    state: "running".into(),
                    command: super::processes::command_line(pid),
                    ..Guest::new()
                },
            })
            .collect();
    }

    /// Asks home to take it back. `false`: its shepherd cannot be told.
    pub fn send_home(&self) -> bool {
        self.orders.as_ref().is_some_and(|orders| orders.try_send(HostOrder::SendHome).is_ok())
    }

    /// What `/proc` here says of it.
    pub fn sampled(&mut self, stats: &BTreeMap<i32, Stat>) {
        for other in &mut self.others {
            other.sampled(stats);
        }
        let Some(stat) = self.pid.and_then(|pid| stats.get(&pid)) else { return };
        self.rss_bytes = stat.rss_bytes;
        let now = Instant::now();
        if let Some((at, before)) = self.cpu_ms {
            let elapsed = now.saturating_duration_since(at).as_secs_f64().max(0.001);
            self.cpu_pct = (self.cpu_pct + stat.cpu_ms.saturating_sub(before) as f64 / elapsed / 10.0) / 2.0;
        }
        self.cpu_ms = Some((now, stat.cpu_ms));
    }

    /// For lists, a line a process.
    pub fn infos(&self, here: &str) -> Vec<ProcessInfo> {
        // Once it is known to run, one that does not is gone and its children go on.
        let gone = self.pid.is_none() && !self.others.is_empty();
        let own = (!gone).then(|| self.info(here)).flatten();
        own.into_iter().chain(self.others.iter().filter_map(|other| other.info(here))).collect()
    }

    /// `None` while it is not known who it is.
    fn info(&self, here: &str) -> Option<ProcessInfo> {
        let (pid, home) = self.at_home.clone()?;
        Some(ProcessInfo {
            pid,
            user: self.user.clone(),
            uid: self.uid,
            home,
            node: here.to_string(),
            state: self.state.clone(),
            cpu_pct: (self.cpu_pct * 10.0).round() / 10.0,
            rss_bytes: self.rss_bytes,
            command: self.command.clone(),
            ..ProcessInfo::default()
        })
    }
}

/// Starts `migd shepherd …`. Its end is waited for by a thread, so that it never stays a zombie.
fn spawn(
    role: &str,
    config: &Config,
    more: &[&str],
    control: &Path,
    session: Option<&TcpStream>,
) -> io::Result<()> {
    let key = config.key.to_string_lossy();
    let control = control.to_string_lossy();
    let words = ["migd", "shepherd", role, "--name", &config.name, "--key", &key, "--control", &control];
    let words: Vec<CString> =
        words.iter().chain(more).map(|word| CString::new(*word)).collect::<Result<_, _>>()?;
    let environment: Vec<CString> = std::env::vars_os()
        .filter_map(|(name, value)| {
            let (name, value) = (name.into_encoded_bytes(), value.into_encoded_bytes());
            CString::new([name.as_slice(), b"=", value.as_slice()].concat()).ok()
        })
        .collect();
    let mut actions = PosixSpawnFileActions::init()?;
    if let Some(session) = session {
        // A descriptor that already has this number loses its close-on-exec flag (posix_spawn(3)).
        actions.add_dup2(session.as_raw_fd(), SESSION_FD)?;
    }
    let mut attributes = PosixSpawnAttr::init()?;
    attributes.set_sigmask(&SigSet::empty())?;
    attributes.set_flags(nix::spawn::PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK)?;
    let pid = posix_spawn(c"/proc/self/exe", &actions, &attributes, &words, &environment)?;
    tracing::debug!(%pid, role, "shepherd started");
    let name = format!("reap-{pid}");
    std::thread::Builder::new().name(name).stack_size(64 << 10).spawn(move || match waitpid(pid, None) {
        Ok(nix::sys::wait::WaitStatus::Exited(_, 0)) => {}
        status => tracing::error!(%pid, ?status, "a shepherd ended badly"),
    })?;
    Ok(())
}

async fn connect(path: &Path, limit: Duration) -> io::Result<UnixStream> {
    let started = Instant::now();
    loop {
        match UnixStream::connect(path).await {
            Err(error) if started.elapsed() >= limit => return Err(error),
            Err(_) => tokio::time::sleep(Duration::from_millis(3)).await,
            stream => return stream,
        }
    }
}

/// Makes sure that this process has a home shepherd.
pub async fn ensure_home(daemon: &Arc<Daemon>, pid: i32) -> io::Result<()> {
    if daemon.lock().homes.get(&pid).is_some_and(|shepherd| !shepherd.orders.is_closed()) {
        return Ok(());
    }
    let path = home_socket(&daemon.config, pid);
    let stream = match UnixStream::connect(&path).await {
        Ok(stream) => stream,
        Err(_) => {
            let record = record::path(&daemon.config.run_dir, pid);
            let more = ["--pid", &pid.to_string(), "--record", &record.to_string_lossy()];
            spawn("home", &daemon.config, &more, &path, None)?;
            connect(&path, START_LIMIT).await?
        }
    };
    attach_home(daemon, pid, stream);
    Ok(())
}

/// Starts the shepherd of an arriving guest, with the connection of its session.
pub fn start_host(
    daemon: &Arc<Daemon>,
    token: &str,
    session: &TcpStream,
    who: (i32, String),
) -> io::Result<()> {
    let path = folder(&daemon.config).join(format!("host-{token}.sock"));
    spawn("host", &daemon.config, &[], &path, Some(session))?;
    let guest = Guest { at_home: Some(who), ..Guest::new() };
    daemon.lock().guests.insert(token.to_string(), guest);
    let (daemon, token) = (Arc::clone(daemon), token.to_string());
    tokio::spawn(async move {
        match connect(&path, START_LIMIT).await {
            Ok(stream) => serve_host(&daemon, token, stream).await,
            Err(error) => {
                tracing::error!(%error, path = %path.display(), "the guest's shepherd does not listen");
                daemon.lock().guests.remove(&token);
            }
        }
    });
    Ok(())
}

/// Connects to every shepherd that an earlier daemon has left.
pub fn find_again(daemon: &Arc<Daemon>) {
    let Ok(entries) = fs::read_dir(folder(&daemon.config)) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        let Some(name) = path.file_name().and_then(|n| n.to_str()?.strip_suffix(".sock")) else { continue };
        let name = name.to_string();
        let daemon = Arc::clone(daemon);
        tokio::spawn(async move {
            let Ok(stream) = UnixStream::connect(&path).await else {
                // Nobody listens: its shepherd has died without cleaning up.
                let _ = fs::remove_file(&path);
                if let Some(pid) = name.strip_prefix("home-").and_then(|pid| pid.parse().ok()) {
                    daemon.remember(pid);
                    rescue::rescue(daemon, pid).await;
                }
                return;
            };
            tracing::info!(shepherd = name, "found again");
            if let Some(pid) = name.strip_prefix("home-").and_then(|pid| pid.parse().ok()) {
                daemon.remember(pid);
                attach_home(&daemon, pid, stream);
            } else if let Some(token) = name.strip_prefix("host-") {
                daemon.lock().guests.insert(token.to_string(), Guest::new());
                serve_host(&daemon, token.to_string(), stream).await;
            }
        });
    }
}

async fn write_orders<T: Serialize>(
    mut writer: OwnedWriteHalf,
    mut orders: mpsc::Receiver<T>,
) -> io::Result<()> {
    while let Some(order) = orders.recv().await {
        let mut line = serde_json::to_vec(&order)?;
        line.push(b'\n');
        writer.write_all(&line).await?;
    }
    Ok(())
}

/// The next event; `None`: the shepherd is gone. A line that is not understood is passed over.
async fn next_event<E: DeserializeOwned>(reader: &mut BufReader<OwnedReadHalf>) -> Option<E> {
    loop {
        let mut line = Vec::new();
        let read = (&mut *reader).take(MAX_LINE as u64).read_until(b'\n', &mut line).await;
        if !matches!(read, Ok(n) if n > 0) {
            return None;
        }
        match serde_json::from_slice(&line) {
            Ok(event) => return Some(event),
            Err(error) => tracing::warn!(%error, "a shepherd's event is not understood"),
        }
    }
}

fn attach_home(daemon: &Arc<Daemon>, pid: i32, stream: UnixStream) {
    let (reader, writer) = stream.into_split();
    let (orders, to_write) = mpsc::channel(ORDERS);
    let ours = orders.clone();
    daemon.lock().homes.insert(pid, HomeShepherd { orders });
    tokio::spawn(write_orders(writer, to_write));
    let daemon = Arc::clone(daemon);
    tokio::spawn(async move {
        let mut reader = BufReader::new(reader);
        let mut said_good_bye = false;
        while let Some(event) = next_event::<HomeEvent>(&mut reader).await {
            said_good_bye |= matches!(event, HomeEvent::Gone { .. });
            home_event(&daemon, pid, event);
        }
        {
            let mut state = daemon.lock();
            if state.homes.get(&pid).is_some_and(|shepherd| shepherd.orders.same_channel(&ours)) {
                state.homes.remove(&pid);
            }
            // Whoever waits for a move of its hears, by the sender's end, that nobody will tell.
            let its = |flight: &&mut InFlight| {
                flight.shepherd.as_ref().is_some_and(|shepherd| shepherd.orders.same_channel(&ours))
            };
            for flight in state.migrations.values_mut().filter(its) {
                flight.outcome = None;
            }
        }
        if !said_good_bye {
            rescue::rescue(daemon, pid).await;
        }
    });
}

fn home_event(daemon: &Arc<Daemon>, pid: i32, event: HomeEvent) {
    let now = Instant::now();
    let mut state = daemon.lock();
    if matches!(event, HomeEvent::Moved { .. } | HomeEvent::Gone { .. }) {
        daemon.save_now.notify_one();
    }
    match event {
        HomeEvent::Ready => {}
        HomeEvent::Progress { id, phase, bytes, wire_bytes } => {
            if let Some(flight) = state.flight(id, pid) {
                flight.taken_up = true;
                flight.info.phase = phase;
                flight.info.bytes = bytes;
                flight.info.wire_bytes = wire_bytes;
            }
        }
        HomeEvent::Moved { id, node, figures, pids } => {
            let (mut dry_run, mut freeze_ms, mut outcome) = (false, None, None);
            if let Some(flight) = state.flight(id, pid) {
                dry_run = flight.dry_run;
                freeze_ms = Some(figures.freeze_us as f64 / 1000.0);
                outcome = flight.outcome.take();
                flight.info.pids.clone_from(&pids);
            }
            if !dry_run {
                let state = &mut *state;
                if let Some(process) = state.jobs.processes.get(&pid).filter(|_| freeze_ms.is_some()) {
                    state.policy.arrived(&process.node, &node, process);
                }
                state.jobs.arrived_together(&daemon.config.name, pid, &pids, &node, freeze_ms, now);
            }
            if let Some(outcome) = outcome {
                let _ = outcome.send(Ok(figures));
            }
        }
        HomeEvent::MoveFailed { id, error } => {
            if let Some(outcome) = state.flight(id, pid).and_then(|flight| flight.outcome.take()) {
                let _ = outcome.send(Err(error));
            }
        }
        HomeEvent::Retreat { reason } => {
            tracing::info!(pid, reason, "comes home");
            let expelled = reason == EXPELLED;
            if !expelled {
                for pid in state.jobs.together(pid) {
                    state.jobs.retreated(pid, &reason, now);
                }
            }
            drop(state);
            moves::retreat(daemon, pid, if expelled { Cause::Expel } else { Cause::Retreat });
        }
        HomeEvent::GuestStat { pid, cpu_ms, rss_bytes, state: letter } => {
            if let Some(process) = state.jobs.processes.get_mut(&pid) {
                process.rss_bytes = rss_bytes;
                process.state = letter;
                process.used(cpu_ms, now);
                // Several threads show in the CPU time only.
                let wants = f64::from(u8::from(letter == 'R'));
                let uses = process.cpu_pct / 100.0;
                process.wants(if uses > 1.0 { wants.max(uses.ceil()) } else { wants }, now);
            }
        }
        HomeEvent::Gone { how, detail } => {
            tracing::debug!(pid, how, detail, "the shepherd has done its work");
            if how == "lost" {
                tracing::error!(pid, detail, "a process was lost with its host node");
            } else if how == "home" {
                let home = daemon.config.name.clone();
                let pids = state.jobs.together(pid);
                state.jobs.arrived_together(&home, pid, &pids, &home, None, now);
            }
        }
    }
}

async fn serve_host(daemon: &Arc<Daemon>, token: String, stream: UnixStream) {
    let (reader, writer) = stream.into_split();
    let (orders, to_write) = mpsc::channel(ORDERS);
    if let Some(guest) = daemon.lock().guests.get_mut(&token) {
        guest.orders = Some(orders);
    }
    tokio::spawn(write_orders(writer, to_write));
    let mut reader = BufReader::new(reader);
    while let Some(event) = next_event::<HostEvent>(&mut reader).await {
        match event {
            HostEvent::Guest { home_pid, home, pid, uid, state, command, others } => {
                let user = tokio::task::spawn_blocking(move || super::sampler::user_name(uid)).await;
                if let Some(guest) = daemon.lock().guests.get_mut(&token) {
                    guest.at_home = Some((home_pid, home));
                    guest.pid = pid;
                    guest.know_others(others);
                    (guest.uid, guest.state, guest.command) = (uid, state, command);
                    guest.user = user.unwrap_or_else(|_| uid.to_string());
                }
            }
            HostEvent::Gone { detail } => tracing::debug!(token, detail, "the guest has gone"),
        }
    }
    daemon.lock().guests.remove(&token);
    daemon.policy_now.notify_one();
}
