//! The first move: from home to a host node. Source and arbiter are the same process here.

use super::super::control::TargetNode;
use super::super::link::ImageWriter;
use super::super::session::{self, SendFigures, StepKind, Welcome};
use super::peer::Host;
use super::record::{self, Record};
use super::{Away, Event, Freeze, Home, MoveError, Place, STALL_LIMIT, STEP_LIMIT};
use crate::homefs::HomeView;
use crate::shepherd::control::MoveFigures;
use crate::shepherd::preflight;
use checkpoint::deputy::Deputy;
use checkpoint::image::ProcessImage;
use checkpoint::image::stream::{Options, StreamWriter};
use checkpoint::tracee::{Tracee, TraceeError};
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
        let (host, image) = match self.prepare_out(node, epoch, deadline) {
            Ok(host) => host,
            Err(error) => {
                self.view = None;
                return (Place::Home, Err(error));
            }
        };
        let mut host = Some(host);
        match self.transfer_out(id, &mut host, image, epoch, dry_run, deadline) {
            Ok((place, figures)) => (place, Ok(figures)),
            Err(error) => {
                if let Some(host) = host {
                    host.abort(epoch, &error.to_string());
                    host.link.close();
                }
                self.view = None;
                let place = if matches!(error, MoveError::Ended) { Place::Gone } else { Place::Home };
                (place, Err(error))
            }
        }
    }

    /// Everything that can be done while the process runs: blockers, the link, its place at the target.
    fn prepare_out(
        &mut self,
        node: &TargetNode,
        epoch: u64,
        deadline: Instant,
    ) -> Result<(Host, Option<(Vec<u8>, u64)>), MoveError> {
        let pid = self.args.pid;
        let blockers = preflight::blockers(pid).map_err(MoveError::failed)?;
        if !blockers.is_empty() {
            return Err(MoveError::Blocked(blockers));
        }
        let view = self.make_view()?;
        let terminal = self.terminal(&view);
        self.connections += 1;
        let host = Host::connect(node, self.connections, &self.key, &view, self.sender.clone())?;
        host.welcome(self.welcome(terminal.clone())?)?;
        host.step(epoch, StepKind::Prepare)?;
        let limit = deadline.min(Instant::now() + STEP_LIMIT);
        let prepared = self
            .await_step(host.number, epoch, limit, |step| matches!(step, StepKind::Prepared).then_some(()));
        if let Err(error) = prepared {
            host.abort(epoch, &error.to_string());
            host.link.close();
            return Err(error);
        }
        Ok((host, terminal))
    }

    fn make_view(&mut self) -> Result<std::sync::Arc<HomeView>, MoveError> {
        let pid = self.args.pid;
        let root = fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC)
            .open(format!("/proc/{pid}/root"))
            .map_err(|_| MoveError::Ended)?;
        let groups = preflight::supplementary_groups(pid).map_err(MoveError::failed)?;
        let token: [u8; 16] = rand::random();
        let view = HomeView::new(OwnedFd::from(root), groups, token).map_err(MoveError::failed)?;
        view.set_deputy(pid).map_err(MoveError::failed)?;
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
            clocks_ns: preflight::clocks_ns(),
            token: self.token,
            terminal,
            tid_base: preflight::tid_base(pid, pid_max),
            pid_max,
        })
    }

    fn transfer_out(
        &mut self,
        id: u64,
        slot: &mut Option<Host>,
        _terminal: Option<(Vec<u8>, u64)>,
        epoch: u64,
        dry_run: bool,
        deadline: Instant,
    ) -> Result<(Place, MoveFigures), MoveError> {
        let host = slot.as_ref().ok_or_else(|| MoveError::Failed("there is no host".into()))?;
        self.progress(id, "freezing", 0, 0);
        let freeze = Freeze(Instant::now());
        let mut tracee = Tracee::freeze(self.args.pid).map_err(from_tracee)?;
        let result = self.send_out(id, host, &mut tracee, epoch, deadline);
        let (image, sent) = match result {
            Ok(done) => done,
            Err(error) => {
                // Dropping gives every thread back what it had; thawing says so when it cannot.
                tracee.thaw().map_err(from_tracee)?;
                return Err(error);
            }
        };
        if dry_run {
            tracee.thaw().map_err(from_tracee)?;
            let figures = freeze.figures(sent);
            host.abort(epoch, "a dry run");
            host.link.close();
            *slot = None;
            self.view = None;
            return Ok((Place::Home, figures));
        }
        self.progress(id, "committing", sent.bytes, sent.wire_bytes);
        let committed = Record { pid: self.args.pid, epoch, node: host.name.clone() };
        if let Err(error) = record::commit(&committed) {
            tracee.thaw().map_err(from_tracee)?;
            return Err(MoveError::Failed(format!("the commit could not be recorded: {error}")));
        }
        let running = host.step(epoch, StepKind::Commit).and_then(|()| {
            let limit = Instant::now() + STEP_LIMIT;
            self.await_step(host.number, epoch, limit, |step| matches!(step, StepKind::Running).then_some(()))
        });
        if let Err(error) = running {
            // It may run there, or not. What it does reaches the world only through us, and we have
            // stopped listening: when its host has lost us it stops it and throws it away.
            host.link.close();
            std::thread::sleep(super::super::host::LEASE_LIMIT);
            record::remove(self.args.pid);
            tracee.thaw().map_err(from_tracee)?;
            return Err(error);
        }
        let figures = freeze.figures(sent);
        let deputy = Deputy::park(tracee, &image).map_err(from_tracee)?;
        let host = slot.take().ok_or_else(|| MoveError::Failed("there is no host".into()))?;
        Ok((Place::Away(Box::new(Away { host, deputy, image, stopping: None })), figures))
    }

    fn send_out(
        &mut self,
        id: u64,
        host: &Host,
        tracee: &mut Tracee,
        epoch: u64,
        deadline: Instant,
    ) -> Result<(ProcessImage, SendFigures), MoveError> {
        let mut image = checkpoint::dump::read_state(tracee).map_err(MoveError::failed)?;
        let blockers = preflight::blockers_of_image(&image);
        if !blockers.is_empty() {
            return Err(MoveError::Blocked(blockers));
        }
        self.carry_out(&mut image)?;
        self.progress(id, "copying", 0, 0);
        let sent = send_image(host.link.clone(), host.credits.clone(), tracee, &image, deadline)
            .map_err(MoveError::failed)?;
        let limit = deadline.min(Instant::now() + STEP_LIMIT);
        self.await_step(host.number, epoch, limit, |step| matches!(step, StepKind::Ready).then_some(()))?;
        Ok((image, sent))
    }
}

