//! The way home: the guest's image is rebuilt in the deputy, which then simply is the process again.

use super::super::link::ImageReader;
use super::super::session::SendFigures;
use super::conduct::{Parties, step_of};
use super::move_out::from_tracee;
use super::peer::Host;
use super::record::{self, Record};
use super::{Away, Freeze, Home, MoveError, Place, STALL_LIMIT, STEP_LIMIT};
use crate::protocol::{HomeEvent, Order, Outcome};
use crate::shepherd::control::MoveFigures;
use checkpoint::deputy::{self, Deputy, SigInfo};
use checkpoint::image::stream::{Item, StreamReader};
use checkpoint::image::{FileKind, OpenFile, ProcessImage};
use checkpoint::restore::{self, FileSource, Rebuild, RebuildOptions};
use checkpoint::tracee::Tracee;
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

impl Home {
    pub(super) fn move_home(
        &mut self,
        id: u64,
        away: Box<Away>,
        dry_run: bool,
        deadline: Instant,
    ) -> (Place, Result<MoveFigures, MoveError>) {
        let epoch = self.next_epoch();
        let Away { host, deputy, image, stopping, looked } = *away;
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
            deputy: Some(deputy),
            filled: None,
            released: false,
            why: None,
        };
        let outcome = self.conduct(epoch, &mut parties);
        let Homewards { figures, deputy, released, why, .. } = parties;
        drop(hold);
        match (outcome, deputy) {
            (Outcome::Moved, _) if released => {
                if let Some(view) = self.view.take() {
                    view.disconnect(host.view_connection);
                    view.release_all();
                }
                host.link.close();
                (Place::Home, Ok(figures.unwrap_or_default()))
            }
            (_, Some(deputy)) => {
                let place = Place::Away(Box::new(Away { host, deputy, image, stopping, looked }));
                match (why, figures) {
                    (None, Some(figures)) if dry_run => (place, Ok(figures)),
                    (why, _) => {
                        (place, Err(why.unwrap_or(MoveError::Failed("the move was given up".into()))))
                    }
                }
            }
            (_, None) => {
                host.kill_guest();
                host.link.close();
                (Place::Gone, Err(why.unwrap_or(MoveError::Ended)))
            }
        }
    }
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
    deputy: Option<Deputy>,
    /// Frozen and filled, not yet released.
    filled: Option<(Tracee, ProcessImage)>,
    released: bool,
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
                let Some((tracee, _)) = self.filled.take() else { return vec![HomeEvent::TargetFailed] };
                if let Err(error) = tracee.release() {
                    // It has ended just now; its guest must not go on without it.
                    self.why = Some(from_tracee(error));
                }
                self.released = true;
                self.figures = self.freeze.map(|freeze| freeze.figures(self.sent));
                vec![HomeEvent::Running]
            }
            Order::Abort => {
                if let Some((tracee, image)) = self.filled.take() {
                    self.deputy = park(tracee, &image);
                }
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
        if heard.event == HomeEvent::Sent && self.dry_run && self.filled.is_some() {
            self.figures = self.freeze.map(|freeze| freeze.figures(self.sent));
            return HomeEvent::TimedOut;
        }
        heard.event
    }

    fn cut_target(&mut self) {}
}

impl Homewards<'_> {
    /// Fills the deputy with what comes. `None`: the stream broke, and the source will say why.
    fn receive(&mut self, home: &mut Home) -> Option<HomeEvent> {
        let mut broken = |error: &dyn std::fmt::Display| {
            self.why.get_or_insert(MoveError::Failed(format!("the image did not arrive: {error}")));
            None
        };
        let reader = ImageReader::new(self.host.link.clone(), self.host.queue.clone(), STALL_LIMIT);
        let mut stream = match StreamReader::new(reader) {
            Ok(stream) => stream,
            Err(error) => return broken(&error),
        };
        let image = match stream.next() {
            Ok(Item::State(image)) => *image,
            Ok(_) => return broken(&"it has no state"),
            Err(error) => return broken(&error),
        };
        home.progress(self.id, "copying", 0, 0);
        let node = self.host.name.clone();
        let refilling = Record { pid: home.args.pid, epoch: self.epoch - 1, node, refilling: true };
        if let Err(error) = record::commit(&home.args.record, &refilling) {
            self.why = Some(MoveError::Failed(format!("the record of it cannot be written: {error}")));
            return Some(HomeEvent::TargetFailed);
        }
        let (mut tracee, caught) = match self.deputy.take()?.freeze() {
            Ok(frozen) => frozen,
            Err(error) => {
                self.why = Some(from_tracee(error));
                return Some(HomeEvent::TargetFailed);
            }
        };
        let result = home.refill(&mut tracee, &image, caught, &mut stream, self.deadline);
        self.filled = Some((tracee, image));
        match result {
            Ok(()) => Some(HomeEvent::Ready),
            Err(error) => {
                self.why = Some(error);
                Some(HomeEvent::TargetFailed)
            }
        }
    }
}

