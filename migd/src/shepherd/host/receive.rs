//! The target's side of a move: a place, a process in it, and its release at the commit.

use super::super::guest_init::{GuestHouse, Setup};
use super::super::link::ImageReader;
use super::super::session::StepKind;
use super::super::supervisor::{self, Supervisor};
use super::{Guest, Host, Next, STEP_LIMIT};
use crate::homefs::HostView;
use crate::protocol::{Order, TargetAction, TargetEvent};
use crate::shepherd::preflight;
use anyhow::{Context, bail};
use checkpoint::image::MappedFile;
use checkpoint::image::stream::{Item, StreamReader};
use checkpoint::restore::{self, FileSource, Rebuild, RebuildOptions, RestoreError};
use checkpoint::tracee::Tracee;
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

impl Host {
    /// Makes the place: the home view mounted as root, in namespaces of its own.
    pub(super) fn prepare(&mut self) -> anyhow::Result<()> {
        let welcome = self.welcome.clone().context("home has not said who comes")?;
        if welcome.version != super::super::session::VERSION {
            bail!("home speaks version {} of the session protocol", welcome.version);
        }
        let device = HostView::open_device().context("opening /dev/fuse")?;
        let wire = Arc::clone(&self.wiring);
        let hooks = Arc::clone(&self.wiring);
        let view = HostView::start(device.try_clone()?, wire, hooks).context("serving /dev/fuse")?;
        let _ = self.wiring.view.set(view);
        let here = preflight::clocks_ns();
        let offset = |home: u64, here: u64| home as i64 - here as i64;
        let setup = Setup {
            hostname: welcome.utsname.0.clone(),
            domainname: welcome.utsname.1.clone(),
            monotonic_offset_ns: offset(welcome.clocks_ns.0, here.0),
            boottime_offset_ns: offset(welcome.clocks_ns.1, here.1),
            token: welcome.token,
            terminal: welcome.terminal.clone(),
            tid_base: welcome.tid_base,
            pid_max: welcome.pid_max,
        };
        let exe = std::env::current_exe().context("finding our own program")?;
        self.house = Some(GuestHouse::start(&exe, device, &setup).context("making the guest's place")?);
        Ok(())
    }

    /// Runs the target's machine of [`crate::protocol`] from this event on.
    pub(super) fn as_target(&mut self, epoch: u64, event: TargetEvent) -> anyhow::Result<Next> {
        let mut events = VecDeque::from([event]);
        let mut listener = None;
        while let Some(event) = events.pop_front() {
            for action in self.target.step(event) {
                match action {
                    TargetAction::MakePlace => events.push_back(match self.prepare() {
                        Ok(()) => TargetEvent::PlaceMade,
                        Err(error) => self.build_failed(&error),
                    }),
                    TargetAction::TellPrepared => {
                        self.reply(epoch, StepKind::Prepared);
                        events.push_back(match self.rebuild() {
                            Ok((tracee, filter)) => {
                                self.standing = Some(tracee);
                                listener = Some(filter);
                                TargetEvent::Built
                            }
                            Err(error) => self.build_failed(&error),
                        });
                    }
                    TargetAction::TellReady => {
                        self.reply(epoch, StepKind::Ready);
                        events.push_back(TargetEvent::Order(self.await_verdict(epoch)));
                    }
                    TargetAction::Release => {
                        let tracee = self.standing.take().context("there is no guest to release")?;
                        let listener = listener.take().context("there is no filter to listen to")?;
                        self.release(tracee, listener)?;
                    }
                    TargetAction::TellRunning => {
                        self.reply(epoch, StepKind::Running);
                        self.tell_daemon("running", self.guest.as_ref().map(|guest| guest.pid));
                    }
                    TargetAction::TellFailed => self.fail(epoch, &anyhow::anyhow!(self.why.clone())),
                    TargetAction::Suspend => self.kill(libc::SIGSTOP),
                    TargetAction::Discard => {
                        // Not the process, or not any more: it dies with its house.
                        self.standing.take().map(Tracee::into_tids);
                        return Ok(Next::End(self.why.clone()));
                    }
                    TargetAction::Ignore(event) => tracing::debug!(?event, "nothing follows from this"),
                }
            }
        }
        Ok(Next::Go)
    }

    fn build_failed(&mut self, error: &anyhow::Error) -> TargetEvent {
        self.why = format!("{error:#}");
        TargetEvent::BuildFailed
    }

    /// Commit or abort: silence and a lost link are an abort too, before the commit.
    fn await_verdict(&mut self, epoch: u64) -> Order {
        let deadline = Instant::now() + STEP_LIMIT;
        let verdict = self.await_step(epoch, deadline, |step| matches!(step, StepKind::Commit).then_some(()));
        match verdict {
            Ok(()) => Order::Commit,
            Err(why) => {
                self.why = format!("the move was given up: {why}");
                Order::Abort
            }
        }
    }

    fn release(&mut self, tracee: Tracee, listener: OwnedFd) -> anyhow::Result<()> {
        let pid = tracee.pid();
        let hooks = self.supervisor_hooks();
        let supervisor = Supervisor::start(listener, pid, hooks).context("supervising the guest")?;
        tracee.release().context("letting the guest run")?;
        self.guest = Some(Guest { pid, supervisor });
        Ok(())
    }

    fn rebuild(&mut self) -> anyhow::Result<(Tracee, OwnedFd)> {
        let link = self.wiring.link.get().context("no link")?.clone();
        let reader = ImageReader::new(link, Arc::clone(&self.wiring.queue), STEP_LIMIT);
        let mut stream = StreamReader::new(reader).context("receiving the image")?;
        let image = match stream.next().context("receiving the state")? {
            Item::State(image) => *image,
            _ => bail!("the image does not begin with a state"),
        };
        let house = self.house.as_mut().context("no place was made")?;
        let pid = house.spawn(&image).context("starting the guest's process")?;
        let mut tracee = Tracee::adopt(pid).context("adopting the guest's process")?;
        let avoid: Vec<(u64, u64)> = image.mm.vmas.iter().map(|vma| (vma.start, vma.end)).collect();
        tracee.install_stub(&avoid).context("mapping the stub")?;
        restore::add_threads(&mut tracee, &image).context("making the guest's threads")?;
        let mut files = ByPath;
        let mut rebuild = Rebuild::begin(&mut tracee, &image, &mut files, RebuildOptions::guest())
            .context("mapping the guest's memory")?;
        loop {
            match stream.next().context("receiving memory")? {
                Item::Data { addr, bytes } => rebuild.data(addr, bytes).context("placing memory")?,
                Item::Zero { addr, len } => rebuild.zero(addr, len).context("placing memory")?,
                Item::End => break,
                Item::State(_) | Item::Process(_) => bail!("the image has several processes"),
            }
        }
        let listener = supervisor::install(rebuild.tracee(), image.pid).context("installing the filter")?;
        rebuild.finish().context("rebuilding the guest's state")?;
        Ok((tracee, listener))
    }
}

/// Opened inside the guest, whose root is home's file system.
struct ByPath;

impl FileSource for ByPath {
    fn open_mapped(
        &mut self,
        tracee: &mut Tracee,
        file: &MappedFile,
        writable: bool,
    ) -> Result<i32, RestoreError> {
        restore::open_inside(tracee, &file.path, writable)
    }
}
