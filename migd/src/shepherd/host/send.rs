//! The source's side of a move: freeze the guest, send its image, then forget it or let it run on.

use super::super::home::send_image;
use super::super::session::{SendFigures, StepKind};
use super::{Host, Next};
use crate::homefs;
use crate::protocol::{Order, SourceAction, SourceEvent};
use crate::shepherd::preflight;
use anyhow::Context;
use checkpoint::image::{FileKind, ProcessImage};
use checkpoint::sys::fd::{pidfd_getfd, pidfd_open};
use checkpoint::tracee::Tracee;
use std::collections::VecDeque;
use std::os::fd::AsFd;
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
                    SourceAction::FreezeAndSend => events.push_back(match self.freeze_and_send() {
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
                    SourceAction::Suspend => self.kill(libc::SIGSTOP),
                    SourceAction::Discard => {
                        // It dies with its house; nobody is told, because it lives elsewhere.
                        self.guest = None;
                        self.standing.take().map(Tracee::into_tids);
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
        let result = self.standing.take().map_or(Ok(()), Tracee::thaw);
        self.thawed();
        result.context("letting the guest run on")
    }

    fn freeze_and_send(&mut self) -> Result<SendFigures, (anyhow::Error, Vec<crate::api::Blocker>)> {
        let plain = |error: anyhow::Error| (error, Vec::new());
        let pid = self.guest.as_ref().map(|guest| guest.pid);
        let pid = pid.ok_or_else(|| plain(anyhow::anyhow!("there is no guest here")))?;
        let frozen = self.frozen(pid);
        let mut tracee =
            frozen.map_err(|error| plain(anyhow::Error::new(error).context("freezing the guest")))?;
        let result = self.send_frozen(&mut tracee);
        self.standing = Some(tracee);
        result
    }

    fn send_frozen(
        &self,
        tracee: &mut Tracee,
    ) -> Result<SendFigures, (anyhow::Error, Vec<crate::api::Blocker>)> {
        let plain = |error: anyhow::Error| (error, Vec::new());
        let mut image = checkpoint::dump::read_state(tracee)
            .map_err(|error| plain(anyhow::Error::new(error).context("reading the guest's state")))?;
        name_handles(tracee.pid(), &mut image).map_err(plain)?;
        let blockers = preflight::blockers_of_image(&image);
        if !blockers.is_empty() {
            return Err((anyhow::anyhow!("it has become unmovable"), blockers));
        }
        let link = self.wiring.link.get().ok_or_else(|| plain(anyhow::anyhow!("no link")))?.clone();
        let deadline = Instant::now() + Duration::from_secs(3600);
        send_image(link, Arc::clone(&self.wiring.credits), tracee, &image, deadline).map_err(plain)
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
