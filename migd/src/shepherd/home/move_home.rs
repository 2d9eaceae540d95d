//! The way home: the guest's image is rebuilt in the deputy, which then simply is the process again.

use super::super::link::ImageReader;
use super::super::session::SendFigures;
use super::carry::Carried;
use super::conduct::{Parties, step_of};
use super::move_out::from_tracee;
use super::objects::{self, AtHome, Kept};
use super::peer::Host;
use super::record::{self, Record};
use super::serve::{end_deputy, is_echo};
use super::{Away, Freeze, Home, Member, MoveError, Place, STALL_LIMIT, STEP_LIMIT};
use crate::protocol::{HomeEvent, Order, Outcome};
use crate::shepherd::control::MoveFigures;
use checkpoint::deputy::{self, Deputy, SigInfo};
use checkpoint::image::stream::{Item, StreamReader};
use checkpoint::image::{FileKind, OpenFile, ProcessImage};
use checkpoint::restore::objects::Objects;
use checkpoint::restore::{self, Rebuild, RebuildOptions};
use checkpoint::tracee::{Tracee, TraceeError};
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

impl Home {
    pub(super) fn move_home(
        &mut self,
        id: u64,
        away: Away,
        dry_run: bool,
        deadline: Instant,
    ) -> (Place, Result<MoveFigures, MoveError>) {
        let epoch = self.next_epoch();
        self.pids = away.pids();
        let Away { host, members, family, objects } = away;
        let hold = self.view.as_ref().map(|view| view.hold());
        let mut parties = Homewards {
            id,
            epoch,
            host: &host,
            deadline,
            dry_run,
            freeze: None,
            figures: None,
            sent: SendFigures::default(),
            members,
            family: &family,
            objects: &objects,
            frozen: Vec::new(),
            filled: false,
            released: Vec::new(),
            why: None,
        };
        let outcome = self.conduct(epoch, &mut parties);
        let Homewards { figures, members, released, why, .. } = parties;
        drop(hold);
        match outcome {
            Outcome::Moved if !released.is_empty() => {
                self.pids = released;
                if let Some(view) = self.view.take() {
                    view.disconnect(host.view_connection);
                    view.release_all();
                }
                host.link.close();
                (Place::Home, Ok(figures.unwrap_or_default()))
            }
            _ if !members.is_empty() => {
                let place = Place::Away(Box::new(Away { host, members, family, objects }));
                match (why, figures) {
                    (None, Some(figures)) if dry_run => (place, Ok(figures)),
                    (why, _) => {
                        (place, Err(why.unwrap_or(MoveError::Failed("the move was given up".into()))))
                    }
                }
            }
            _ => {
                host.kill_guest(None);
                host.link.close();
                (Place::Gone, Err(why.unwrap_or(MoveError::Ended)))
            }
        }
    }
}

/// A deputy that stands ready to be filled.
struct Frozen {
    tracee: Tracee,
    /// What it is to be; until it is filled, what it was.
    image: ProcessImage,
    carried: Carried,
    /// What it had caught, and nobody was told of.
    queued: Vec<SigInfo>,
    /// It was stopped, as its guest was; and was sent a SIGCONT because its guest is not any more.
    stopped: bool,
    continued: bool,
    /// All that its guest is is in it.
    filled: bool,
}

/// The parties of a home-coming: the target is the deputy, here.
struct Homewards<'a> {
    id: u64,
    epoch: u64,
    host: &'a Host,
    deadline: Instant,
    dry_run: bool,
    freeze: Option<Freeze>,
    figures: Option<MoveFigures>,
    sent: SendFigures,
    /// Parked.
    members: Vec<Member>,
    family: &'a BTreeSet<i32>,
    objects: &'a Kept,
    /// Frozen, then filled, not yet released; in the order of the image.
    frozen: Vec<Frozen>,
    /// All of them are filled.
    filled: bool,
    /// PIDs of those that run again.
    released: Vec<i32>,
    why: Option<MoveError>,
}

