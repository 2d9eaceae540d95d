//! An image restored on its own, under its own PIDs, its root as a child of this process.
//!
//! The root starts as an empty process with its PID and its descriptors; what follows is in
//! [`super::family`].
//! Nothing of it runs before [`Restored::release`], and whatever fails before that leaves no process
//! behind.

use super::clocks::{self, Clocks};
use super::family::{self, Family, Surroundings};
use super::files::open_all_inside;
use super::objects::{Objects, Source};
use super::one_cpu::OneCpu;
use super::shell::{self, is_zombie, taken};
use super::traces::Traces;
use super::{FileSource, RebuildOptions, RestoreError, huge, table, taking};
use crate::image::objects::ObjectKey;
use crate::image::stream::StreamReader;
use crate::image::{FileKind, MappedFile, ProcessImage};
use crate::inventory::{self, relations, shares};
use crate::proc::status::Status;
use crate::sys::wait;
use crate::tracee::Tracee;
use nix::errno::Errno;
use nix::sys::prctl::{set_child_subreaper, set_pdeathsig};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, setpgid, setsid};
use std::collections::BTreeSet;
use std::fs;
use std::io::{IsTerminal, Read};
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

/// How it is restored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Standalone {
    /// It outlives this process: a session of its own, no signal at the parent's death.
    pub detach: bool,
    /// The standard input is not to be given to it (an image comes through it).
    pub no_input: bool,
    /// Mapped files need not be the very files that were mapped.
    pub other_files: bool,
    /// The CPU need not have all that the image's had.
    pub other_cpu: bool,
}

/// How long the end of what was killed is waited for.
const END_LIMIT: Duration = Duration::from_secs(5);

/// Rebuilt processes that have not run yet. Dropped, they are ended.
pub struct Restored {
    /// Parents first.
    tracees: Vec<Tracee>,
    /// For each its PID, and whether it is to stand stopped.
    stops: Vec<(i32, bool)>,
    clocks: Clocks,
    /// What is to stay with them.
    traces: [Traces; 2],
}

/// Rebuilds the processes whose states have been read from `stream` (parents before their children),
/// with the memory that follows.
pub fn rebuild<R: Read>(
    images: &[ProcessImage],
    stream: &mut StreamReader<R>,
    how: Standalone,
) -> Result<Restored, RestoreError> {
    check_family(images)?;
    table::raise_limit();
    huge::check_room(images)?;
    let objects = Objects::receive(stream)?;
    objects.check(images)?;
    // Whoever loses its parent on the way comes to us, and is waited for (prctl(2)).
    set_child_subreaper(true).map_err(|errno| RestoreError::file("PR_SET_CHILD_SUBREAPER", errno))?;
    rebuild_all(images, stream, how, objects).inspect_err(|_| reap_orphans(Instant::now() + END_LIMIT))
}

fn rebuild_all<R: Read>(
    images: &[ProcessImage],
    stream: &mut StreamReader<R>,
    how: Standalone,
    objects: Objects,
) -> Result<Restored, RestoreError> {
    let bases: Result<Vec<i32>, RestoreError> =
        images.iter().map(|image| table::above(&image.files)).collect();
    let base = bases?.into_iter().max().unwrap_or(3);
    let shared = table::make_shared(images, base, &objects)?;
    let ids = images.iter().flat_map(ids_of).collect();
    let mut here = Here { shared, base, how, ids, objects: Some(objects), segments: Traces::default() };
    let cpu = OneCpu::take(images.len());
    let (clocks, for_children) = clocks::continue_from(&images[0])?;
    let root = shell::spawn(images[0].pid, base, |keep| here.set_up_root(images, keep))?;
    drop(for_children);
    let root = Tracee::adopt(root).inspect_err(|_| {
        let _ = wait::kill(root, libc::SIGKILL);
    })?;
    let pid = root.pid();
    // The root's parent is another one now, and gone if it outlives us.
    let go_on = clocks == Clocks::GoOn;
    let affinity = !cpu.is_taken();
    let of_others =
        RebuildOptions { cpu: !how.other_cpu, clocks: go_on, affinity, ..RebuildOptions::standalone() };
    let of_root = RebuildOptions { pdeathsig: !how.detach, ..of_others };
    let mut family = Family::of(images, root, [of_root, of_others]).inspect_err(|_| {
        let _ = wait::kill(pid, libc::SIGKILL);
    })?;
    family.forget_parent_death()?;
    family.fill(stream, &mut here)?;
    family.finish(&mut here)?;
    let tracees = family.into_tracees();
    cpu.release(images, &tracees);
    Ok(Restored {
        tracees,
        stops: images.iter().map(|image| (image.pid, image.signals.stopped_by.is_some())).collect(),
        clocks,
        traces: [here.segments, here.shared.names],
    })
}

