//! The processes of an image: each made by an injected clone3(2) in its parent, and filled.
//!
//! ```mermaid
//! sequenceDiagram
//!   participant R as restorer
//!   participant P as parent
//!   participant C as child
//!   R->>P: mappings, memory
//!   R->>P: its session; clone3 for each child (births)
//!   P->>C: memory, copy-on-write
//!   R->>C: descriptors, mappings that differ, pages that differ
//!   R->>C: session, its own children …
//!   R->>P: when all memory is there: groups; what has ended ends
//!   R->>C: the rest of its state, children before parents
//!   R->>P: the rest of its state
//! ```
//!
//! So what parent and child had in common in memory is common again, and is not in the image twice. Nothing
//! of them runs, and until they are let go the kernel ends them with the restorer.

use super::births::Births;
use super::{
    FileSource, Filled, Rebuild, RebuildOptions, RestoreError, go_on, groups, reports, seal, terminals,
    together,
};
use crate::image::ProcessImage;
use crate::image::stream::{Item, StreamReader};
use crate::sys::ptrace::{self, Stop};
use crate::sys::wait;
use crate::tracee::{Call, Tracee};
use std::collections::BTreeMap;
use std::io::Read;
use std::time::{Duration, Instant};

/// How long the end of what was killed is waited for.
const END_LIMIT: Duration = Duration::from_secs(5);

/// What the embedder adds to the processes.
pub trait Surroundings: FileSource {
    /// Gives a child its descriptor table; it has its parent's now, which is complete.
    fn give_files(
        &mut self,
        who: usize,
        images: &[ProcessImage],
        child: &mut Tracee,
    ) -> Result<(), RestoreError>;

    /// A process has made this session; its other children come next.
    fn session_made(&mut self, session: i32, leader: &mut Tracee) -> Result<(), RestoreError> {
        let _ = (session, leader);
        Ok(())
    }

    /// Something to be done when its memory is there, before the rest of its state.
    fn before_finish(
        &mut self,
        who: usize,
        images: &[ProcessImage],
        tracee: &mut Tracee,
    ) -> Result<(), RestoreError> {
        let _ = (who, images, tracee);
        Ok(())
    }

    /// All have what is theirs alone; what names others of them comes next.
    fn all_are_filled(&mut self) -> Result<(), RestoreError> {
        Ok(())
    }
}

/// One process of it.
pub(super) struct Member {
    pub tracee: Tracee,
    filled: Option<Filled>,
    /// It was made here, and began with this memory.
    born: Option<Memory>,
}

/// What one that was made here began with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Memory {
    /// Its parent's, copy-on-write.
    Parents,
    /// That of who made it in its parent's place.
    Anothers,
    /// It has that of who made it, and will.
    Shared,
}

impl Member {
    pub fn born(tracee: Tracee, memory: Memory) -> Member {
        Member { tracee, filled: None, born: Some(memory) }
    }
}

/// Processes under way. Dropped, all of them are ended.
pub struct Family<'a> {
    pub(super) images: &'a [ProcessImage],
    /// The root's, and those of all others.
    options: [RebuildOptions; 2],
    /// In the images' order.
    pub(super) members: Vec<Option<Member>>,
    /// The same when all is done.
    ready: Vec<Tracee>,
    /// Who is to end before anything runs: zombies, and leaders that are gone.
    pub(super) births: Births,
    places: BTreeMap<i32, usize>,
}

