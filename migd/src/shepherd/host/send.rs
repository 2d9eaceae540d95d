//! The source's side of a move: freeze the guest, send its image, then forget it or let it run on.

use super::super::home::send_images;
use super::super::session::{SendFigures, StepKind};
use super::{Host, Next};
use crate::homefs;
use crate::protocol::{Order, SourceAction, SourceEvent};
use crate::shepherd::preflight;
use anyhow::Context;
use checkpoint::dump::objects;
use checkpoint::dump::tree::FrozenTree;
use checkpoint::image::{Backing, FileKind, ProcessImage};
use checkpoint::inventory::Rules;
use checkpoint::inventory::mapped_files::named_and_written;
use checkpoint::sys::fd::{pidfd_getfd, pidfd_open};
use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Longest that a frozen guest waits to hear whether it has moved. Not knowing, it stays frozen.
const VERDICT_LIMIT: Duration = Duration::from_secs(120);

impl Host {
    /// Runs the source's machine of [`crate::protocol`] from this event on.
    pub(super) fn as_source(&mut self, epoch: u64, event: SourceEvent) -> anyhow::Result<Next> {
        let mut events = VecDeque::from([event]);
        let mut figures = SendFigures::default();
        let mut blockers = Vec::new();
        while let Some(event) = events.pop_front() {
            for action in self.source.step(event) {
                match action {
                    SourceAction::FreezeAndSend => events.push_back(match self.freeze_and_send(epoch) {
                        Ok(sent) => {
                            figures = sent;
                            SourceEvent::Sent
                        }
                        Err((error, found)) => {
                            self.why = format!("on {}: {error:#}", self.args.name);
                            blockers = found;
                            SourceEvent::SendFailed
                        }
                    }),
                    SourceAction::TellSent => {
                        self.reply(epoch, StepKind::Sent { figures });
                        events.extend(self.await_fate(epoch));
                    }
                    SourceAction::TellFailed => {
                        let (blockers, why) = (std::mem::take(&mut blockers), self.why.clone());
                        self.reply(epoch, StepKind::Failed { blockers, why });
                    }
                    SourceAction::Thaw => self.run_on()?,
                    SourceAction::Suspend => self.kill(None, libc::SIGSTOP),
                    SourceAction::Discard => {
                        // It dies with its house; nobody is told, because it lives elsewhere.
                        self.guests.clear();
                        self.standing.take().map(FrozenTree::into_tids);
                        return Ok(Next::End(self.why.clone()));
                    }
                    SourceAction::Ignore(event) => tracing::debug!(?event, "nothing follows from this"),
                }
            }
        }
        Ok(Next::Go)
    }

    /// What becomes of the frozen guest. Without word from home it may run elsewhere by now: it is
    /// never let run on.
    fn await_fate(&mut self, epoch: u64) -> Vec<SourceEvent> {
        let deadline = Instant::now() + VERDICT_LIMIT;
        match self.await_step(epoch, deadline, |step| matches!(step, StepKind::Forget).then_some(())) {
            Ok(()) => {
                self.why = "the guest has moved on".into();
                vec![SourceEvent::Order(Order::Forget)]
            }
            Err(why) => {
                let lost = why.starts_with("home was lost") || Instant::now() >= deadline;
                tracing::info!(%why, lost, "the move is off");
                self.why = why;
                match lost {
                    true => vec![SourceEvent::LinkLost, SourceEvent::LeaseExpired],
                    false => vec![SourceEvent::Order(Order::Abort)],
                }
            }
        }
    }

    fn run_on(&mut self) -> anyhow::Result<()> {
        let result = self.standing.take().map_or(Ok(()), FrozenTree::thaw);
        self.thawed();
        result.context("letting the guest run on")
    }

    fn freeze_and_send(
        &mut self,
        epoch: u64,
    ) -> Result<SendFigures, (anyhow::Error, Vec<crate::api::Blocker>)> {
        let mut tree = self
            .freeze_all()
            .map_err(|error| (anyhow::Error::new(error).context("freezing the guest"), Vec::new()))?;
        let result = self.send_frozen(epoch, &mut tree);
        self.standing = Some(tree);
        result
    }

    fn send_frozen(
        &self,
        epoch: u64,
        tree: &mut FrozenTree,
    ) -> Result<SendFigures, (anyhow::Error, Vec<crate::api::Blocker>)> {
        let plain = |error: anyhow::Error| (error, Vec::new());
        let mut images = tree
            .read_states()
            .map_err(|error| plain(anyhow::Error::new(error).context("reading the guest's state")))?;
        for (tracee, image) in tree.tracees().zip(&mut images) {
            image.forget_filters();
            name_handles(tracee.pid(), image).map_err(plain)?;
            self.name_mapped(tracee.pid(), image).map_err(plain)?;
            self.name_relations(image);
        }
        tree.write_back(&images).map_err(|error| plain(error.into()))?;
        let blockers = preflight::blockers_of_images(&images);
        if !blockers.is_empty() {
            return Err((anyhow::anyhow!("it has become unmovable"), blockers));
        }
        let mut objects = objects::collect(&tree.pids(), &mut images, Rules::Homed)
            .map_err(|error| plain(anyhow::Error::new(error).context("looking at what they share")))?;
        self.objects.rename(&mut images, &mut objects);
        let link = self.wiring.link.get().ok_or_else(|| plain(anyhow::anyhow!("no link")))?.clone();
        let deadline = Instant::now() + Duration::from_secs(3600);
        send_images(link, Arc::clone(&self.wiring.credits), epoch, tree, &images, &objects, deadline)
            .map_err(plain)
    }

    /// Mapped files of the home file system that are written through memory or have lost their name are named by what
    /// home has open.
    fn name_mapped(&self, pid: i32, image: &mut ProcessImage) -> anyhow::Result<()> {
        let token = self.welcome.as_ref().context("home has not said who comes")?.token;
        let at_home = homefs::device_of(pid).context("looking for home's file system")?;
        for vma in &mut image.mm.vmas {
            let writes = named_and_written(vma).is_some();
            let Backing::File(file) = &mut vma.backing else { continue };
            if file.dev == at_home && (writes || file.deleted) {
                file.path = homefs::inode_path(&token, file.ino).into_os_string().into_vec();
                file.deleted = false;
            }
        }
        Ok(())
    }

    /// Groups and sessions as they are at home, where alone they can change.
    fn name_relations(&self, image: &mut ProcessImage) {
        if let Some(&(pgid, sid)) = self.relations.get(&image.pid) {
            (image.pgid, image.sid) = (pgid, sid);
        }
        for zombie in &mut image.zombies {
            if let Some(&(pgid, sid)) = self.relations.get(&zombie.pid) {
                (zombie.pgid, zombie.sid) = (pgid, sid);
            }
        }
    }
}

/// Replaces what lies in the home file system by the handles of home's.
fn name_handles(pid: i32, image: &mut ProcessImage) -> anyhow::Result<()> {
    let pidfd = pidfd_open(pid).context("pidfd_open")?;
    for (index, file) in image.files.files.iter_mut().enumerate() {
        if !matches!(file.kind, FileKind::Regular { .. } | FileKind::Directory) {
            continue;
        }
        let Some(fd) = image.files.fds.iter().find(|fd| fd.file as usize == index) else { continue };
        let copy = pidfd_getfd(pidfd.as_fd(), fd.fd).context("pidfd_getfd")?;
        if let Ok(handle) = homefs::handle_of(copy.as_fd()) {
            file.kind = FileKind::Foreign { handle };
        }
    }
    Ok(())
}
