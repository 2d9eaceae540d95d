//! A process with all its descendants: frozen from the root down, and read as one image.
//!
//! Who stands still has no more children, so that going down from the root finds them all. A child
//! that ends on the way stays a zombie, because its parent stands still already.

use super::pipes::read_pipe;
use super::{DumpError, read_state_of};
use crate::image::{FileKind, MAX_PROCESSES, ProcessImage, ZombieImage};
use crate::inventory::{self, Blocker, Rules, relations, tree};
use crate::proc::status::{Stat, Status};
use crate::sys::kcmp;
use crate::tracee::{Tracee, TraceeError};
use std::collections::{BTreeMap, BTreeSet};

/// One living process of a tree.
struct Member {
    tracee: Tracee,
    /// Its parent's PID; of the root 0.
    ppid: i32,
    zombies: Vec<ZombieImage>,
}

/// A frozen process and its frozen descendants. Dropped, they all run on.
pub struct FrozenTree(Vec<Member>);

impl FrozenTree {
    /// Freezes the process and its descendants. An error leaves all of them running as they were.
    pub fn freeze(root: i32) -> Result<FrozenTree, TraceeError> {
        let mut members = vec![Member { tracee: Tracee::freeze(root)?, ppid: 0, zombies: Vec::new() }];
        let mut at = 0;
        while at < members.len() {
            let parent = members[at].tracee.pid();
            for child in tree::children(parent) {
                if members.len() + members[at].zombies.len() >= MAX_PROCESSES {
                    return Err(TraceeError::Unfit { pid: root, what: "it has too many descendants" });
                }
                if child == std::process::id() as i32 {
                    return Err(TraceeError::Unfit {
                        pid: root,
                        what: "it has this program as a descendant",
                    });
                }
                match living(child)? {
                    Some(tracee) => members.push(Member { tracee, ppid: parent, zombies: Vec::new() }),
                    None => members[at].zombies.extend(zombie(child)),
                }
            }
            at += 1;
        }
        Ok(FrozenTree(members))
    }

    /// PIDs of those that live, the root first.
    pub fn pids(&self) -> Vec<i32> {
        self.0.iter().map(|member| member.tracee.pid()).collect()
    }

    /// Whether the root has children, zombies among them.
    pub fn has_children(&self) -> bool {
        self.0.len() > 1 || self.0.iter().any(|member| !member.zombies.is_empty())
    }

    /// The processes, parents before their children.
    pub fn tracees(&self) -> impl Iterator<Item = &Tracee> {
        self.0.iter().map(|member| &member.tracee)
    }

    /// Reads everything but memory, and what is in the pipes between them.
    pub fn read(&mut self) -> Result<Vec<ProcessImage>, DumpError> {
        let family = self.pids();
        let mut images = Vec::with_capacity(self.0.len());
        for member in &mut self.0 {
            let mut image = read_state_of(&mut member.tracee, &family)?;
            image.ppid = member.ppid;
            image.zombies = member.zombies.clone();
            images.push(image);
        }
        share_files(&family, &mut images);
        read_pipes(&family, &mut images)?;
        Ok(images)
    }

    /// Lets all of them run on. The first error is told when all have been tried.
    pub fn thaw(self) -> Result<(), TraceeError> {
        let results: Vec<_> = self.0.into_iter().map(|member| member.tracee.thaw()).collect();
        results.into_iter().collect()
    }

    /// Keeps all threads stopped and forgets the rest; see [`Tracee::into_tids`].
    pub fn into_tids(self) -> Vec<i32> {
        self.0.into_iter().flat_map(|member| member.tracee.into_tids()).collect()
    }
}

/// `None`: it has ended.
fn living(pid: i32) -> Result<Option<Tracee>, TraceeError> {
    let ended = || Status::read(pid).map_or(true, |status| tree::has_ended(pid, &status));
    if ended() {
        return Ok(None);
    }
    match Tracee::freeze(pid) {
        Ok(tracee) => Ok(Some(tracee)),
        Err(_) if ended() => Ok(None),
        Err(error) => Err(error),
    }
}

/// `None`: its parent wants to hear of no ends, so that it is gone.
fn zombie(pid: i32) -> Option<ZombieImage> {
    let stat = Stat::read(pid).ok()?;
    let number = |n| stat.number(n).map(|number| number as i32);
    // proc_pid_stat(5): pgrp, session, exit_code.
    Some(ZombieImage { pid, pgid: number(5)?, sid: number(6)?, status: number(52)? })
}

/// Numbers the open file descriptions that several of the processes have.
fn share_files(pids: &[i32], images: &mut [ProcessImage]) {
    /// One description: a descriptor that names it, and who has it.
    struct Known {
        pid: i32,
        fd: i32,
        holders: Vec<(usize, usize)>,
    }
    let mut alike: BTreeMap<(u64, u64, u64, u32), Vec<Known>> = BTreeMap::new();
    for (who, (image, &pid)) in images.iter().zip(pids).enumerate() {
        for (index, file) in image.files.files.iter().enumerate() {
            let Some(fd) = image.files.fds.iter().find(|fd| fd.file as usize == index) else { continue };
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
            images[who].files.files[index].shared = number as u32 + 1;
        }
    }
}

/// What is in each internal pipe, once, in the image of a process that has an end of it.
fn read_pipes(pids: &[i32], images: &mut [ProcessImage]) -> Result<(), DumpError> {
    let mut seen = BTreeSet::new();
    // Who can read it first: the others do not know what is in it.
    for only_readers in [true, false] {
        for (image, &pid) in images.iter_mut().zip(pids) {
            let ends: Vec<u64> = image
                .files
                .files
                .iter()
                .filter(|file| file.kind == (FileKind::Pipe { internal: true }))
                .filter(|file| !only_readers || file.flags as i32 & libc::O_ACCMODE != libc::O_WRONLY)
                .map(|file| file.stat.1)
                .collect();
            for ino in ends {
                if seen.insert(ino) {
                    let pipe = read_pipe(pid, &image.files, ino)?;
                    image.files.pipes.push(pipe);
                }
            }
        }
    }
    Ok(())
}

/// Why an image just read cannot be used after all.
pub fn blockers(images: &[ProcessImage]) -> Vec<Blocker> {
    let mut blockers = Vec::new();
    for image in images {
        blockers.extend(inventory::image_blockers(image, Rules::Standalone));
        let shared_epoll =
            |file: &&crate::image::OpenFile| file.shared != 0 && matches!(file.kind, FileKind::Epoll { .. });
        if image.files.files.iter().any(|file| shared_epoll(&file)) {
            let what = format!("process {} shares an epoll with another one", image.pid);
            blockers.push(Blocker { kind: "fd", what });
        }
    }
    relations::blockers(&relations::of_images(images), &mut blockers);
    blockers
}
