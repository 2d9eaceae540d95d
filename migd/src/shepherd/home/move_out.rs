//! The first move: from home to a host node. Source and arbiter are the same process here.

use super::super::control::TargetNode;
use super::super::link::ImageWriter;
use super::super::session::{self, SendFigures, Welcome};
use super::carry::Carried;
use super::conduct::{Parties, step_of};
use super::objects::Kept;
use super::peer::Host;
use super::record;
use super::{Away, Event, Freeze, Home, Member, MoveError, Place, STALL_LIMIT, STEP_LIMIT};
use crate::homefs::HomeView;
use crate::protocol::{HomeEvent, Order, Outcome};
use crate::shepherd::control::MoveFigures;
use crate::shepherd::preflight;
use checkpoint::deputy::Deputy;
use checkpoint::dump::objects::{self, Object};
use checkpoint::dump::tree::FrozenTree;
use checkpoint::image::ProcessImage;
use checkpoint::image::stream::{Options, StreamWriter};
use checkpoint::inventory::Rules;
use checkpoint::tracee::TraceeError;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Instant;

impl Home {
    pub(super) fn move_out(
        &mut self,
        id: u64,
        node: &TargetNode,
        dry_run: bool,
        deadline: Instant,
    ) -> (Place, Result<MoveFigures, MoveError>) {
        self.progress(id, "preparing", 0, 0);
        let epoch = self.next_epoch();
        let host = match self.prepare_out(node) {
            Ok(host) => host,
            Err(error) => {
                self.view = None;
                return (Place::Home, Err(error.or_ended(self.args.pid)));
            }
        };
        let mut parties = Out {
            id,
            epoch,
            host,
            deadline,
            dry_run,
            freeze: None,
            figures: None,
            sent: SendFigures::default(),
            tree: None,
            images: Vec::new(),
            carried: Vec::new(),
            members: Vec::new(),
            objects: Kept::default(),
            why: None,
        };
        let outcome = self.conduct(epoch, &mut parties);
        let Out { host, members, why, figures, tree, images, objects, .. } = parties;
        let place = match outcome {
            Outcome::Moved if !members.is_empty() => {
                let family = images.iter().map(|image| image.pid).collect();
                return (
                    Place::Away(Box::new(Away { host, members, family, objects })),
                    Ok(figures.unwrap_or_default()),
                );
            }
            Outcome::Failed => Place::Home,
            _ => Place::Gone,
        };
        // Thawed by dropping, should it still stand here.
        drop(tree);
        host.link.close();
        self.view = None;
        record::remove(&self.args.record);
        match (why, figures) {
            (None, Some(figures)) if dry_run => (place, Ok(figures)),
            (Some(MoveError::Ended), _) => (Place::Gone, Err(MoveError::Ended)),
            (why, _) => {
                let why = why.unwrap_or(MoveError::Failed("the move was given up".into()));
                (place, Err(why.or_ended(self.args.pid)))
            }
        }
    }

    /// Everything that can be done while the process runs: blockers, the link, who comes.
    fn prepare_out(&mut self, node: &TargetNode) -> Result<Host, MoveError> {
        let pid = self.args.pid;
        let blockers = preflight::blockers(pid).map_err(MoveError::failed)?;
        if !blockers.is_empty() {
            return Err(MoveError::Blocked(blockers));
        }
        let view = self.make_view()?;
        let terminal = self.terminal(&view);
        self.connections += 1;
        let host = Host::connect(node, self.connections, &self.key, &view, self.sender.clone())?;
        host.welcome(self.welcome(terminal)?)?;
        Ok(host)
    }

