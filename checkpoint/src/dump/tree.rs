//! A process with all its descendants: frozen from the root down, and read as one image.
//!
//! Who stands still has no more children, so that going down from the root finds them all. A child
//! that ends on the way stays a zombie, because its parent stands still already.

use super::pipes::read_pipe;
use super::sockets::{self, Connections, InFlight};
use super::{DumpError, Run, Waits, for_each_run, for_each_run_of_child, read_states_of};
use super::{aio, reports, terminals, write_back};
use crate::image::reports::ReportImage;
use crate::image::shares::SharesImage;
use crate::image::{FileKind, FilesImage, MAX_PROCESSES, ProcessImage, ZombieImage};
use crate::inventory::pipes::identity;
use crate::inventory::{self, Blocker, Rules, family::Family, owners, relations, shares, tree, watches};
use crate::proc::{
    self,
    status::{Stat, Status},
};
use crate::sys::bpf::threads::{self, Thread};
use crate::sys::kcmp;
use crate::tracee::{Tracee, TraceeError};
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// One living process of a tree.
struct Member {
    tracee: Tracee,
    /// Its parent's PID; of the root 0.
    ppid: i32,
    /// The thread of its parent's that has it as a child.
    parent_tid: i32,
    zombies: Vec<ZombieImage>,
    /// What the kernel told of its threads when they stood.
    seen: Option<Vec<Thread>>,
}

/// A frozen process and its frozen descendants. Dropped, they all run on.
pub struct FrozenTree {
    members: Vec<Member>,
    waits: Waits,
    connections: Connections,
}

/// How one process of a tree is frozen, by its PID.
pub type Freezer<'a> = dyn FnMut(i32) -> Result<Tracee, TraceeError> + 'a;

impl FrozenTree {
    /// Freezes the process and its descendants. An error leaves all of them running as they were.
    pub fn freeze(root: i32) -> Result<FrozenTree, TraceeError> {
        FrozenTree::freeze_with(&[root], &mut Tracee::freeze)
    }

    /// Freezes what of `seeds` lives (parents before their children; some may have lost theirs), and
    /// all their descendants, each by `freezer`.
    pub fn freeze_with(seeds: &[i32], freezer: &mut Freezer<'_>) -> Result<FrozenTree, TraceeError> {
        let root = seeds.first().copied().unwrap_or(0);
        let mut looked: Vec<i32> = seeds.iter().flat_map(|&seed| tree::descendants(seed)).collect();
        looked.sort_unstable();
        looked.dedup();
        let mut waits = Waits::look(&looked);
        let mut members: Vec<Member> = Vec::new();
        for &seed in seeds {
            if let Some(tracee) = living(seed, freezer)? {
                members.push(Member { tracee, ppid: 0, parent_tid: 0, zombies: Vec::new(), seen: None });
            }
        }
        if members.is_empty() {
            return Err(TraceeError::Died { tid: root });
        }
        let mut at = 0;
        while at < members.len() {
            let parent = members[at].tracee.process();
            members[at].seen = threads::of_many(parent);
            for (parent_tid, child) in tree::children_of(parent, members[at].seen.as_deref()) {
                if let Some(known) = members.iter_mut().find(|member| member.tracee.process() == child) {
                    (known.ppid, known.parent_tid) = (parent, parent_tid);
                    continue;
                }
                if members.len() + members[at].zombies.len() >= MAX_PROCESSES {
                    return Err(TraceeError::Unfit { pid: root, what: "it has too many descendants" });
                }
                if child == std::process::id() as i32 {
                    return Err(TraceeError::Unfit {
                        pid: root,
                        what: "it has this program as a descendant",
                    });
                }
                match living(child, freezer)? {
                    Some(tracee) => {
                        let zombies = Vec::new();
                        members.push(Member { tracee, ppid: parent, parent_tid, zombies, seen: None })
                    }
                    None => members[at].zombies.extend(zombie(child, parent_tid)),
                }
            }
            at += 1;
        }
        waits.frozen();
        Ok(FrozenTree { members: parents_first(members), waits, connections: Connections::default() })
    }

    /// PIDs of those that live, the root first.
    pub fn pids(&self) -> Vec<i32> {
        self.members.iter().map(|member| member.tracee.pid()).collect()
    }

    /// Whether the root has children, zombies among them.
    pub fn has_children(&self) -> bool {
        self.members.len() > 1 || self.members.iter().any(|member| !member.zombies.is_empty())
    }