impl Parties for Homewards<'_> {
    fn target_name(&self, home: &Home) -> String {
        home.args.name.clone()
    }

    fn to_target(&mut self, home: &mut Home, order: Order) -> Vec<HomeEvent> {
        match order {
            Order::Prepare => vec![HomeEvent::Prepared],
            Order::Commit => {
                home.progress(self.id, "committing", self.sent.bytes, self.sent.wire_bytes);
                if !self.filled {
                    return vec![HomeEvent::TargetFailed];
                }
                // Children first: who waits for one finds it at work.
                for Frozen { tracee, .. } in std::mem::take(&mut self.frozen).into_iter().rev() {
                    self.released.insert(0, tracee.pid());
                    if let Err(error) = tracee.release() {
                        // It has ended just now; its guest must not go on without it.
                        self.why = Some(from_tracee(error));
                    }
                }
                self.figures = self.freeze.map(|freeze| freeze.figures(self.sent));
                vec![HomeEvent::Running]
            }
            Order::Abort => {
                for frozen in std::mem::take(&mut self.frozen) {
                    let pid = frozen.tracee.pid();
                    match park(frozen) {
                        Some(member) => self.members.push(member),
                        None => self.host.kill_guest(Some(pid)),
                    }
                }
                self.objects.empty();
                Vec::new()
            }
            Order::Freeze | Order::Forget => Vec::new(),
        }
    }

    fn to_source(&mut self, home: &mut Home, order: Order) -> Vec<HomeEvent> {
        if order == Order::Freeze {
            home.progress(self.id, "freezing", 0, 0);
            self.freeze = Some(Freeze(Instant::now()));
            self.host.queue.reset();
        }
        if order == Order::Forget {
            home.silence(self.host);
        }
        let why = self.why.as_ref().map_or("a dry run".to_string(), ToString::to_string);
        match self.host.step(self.epoch, step_of(order, &why)) {
            // Ours is to receive now.
            Ok(()) if order == Order::Freeze => self.receive(home).into_iter().collect(),
            Ok(()) => Vec::new(),
            Err(error) => {
                self.why.get_or_insert(error);
                vec![HomeEvent::SourceLost]
            }
        }
    }

    fn wait(&mut self, home: &mut Home) -> HomeEvent {
        let deadline = self.deadline.min(Instant::now() + STEP_LIMIT);
        let heard = home.hear(self.epoch, Some(self.host.number), None, deadline);
        if let Some(error) = heard.error {
            self.why = Some(error);
        }
        if let Some(sent) = heard.figures {
            self.sent = sent;
        }
        if heard.event == HomeEvent::Sent && self.dry_run && self.filled {
            self.figures = self.freeze.map(|freeze| freeze.figures(self.sent));
            return HomeEvent::TimedOut;
        }
        heard.event
    }

    fn cut_target(&mut self) {}
}

