//! An image restored on its own, under its own PIDs, its root as a child of this process.
//!
//! The order: shells with the PIDs and the descriptors, each made by its parent, adopted; then one
//! after the other its threads under their TIDs, its memory from the stream, the rest of its state.
//! Nothing of it runs before [`Restored::release`], and whatever fails before that leaves no process
//! behind.

use super::family::{self, Family};
use super::shell::{is_zombie, taken};
use super::{FileSource, Rebuild, RebuildOptions, RestoreError, add_threads, open_inside, table};
use crate::image::stream::{Item, StreamReader};
use crate::image::{FileKind, MappedFile, ProcessImage};
use crate::inventory::relations;
use crate::proc::status::Status;
use crate::sys::ptrace::{self, Stop};
use crate::sys::wait;
use crate::tracee::Tracee;
use nix::sys::prctl::set_child_subreaper;
use nix::unistd::{Pid, setpgid, setsid};
use std::collections::BTreeSet;
use std::fs;
use std::io::{IsTerminal, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
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
}

/// How long the end of what was killed is waited for.
const END_LIMIT: Duration = Duration::from_secs(5);

/// Rebuilt processes that have not run yet. Dropped, they are ended.
pub struct Restored {
    /// PIDs, parents first, and who is the parent: of the root this process.
    pids: Vec<(i32, i32)>,
    tracees: Vec<Tracee>,
    /// For each its PID, and whether it is to stand stopped.
    stops: Vec<(i32, bool)>,
}

/// Rebuilds the processes whose states have been read from `stream` (parents before their children),
/// with the memory that follows.
pub fn rebuild<R: Read>(
    images: &[ProcessImage],
    stream: &mut StreamReader<R>,
    how: Standalone,
) -> Result<Restored, RestoreError> {
    check_family(images)?;
    let mut restored = make_family(images, how)?;
    for &(pid, _) in &restored.pids {
        restored.tracees.push(Tracee::adopt(pid)?);
    }
    for (image, tracee) in images.iter().zip(&mut restored.tracees) {
        check_xstate(image, tracee)?;
        let avoid: Vec<(u64, u64)> = image.mm.vmas.iter().map(|vma| (vma.start, vma.end)).collect();
        tracee.install_stub(&avoid)?;
        // It would have died with its parent until now.
        let args = [libc::PR_SET_PDEATHSIG as u64, 0, 0, 0, 0, 0];
        tracee.must(0, "PR_SET_PDEATHSIG", libc::SYS_prctl, args)?;
    }
    family::join_groups(images, &mut restored.tracees)?;
    let mut next = Some(0);
    while let Some(who) = next {
        // The root's parent is another one now, and gone if it outlives us.
        let pdeathsig = who > 0 || !how.detach;
        let options = RebuildOptions { pdeathsig, ..RebuildOptions::standalone() };
        next = fill(&images[who], &mut restored.tracees[who], stream, how, options)?;
        let expected = (who + 1 < images.len()).then_some(who + 1);
        if next != expected {
            return Err(RestoreError::Unfit("the image lacks the memory of a process".into()));
        }
    }
    Ok(restored)
}

/// The empty processes.
fn make_family(images: &[ProcessImage], how: Standalone) -> Result<Restored, RestoreError> {
    table::raise_limit();
    // Whoever loses its parent on the way comes to us, and is waited for (prctl(2)).
    set_child_subreaper(true).map_err(|errno| RestoreError::file("PR_SET_CHILD_SUBREAPER", errno))?;
    let bases: Result<Vec<i32>, RestoreError> =
        images.iter().map(|image| table::above(&image.files)).collect();
    let base = bases?.into_iter().max().unwrap_or(3);
    let shared = table::make_shared(images, base)?;
    let join = || join_group(&images[0], how);
    let root = Family { images, shared: &shared, base, how, join: &join }
        .spawn(0)
        .inspect_err(|_| reap_orphans(Instant::now() + END_LIMIT))?;
    let us = std::process::id() as i32;
    let parent = |image: &ProcessImage| if image.pid == root { us } else { image.ppid };
    Ok(Restored {
        pids: images.iter().map(|image| (image.pid, parent(image))).collect(),
        tracees: Vec::new(),
        stops: images.iter().map(|image| (image.pid, image.signals.stopped_by.is_some())).collect(),
    })
}

/// Rebuilds one process from what comes; gives the place of the next one's.
fn fill<R: Read>(
    image: &ProcessImage,
    tracee: &mut Tracee,
    stream: &mut StreamReader<R>,
    how: Standalone,
    options: RebuildOptions,
) -> Result<Option<usize>, RestoreError> {
    add_threads(tracee, image)?;
    let mut files = ByPath { any: how.other_files };
    let mut rebuild = Rebuild::begin(tracee, image, &mut files, options)?;
    let next = loop {
        match stream.next()? {
            Item::Data { addr, bytes } => rebuild.data(addr, bytes)?,
            Item::Zero { addr, len } => rebuild.zero(addr, len)?,
            Item::Process(next) => break Some(next),
            Item::End => break None,
            Item::State(_) => return Err(RestoreError::Unfit("a state among the memory".into())),
        }
    };
    rebuild.finish()?;
    Ok(next)
}

