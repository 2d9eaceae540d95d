//! The host shepherd: builds one guest, lets it run, serves it, and sends it on when home says so.
//!
//! It is started by the daemon with the connection from a home shepherd as descriptor 4. It ends when
//! the guest has left or ended, and its guest ends with it.
//!
//! Threads: the main one owns ptrace; the link has two; the home file system has its readers; the
//! supervisor has its own. A thread that is to touch the guest with ptrace asks the main one.

mod objects;
mod receive;
mod send;
mod serve;

use super::control::{HostEvent, HostOrder};
use super::control_socket::ControlServer;
use super::guest_init::{GuestHouse, HouseEvent};
use super::inbox::{Inbox, Sender};
use super::link::{Channel, Credits, ImageQueue, Link, LinkSink};
use super::session::{Step, StepKind, ToHome, ToHost, Welcome};
use super::supervisor::Supervisor;
use crate::cluster_key::ClusterKey;
use crate::homefs::{HostHooks, HostView, InterruptReply, Wire};
use crate::protocol::{Order, Source, SourceEvent, Target, TargetEvent};
use checkpoint::dump::tree::FrozenTree;
use checkpoint::image::codec;
use checkpoint::tracee::{Tracee, TraceeError};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Silence after which home counts as lost. Shorter than home's own limit for us.
pub const SILENCE_LIMIT: Duration = Duration::from_secs(10);
/// After losing home, the guest stands still; after this it is thrown away. Home waits so long, after
/// its own silence limit, before it lets another copy run.
pub const LEASE_LIMIT: Duration = Duration::from_secs(2);
/// How long home may take to read the last that is told.
const LEAVE_LIMIT: Duration = Duration::from_secs(3);
/// How long home may take between its steps of a move.
const STEP_LIMIT: Duration = Duration::from_secs(60);

/// `migd shepherd host`.
#[derive(Debug, Clone, clap::Args)]
pub struct HostArgs {
    /// This node's name.
    #[arg(long)]
    pub name: String,
    /// The cluster key.
    #[arg(long)]
    pub key: PathBuf,
    /// Where to listen for the daemon.
    #[arg(long)]
    pub control: PathBuf,
}

/// What the main thread hears of.
enum Event {
    Message(ToHost),
    Lost(String),
    Order(HostOrder),
    /// The thread waits at home in a call that a signal must be able to end.
    Interrupted(i32, InterruptReply),
}

/// What other threads need of a link.
struct Wiring {
    link: OnceLock<Link>,
    view: OnceLock<Arc<HostView>>,
    queue: Arc<ImageQueue>,
    credits: Arc<Credits>,
    sender: Sender<Event>,
    /// The guest is being frozen: interrupted calls end at once, the freeze repairs them.
    freezing: AtomicBool,
    /// Who runs here, by their PIDs at home.
    guests: Mutex<HashSet<i32>>,
    /// Who waits for which answer of home's.
    questions: Mutex<HashMap<u64, mpsc::Sender<super::session::Reply>>>,
}

struct Sink(Arc<Wiring>);

impl LinkSink for Sink {
    fn frame(&mut self, channel: Channel, body: Vec<u8>) {
        match channel {
            Channel::Home => {
                if let Some(view) = self.0.view.get() {
                    // The request it answers may be gone: the guest was killed.
                    let _ = view.deliver(&body);
                }
            }
            Channel::Image => self.0.queue.push(body),
            Channel::Credit => self.0.credits.taken(&body),
            Channel::Control => match codec::decode::<ToHost>(&body) {
                Ok(message) => self.control(message),
                Err(error) => tracing::warn!(%error, "a message of home's is not understood"),
            },
            Channel::Alive => {}
        }
    }

    fn lost(&mut self, why: String) {
        self.0.queue.end(&why);
        self.0.credits.end();
        lock(&self.0.questions).clear();
        self.0.sender.push(Event::Lost(why));
    }
}