impl Homewards<'_> {
    /// Fills the deputies with what comes. `None`: the stream broke, and the source will say why.
    fn receive(&mut self, home: &mut Home) -> Option<HomeEvent> {
        let mut broken = |error: &dyn std::fmt::Display| {
            self.why.get_or_insert(MoveError::Failed(format!("the image did not arrive: {error}")));
            None
        };
        let reader =
            ImageReader::new(self.host.link.clone(), self.host.queue.clone(), self.epoch, STALL_LIMIT);
        let mut stream = match StreamReader::new(reader) {
            Ok(stream) => stream,
            Err(error) => return broken(&error),
        };
        let images = match stream.states() {
            Ok(images) => images,
            Err(error) => return broken(&error),
        };
        home.progress(self.id, "copying", 0, 0);
        let node = self.host.name.clone();
        let pids = self.members.iter().map(|member| member.deputy.pid()).collect();
        let refilling = Record { pid: home.args.pid, epoch: self.epoch - 1, node, refilling: true, pids };
        if let Err(error) = record::commit(&home.args.record, &refilling) {
            self.why = Some(MoveError::Failed(format!("the record of it cannot be written: {error}")));
            return Some(HomeEvent::TargetFailed);
        }
        let result = self.freeze(&images).and_then(|()| self.refill(home, &images, &mut stream));
        match result {
            Ok(()) => {
                self.filled = true;
                Some(HomeEvent::Ready)
            }
            Err(error) => {
                self.why = Some(error);
                Some(HomeEvent::TargetFailed)
            }
        }
    }

    /// Freezes the deputies of those that come, in their order. Whoever is not among them has ended
    /// there, and ends here.
    fn freeze(&mut self, images: &[ProcessImage]) -> Result<(), MoveError> {
        let mut members = std::mem::take(&mut self.members);
        let ended = members.extract_if(.., |member| {
            let pid = member.deputy.pid();
            !images.iter().any(|image| image.pid == pid)
        });
        let zombies = || images.iter().flat_map(|image| &image.zombies);
        for member in ended {
            let pid = member.deputy.pid();
            // One that its parent has waited for already may have ended in whatever way.
            let status = zombies().find(|zombie| zombie.pid == pid).map_or(0, |zombie| zombie.status);
            end_deputy(member.deputy, status);
        }
        let mut died = None;
        for image in images {
            let Some(at) = members.iter().position(|member| member.deputy.pid() == image.pid) else {
                died.get_or_insert(MoveError::Failed(format!("process {} has no deputy here", image.pid)));
                continue;
            };
            let mut member = members.remove(at);
            let stopped = member.stopping.is_some();
            if image.signals.stopped_by.is_none() {
                member.continue_deputy();
            }
            let Member { deputy, image, carried, continued, .. } = member;
            match deputy.freeze() {
                Ok((tracee, queued)) => {
                    let filled = false;
                    self.frozen.push(Frozen { tracee, image, carried, queued, stopped, continued, filled });
                }
                Err(error) => drop(died.get_or_insert(from_tracee(error))),
            }
        }
        died.map_or(Ok(()), Err)
    }

    fn refill(
        &mut self,
        home: &mut Home,
        images: &[ProcessImage],
        stream: &mut StreamReader<ImageReader>,
    ) -> Result<(), MoveError> {
        let mut shared = BTreeMap::new();
        let objects = Objects::receive_with(stream, &mut |image| self.objects.give(image));
        let objects = objects.map_err(MoveError::failed)?;
        let mut next = Some(0);
        while let Some(who) = next {
            let (Some(frozen), Some(image)) = (self.frozen.get_mut(who), images.get(who)) else {
                return Err(MoveError::Failed("the image has more processes than deputies".into()));
            };
            // Only one of them: whatever the image says, nobody else's memory is read.
            let parent =
                images[..who].iter().find(|parent| parent.pid == image.ppid).map(|parent| parent.pid);
            let mut files = Files { parent, shared: &mut shared, objects: &objects };
            next = home.refill(frozen, image, self.family, &mut files, stream, self.deadline)?;
            if next != (who + 1 < images.len()).then_some(who + 1) {
                return Err(MoveError::Failed("the image lacks the memory of a process".into()));
            }
        }
        objects.seal().map(|segments| segments.keep()).map_err(MoveError::failed)
    }
}

/// What deputies' descriptors and memory are made from.
struct Files<'a> {
    /// Its parent, if that is one of them: its memory is there.
    parent: Option<i32>,
    /// Made here, and shared by several of them: by the image's numbers.
    shared: &'a mut BTreeMap<u32, OwnedFd>,
    objects: &'a Objects,
}

impl Files<'_> {
    fn make(&mut self, file: &OpenFile) -> Result<OwnedFd, MoveError> {
        let make = || match file.kind {
            FileKind::Memfd | FileKind::Regular { .. } => objects::open(self.objects, file),
            _ => restore::make_local(file).map_err(MoveError::failed),
        };
        if file.shared == 0 {
            return make();
        }
        let made = match self.shared.remove(&file.shared) {
            Some(made) => made,
            None => make()?,
        };
        let copy = made.try_clone().map_err(MoveError::failed)?;
        self.shared.insert(file.shared, made);
        Ok(copy)
    }
}

