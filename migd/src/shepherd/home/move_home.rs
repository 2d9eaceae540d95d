//! The way home: the guest's image is rebuilt in the deputy, which then simply is the process again.

use super::super::link::ImageReader;
use super::super::session::{SendFigures, StepKind};
use super::move_out::from_tracee;
use super::record::{self, Record};
use super::{Away, Freeze, Home, MoveError, Place, STALL_LIMIT, STEP_LIMIT};
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
        let Away { host, deputy, image: departed, stopping } = *away;
        self.progress(id, "freezing", 0, 0);
        let freeze = Freeze(Instant::now());
        host.queue.reset();
        let hold = self.view.as_ref().map(|view| view.hold());
        let result = match host.step(epoch, StepKind::Freeze) {
            Ok(()) => self.receive_home(id, &host, deputy, epoch, dry_run, deadline),
            Err(error) => Err((error, Some(deputy))),
        };
        let (tracee, sent) = match result {
            Ok(done) => done,
            Err((error, parked)) => {
                host.abort(epoch, &error.to_string());
                return match parked {
                    Some(deputy) => {
                        (Place::Away(Box::new(Away { host, deputy, image: departed, stopping })), Err(error))
                    }
                    None => (Place::Gone, Err(error)),
                };
            }
        };
        self.progress(id, "committing", sent.bytes, sent.wire_bytes);
        let node = self.args.name.clone();
        let _ = record::commit(&Record { pid: self.args.pid, epoch, node });
        let released = tracee.release();
        let figures = freeze.figures(sent);
        let _ = host.step(epoch, StepKind::Forget);
        drop(hold);
        if let Some(view) = self.view.take() {
            view.disconnect(host.view_connection);
            view.release_all();
        }
        host.link.close();
        match released {
            Ok(()) => (Place::Home, Ok(figures)),
            Err(error) => (Place::Gone, Err(from_tracee(error))),
        }
    }
}

/// What a failed home-coming gives: the error, and the deputy parked again (absent: it is gone).
type Failed = (MoveError, Option<Deputy>);

impl Home {
    fn receive_home(
        &mut self,
        id: u64,
        host: &super::peer::Host,
        deputy: Deputy,
        epoch: u64,
        dry_run: bool,
        deadline: Instant,
    ) -> Result<(Tracee, SendFigures), Failed> {
        let reader = ImageReader::new(host.link.clone(), host.queue.clone(), STALL_LIMIT);
        let mut stream = match StreamReader::new(reader) {
            Ok(stream) => stream,
            Err(error) => return Err((self.refusal(host, epoch, error), Some(deputy))),
        };
        let image = match stream.next() {
            Ok(Item::State(image)) => *image,
            Ok(_) => return Err((MoveError::Failed("the image has no state".into()), Some(deputy))),
            Err(error) => return Err((self.refusal(host, epoch, error), Some(deputy))),
        };
        self.progress(id, "copying", 0, 0);
        let (mut tracee, caught) = match deputy.freeze() {
            Ok(frozen) => frozen,
            Err(error) => return Err((from_tracee(error), None)),
        };
        let filled = self.refill(&mut tracee, &image, caught, &mut stream, deadline).and_then(|()| {
            let limit = deadline.min(Instant::now() + STEP_LIMIT);
            self.await_step(host.number, epoch, limit, |step| match step {
                StepKind::Sent { figures } => Some(figures),
                _ => None,
            })
        });
        match filled {
            Ok(sent) if !dry_run => Ok((tracee, sent)),
            Ok(_) => Err((
                MoveError::Failed("a dry run: everything was done but the commit".into()),
                park(tracee, &image),
            )),
            Err(error) => Err((error, park(tracee, &image))),
        }
    }

    /// Why the stream broke: the source's own word, if it has given one.
    fn refusal(&mut self, host: &super::peer::Host, epoch: u64, error: impl std::fmt::Display) -> MoveError {
        let told = self.await_step(host.number, epoch, Instant::now(), |_| None::<()>);
        match told {
            Err(MoveError::Node(_)) | Ok(()) => {
                MoveError::Failed(format!("the image did not arrive: {error}"))
            }
            Err(told) => told,
        }
    }

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
                Item::State(_) => return Err(MoveError::Failed("the image has two states".into())),
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
            if let FileKind::Foreign { handle } = file.kind {
                if self.carried.fds.get(&fd.fd) == Some(&handle) {
                    keep.insert(fd.fd);
                }
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