impl Home {
    fn refill(
        &mut self,
        tracee: &mut Tracee,
        image: &ProcessImage,
        mut queued: Vec<SigInfo>,
        stream: &mut StreamReader<ImageReader>,
        deadline: Instant,
    ) -> Result<(), MoveError> {
        let tids: Vec<i32> = image.threads.iter().map(|thread| thread.tid).collect();
        deputy::reconcile_threads(tracee, &tids).map_err(from_tracee)?;
        queued.extend(take_signals(tracee)?);
        self.place_files(tracee, image)?;
        let options = RebuildOptions::deputy();
        let mut files = ByPath;
        let mut rebuild = Rebuild::begin(tracee, image, &mut files, options).map_err(MoveError::failed)?;
        loop {
            if Instant::now() >= deadline {
                return Err(MoveError::Failed("the time given for the move is over".into()));
            }
            match stream.next().map_err(MoveError::failed)? {
                Item::Data { addr, bytes } => rebuild.data(addr, bytes).map_err(MoveError::failed)?,
                Item::Zero { addr, len } => rebuild.zero(addr, len).map_err(MoveError::failed)?,
                Item::End => break,
                Item::State(_) | Item::Process(_) => {
                    return Err(MoveError::Failed("the image has several processes".into()));
                }
            }
        }
        rebuild.queue_after(queued);
        rebuild.finish().map_err(MoveError::failed)
    }

    /// Makes the deputy's descriptor table that of the guest.
    fn place_files(&mut self, tracee: &mut Tracee, image: &ProcessImage) -> Result<(), MoveError> {
        let view = self.view.clone().ok_or_else(|| MoveError::Failed("there is no home view".into()))?;
        let mut opened: BTreeMap<u32, OwnedFd> = BTreeMap::new();
        let mut keep = BTreeSet::new();
        for fd in &image.files.fds {
            let Some(file) = image.files.files.get(fd.file as usize) else {
                return Err(MoveError::Failed("the image's descriptor table is inconsistent".into()));
            };
            if let FileKind::Foreign { handle } = file.kind
                && self.carried.fds.get(&fd.fd) == Some(&handle)
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
                    self.settle(&ours, *handle, file);
                    ours
                }
                _ => restore::make_local(file).map_err(MoveError::failed)?,
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

    /// Position and status flags that the guest has changed on the host node.
    fn settle(&self, ours: &OwnedFd, handle: u64, file: &OpenFile) {
        use nix::fcntl::{FcntlArg, OFlag, fcntl};
        const SETTABLE: i32 = libc::O_APPEND | libc::O_NONBLOCK | libc::O_DIRECT | libc::O_NOATIME;
        let shared = self.carried.shared.contains(&handle);
        if !shared {
            // Streams answer ESPIPE, which is right.
            let _ = nix::unistd::lseek(ours, file.pos as i64, nix::unistd::Whence::SeekSet);
        }
        let Ok(now) = fcntl(ours, FcntlArg::F_GETFL) else { return };
        let wanted = (now & !SETTABLE) | (file.flags as i32 & SETTABLE);
        if wanted != now {
            let _ = fcntl(ours, FcntlArg::F_SETFL(OFlag::from_bits_retain(wanted)));
        }
    }
}

/// What waits in the deputy: the signal in the slot, then those in the kernel's queue. They come after
/// what is pending in the guest, which is older.
fn take_signals(tracee: &mut Tracee) -> Result<Vec<SigInfo>, MoveError> {
    let mut out: Vec<SigInfo> = deputy::take_slot(tracee).map_err(from_tracee)?.into_iter().collect();
    out.extend(deputy::drain_pending(tracee).map_err(from_tracee)?);
    Ok(out)
}

fn park(tracee: Tracee, image: &ProcessImage) -> Option<Deputy> {
    Deputy::park_again(tracee, image)
        .inspect_err(|error| tracing::error!(%error, "the deputy could not be parked again"))
        .ok()
}

/// At home, mapped files are opened by path, inside the deputy and with its rights.
struct ByPath;

impl FileSource for ByPath {
    fn open_mapped(
        &mut self,
        tracee: &mut Tracee,
        file: &checkpoint::image::MappedFile,
        writable: bool,
    ) -> Result<i32, checkpoint::restore::RestoreError> {
        restore::open_inside(tracee, &file.path, writable)
    }
}