impl Home {
    /// Fills one deputy; gives the place of the next.
    fn refill(
        &mut self,
        frozen: &mut Frozen,
        image: &ProcessImage,
        family: &BTreeSet<i32>,
        files: &mut Files<'_>,
        stream: &mut StreamReader<ImageReader>,
        deadline: Instant,
    ) -> Result<Option<usize>, MoveError> {
        let Frozen { tracee, image: known, carried, queued, stopped, continued, filled } = frozen;
        let tids: Vec<i32> = image.threads.iter().map(|thread| thread.tid).collect();
        deputy::reconcile_threads(tracee, &tids).map_err(from_tracee)?;
        queued.extend(take_signals(tracee)?);
        queued.retain(|info| !is_echo(info, family) && !is_own_cont(info, continued));
        let unknown: Vec<i32> = image.zombies.iter().map(|zombie| zombie.pid).collect();
        deputy::reap_ended_children(tracee, &unknown).map_err(from_tracee)?;
        self.place_files(tracee, image, carried, files)?;
        // One that stopped a moment ago; the others are stopped as it is.
        let stop = image.signals.stopped_by.is_some() && !*stopped;
        let options = RebuildOptions { stop, ..RebuildOptions::deputy() };
        let parent = files.parent;
        let view = self.view.clone().ok_or_else(no_view)?;
        let mut files = AtHome { objects: files.objects, view: &view };
        known.clone_from(image);
        let mut rebuild = Rebuild::begin(tracee, image, &mut files, options).map_err(MoveError::failed)?;
        if let Some(parent) = parent {
            rebuild.set_parent(parent);
        }
        let next = loop {
            if Instant::now() >= deadline {
                return Err(MoveError::Failed("the time given for the move is over".into()));
            }
            match stream.next().map_err(MoveError::failed)? {
                Item::Data { addr, bytes } => rebuild.data(addr, bytes).map_err(MoveError::failed)?,
                Item::Zero { addr, len } => rebuild.zero(addr, len).map_err(MoveError::failed)?,
                Item::Same { addr, len } => rebuild.same(addr, len).map_err(MoveError::failed)?,
                Item::End => break None,
                Item::Process(next) => break Some(next),
                Item::State(_) | Item::Object(_) => {
                    return Err(MoveError::Failed("a state among the memory".into()));
                }
            }
        };
        rebuild.queue_after(queued.clone());
        rebuild.finish().map_err(MoveError::failed)?;
        *filled = true;
        Ok(next)
    }

    /// Makes the deputy's descriptor table that of the guest.
    fn place_files(
        &mut self,
        tracee: &mut Tracee,
        image: &ProcessImage,
        carried: &Carried,
        files: &mut Files<'_>,
    ) -> Result<(), MoveError> {
        let view = self.view.clone().ok_or_else(no_view)?;
        let mut opened: BTreeMap<u32, OwnedFd> = BTreeMap::new();
        let mut keep = BTreeSet::new();
        for fd in &image.files.fds {
            let Some(file) = image.files.files.get(fd.file as usize) else {
                return Err(MoveError::Failed("the image's descriptor table is inconsistent".into()));
            };
            if let FileKind::Foreign { handle } = file.kind
                && carried.fds.get(&fd.fd) == Some(&handle)
            {
                keep.insert(fd.fd);
            }
            if opened.contains_key(&fd.file) {
                continue;
            }
            if matches!(file.kind, FileKind::Epoll { .. }) {
                continue; // made by the rebuild
            }
            let ours = match &file.kind {
                FileKind::Foreign { handle } => {
                    let ours = view.handle_file(*handle).ok_or_else(|| {
                        MoveError::Failed(format!(
                            "descriptor {} stands for a file that is closed at home",
                            fd.fd
                        ))
                    })?;
                    settle(&ours, *handle, file, carried);
                    ours
                }
                _ => files.make(file)?,
            };
            opened.insert(fd.file, ours);
        }
        let mut table = Vec::new();
        for fd in &image.files.fds {
            if keep.contains(&fd.fd) {
                let flag = if fd.cloexec { libc::FD_CLOEXEC as u64 } else { 0 };
                let args = [fd.fd as u64, libc::F_SETFD as u64, flag, 0, 0, 0];
                tracee.must(0, "setting close-on-exec", libc::SYS_fcntl, args).map_err(from_tracee)?;
            } else if let Some(ours) = opened.get(&fd.file) {
                table.push((fd.fd, ours.as_fd(), fd.cloexec));
            }
        }
        deputy::install_fds(tracee, &keep, &table).map_err(from_tracee)
    }
}

