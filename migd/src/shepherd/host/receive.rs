//! The target's side of a move: a place, a process in it, and its release at the commit.

use super::super::guest_init::{self, GuestHouse, Setup};
use super::super::link::ImageReader;
use super::super::session::StepKind;
use super::super::supervisor::{self, Supervisor};
use super::objects::{self, Known};
use super::{Guest, Host, Next, STEP_LIMIT, lock};
use crate::homefs::HostView;
use crate::protocol::{Order, TargetAction, TargetEvent};
use anyhow::{Context, bail};
use checkpoint::image::ProcessImage;
use checkpoint::image::objects::ObjectKey;
use checkpoint::image::stream::{Item, StreamReader};
use checkpoint::inventory::mapped_files::named_and_written;
use checkpoint::restore::objects::{Objects, Source};
use checkpoint::restore::{self, FileSource, Rebuild, RebuildOptions, RestoreError};
use checkpoint::sys::fd::pidfd_open;
use checkpoint::sys::time_namespace::{Offsets, clocks_ns};
use checkpoint::tracee::{Tracee, TraceeError};
use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
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
        let here = clocks_ns();
        let own = Offsets::of(std::process::id() as i32).unwrap_or_default();
        let offset = |home: u64, here: u64| (home as i64).saturating_sub(here as i64);
        let setup = Setup {
            hostname: welcome.utsname.0.clone(),
            domainname: welcome.utsname.1.clone(),
            monotonic_offset_ns: offset(welcome.clocks_ns.0, here.0).saturating_add(own.monotonic_ns),
            boottime_offset_ns: offset(welcome.clocks_ns.1, here.1).saturating_add(own.boottime_ns),
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
        while let Some(event) = events.pop_front() {
            for action in self.target.step(event) {
                match action {
                    TargetAction::MakePlace => events.push_back(match self.prepare() {
                        Ok(()) => TargetEvent::PlaceMade,
                        Err(error) => self.build_failed(&error),
                    }),
                    TargetAction::TellPrepared => {
                        self.reply(epoch, StepKind::Prepared);
                        events.push_back(match self.rebuild(epoch) {
                            Ok(built) => {
                                self.built = built;
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
                        self.release()?;
                    }
                    TargetAction::TellRunning => {
                        self.reply(epoch, StepKind::Running);
                        self.tell_daemon("running");
                    }
                    TargetAction::TellFailed => self.fail(epoch, &anyhow::anyhow!(self.why.clone())),
                    TargetAction::Suspend => self.kill(None, libc::SIGSTOP),
                    TargetAction::Discard => {
                        // Not the process, or not any more: it dies with its house.
                        for built in self.built.drain(..) {
                            built.tracee.into_tids();
                        }
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

    fn release(&mut self) -> anyhow::Result<()> {
        lock(&self.wiring.guests).extend(self.built.iter().map(|built| built.inside));
        // All are heard before the first can call.
        for built in &mut self.built {
            let (pid, inside) = (built.tracee.pid(), built.inside);
            let hooks = super::serve::hooks(&self.wiring, inside);
            let listener = built.listener.take().context("there is no filter to listen to")?;
            let supervisor = Supervisor::start(listener, pid, hooks).context("supervising the guest")?;
            let pidfd = pidfd_open(pid).context("pidfd_open")?;
            let (top, stopped) = (built.top, built.stopped);
            self.guests.push(Guest { pid, inside, supervisor, pidfd, top, stopped });
        }
        self.released = true;
        // Children first: who waits for one finds it at work.
        for built in std::mem::take(&mut self.built).into_iter().rev() {
            match built.tracee.release() {
                // Killed just now.
                Ok(()) | Err(TraceeError::Died { .. }) => {}
                Err(error) => return Err(error).context("letting the guest run"),
            }
        }
        Ok(())
    }

    fn rebuild(&mut self, epoch: u64) -> anyhow::Result<Vec<Built>> {
        let link = self.wiring.link.get().context("no link")?.clone();
        let reader = ImageReader::new(link, Arc::clone(&self.wiring.queue), epoch, STEP_LIMIT);
        let mut stream = StreamReader::new(reader).context("receiving the image")?;
        let images = stream.states().context("receiving the states")?;
        for image in &images {
            self.relations.insert(image.pid, (image.pgid, image.sid));
            let zombies = image.zombies.iter().map(|zombie| (zombie.pid, (zombie.pgid, zombie.sid)));
            self.relations.extend(zombies);
        }
        let objects =
            Objects::receive_with(&mut stream, &mut objects::give).context("receiving what they share")?;
        self.objects = Known::of(&objects).context("looking at what they share")?;
        let house = self.house.as_mut().context("no place was made")?;
        let given: Vec<(ObjectKey, BorrowedFd<'_>)> =
            objects.files().map(|(image, file)| (image.key, file.as_fd())).collect();
        let numbers = house.give(&given).context("handing on what they share")?;
        let numbers = objects.files().map(|(_, file)| file.as_raw_fd()).zip(numbers).collect();
        let mut files = InHouse { objects: &objects, numbers };
        let pids = house.spawn(&images).context("starting the guests' processes")?;
        // Dropped on an error, they would be let go; but they die with their house.
        let mut family = Shells(Vec::with_capacity(images.len()));
        for (image, pid) in images.iter().zip(pids) {
            let mut tracee = Tracee::adopt(pid).context("adopting a guest's process")?;
            let avoid: Vec<(u64, u64)> = image.mm.vmas.iter().map(|vma| (vma.start, vma.end)).collect();
            tracee.install_stub(&avoid).context("mapping the stub")?;
            // It would have died with its parent until now.
            let args = [libc::PR_SET_PDEATHSIG as u64, 0, 0, 0, 0, 0];
            tracee.must(0, "PR_SET_PDEATHSIG", libc::SYS_prctl, args).context("readying a guest")?;
            family.0.push(tracee);
        }
        guest_init::join_groups(&images, &mut family.0);
        let mut listeners = Vec::with_capacity(images.len());
        let mut next = Some(0);
        while let Some(who) = next {
            let parent = images[..who].iter().position(|image| image.pid == images[who].ppid);
            let parent = parent.map(|up| family.0[up].pid());
            let (listener, then) = fill(&images[who], &mut family.0[who], parent, &mut files, &mut stream)
                .with_context(|| format!("rebuilding process {}", images[who].pid))?;
            listeners.push(listener);
            next = then;
            if next != (who + 1 < images.len()).then_some(who + 1) {
                bail!("the image lacks the memory of a process");
            }
        }
        objects.seal().context("sealing what they share")?.keep();
        house.let_go().context("letting go of what they share")?;
        let mut vmas = images.iter().flat_map(|image| &image.mm.vmas);
        if vmas.any(|vma| named_and_written(vma).is_some()) {
            house.write_back().context("seeing to mapped files")?;
        }
        let tracees = std::mem::take(&mut family.0);
        let built = tracees.into_iter().zip(listeners).zip(&images);
        Ok(built
            .map(|((tracee, listener), image)| Built {
                tracee,
                listener: Some(listener),
                inside: image.pid,
                top: image.ppid == 0,
                stopped: image.signals.stopped_by.is_some(),
            })
            .collect())
    }
}

/// A process that is built, and has not run yet.
pub(super) struct Built {
    tracee: Tracee,
    listener: Option<OwnedFd>,
    inside: i32,
    top: bool,
    stopped: bool,
}

/// Processes that must not run: dropped, they stay as they stand, and end with their house.
struct Shells(Vec<Tracee>);

impl Drop for Shells {
    fn drop(&mut self) {
        for tracee in self.0.drain(..) {
            tracee.into_tids();
        }
    }
}

/// Fills one process with what comes; gives its filter's listener, and the place of the next one.
fn fill(
    image: &ProcessImage,
    tracee: &mut Tracee,
    parent: Option<i32>,
    files: &mut InHouse<'_>,
    stream: &mut StreamReader<ImageReader>,
) -> anyhow::Result<(OwnedFd, Option<usize>)> {
    let mut rebuild =
        Rebuild::begin(tracee, image, files, RebuildOptions::guest()).context("mapping its memory")?;
    if let Some(parent) = parent {
        rebuild.set_parent(parent);
    }
    let next = loop {
        match stream.next().context("receiving memory")? {
            Item::Data { addr, bytes } => rebuild.data(addr, bytes).context("placing memory")?,
            Item::Zero { addr, len } => rebuild.zero(addr, len).context("placing memory")?,
            Item::Same { addr, len } => rebuild.same(addr, len).context("placing memory")?,
            Item::Process(next) => break Some(next),
            Item::End => break None,
            Item::State(_) | Item::Object(_) => bail!("a state among the memory"),
        }
    };
    // Before the filter, which all are to have.
    rebuild.make_threads().context("making its threads")?;
    let listener = supervisor::install(rebuild.tracee(), image.pid).context("installing the filter")?;
    rebuild.finish().context("rebuilding its state")?;
    Ok((listener, next))
}

/// What guests map: files are opened inside the guest, whose root is home's file system; objects are the house's.
struct InHouse<'a> {
    objects: &'a Objects,
    /// By our descriptors those of the house's PID 1.
    numbers: HashMap<i32, i32>,
}

impl FileSource for InHouse<'_> {
    fn object(&mut self, key: ObjectKey) -> Result<Source, RestoreError> {
        self.objects.source(key)
    }

    fn take_in(&mut self, tracee: &mut Tracee, ours: i32) -> Result<i32, RestoreError> {
        let lost = || RestoreError::Unfit("an object that the house does not have".into());
        let path = format!("/proc/1/fd/{}", self.numbers.get(&ours).ok_or_else(lost)?);
        restore::open_inside(tracee, path.as_bytes(), true)
    }
}