    /// The processes, parents before their children.
    pub fn tracees(&self) -> impl Iterator<Item = &Tracee> {
        self.members.iter().map(|member| &member.tracee)
    }

    /// The processes alone, in that order.
    pub fn into_tracees(self) -> Vec<Tracee> {
        self.members.into_iter().map(|member| member.tracee).collect()
    }

    /// Reads everything but memory, and what is in the pipes and sockets between them.
    pub fn read(&mut self) -> Result<Vec<ProcessImage>, DumpError> {
        let family = Family::of(self.pids());
        let mut images = self.read_each(&family)?;
        self.read_reports(&mut images)?;
        terminals::read(&family, &mut images)?;
        let mut flight = sockets::read(&family, &mut images)?;
        flight.settle(&family);
        share_files(&family, &mut images, &mut flight);
        for (image, &pid) in images.iter_mut().zip(family.iter()) {
            watches::mark_spent(pid, &mut image.files);
        }
        read_pipes(&family, &mut images, &mut flight)?;
        images[0].files.in_flight = flight.files.files;
        self.connections = flight.connections;
        Ok(images)
    }

    /// Reads everything but memory and the contents of pipes and sockets, which stay where they are.
    pub fn read_states(&mut self) -> Result<Vec<ProcessImage>, DumpError> {
        let family = Family::of(self.pids());
        let mut images = self.read_each(&family)?;
        share_files(&family, &mut images, &mut InFlight::default());
        for (image, &pid) in images.iter_mut().zip(family.iter()) {
            watches::mark_spent(pid, &mut image.files);
        }
        Ok(images)
    }

    /// Lets each write back what it has written into mapped files ([`write_back::mapped_files`]).
    pub fn write_back(&mut self, images: &[ProcessImage]) -> Result<(), DumpError> {
        let mut each = self.members.iter_mut().zip(images);
        each.try_for_each(|(member, image)| write_back::mapped_files(&mut member.tracee, &image.mm.vmas))
    }

    fn read_each(&mut self, family: &Family) -> Result<Vec<ProcessImage>, DumpError> {
        let tracees =
            self.members.iter_mut().map(|member| (&mut member.tracee, member.seen.take())).collect();
        let mut images = read_states_of(tracees, family, &mut self.waits)?;
        for (image, member) in images.iter_mut().zip(&self.members) {
            image.ppid = member.ppid;
            // By the number that the process knows itself, as all others.
            let inside = |tid: i32| Status::read(tid).ok()?.inner_id();
            image.parent_tid = if member.ppid == 0 { 0 } else { inside(member.parent_tid).unwrap_or(0) };
            image.zombies = member.zombies.clone();
        }
        // Parents by the numbers that the processes know themselves.
        let processes = self.members.iter().map(|member| member.tracee.process());
        let numbers = processes.zip(family.iter().copied()).zip(images.iter().map(|image| image.pid));
        let inside: BTreeMap<i32, i32> =
            numbers.flat_map(|((process, face), pid)| [(process, pid), (face, pid)]).collect();
        let inside = |pid: i32| inside.get(&pid).copied().unwrap_or(0);
        for (image, shares) in images.iter_mut().zip(shares::of_family(family)) {
            image.ppid = inside(image.ppid);
            image.shares = SharesImage {
                memory: inside(shares.memory),
                files: inside(shares.files),
                fs: inside(shares.fs),
                handlers: inside(shares.handlers),
            };
        }
        for (image, member) in images.iter_mut().zip(&self.members) {
            let faces = |pid: i32| (pid != 0 && pid != member.tracee.process()).then(|| inside(pid));
            let files = image.files.files.iter_mut();
            let targets = files.filter_map(|file| match &mut file.kind {
                FileKind::Epoll { targets } => Some(targets),
                _ => None,
            });
            for target in targets.flatten() {
                target.at.0 = faces(target.at.0).filter(|&pid| pid != 0).unwrap_or(target.at.0);
            }
        }
        share_memory(&mut images);
        Ok(images)
    }

    /// What parents have heard of the stops of their children.
    fn read_reports(&mut self, images: &mut [ProcessImage]) -> Result<(), DumpError> {
        for at in 0..self.members.len() {
            let (parent, inside) = (self.members[at].tracee.process(), images[at].pid);
            let children: Vec<usize> =
                (at + 1..self.members.len()).filter(|&child| self.members[child].ppid == parent).collect();
            let pids: Vec<i32> = children.iter().map(|&child| images[child].pid).collect();
            debug_assert!(children.iter().all(|&child| images[child].ppid == inside));
            let told = reports::untold(&mut self.members[at].tracee, &pids)?;
            for (child, untold) in children.into_iter().zip(told) {
                let stopped = images[child].signals.stopped_by.is_some();
                images[child].report = ReportImage {
                    stop_taken: stopped && untold != Some(reports::STOPPED),
                    continued: !stopped && untold == Some(reports::CONTINUED),
                };
            }
        }
        Ok(())
    }