fn no_view() -> MoveError {
    MoveError::Failed("there is no home view".into())
}

/// Position and status flags that the guest has changed on the host node.
fn settle(ours: &OwnedFd, handle: u64, file: &OpenFile, carried: &Carried) {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    const SETTABLE: i32 = libc::O_APPEND | libc::O_NONBLOCK | libc::O_DIRECT | libc::O_NOATIME;
    if !carried.shared.contains(&handle) {
        // Streams answer ESPIPE, which is right.
        let _ = nix::unistd::lseek(ours, file.pos as i64, nix::unistd::Whence::SeekSet);
    }
    let Ok(now) = fcntl(ours, FcntlArg::F_GETFL) else { return };
    let wanted = (now & !SETTABLE) | (file.flags as i32 & SETTABLE);
    if wanted != now {
        let _ = fcntl(ours, FcntlArg::F_SETFL(OFlag::from_bits_retain(wanted)));
    }
}

/// What waits in the deputy: the signal in the slot, then those in the kernel's queue. They come after
/// what is pending in the guest, which is older.
fn take_signals(tracee: &mut Tracee) -> Result<Vec<SigInfo>, MoveError> {
    let mut out: Vec<SigInfo> = deputy::take_slot(tracee).map_err(from_tracee)?.into_iter().collect();
    out.extend(deputy::drain_pending(tracee).map_err(from_tracee)?);
    Ok(out)
}

/// Whether a signal is the SIGCONT that was sent to let a deputy go on after its guest; there is one.
fn is_own_cont(info: &SigInfo, continued: &mut bool) -> bool {
    deputy::signal_number(info) == libc::SIGCONT && std::mem::take(continued)
}

/// Parks again what was to come home and does not.
fn park(frozen: Frozen) -> Option<Member> {
    let Frozen { mut tracee, image, carried, queued, filled, .. } = frozen;
    let stopping = image.signals.stopped_by;
    let told = |error: &TraceeError| tracing::error!(%error, "the deputy could not be parked again");
    keep_signals(&mut tracee, &image, queued, filled).inspect_err(told).ok()?;
    let deputy = Deputy::park_again(tracee, &image).inspect_err(told).ok()?;
    Some(Member { deputy, image, carried, stopping, continued: false, looked: Instant::now() })
}

/// The signals that the deputy had caught wait in it again. Those that its guest has pending are there too if it
/// was filled, and the guest keeps them.
fn keep_signals(
    tracee: &mut Tracee,
    image: &ProcessImage,
    queued: Vec<SigInfo>,
    filled: bool,
) -> Result<(), TraceeError> {
    // The rebuild's end has taken it away.
    tracee.install_stub(&[])?;
    let mut keep = queued;
    if filled {
        let mut pending = deputy::drain_pending(tracee)?;
        for info in image.signals.pending.iter().map(Vec::as_slice).chain(keep.iter().map(|info| &info[..])) {
            // The kernel keeps the first part of it, with sender and value.
            let same = |other: &SigInfo| other[..SENDER_AND_VALUE] == info[..SENDER_AND_VALUE];
            if let Some(at) = pending.iter().position(same) {
                pending.remove(at);
            }
        }
        // What came meanwhile.
        keep.extend(pending);
        deputy::drop_thread_signals(tracee)?;
    }
    keep.iter().try_for_each(|info| deputy::requeue_signal(tracee, None, info))
}

/// Of a `siginfo_t`, bytes.
const SENDER_AND_VALUE: usize = 32;