impl<'a> Family<'a> {
    /// The root is there, with its PID, its descriptors, and in its session; its descendants are made.
    pub fn of(
        images: &'a [ProcessImage],
        root: Tracee,
        options: [RebuildOptions; 2],
    ) -> Result<Family<'a>, RestoreError> {
        let mut family = Family::new(images, vec![root], options);
        family.births = Births::plan(images);
        let avoid: Vec<(u64, u64)> =
            images.iter().flat_map(|image| &image.mm.vmas).map(|vma| (vma.start, vma.end)).collect();
        if let Some(Some(root)) = family.members.first_mut() {
            root.tracee.end_with_tracer()?;
            // All of them will have it at the same place.
            root.tracee.install_stub(&avoid)?;
            // Ignored, the ends of children leave no zombies (sigaction(2)); of their stops nothing is told.
            let mut action = [0; 32];
            action[8] = libc::SA_NOCLDSTOP as u8;
            let args = [libc::SIGCHLD as u64, 0, 0, 8, 0, 0];
            let default = Call::must("setting an action", libc::SYS_rt_sigaction, args).input(1, &action);
            root.tracee.must_all(0, &[default])?;
        }
        Ok(family)
    }

    /// All tasks are there, one for each image; they are only filled.
    pub fn standing(
        images: &'a [ProcessImage],
        tracees: Vec<Tracee>,
        options: [RebuildOptions; 2],
    ) -> Result<Family<'a>, RestoreError> {
        if tracees.len() != images.len() {
            return Err(RestoreError::Unfit("there are not as many tasks as processes".into()));
        }
        Ok(Family::new(images, tracees, options))
    }

    fn new(images: &'a [ProcessImage], tracees: Vec<Tracee>, options: [RebuildOptions; 2]) -> Family<'a> {
        let mut members: Vec<Option<Member>> =
            tracees.into_iter().map(|tracee| Some(Member { tracee, filled: None, born: None })).collect();
        members.resize_with(images.len(), || None);
        let places = images.iter().zip(0..).map(|(image, at)| (image.pid, at)).collect();
        Family { images, options, members, ready: Vec::new(), births: Births::default(), places }
    }

    /// Its end is not bound to that of the thread that made it any more, but to its tracer's.
    pub(super) fn forget_parent_death(&mut self) -> Result<(), RestoreError> {
        let Some(Some(root)) = self.members.first_mut() else { return Ok(()) };
        let args = [libc::PR_SET_PDEATHSIG as u64, 0, 0, 0, 0, 0];
        root.tracee.must(0, "PR_SET_PDEATHSIG", libc::SYS_prctl, args)?;
        Ok(())
    }

    /// Makes and fills all of them with the memory that comes from `stream`.
    pub fn fill<R: Read>(
        &mut self,
        stream: &mut StreamReader<R>,
        surroundings: &mut dyn Surroundings,
    ) -> Result<(), RestoreError> {
        for who in 0..self.images.len() {
            let next = self.fill_one(who, stream, surroundings)?;
            if next != (who + 1 < self.images.len()).then_some(who + 1) {
                return Err(RestoreError::Unfit("the image lacks the memory of a process".into()));
            }
            self.bear_children(who, surroundings)?;
        }
        groups::join(self)?;
        if !self.births.is_empty() {
            let mut tracees: Vec<&mut Tracee> =
                self.members.iter_mut().flatten().map(|member| &mut member.tracee).collect();
            terminals::set_foreground(self.images, &mut tracees)?;
        }
        self.end_the_ended()
    }

    /// Rebuilds one process' memory from what comes; gives the place of the next one's.
    fn fill_one<R: Read>(
        &mut self,
        who: usize,
        stream: &mut StreamReader<R>,
        surroundings: &mut dyn Surroundings,
    ) -> Result<Option<usize>, RestoreError> {
        let image = &self.images[who];
        let parent = self.places.get(&image.ppid).map(|&up| &self.images[up]);
        let options = self.options[usize::from(who > 0)];
        let above = self.place_of(image.ppid).and_then(|up| self.members[up].as_ref());
        let above = above.map(|parent| parent.tracee.pid());
        let member = self.members[who].as_mut().ok_or_else(|| not_made(image))?;
        if member.born.is_some() && image.shares.files == 0 {
            surroundings.give_files(who, self.images, &mut member.tracee)?;
        }
        let mut rebuild = match (parent, member.born) {
            (Some(parent), Some(Memory::Parents)) => {
                Rebuild::begin_child(&mut member.tracee, image, parent, surroundings, options)?
            }
            (_, Some(Memory::Shared)) => Rebuild::begin_sharing(&mut member.tracee, image, options)?,
            _ => Rebuild::begin(&mut member.tracee, image, surroundings, options)?,
        };
        if let Some(parent) = above {
            rebuild.set_parent(parent);
        }
        let next = loop {
            match stream.next()? {
                Item::Data { .. } | Item::Zero { .. } | Item::Same { .. } if image.shares.memory != 0 => {
                    return Err(RestoreError::Unfit("the image has a shared memory twice".into()));
                }
                Item::Data { addr, bytes } => rebuild.data(addr, bytes)?,
                Item::Zero { addr, len } => rebuild.zero(addr, len)?,
                Item::Same { addr, len } => rebuild.same(addr, len)?,
                Item::Process(next) => break Some(next),
                Item::End => break None,
                Item::State(_) | Item::Object(_) => {
                    return Err(RestoreError::Unfit("a state or an object among the memory".into()));
                }
            }
        };
        rebuild.end_of_contents()?;
        rebuild.make_threads()?;
        member.filled = Some(rebuild.set_aside());
        Ok(next)
    }

    /// Rebuilds the rest of all of them. They stand ready for their release, in the images' order.
    pub fn finish(&mut self, surroundings: &mut dyn Surroundings) -> Result<(), RestoreError> {
        let born = !self.births.is_empty();
        if born {
            reports::stop_again(self)?;
        }
        for (who, image) in self.images.iter().enumerate().rev() {
            let options = self.options[usize::from(who > 0)];
            let member = self.members[who].as_mut().ok_or_else(|| not_made(image))?;
            let filled = member.filled.take().ok_or_else(|| not_made(image))?;
            surroundings.before_finish(who, self.images, &mut member.tracee)?;
            Rebuild::take_up(&mut member.tracee, image, options, filled).complete()?;
        }
        self.ready = std::mem::take(&mut self.members).into_iter().flatten().map(|one| one.tracee).collect();
        surroundings.all_are_filled()?;
        together::settle(self.images, &mut self.ready)?;
        // The calls first: who shares a memory shares the stub in it.
        let calls: Result<Vec<_>, _> =
            self.images.iter().zip(&mut self.ready).map(|(image, tracee)| go_on(tracee, image)).collect();
        for (who, ((image, tracee), registers)) in
            self.images.iter().zip(&mut self.ready).zip(calls?).enumerate()
        {
            let options = self.options[usize::from(who > 0)];
            // The others stand stopped already.
            let stop = options.stop && (who == 0 || !born);
            seal(tracee, image, RebuildOptions { stop, ..options }, registers)?;
        }
        Ok(())
    }

    /// The processes, in the images' order: whoever has them lets them run.
    pub fn into_tracees(mut self) -> Vec<Tracee> {
        std::mem::take(&mut self.ready)
    }

    pub(super) fn place_of(&self, pid: i32) -> Option<usize> {
        self.places.get(&pid).copied()
    }
}

fn not_made(image: &ProcessImage) -> RestoreError {
    RestoreError::Unfit(format!("process {} comes before it could be made", image.pid))
}

impl Drop for Family<'_> {
    fn drop(&mut self) {
        let members = std::mem::take(&mut self.members).into_iter().flatten().map(|member| member.tracee);
        let passing = std::mem::take(&mut self.births.passing).into_iter().map(|one| one.tracee);
        end(members.chain(std::mem::take(&mut self.ready)).chain(passing).collect());
    }
}

/// Ends processes that must not run: killed before they are let go. Their parents come before them.
pub(super) fn end(tracees: Vec<Tracee>) {
    for tracee in tracees.iter().rev() {
        // Traced, so the number still is this process.
        let _ = wait::kill(tracee.pid(), libc::SIGKILL);
    }
    let tids: Vec<i32> = tracees.into_iter().flat_map(Tracee::into_tids).collect();
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
}