/// What this program gives to the processes.
struct Here {
    shared: table::SharedFiles,
    /// A descriptor number above those of all tables.
    base: i32,
    how: Standalone,
    /// All numbers that are needed.
    ids: BTreeSet<i32>,
    /// Until they are sealed.
    objects: Option<Objects>,
    /// The System V segments among them that stay.
    segments: Traces,
}

impl Here {
    /// Runs in the new process.
    fn set_up_root(&self, images: &[ProcessImage], keep: i32) -> Result<(), RestoreError> {
        let failed = |what: &'static str| move |errno| RestoreError::file(what, errno);
        set_pdeathsig(Signal::SIGKILL).map_err(failed("PR_SET_PDEATHSIG"))?;
        join_group(&images[0], self.how)?;
        if images[0].sid == images[0].pid {
            self.shared.terminals.control(images[0].sid)?;
        }
        table::build(&images[0].files, &self.shared.given[0], self.how.no_input, keep)
    }
}

impl Surroundings for Here {
    fn give_files(
        &mut self,
        who: usize,
        images: &[ProcessImage],
        child: &mut Tracee,
    ) -> Result<(), RestoreError> {
        let files = &images[who].files;
        let parent = images.iter().find(|parent| parent.pid == images[who].ppid);
        let kept = parent.map(|parent| taking::inherited(files, &parent.files)).unwrap_or_default();
        let complete = files.fds.iter().all(|fd| kept.contains(&fd.fd));
        let build = |keep| table::build(files, &self.shared.given[who], self.how.no_input, keep);
        let helper = match complete {
            true => None,
            false => Some(shell::Helper::start(&self.ids, self.base, build)?),
        };
        taking::take(child, files, &kept, helper.as_ref(), self.base)
    }

    fn session_made(&mut self, session: i32, leader: &mut Tracee) -> Result<(), RestoreError> {
        self.shared.terminals.control_inside(session, leader)
    }

    fn all_are_filled(&mut self) -> Result<(), RestoreError> {
        if let Some(objects) = self.objects.take() {
            self.segments = objects.seal()?;
        }
        Ok(())
    }
}

/// Opens mapped files by their paths; a file that took another's place would be wrong code or data.
impl FileSource for Here {
    fn object(&mut self, key: ObjectKey) -> Result<Source, RestoreError> {
        let sealed = || RestoreError::Unfit("memory of an object that is sealed already".into());
        self.objects.as_ref().ok_or_else(sealed)?.source(key)
    }

    fn open_mapped(
        &mut self,
        tracee: &mut Tracee,
        file: &MappedFile,
        writable: bool,
    ) -> Result<i32, RestoreError> {
        let opened = self.open_all_mapped(tracee, &[(file, writable)])?;
        Ok(opened[0])
    }