impl Restored {
    /// The root's PID.
    pub fn pid(&self) -> i32 {
        self.pids[0].0
    }

    /// Lets them run (or stand stopped, if they were). The root is a child of this process.
    pub fn release(mut self) -> Result<i32, RestoreError> {
        // Children first: who waits for one finds it at work.
        while let Some(tracee) = self.tracees.pop() {
            let (pid, stops) = self.stops[self.tracees.len()];
            tracee.release()?;
            if stops {
                await_stop(pid);
            }
        }
        let pid = self.pid();
        self.pids.clear();
        let _ = set_child_subreaper(false);
        Ok(pid)
    }
}

impl Drop for Restored {
    fn drop(&mut self) {
        if self.pids.is_empty() {
            return;
        }
        // Killed before they are let go: half of a program must not run. Children first, as long as
        // their parents tell that they are ours.
        for &(pid, parent) in self.pids.iter().rev() {
            let status = Status::read(pid);
            if status.is_ok_and(|status| status.decimal("PPid") == Some(parent as u64)) {
                let _ = wait::kill(pid, libc::SIGKILL);
            }
        }
        let mut tids: Vec<i32> = self.pids.iter().take(1).map(|&(pid, _)| pid).collect();
        tids.extend(self.tracees.drain(..).flat_map(Tracee::into_tids));
        let deadline = Instant::now() + END_LIMIT;
        // The leaders last: their end is told when the other threads are reaped.
        for &tid in tids.iter().rev() {
            while Instant::now() < deadline {
                match ptrace::wait(tid, false) {
                    Ok(Some(Stop::Gone(_))) | Err(_) => break,
                    Ok(_) => std::thread::sleep(Duration::from_micros(200)),
                }
            }
        }
        reap_orphans(deadline);
    }
}

/// Its parent, which is let go after it, must find it stopped already.
fn await_stop(pid: i32) {
    let deadline = Instant::now() + END_LIMIT;
    while Status::read(pid).is_ok_and(|status| status.state() != 'T') && Instant::now() < deadline {
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Takes what the killed have left to us: this program has no other children.
fn reap_orphans(deadline: Instant) {
    while Instant::now() < deadline {
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
        let zombies = image.zombies.iter().map(|zombie| zombie.pid);
        let threads = image.threads.iter().skip(1).map(|thread| thread.tid);
        for id in zombies.chain(threads).chain([image.pid]) {
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
    let mut blockers = Vec::new();
    relations::blockers(&relations::of_images(images), &mut blockers);
    match blockers.first() {
        Some(blocker) => Err(RestoreError::Unfit(blocker.what.clone())),
        None => Ok(()),
    }
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
    for thread in image.threads.iter().skip(1) {
        if Path::new(&format!("/proc/{}", thread.tid)).exists() {
            return Err(taken(thread.tid));
        }
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

/// The extended state must have the same shape, and no part that this CPU or kernel lacks.
fn check_xstate(image: &ProcessImage, tracee: &Tracee) -> Result<(), RestoreError> {
    /// The kernel's mask of features in the software-reserved bytes of the legacy area
    /// (arch/x86/include/uapi/asm/sigcontext.h).
    const MASK_AT: usize = 464;
    let here = &tracee.original(0).xstate;
    let mask = |area: &[u8]| {
        area.get(MASK_AT..MASK_AT + 8).map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")))
    };
    for thread in &image.threads {
        if mask(&thread.xstate) != mask(here) || thread.xstate.len() != here.len() {
            return Err(RestoreError::Unfit(format!(
                "its CPU had other vector registers (features {:#x}, {} bytes) than this one ({:#x}, {})",
                mask(&thread.xstate).unwrap_or(0),
                thread.xstate.len(),
                mask(here).unwrap_or(0),
                here.len()
            )));
        }
    }
    Ok(())
}

/// Opens mapped files by their paths; a file that took another's place would be wrong code or data.
struct ByPath {
    any: bool,
}

impl FileSource for ByPath {
    fn open_mapped(
        &mut self,
        tracee: &mut Tracee,
        file: &MappedFile,
        writable: bool,
    ) -> Result<i32, RestoreError> {
        let name = String::from_utf8_lossy(&file.path);
        if file.deleted && !self.any {
            return Err(RestoreError::Unfit(format!("the mapped file {name} had been deleted or replaced")));
        }
        let fd = open_inside(tracee, &file.path, writable)?;
        let found = fs::metadata(format!("/proc/{}/fd/{fd}", tracee.pid()))
            .map_err(|source| RestoreError::File { what: format!("looking at {name}"), source })?;
        // On overlays and subvolumes `maps` and `stat` name different devices.
        let same_device =
            found.dev() == file.dev || libc::major(file.dev) == 0 || libc::major(found.dev()) == 0;
        if !(self.any || found.ino() == file.ino && same_device) {
            return Err(RestoreError::Unfit(format!("the mapped file {name} has been replaced")));
        }
        Ok(fd)
    }
}
