//! The home shepherd: traces the deputy, serves the home view, and is the arbiter of every move of its
//! process. It starts when the process is to leave home and ends when it is home again or has ended.
//!
//! Threads: the main one owns ptrace and runs everything in this module; each link has two
//! ([`super::link`]); the home view has its workers. The main thread hears of them through the inbox.

mod carry;
mod conduct;
mod move_home;
mod move_out;
mod move_over;
mod objects;
mod peer;
pub mod record;
mod serve;

use super::control::{HomeEvent, HomeOrder, MoveFigures, TargetNode};
use super::control_socket::ControlServer;
use super::inbox::{Inbox, Sender};
use super::session::{ToHome, ToHost};
use crate::api::{ApiError, Blocker, ErrorKind};
use crate::cluster_key::ClusterKey;
use crate::homefs::HomeView;
use checkpoint::deputy::{Deputy, DeputyEvent};
use checkpoint::image::ProcessImage;
use checkpoint::inventory::tree;
use peer::Host;
use std::collections::{BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Silence after which a host counts as lost. Longer than what the host itself allows
/// ([`super::host::SILENCE_LIMIT`]), so that a guest cut off is stopped before home acts.
pub const SILENCE_LIMIT: Duration = Duration::from_secs(15);
/// How long one step of a move may take without progress.
const STEP_LIMIT: Duration = Duration::from_secs(20);
/// Signals to single threads, which are rare, are looked for so often, on so many threads.
const THREADS_EVERY: Duration = Duration::from_secs(1);
const THREADS_LIMIT: usize = 256;
/// No image data for this long: the move is given up.
const STALL_LIMIT: Duration = Duration::from_secs(5);

/// `migd shepherd home`.
#[derive(Debug, Clone, clap::Args)]
pub struct HomeArgs {
    /// The process, at home here.
    #[arg(long)]
    pub pid: i32,
    /// This node's name.
    #[arg(long)]
    pub name: String,
    /// The cluster key.
    #[arg(long)]
    pub key: PathBuf,
    /// Where to listen for the daemon.
    #[arg(long)]
    pub control: PathBuf,
    /// Where the commit of a move is recorded.
    #[arg(long)]
    pub record: PathBuf,
}

pub(in crate::shepherd) use move_out::send_images;

/// What the main thread hears of.
pub(super) enum Event {
    /// No host has this handle open any more.
    Closed(u64),
    Order(HomeOrder),
    /// From the host with this connection number.
    Message(u64, ToHome),
    /// That host's link is gone.
    Lost(u64, String),
}

/// Why a move came to nothing; the process runs where it was.
#[derive(Debug, thiserror::Error)]
pub(super) enum MoveError {
    #[error("it cannot be moved")]
    Blocked(Vec<Blocker>),
    #[error("{0}")]
    Node(String),
    #[error("{0}")]
    Failed(String),
    /// The process ended meanwhile.
    #[error("it ended while it was being moved")]
    Ended,
}

impl MoveError {
    fn failed(error: impl std::fmt::Display) -> MoveError {
        // With the causes of an `anyhow` error.
        MoveError::Failed(format!("{error:#}"))
    }

    /// The same, or that the process has ended, of which whatever else failed is then only the sign: a file of
    /// `/proc` that has gone, a descriptor that cannot be had any more.
    fn or_ended(self, pid: i32) -> MoveError {
        match self {
            MoveError::Failed(_) if !tree::lives(pid) => MoveError::Ended,
            other => other,
        }
    }

    fn to_api(&self, pid: i32, to: &str) -> ApiError {
        let (kind, next, blockers) = match self {
            MoveError::Blocked(blockers) => (
                ErrorKind::NotMigratable,
                "close what is named, or wait until the process has; it was not stopped".to_string(),
                blockers.clone(),
            ),
            MoveError::Node(_) => {
                (ErrorKind::NodeDown, format!("see `mosctl nodes`; is {to} up and reachable?"), Vec::new())
            }
            MoveError::Failed(_) => {
                (ErrorKind::Failed, "it runs on where it was; try again, or see the log".into(), Vec::new())
            }
            MoveError::Ended => (ErrorKind::Failed, "nothing: the process is gone".into(), Vec::new()),
        };
        let why = match self {
            MoveError::Blocked(blockers) => {
                blockers.iter().map(|b| b.what.as_str()).collect::<Vec<_>>().join("; ")
            }
            other => other.to_string(),
        };
        ApiError { kind, what: format!("process {pid} could not be moved to {to}"), why, next, blockers }
    }
}

/// Where the process is.
enum Place {
    /// At home, a process like any other.
    Home,
    /// Elsewhere.
    Away(Box<Away>),
    /// It has ended, or is lost.
    Gone,
}

/// A subtree that is elsewhere.
struct Away {
    host: Host,
    /// Those that live, parents before their children.
    members: Vec<Member>,
    /// All that ever were with it: the ends of those at home are echoes of what the host has told.
    family: BTreeSet<i32>,
    /// What they had here and no name leads to.
    objects: objects::Kept,
}

/// One process of a subtree that is elsewhere, and what of it is at home.
struct Member {
    deputy: Deputy,
    /// What was last read of it, for what the deputy must keep.
    image: ProcessImage,
    carried: carry::Carried,
    /// The guest has stopped, and the deputy was stopped for it.
    stopping: Option<u8>,
    /// The deputy was sent a SIGCONT because its guest goes on.
    continued: bool,
    /// When its threads were last looked at.
    looked: Instant,
}

impl Away {
    fn member(&mut self, pid: i32) -> Option<&mut Member> {
        self.members.iter_mut().find(|member| member.deputy.pid() == pid)
    }

    fn pids(&self) -> Vec<i32> {
        self.members.iter().map(|member| member.deputy.pid()).collect()
    }
}

/// The home shepherd's state.
pub(super) struct Home {
    args: HomeArgs,
    key: ClusterKey,
    inbox: Inbox<Event>,
    sender: Sender<Event>,
    control: ControlServer<HomeEvent>,
    view: Option<Arc<HomeView>>,
    token: [u8; 16],
    place: Place,
    /// Who moved last, or is away now.
    pids: Vec<i32>,
    epoch: u64,
    connections: u64,
    /// Messages that came while a step was waited for.
    put_off: VecDeque<Event>,
}

/// The shepherd's whole life.
pub fn main(args: HomeArgs) -> anyhow::Result<()> {
    let inbox = Inbox::new()?;
    let sender = inbox.sender();
    let orders = inbox.sender();
    let control = ControlServer::start(&args.control, move |order| {
        orders.push(Event::Order(order));
    })?;
    let key = ClusterKey::load(&args.key)?;
    control.send(&HomeEvent::Ready);
    let mut home = Home {
        args,
        key,
        inbox,
        sender,
        control,
        view: None,
        token: [0; 16],
        place: Place::Home,
        pids: vec![],
        epoch: 0,
        connections: 0,
        put_off: VecDeque::new(),
    };
    home.run()?;
    let _ = std::fs::remove_file(&home.args.control);
    Ok(())
}

impl Home {
    fn run(&mut self) -> anyhow::Result<()> {
        // A shepherd whose process never leaves (the first move failed) ends after a while.
        let mut idle_since = Instant::now();
        loop {
            while let Some(event) = self.put_off.pop_front().or_else(|| self.inbox.pop()) {
                idle_since = Instant::now();
                if self.handle(event)? {
                    return Ok(());
                }
            }
            if self.attend_deputy()? {
                return Ok(());
            }
            if matches!(self.place, Place::Home) && idle_since.elapsed() > Duration::from_secs(5) {
                self.gone("home", "it stays at home");
                return Ok(());
            }
            self.inbox.wait(Instant::now() + Duration::from_millis(200), &[])?;
        }
    }

    /// Handles one event; `true`: the shepherd's work is done.
    fn handle(&mut self, event: Event) -> anyhow::Result<bool> {
        match event {
            Event::Order(HomeOrder::Move { id, target, dry_run, timeout_ms }) => {
                return Ok(self.order_move(id, target, dry_run, Duration::from_millis(timeout_ms)));
            }
            // A move runs to its end within its own limits; there is nothing to cancel between moves.
            Event::Order(HomeOrder::Cancel { .. }) => {}
            Event::Closed(handle) => self.handle_closed(handle),
            Event::Message(connection, message) => return self.serve(connection, message),
            Event::Lost(connection, why) => return Ok(self.host_lost(connection, &why)),
        }
        Ok(false)
    }

    fn order_move(&mut self, id: u64, target: Option<TargetNode>, dry_run: bool, limit: Duration) -> bool {
        let to = target.as_ref().map_or(self.args.name.clone(), |node| node.name.clone());
        let deadline = Instant::now() + limit.max(Duration::from_secs(1));
        let place = std::mem::replace(&mut self.place, Place::Gone);
        let started = Instant::now();
        let (place, result) = match (place, target) {
            (Place::Home, Some(node)) => self.move_out(id, &node, dry_run, deadline),
            (Place::Away(away), Some(node)) if away.host.name == node.name => {
                (Place::Away(away), Err(MoveError::Failed(format!("it is on {} already", node.name))))
            }
            (Place::Away(away), Some(node)) => self.move_over(id, away, &node, dry_run, deadline),
            (Place::Away(away), None) => self.move_home(id, *away, dry_run, deadline),
            (Place::Home, None) => (Place::Home, Err(MoveError::Failed("it is at home already".into()))),
            (Place::Gone, _) => (Place::Gone, Err(MoveError::Ended)),
        };
        self.place = place;
        match result {
            Ok(mut figures) => {
                figures.total_us = started.elapsed().as_micros() as u64;
                // After a dry run it is where it was.
                let node = match &self.place {
                    Place::Away(away) => away.host.name.clone(),
                    Place::Home | Place::Gone => self.args.name.clone(),
                };
                if let Place::Away(away) = &self.place {
                    self.pids = away.pids();
                }
                let pids = self.pids.clone();
                self.control.send(&HomeEvent::Moved { id, node, figures, pids });
            }
            Err(error) => {
                let error = self.with_names(error);
                tracing::warn!(pid = self.args.pid, %to, %error, "move failed");
                self.control.send(&HomeEvent::MoveFailed { id, error: error.to_api(self.args.pid, &to) });
            }
        }
        match &self.place {
            Place::Gone => {
                self.gone("exited", "it ended");
                true
            }
            Place::Home if self.epoch > 0 && self.view.is_none() => {
                self.gone("home", "it is home");
                true
            }
            _ => false,
        }
    }

    /// Hears no more of a host's requests for files. What a guest has left to say that goes on elsewhere is its end,
    /// which is not to be seen in files that it maps: the kernel marks robust futexes (`exit_robust_list`, kernel/futex),
    /// and would write the whole of an old page.
    fn silence(&self, host: &Host) {
        if let Some(view) = &self.view {
            view.disconnect(host.view_connection);
        }
    }

    /// A host knows mapped files by home's handles.
    fn with_names(&self, error: MoveError) -> MoveError {
        match (error, &self.view) {
            (MoveError::Failed(why), Some(view)) => MoveError::Failed(view.with_names(&why)),
            (error, _) => error,
        }
    }

    fn gone(&mut self, how: &str, detail: &str) {
        record::remove(&self.args.record);
        self.control.send(&HomeEvent::Gone { how: how.into(), detail: detail.into() });
        self.control.flush();
    }

    fn progress(&self, id: u64, phase: &str, bytes: u64, wire_bytes: u64) {
        self.control.send(&HomeEvent::Progress { id, phase: phase.into(), bytes, wire_bytes });
    }

    fn next_epoch(&mut self) -> u64 {
        self.epoch += 1;
        self.epoch
    }

    /// Looks at the deputies; `true`: the shepherd's work is done.
    fn attend_deputy(&mut self) -> anyhow::Result<bool> {
        let Place::Away(away) = &self.place else { return Ok(false) };
        for pid in away.pids() {
            if self.attend(pid)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Looks at one of them.
    fn attend(&mut self, pid: i32) -> anyhow::Result<bool> {
        // Bounded, so that a flood of signals cannot keep orders waiting.
        for _ in 0..256 {
            let Place::Away(away) = &mut self.place else { return Ok(false) };
            let Away { host, members, family, .. } = &mut **away;
            let Some(member) = members.iter_mut().find(|member| member.deputy.pid() == pid) else {
                return Ok(false);
            };
            let event = match member.deputy.poll() {
                Ok(None) if member.looked.elapsed() >= THREADS_EVERY => return self.attend_threads(pid),
                Ok(Some(event)) => event,
                Ok(None) => return Ok(false),
                Err(error) => {
                    tracing::error!(pid, %error, "a deputy cannot be handled");
                    return Ok(self.deputy_died(pid, "the deputy is gone"));
                }
            };
            match event {
                DeputyEvent::Signal(info) if serve::is_echo(&info, family) => member.deputy.resume()?,
                DeputyEvent::Signal(info) if member.is_own(&info) => member.deputy.resume()?,
                DeputyEvent::Signal(info) => member.pass_signal(host, &info)?,
                DeputyEvent::Stopped(signal) => member.stopped(host, signal),
                DeputyEvent::Continued => member.stopping = None,
                DeputyEvent::Died(status) => {
                    let detail = format!("its deputy was killed (status {status:#x})");
                    return Ok(self.deputy_died(pid, &detail));
                }
            }
        }
        Ok(false)
    }

    /// Passes on what was sent to single threads of a deputy, which only its leader can catch by
    /// itself; `true`: the shepherd's work is done.
    fn attend_threads(&mut self, pid: i32) -> anyhow::Result<bool> {
        let Place::Away(away) = &mut self.place else { return Ok(false) };
        let Some(at) = away.members.iter().position(|member| member.deputy.pid() == pid) else {
            return Ok(false);
        };
        let member = &mut away.members[at];
        member.looked = Instant::now();
        let tids = member.deputy.threads_with_signals(THREADS_LIMIT);
        if tids.is_empty() || member.stopping.is_some() {
            return Ok(false);
        }
        let Member { deputy, image, carried, stopping, continued, looked } = away.members.remove(at);
        let taken = deputy.thread_signals(&tids).and_then(|(tracee, signals)| {
            // The guest gets them whatever becomes of the deputy.
            for (tid, info) in signals {
                let tid = (tid != pid).then_some(tid);
                if !serve::is_echo(&info, &away.family) {
                    let _ = away.host.tell(&ToHost::Signal { pid, tid, info: info.to_vec() });
                }
            }
            Deputy::park_again(tracee, &image)
        });
        match taken {
            Ok(deputy) => {
                away.members.insert(at, Member { deputy, image, carried, stopping, continued, looked });
                Ok(false)
            }
            Err(error) => {
                tracing::error!(pid, %error, "a deputy cannot be handled");
                away.host.kill_guest(Some(pid));
                Ok(self.none_left("the deputy is gone"))
            }
        }
    }

    /// Somebody at home has killed a deputy: its guest dies too.
    fn deputy_died(&mut self, pid: i32, detail: &str) -> bool {
        if let Place::Away(away) = &mut self.place {
            away.members.retain(|member| member.deputy.pid() != pid);
            away.host.kill_guest(Some(pid));
        }
        self.none_left(detail)
    }

    /// If none of the subtree is left, the shepherd's work is done.
    fn none_left(&mut self, detail: &str) -> bool {
        if matches!(&self.place, Place::Away(away) if !away.members.is_empty()) {
            return false;
        }
        if let Place::Away(away) = std::mem::replace(&mut self.place, Place::Gone) {
            if let Some(view) = self.view.take() {
                view.disconnect(away.host.view_connection);
                view.release_all();
            }
            away.host.link.close();
        }
        self.gone("exited", detail);
        true
    }
}

/// What a move has cost so far.
#[derive(Debug, Clone, Copy)]
pub(super) struct Freeze(Instant);

impl Freeze {
    fn figures(self, sent: super::session::SendFigures) -> MoveFigures {
        MoveFigures {
            bytes: sent.bytes,
            wire_bytes: sent.wire_bytes,
            pages: sent.pages,
            rounds: 1,
            total_us: 0,
            freeze_us: self.0.elapsed().as_micros() as u64,
        }
    }
}