    fn open_all_mapped(
        &mut self,
        tracee: &mut Tracee,
        files: &[(&MappedFile, bool)],
    ) -> Result<Vec<i32>, RestoreError> {
        let name = |file: &MappedFile| String::from_utf8_lossy(&file.path).into_owned();
        if let Some((file, _)) = files.iter().find(|(file, _)| file.deleted && !self.how.other_files) {
            let why = format!("the mapped file {} had been deleted or replaced", name(file));
            return Err(RestoreError::Unfit(why));
        }
        let wanted: Vec<(&[u8], bool)> =
            files.iter().map(|(file, writable)| (file.path.as_slice(), *writable)).collect();
        let fds = open_all_inside(tracee, &wanted)?;
        for (&fd, (file, _)) in fds.iter().zip(files) {
            let found = fs::metadata(format!("/proc/{}/fd/{fd}", tracee.pid())).map_err(|source| {
                RestoreError::File { what: format!("looking at {}", name(file)), source }
            })?;
            // On overlays and subvolumes `maps` and `stat` name different devices.
            let same_device =
                found.dev() == file.dev || libc::major(file.dev) == 0 || libc::major(found.dev()) == 0;
            if !(self.how.other_files || found.ino() == file.ino && same_device) {
                return Err(RestoreError::Unfit(format!("the mapped file {} has been replaced", name(file))));
            }
        }
        Ok(fds)
    }
}

impl Restored {
    /// The root's PID.
    pub fn pid(&self) -> i32 {
        self.stops[0].0
    }

    /// Whether its clocks go on.
    pub fn clocks(&self) -> Clocks {
        self.clocks
    }

    /// Lets them run (or stand stopped, if they were). The root is a child of this process.
    pub fn release(mut self) -> Result<i32, RestoreError> {
        // If this program is killed before here, none of them is left; after, all run. What is between, where
        // half a tree would be left, takes a microsecond a thread.
        self.tracees.iter_mut().try_for_each(Tracee::settle)?;
        self.tracees.iter_mut().try_for_each(Tracee::outlive)?;
        self.traces.iter().for_each(Traces::keep);
        // Children first: who waits for one finds it at work.
        while let Some(tracee) = self.tracees.pop() {
            let (pid, stops) = self.stops[self.tracees.len()];
            tracee.release()?;
            if stops {
                await_stop(pid);
            }
        }
        let _ = set_child_subreaper(false);
        Ok(self.pid())
    }
}

impl Drop for Restored {
    fn drop(&mut self) {
        if self.tracees.is_empty() {
            return;
        }
        // Half of a program must not run; those that have been let go already become our children.
        family::end(std::mem::take(&mut self.tracees));
        reap_orphans(Instant::now() + END_LIMIT);
    }
}