/// Sends state and pages of a frozen process.
pub(in crate::shepherd) fn send_image(
    link: super::super::link::Link,
    credits: std::sync::Arc<super::super::link::Credits>,
    tracee: &Tracee,
    image: &ProcessImage,
    deadline: Instant,
) -> anyhow::Result<SendFigures> {
    let writer = ImageWriter::new(link, credits, STALL_LIMIT);
    let mut stream = StreamWriter::new(writer, Options::default())?;
    stream.state(image)?;
    checkpoint::dump::for_each_run(tracee, &image.mm, |run| -> anyhow::Result<()> {
        if Instant::now() >= deadline {
            anyhow::bail!("the time given for the move is over");
        }
        match run {
            checkpoint::dump::Run::Data { addr, bytes } => stream.data(addr, bytes)?,
            checkpoint::dump::Run::Zero { addr, len } => stream.zero(addr, len)?,
        }
        Ok(())
    })?;
    let (_, stats) = stream.finish()?;
    Ok(SendFigures { bytes: stats.raw_bytes, wire_bytes: stats.wire_bytes, pages: stats.pages })
}

pub(super) fn from_tracee(error: TraceeError) -> MoveError {
    match error {
        TraceeError::Died { .. } => MoveError::Ended,
        other => MoveError::failed(other),
    }
}