    /// Calls `each` for the memory of the process at `index` ([`for_each_run`]); what it shares with its
    /// parent is told as such.
    pub fn for_each_run<E: From<DumpError>>(
        &self,
        images: &[ProcessImage],
        index: usize,
        each: impl FnMut(Run<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let (member, mm) = (&self.members[index], &images[index].mm);
        if images[index].shares.memory != 0 {
            // It is that of one before.
            return Ok(());
        }
        match self.members.iter().position(|parent| parent.tracee.process() == member.ppid) {
            Some(parent) => {
                let parent = (self.members[parent].tracee.pid(), &images[parent].mm);
                for_each_run_of_child(&member.tracee, mm, parent, each)
            }
            None => for_each_run(&member.tracee, mm, each),
        }
    }

    /// Copies of their TCP connections, for who ends the processes ([`Connections::abort`]).
    pub fn take_connections(&mut self) -> Connections {
        std::mem::take(&mut self.connections)
    }

    /// Lets all of them run on. The first error is told when all have been tried.
    pub fn thaw(self) -> Result<(), TraceeError> {
        // What one of them closes is closed.
        drop(self.connections);
        let results: Vec<_> = self.members.into_iter().map(|member| member.tracee.thaw()).collect();
        results.into_iter().collect()
    }

    /// Keeps all threads stopped and forgets the rest; see [`Tracee::into_tids`].
    pub fn into_tids(self) -> Vec<i32> {
        self.members.into_iter().flat_map(|member| member.tracee.into_tids()).collect()
    }
}

/// Whoever shares a memory has it as it was found first: each has a stub in it by now.
fn share_memory(images: &mut [ProcessImage]) {
    for at in 1..images.len() {
        let (before, rest) = images.split_at_mut(at);
        if let Some(first) = before.iter().find(|image| image.pid == rest[0].shares.memory) {
            rest[0].mm = first.mm.clone();
        }
    }
}

/// Puts every process behind its parent.
fn parents_first(members: Vec<Member>) -> Vec<Member> {
    let (mut sorted, mut rest) = (Vec::with_capacity(members.len()), members);
    while !rest.is_empty() {
        let waiting: Vec<i32> = rest.iter().map(|member| member.tracee.process()).collect();
        let (ready, later): (Vec<Member>, Vec<Member>) =
            rest.into_iter().partition(|member| !waiting.contains(&member.ppid));
        // Parents of each other they cannot be.
        if ready.is_empty() {
            sorted.extend(later);
            return sorted;
        }
        sorted.extend(ready);
        rest = later;
    }
    sorted
}

/// `None`: it has ended.
fn living(pid: i32, freezer: &mut Freezer<'_>) -> Result<Option<Tracee>, TraceeError> {
    if !tree::lives(pid) {
        return Ok(None);
    }
    let frozen = match freezer(pid) {
        // Its leader has ended just now, and the others live on.
        Err(TraceeError::Died { .. }) if proc::face(pid) != pid => freezer(pid),
        other => other,
    };
    match frozen {
        Ok(tracee) => Ok(Some(tracee)),
        // It has lost its memory, and is a zombie soon; one whose parent wants none is gone then.
        Err(TraceeError::Died { .. }) if ends_soon(pid) => Ok(None),
        Err(_) if !tree::lives(pid) => Ok(None),
        Err(error) => Err(error),
    }
}

/// How long the end of one that is ending may take.
const END_LIMIT: Duration = Duration::from_secs(2);

fn ends_soon(pid: i32) -> bool {
    let deadline = Instant::now() + END_LIMIT;
    while tree::lives(pid) {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    true
}

/// `None`: its parent wants to hear of no ends, so that it is gone.
fn zombie(pid: i32, parent_tid: i32) -> Option<ZombieImage> {
    let stat = Stat::read(pid).ok()?;
    let number = |n| stat.number(n).map(|number| number as i32);
    // proc_pid_stat(5): pgrp, session, exit_code, exit_signal.
    let inside = |id: i32| Some(Status::read(id).ok()?.inner_id().unwrap_or(id));
    Some(ZombieImage {
        pid: inside(pid)?,
        pgid: number(5)?,
        sid: number(6)?,
        status: number(52)?,
        exit_signal: number(38)?,
        parent_tid: inside(parent_tid).unwrap_or(0),
    })
}

/// The tables of all processes, and what is in flight between them, which this program has copies of.
fn tables<'a>(
    pids: &[i32],
    images: &'a mut [ProcessImage],
    flight: &'a mut InFlight,
) -> Vec<(i32, &'a mut FilesImage)> {
    let us = std::process::id() as i32;
    let of_images = pids.iter().copied().zip(images.iter_mut().map(|image| &mut image.files));
    of_images.chain([(us, &mut flight.files)]).collect()
}

/// Numbers the open file descriptions that several of the processes have.
fn share_files(pids: &[i32], images: &mut [ProcessImage], flight: &mut InFlight) {
    /// One description: a descriptor that names it, and who has it.
    struct Known {
        pid: i32,
        fd: i32,
        holders: Vec<(usize, usize)>,
    }
    let mut tables = tables(pids, images, flight);
    let mut alike: BTreeMap<(u64, u64, u64, u32), Vec<Known>> = BTreeMap::new();
    for (who, &(pid, ref files)) in tables.iter().enumerate() {
        for (index, file) in files.files.iter().enumerate() {
            let Some(fd) = files.fds.iter().find(|fd| fd.file as usize == index) else { continue };
            let known = alike.entry((file.stat.0, file.stat.1, file.pos, file.flags)).or_default();
            let same = |known: &&mut Known| kcmp::same_file(known.pid, known.fd, pid, fd.fd).unwrap_or(false);
            match known.iter_mut().find(same) {
                Some(known) => known.holders.push((who, index)),
                None => known.push(Known { pid, fd: fd.fd, holders: vec![(who, index)] }),
            }
        }
    }
    let shared = alike.into_values().flatten().filter(|known| known.holders.len() > 1);
    for (number, known) in shared.enumerate() {
        for (who, index) in known.holders {
            tables[who].1.files[index].shared = number as u32 + 1;
        }
    }
}

/// What is in each internal pipe, once, in the image of a process that has an end of it.
fn read_pipes(pids: &[i32], images: &mut [ProcessImage], flight: &mut InFlight) -> Result<(), DumpError> {
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    // Who can read it first: the others do not know what is in it.
    for only_readers in [true, false] {
        for (pid, files) in tables(pids, images, flight) {
            let ends: Vec<(u64, u64)> = files
                .files
                .iter()
                .filter(|file| file.kind == (FileKind::Pipe { internal: true }))
                .filter(|file| !only_readers || file.flags as i32 & libc::O_ACCMODE != libc::O_WRONLY)
                .map(identity)
                .collect();
            for id in ends {
                if seen.insert(id) {
                    found.push(read_pipe(pid, files, id)?);
                }
            }
        }
    }
    images[0].files.pipes = found;
    Ok(())
}

/// Why an image just read cannot be used after all.
pub fn blockers(images: &[ProcessImage]) -> Vec<Blocker> {
    let mut blockers = Vec::new();
    for image in images {
        blockers.extend(inventory::image_blockers(image, Rules::Standalone));
    }
    if let Some(what) = images.first().and_then(|root| sockets::refuse_in_flight(&root.files.in_flight)) {
        let what = format!("a descriptor in flight in a socket: {what}");
        blockers.push(Blocker { kind: "fd", what });
    }
    blockers.extend(other_root(images));
    relations::blockers(&relations::of_images(images), &tree::in_use, &mut blockers);
    shares::in_image(images, &mut blockers);
    owners::not_in_image(images, &mut blockers);
    aio::blockers(images, &mut blockers);
    blockers
}

/// What is named by paths is named from here, and made again before a root is entered.
fn other_root(images: &[ProcessImage]) -> Option<Blocker> {
    let within: Vec<&ProcessImage> = images.iter().filter(|image| image.fs.root != b"/").collect();
    let root = String::from_utf8_lossy(&within.first()?.fs.root).into_owned();
    let named = images.iter().flat_map(|image| &image.files.sockets).any(|socket| socket.file.is_some());
    let why = match within.iter().any(|image| image.shares.fs != 0) {
        true => "that processes share (CLONE_FS)",
        false if named => "beside Unix sockets with names in the file system",
        false => return None,
    };
    Some(Blocker { kind: "namespace", what: format!("its root is {root} (chroot), {why}") })
}