/// Its parent, which is let go after it, must find it stopped already.
fn await_stop(pid: i32) {
    let deadline = Instant::now() + END_LIMIT;
    let pid = crate::proc::face(pid);
    while Status::read(pid).is_ok_and(|status| status.state() != 'T') && Instant::now() < deadline {
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Ends and takes what the killed have left to us: this program has no other children.
fn reap_orphans(deadline: Instant) {
    while Instant::now() < deadline {
        for child in inventory::tree::children(std::process::id() as i32) {
            let _ = wait::kill(child, libc::SIGKILL);
        }
        match wait::any_child(libc::__WALL) {
            Ok(Some(_)) => {}
            Ok(None) => std::thread::sleep(Duration::from_micros(200)),
            Err(_) => break,
        }
    }
    let _ = set_child_subreaper(false);
}

/// What holds of several processes together.
fn check_family(images: &[ProcessImage]) -> Result<(), RestoreError> {
    let unfit = |what: &str| Err(RestoreError::Unfit(format!("the image is not consistent: {what}")));
    let Some(root) = images.first() else { return unfit("there is no process in it") };
    if root.ppid != 0 {
        return unfit("its first process has a parent in it");
    }
    let mut ids = BTreeSet::new();
    for (index, image) in images.iter().enumerate() {
        super::check(image)?;
        check_standalone(image)?;
        if index > 0 && !images[..index].iter().any(|other| other.pid == image.ppid) {
            return unfit("a process comes before its parent");
        }
        for id in ids_of(image) {
            if id <= 0 || !ids.insert(id) {
                return unfit("two processes or threads have one number");
            }
        }
        // A zombie is its last owner, perhaps, and soon gone: that is waited for.
        let pids = image.zombies.iter().map(|zombie| zombie.pid).chain([image.pid]);
        if let Some(id) = pids.into_iter().find(|&id| !is_zombie(id)) {
            return Err(taken(id));
        }
    }
    check_shares(images)?;
    let mut blockers = Vec::new();
    shares::in_image(images, &mut blockers);
    relations::blockers(&relations::of_images(images), &inventory::tree::in_use, &mut blockers);
    match blockers.first() {
        Some(blocker) => Err(RestoreError::Unfit(blocker.what.clone())),
        None => Ok(()),
    }
}

/// Whoever shares something names the first process that has it, and tells the same of it.
fn check_shares(images: &[ProcessImage]) -> Result<(), RestoreError> {
    for (at, image) in images.iter().enumerate() {
        for (kind, &(with, ..)) in image.shares.each().iter().enumerate().filter(|(_, one)| one.0 != 0) {
            let first = images[..at].iter().find(|other| other.pid == with);
            let is_first = |other: &&ProcessImage| other.shares.each()[kind].0 == 0;
            let is_same = |other: &&ProcessImage| {
                (image.shares.files != with || image.files.fds == other.files.fds)
                    && (image.shares.fs != with || image.fs == other.fs)
                    && (image.shares.memory != with || image.mm.vmas.len() == other.mm.vmas.len())
            };
            if !first.filter(is_first).is_some_and(|other| is_same(&other)) {
                let what = "the image is not consistent: what a process shares with another";
                return Err(RestoreError::Unfit(what.into()));
            }
        }
    }
    Ok(())
}

/// The numbers that a process has, its own first.
fn ids_of(image: &ProcessImage) -> impl Iterator<Item = i32> {
    let zombies = image.zombies.iter().map(|zombie| zombie.pid);
    let threads = image.threads.iter().skip(1).map(|thread| thread.tid);
    std::iter::once(image.pid).chain(zombies).chain(threads)
}

/// What an image that stands alone cannot have.
fn check_standalone(image: &ProcessImage) -> Result<(), RestoreError> {
    let unfit = |what: String| Err(RestoreError::Unfit(what));
    if image.pid <= 0 || image.threads.iter().any(|thread| thread.tid <= 0) {
        return unfit("the image is not consistent: a PID is not positive".into());
    }
    if image.fs.cwd_deleted {
        return unfit("its working directory has been removed".into());
    }
    // Signal 0 finds a thread too, and is a tenth of a look into `/proc`.
    let is_free = |tid| kill(Pid::from_raw(tid), None) == Err(Errno::ESRCH);
    if let Some(thread) = image.threads.iter().skip(1).find(|thread| !is_free(thread.tid)) {
        return Err(taken(thread.tid));
    }
    Ok(())
}

/// Session and process group, as far as the terminal and whoever waits for us allow.
fn join_group(image: &ProcessImage, how: Standalone) -> Result<(), RestoreError> {
    let own_session = image.sid == image.pid && !has_terminal(image);
    let result = if how.detach || own_session {
        setsid().map(drop)
    } else if image.pgid == image.pid && !std::io::stdin().is_terminal() {
        setpgid(Pid::from_raw(0), Pid::from_raw(0))
    } else {
        // In our group: the keys of the terminal reach it and us.
        Ok(())
    };
    result.map_err(|errno| RestoreError::file("joining a process group", errno))
}

fn has_terminal(image: &ProcessImage) -> bool {
    image.files.files.iter().any(|file| file.kind == FileKind::Tty)
}