    fn make_view(&mut self) -> Result<std::sync::Arc<HomeView>, MoveError> {
        let pid = self.args.pid;
        let root = fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC)
            .open(format!("/proc/{pid}/root"))
            .map_err(|_| MoveError::Ended)?;
        let failed = |what: &str, error| MoveError::Failed(format!("{what}: {error}"));
        let groups = preflight::supplementary_groups(pid)
            .map_err(|error| failed("its groups could not be read", error))?;
        let token: [u8; 16] = rand::random();
        let view = HomeView::new(OwnedFd::from(root), groups, token)
            .map_err(|error| failed("its files could not be made ready to be served", error))?;
        view.set_deputy(pid).map_err(|error| failed("its identity could not be read", error))?;
        let closed = self.sender.clone();
        view.set_on_closed(move |handle| {
            closed.push(Event::Closed(handle));
        });
        self.token = token;
        self.view = Some(std::sync::Arc::clone(&view));
        Ok(view)
    }

    /// Its controlling terminal, if it has one: opened here, to stand for `/dev/tty` there.
    pub(super) fn terminal(&self, view: &HomeView) -> Option<(Vec<u8>, u64)> {
        let path = preflight::controlling_terminal(self.args.pid)?;
        let flags = libc::O_NOCTTY | libc::O_CLOEXEC;
        let file = fs::OpenOptions::new().read(true).write(true).custom_flags(flags).open(&path).ok()?;
        let handle = view.add_handle(OwnedFd::from(file), crate::homefs::HandleKind::Stream).ok()?;
        Some((path.into_bytes(), handle))
    }

    pub(super) fn welcome(&self, terminal: Option<(Vec<u8>, u64)>) -> Result<Welcome, MoveError> {
        let pid = self.args.pid;
        let pid_max = preflight::pid_max();
        Ok(Welcome {
            version: session::VERSION,
            home: self.args.name.clone(),
            pid,
            uid: preflight::owner(pid).ok_or(MoveError::Ended)?,
            command: preflight::command_line(pid),
            utsname: preflight::utsname(),
            clocks_ns: preflight::clocks_of_ns(pid),
            token: self.token,
            terminal,
            tid_base: preflight::tid_base(pid, pid_max),
            pid_max,
        })
    }
}

/// The parties of a move away: the source is the process itself, here.
struct Out {
    id: u64,
    epoch: u64,
    host: Host,
    deadline: Instant,
    dry_run: bool,
    freeze: Option<Freeze>,
    figures: Option<MoveFigures>,
    sent: SendFigures,
    tree: Option<FrozenTree>,
    images: Vec<ProcessImage>,
    carried: Vec<Carried>,
    members: Vec<Member>,
    objects: Kept,
    why: Option<MoveError>,
}

impl Parties for Out {
    fn target_name(&self, _: &Home) -> String {
        self.host.name.clone()
    }

    fn to_target(&mut self, home: &mut Home, order: Order) -> Vec<HomeEvent> {
        if order == Order::Commit {
            home.progress(self.id, "committing", self.sent.bytes, self.sent.wire_bytes);
        }
        let why = self.why.as_ref().map_or("a dry run".to_string(), ToString::to_string);
        match self.host.step(self.epoch, step_of(order, &why)) {
            Ok(()) => Vec::new(),
            Err(error) => {
                self.why.get_or_insert(error);
                vec![HomeEvent::TargetLost]
            }
        }
    }

    fn to_source(&mut self, home: &mut Home, order: Order) -> Vec<HomeEvent> {
        match order {
            Order::Freeze => match self.freeze_and_send(home) {
                Ok(()) => vec![HomeEvent::Sent],
                Err(error) => {
                    let event = match error {
                        MoveError::Ended => HomeEvent::SourceLost,
                        _ => HomeEvent::SourceFailed,
                    };
                    self.why.get_or_insert(error);
                    vec![event]
                }
            },
            Order::Abort => {
                if let Some(tree) = self.tree.take()
                    && let Err(error) = tree.thaw()
                {
                    self.why = Some(from_tracee(error));
                }
                Vec::new()
            }
            Order::Forget => {
                self.figures = self.freeze.map(|freeze| freeze.figures(self.sent));
                self.park();
                Vec::new()
            }
            Order::Prepare | Order::Commit => Vec::new(),
        }
    }

    fn wait(&mut self, home: &mut Home) -> HomeEvent {
        let deadline = self.deadline.min(Instant::now() + STEP_LIMIT);
        let heard = home.hear(self.epoch, None, Some(self.host.number), deadline);
        if let Some(error) = heard.error {
            // What the target says comes before what its silence made of our sending.
            self.why = Some(error);
        }
        if heard.event == HomeEvent::Ready && self.dry_run {
            self.figures = self.freeze.map(|freeze| freeze.figures(self.sent));
            return HomeEvent::TimedOut;
        }
        heard.event
    }