impl Sink {
    fn control(&mut self, message: ToHost) {
        match message {
            ToHost::Answer { id, reply } => {
                if let Some(waiter) = lock(&self.0.questions).remove(&id) {
                    let _ = waiter.send(reply);
                }
            }
            message => {
                if let ToHost::Move(Step { kind: StepKind::Abort { why }, .. }) = &message {
                    self.0.queue.end(why);
                    self.0.credits.end();
                }
                self.0.sender.push(Event::Message(message));
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Wire for Wiring {
    fn send(&self, frame: &[u8]) -> io::Result<()> {
        let link = self.link.get().ok_or(io::ErrorKind::NotConnected)?;
        link.send(Channel::Home, frame.to_vec())
    }
}

impl HostHooks for Wiring {
    fn interrupted(&self, tid: i32, reply: InterruptReply) {
        if self.freezing.load(Ordering::Acquire) {
            reply.interrupted();
        } else {
            self.sender.push(Event::Interrupted(tid, reply));
        }
    }
}

/// A process of the subtree, once it runs.
struct Guest {
    /// PID as we see it.
    pid: i32,
    /// PID as it sees it itself, the same as at home.
    inside: i32,
    supervisor: Supervisor,
    /// Readable when it has ended.
    pidfd: OwnedFd,
    /// Its parent is not of the subtree: the house's PID 1 tells of it.
    top: bool,
    /// Home was told that it stands stopped.
    stopped: bool,
}

struct Host {
    args: HostArgs,
    inbox: Inbox<Event>,
    wiring: Arc<Wiring>,
    control: ControlServer<HostEvent>,
    welcome: Option<Welcome>,
    house: Option<GuestHouse>,
    /// Those that run here, parents first.
    guests: Vec<Guest>,
    /// They have been let run.
    released: bool,
    /// Before the commit: they stand here, each with its filter's listener.
    built: Vec<receive::Built>,
    /// The guests are to move on, and stand here.
    standing: Option<FrozenTree>,
    /// Group and session at home of everybody who came, zombies too.
    relations: HashMap<i32, (i32, i32)>,
    /// What came of memory and files without a name.
    objects: objects::Known,
    target: Target,
    source: Source,
    /// Why it ends, or why a move failed.
    why: String,
    last_stat: Instant,
}

/// What to do after an event.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    Go,
    End(String),
}

/// The shepherd's whole life.
pub fn main(args: HostArgs) -> anyhow::Result<()> {
    let inbox = Inbox::new()?;
    let orders = inbox.sender();
    let control = ControlServer::start(&args.control, move |order| {
        orders.push(Event::Order(order));
    })?;
    let key = ClusterKey::load(&args.key)?;
    let wiring = Arc::new(Wiring {
        link: OnceLock::new(),
        view: OnceLock::new(),
        queue: Arc::default(),
        credits: Arc::default(),
        sender: inbox.sender(),
        freezing: AtomicBool::new(false),
        guests: Mutex::default(),
        questions: Mutex::default(),
    });
    let stream = std::net::TcpStream::from(connection());
    let sink = Box::new(Sink(Arc::clone(&wiring)));
    let link = Link::accept(stream, key.server_config()?, SILENCE_LIMIT, sink)?;
    let _ = wiring.link.set(link.clone());
    let control_path = args.control.clone();
    let mut host = Host {
        args,
        inbox,
        wiring,
        control,
        welcome: None,
        house: None,
        guests: Vec::new(),
        released: false,
        built: Vec::new(),
        standing: None,
        relations: HashMap::new(),
        objects: objects::Known::default(),
        target: Target::default(),
        source: Source::default(),
        why: String::new(),
        last_stat: Instant::now(),
    };
    let detail = host.run()?;
    host.control.send(&HostEvent::Gone { detail });
    host.control.flush();
    drop(host.house.take());
    link.close();
    // Home must have read how the guests ended.
    link.await_end(LEAVE_LIMIT);
    let _ = std::fs::remove_file(control_path);
    Ok(())
}

/// The connection that the daemon has accepted for us.
fn connection() -> OwnedFd {
    checkpoint::sys::fd::own(4)
}

impl Host {
    fn run(&mut self) -> anyhow::Result<String> {
        let started = Instant::now();
        loop {
            while let Some(event) = self.inbox.pop() {
                if let Next::End(why) = self.handle(event)? {
                    return Ok(why);
                }
            }
            if let Some(why) = self.attend_house()? {
                return Ok(why);
            }
            self.attend_ends();
            if self.released && self.guests.is_empty() {
                return Ok("the guests have ended".into());
            }
            self.tell_stat();
            if !self.released && started.elapsed() > STEP_LIMIT {
                return Ok("home began no move".into());
            }
            let house = self.house.as_ref().map(|house| house.as_fd());
            let ends = self.guests.iter().filter(|guest| !guest.top).map(|guest| guest.pidfd.as_fd());
            let more: Vec<BorrowedFd<'_>> = house.into_iter().chain(ends).collect();
            self.inbox.wait(Instant::now() + Duration::from_millis(500), &more)?;
        }
    }

    fn handle(&mut self, event: Event) -> anyhow::Result<Next> {
        match event {
            Event::Message(ToHost::Welcome(welcome)) => {
                self.welcome = Some(*welcome);
                self.tell_daemon("arriving");
            }
            Event::Message(ToHost::Move(step)) => return self.step(step),
            Event::Message(ToHost::Signal { pid, tid, info }) => self.pass_signal(pid, tid, &info),
            Event::Message(ToHost::Kill { pid, signal }) => self.kill(pid, signal),
            // Taken by the sink.
            Event::Message(ToHost::Answer { .. }) => {}
            Event::Order(HostOrder::SendHome) => {
                self.tell(&ToHome::Retreat { reason: super::control::EXPELLED.into() });
            }
            Event::Interrupted(tid, reply) => self.repair_interrupted(tid, reply),
            Event::Lost(why) => return self.home_lost(&why),
        }
        Ok(Next::Go)
    }

    fn step(&mut self, step: Step) -> anyhow::Result<Next> {
        let epoch = step.epoch;
        match step.kind {
            StepKind::Prepare => self.as_target(epoch, TargetEvent::Order(Order::Prepare)),
            StepKind::Freeze if !self.guests.is_empty() => {
                self.as_source(epoch, SourceEvent::Order(Order::Freeze))
            }
            StepKind::Freeze => {
                self.fail(epoch, &anyhow::anyhow!("there is no guest here"));
                Ok(Next::Go)
            }
            // Of a move that is over.
            StepKind::Abort { why } if !self.released => {
                self.why = format!("home gave up: {why}");
                self.as_target(epoch, TargetEvent::Order(Order::Abort))
            }
            _ => Ok(Next::Go),
        }
    }

    /// The link is gone: the guest stands still at once, and is thrown away when nobody can have come
    /// back for it.
    fn home_lost(&mut self, why: &str) -> anyhow::Result<Next> {
        self.why = format!("home was lost: {why}");
        if !self.released {
            return self.as_target(0, TargetEvent::LinkLost);
        }
        self.as_source(0, SourceEvent::LinkLost)?;
        // A link does not come back in this version: the lease has no more to wait for.
        self.as_source(0, SourceEvent::LeaseExpired)
    }

    /// Waits for home's next step of `epoch` in a move. `Err`: the move is off, for this reason.
    fn await_step<T>(
        &mut self,
        epoch: u64,
        deadline: Instant,
        mut wanted: impl FnMut(&StepKind) -> Option<T>,
    ) -> Result<T, String> {
        loop {
            while let Some(event) = self.inbox.pop() {
                match event {
                    Event::Message(ToHost::Move(step)) if step.epoch == epoch => {
                        if let StepKind::Abort { why } = &step.kind {
                            return Err(why.clone());
                        }
                        if let Some(found) = wanted(&step.kind) {
                            return Ok(found);
                        }
                    }
                    Event::Lost(why) => {
                        self.wiring.sender.push(Event::Lost(why.clone()));
                        return Err(format!("home was lost: {why}"));
                    }
                    // It is frozen, so its call has ended already.
                    Event::Interrupted(_, reply) => reply.interrupted(),
                    // Comes when the move is over: the guest that goes on gets it here, or the deputy
                    // has kept it at home.
                    Event::Message(message) => drop(self.put_off(message)),
                    Event::Order(_) => {}
                }
            }
            if Instant::now() >= deadline {
                return Err("home did not answer in time".into());
            }
            self.inbox
                .wait(deadline.min(Instant::now() + Duration::from_millis(100)), &[])
                .map_err(|error| error.to_string())?;
        }
    }

    fn tell(&self, message: &ToHome) {
        let Some(link) = self.wiring.link.get() else { return };
        match codec::encode(message) {
            // A lost link tells itself.
            Ok(body) => drop(link.send(Channel::Control, body)),
            Err(error) => tracing::error!(%error, "a message could not be encoded"),
        }
    }

    fn reply(&self, epoch: u64, kind: StepKind) {
        self.tell(&ToHome::Move(Step { epoch, kind }));
    }

    fn fail(&self, epoch: u64, error: &anyhow::Error) {
        tracing::warn!(epoch, "{error:#}");
        let why = format!("on {}: {error:#}", self.args.name);
        self.reply(epoch, StepKind::Failed { blockers: Vec::new(), why });
    }

    fn tell_daemon(&self, state: &str) {
        let Some(welcome) = &self.welcome else { return };
        let of_root = self.guests.iter().find(|guest| guest.inside == welcome.pid);
        let others = self.guests.iter().filter(|guest| guest.inside != welcome.pid);
        self.control.send(&HostEvent::Guest {
            home_pid: welcome.pid,
            home: welcome.home.clone(),
            pid: of_root.map(|guest| guest.pid),
            uid: welcome.uid,
            state: state.into(),
            command: welcome.command.clone(),
            others: others.map(|guest| (guest.inside, guest.pid)).collect(),
        });
    }

    /// Looks at what the house's PID 1 tells; `Some`: the shepherd's work is done.
    fn attend_house(&mut self) -> anyhow::Result<Option<String>> {
        for _ in 0..64 {
            let Some(house) = &mut self.house else { return Ok(None) };
            match house.next_event()? {
                None => return Ok(None),
                Some(HouseEvent::Ended { pid, status }) => self.ended(pid, status),
                Some(HouseEvent::Stopped { pid, signal }) => {
                    if let Some(guest) = self.guests.iter_mut().find(|guest| guest.inside == pid) {
                        guest.stopped = true;
                        self.tell(&ToHome::Stopped { pid, signal });
                    }
                }
                Some(HouseEvent::Continued { pid }) => {
                    if let Some(guest) = self.guests.iter_mut().find(|guest| guest.inside == pid) {
                        guest.stopped = false;
                        self.tell(&ToHome::Continued { pid });
                    }
                }
                Some(HouseEvent::Gone) => {
                    self.attend_ends();
                    return Ok(Some("the guests' init is gone".into()));
                }
            }
        }
        Ok(None)
    }

    /// Looks for guests that have ended and of whom only their parent hears.
    fn attend_ends(&mut self) {
        for (pid, inside) in self.ended_children() {
            // A zombie tells how it ended. One that is gone was waited for: nobody can ask any more.
            self.ended(inside, super::preflight::exit_status(pid).unwrap_or(0));
        }
    }

    fn ended_children(&self) -> Vec<(i32, i32)> {
        let children = self.guests.iter().filter(|guest| !guest.top);
        let ended = children.filter(|guest| {
            let mut asked = [PollFd::new(guest.pidfd.as_fd(), PollFlags::POLLIN)];
            poll(&mut asked, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
        });
        ended.map(|guest| (guest.pid, guest.inside)).collect()
    }

    fn ended(&mut self, inside: i32, status: i32) {
        let Some(at) = self.guests.iter().position(|guest| guest.inside == inside) else { return };
        lock(&self.wiring.guests).remove(&inside);
        drop(self.guests.remove(at));
        self.tell(&ToHome::Ended { pid: inside, status });
        self.tell_daemon("running");
    }

    /// Freezes all guests, whatever calls they wait in.
    fn freeze_all(&self) -> Result<FrozenTree, TraceeError> {
        self.wiring.freezing.store(true, Ordering::Release);
        let pids: Vec<i32> = self.guests.iter().map(|guest| guest.pid).collect();
        let result = FrozenTree::freeze_with(&pids, &mut |pid| self.freeze_one(pid));
        if result.is_err() {
            self.wiring.freezing.store(false, Ordering::Release);
        }
        result
    }

    /// A call of a guest's that waits in its filter is let go by the supervisor alone.
    fn freeze_one(&self, pid: i32) -> Result<Tracee, TraceeError> {
        match self.guests.iter().find(|guest| guest.pid == pid) {
            Some(guest) => guest.supervisor.freeze(),
            None => Tracee::freeze(pid),
        }
    }

    fn thawed(&self) {
        self.wiring.freezing.store(false, Ordering::Release);
    }
}
