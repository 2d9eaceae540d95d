//! The source's side of a move: freeze the guest, send its image, then forget it or let it run on.

use super::super::home::send_image;
use super::super::session::{SendFigures, StepKind};
use super::{Host, Next};
use crate::homefs;
use crate::shepherd::preflight;
use anyhow::Context;
use checkpoint::image::{FileKind, ProcessImage};
use checkpoint::sys::fd::{pidfd_getfd, pidfd_open};
use checkpoint::tracee::Tracee;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Longest that a frozen guest waits to hear whether it has moved. Not knowing, it stays frozen.
const VERDICT_LIMIT: Duration = Duration::from_secs(120);

impl Host {
    pub(super) fn send_guest(&mut self, epoch: u64) -> anyhow::Result<Next> {
        let Some(pid) = self.guest.as_ref().map(|guest| guest.pid) else {
            self.fail(epoch, &anyhow::anyhow!("there is no guest here"));
            return Ok(Next::Go);
        };
        let mut tracee = match self.frozen(pid) {
            Ok(tracee) => tracee,
            Err(error) => {
                self.fail(epoch, &anyhow::Error::new(error).context("freezing the guest"));
                return Ok(Next::Go);
            }
        };
        match self.send_frozen(&mut tracee) {
            Ok(figures) => self.reply(epoch, StepKind::Sent { figures }),
            Err((error, blockers)) => {
                let why = format!("on {}: {error:#}", self.args.name);
                self.reply(epoch, StepKind::Failed { blockers, why });
                return self.run_on(tracee);
            }
        }
        let deadline = Instant::now() + VERDICT_LIMIT;
        let verdict = self.await_step(epoch, deadline, |step| matches!(step, StepKind::Forget).then_some(()));
        match verdict {
            Ok(()) => {
                self.guest = None;
                // It dies with its init; nobody is told, because it lives elsewhere.
                drop(tracee.into_tids());
                Ok(Next::End("the guest has moved on".into()))
            }
            Err(why) if why.starts_with("home was lost") || Instant::now() >= deadline => {
                // It may run elsewhere by now: never let this copy run.
                self.guest = None;
                drop(tracee.into_tids());
                Ok(Next::End(why))
            }
            Err(why) => {
                tracing::info!(%why, "the move is off; the guest runs on");
                self.run_on(tracee)
            }
        }
    }

    fn run_on(&mut self, tracee: Tracee) -> anyhow::Result<Next> {
        let result = tracee.thaw();
        self.thawed();
        result.context("letting the guest run on")?;
        Ok(Next::Go)
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