    fn cut_target(&mut self) {
        self.host.link.close();
    }
}

impl Out {
    fn freeze_and_send(&mut self, home: &mut Home) -> Result<(), MoveError> {
        home.progress(self.id, "freezing", 0, 0);
        self.freeze = Some(Freeze(Instant::now()));
        let tree = self.tree.insert(FrozenTree::freeze(home.args.pid).map_err(from_tracee)?);
        let mut images = tree.read_states().map_err(MoveError::failed)?;
        let blockers = preflight::blockers_of_images(&images);
        if !blockers.is_empty() {
            return Err(MoveError::Blocked(blockers));
        }
        let objects = objects::collect(&tree.pids(), &mut images, Rules::Homed).map_err(MoveError::failed)?;
        self.carried = home.carry_out(&mut images, &objects)?;
        if let Some(view) = &home.view {
            images.iter().for_each(|image| view.allow(&image.creds.uids, &image.creds.gids));
            view.set_family(images.iter().map(|image| image.pid).collect());
        }
        home.progress(self.id, "copying", 0, 0);
        let (link, credits) = (self.host.link.clone(), self.host.credits.clone());
        self.sent = send_images(link, credits, self.epoch, tree, &images, &objects, self.deadline)
            .map_err(MoveError::failed)?;
        self.objects = Kept::of(objects)?;
        home.pids = images.iter().map(|image| image.pid).collect();
        self.images = images;
        Ok(())
    }

    /// They run elsewhere: each becomes its own deputy.
    fn park(&mut self) {
        let Some(tree) = self.tree.take() else { return };
        let carried = std::mem::take(&mut self.carried);
        for ((tracee, image), carried) in tree.into_tracees().into_iter().zip(&self.images).zip(carried) {
            match Deputy::park(tracee, image) {
                Ok(deputy) => self.members.push(Member {
                    deputy,
                    image: image.clone(),
                    carried,
                    stopping: image.signals.stopped_by,
                    continued: false,
                    looked: Instant::now(),
                }),
                Err(error) => {
                    // Killed just now: its guest goes with it.
                    self.host.kill_guest(Some(image.pid));
                    self.why = Some(from_tracee(error));
                }
            }
        }
        self.objects.empty();
    }
}

/// Sends the states and pages of frozen processes, and what they share; pages that a child has in common with its
/// parent once.
pub(in crate::shepherd) fn send_images(
    link: super::super::link::Link,
    credits: std::sync::Arc<super::super::link::Credits>,
    epoch: u64,
    tree: &FrozenTree,
    images: &[ProcessImage],
    objects: &[Object],
    deadline: Instant,
) -> anyhow::Result<SendFigures> {
    let in_time = || match Instant::now() >= deadline {
        true => Err(anyhow::anyhow!("the time given for the move is over")),
        false => Ok(()),
    };
    let writer = ImageWriter::new(link, credits, epoch, STALL_LIMIT);
    let mut stream = StreamWriter::new(writer, Options::default())?;
    for image in images {
        stream.state(image)?;
    }
    for object in objects {
        stream.object(&object.image)?;
        object.for_each_run(|offset, bytes| -> anyhow::Result<()> {
            in_time()?;
            Ok(stream.data(offset, bytes)?)
        })?;
    }
    for index in 0..images.len() {
        if index > 0 || !objects.is_empty() {
            stream.process(index)?;
        }
        tree.for_each_run(images, index, |run| -> anyhow::Result<()> {
            in_time()?;
            match run {
                checkpoint::dump::Run::Data { addr, bytes } => stream.data(addr, bytes)?,
                checkpoint::dump::Run::Zero { addr, len } => stream.zero(addr, len)?,
                checkpoint::dump::Run::Same { addr, len } => stream.same(addr, len)?,
            }
            Ok(())
        })?;
    }
    let (_, stats) = stream.finish()?;
    Ok(SendFigures { bytes: stats.raw_bytes, wire_bytes: stats.wire_bytes, pages: stats.pages })
}

pub(super) fn from_tracee(error: TraceeError) -> MoveError {
    match error {
        TraceeError::Died { .. } => MoveError::Ended,
        other => MoveError::failed(other),
    }
}
