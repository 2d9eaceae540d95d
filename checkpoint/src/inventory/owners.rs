//! Processes that open files refer to: those they tell of what happens (`F_SETOWN`), pidfds, and files of
//! `/proc/PID`. They must be in the image too.

use super::Blocker;
use super::tree;
use crate::image::{FileKind, FilesImage, OpenFile, ProcessImage};
use crate::proc::status::Status;

/// `F_OWNER_TID`, `F_OWNER_PID`, `F_OWNER_PGRP` (linux/fcntl.h).
pub const OWNER_TID: i32 = 0;
/// See [`OWNER_TID`].
pub const OWNER_PID: i32 = 1;
/// See [`OWNER_TID`].
pub const OWNER_PGRP: i32 = 2;

/// In the place of an owner's type: a process or thread, or a child that has ended.
const ANY: i32 = -1;

/// References to what is not of a live family.
pub fn outside(family: &[i32], files: &FilesImage, blockers: &mut Vec<Blocker>) {
    if files.files.iter().all(|file| file.owner.1 == 0 && referred(file) == 0) {
        return;
    }
    let groups: Vec<i32> = tree::relations(family).iter().map(|relation| relation.pgid).collect();
    let known = |kind: i32, id: i32| match kind {
        OWNER_TID | ANY => {
            let group = Status::read(id).ok().and_then(|status| status.decimal("Tgid"));
            group.is_some_and(|group| family.contains(&(group as i32)))
        }
        OWNER_PID => family.contains(&id),
        OWNER_PGRP => groups.contains(&id),
        _ => false,
    };
    name_strangers(files, &known, blockers);
}

/// References to what is not in an image.
pub fn not_in_image(images: &[ProcessImage], blockers: &mut Vec<Blocker>) {
    let known = |kind: i32, id: i32| match kind {
        OWNER_TID => images.iter().flat_map(|image| &image.threads).any(|thread| thread.tid == id),
        OWNER_PID => images.iter().any(|image| image.pid == id),
        OWNER_PGRP => images.iter().any(|image| image.pgid == id),
        ANY => images.iter().any(|image| {
            let zombie = image.zombies.iter().any(|zombie| zombie.pid == id);
            zombie || image.pid == id || image.threads.iter().any(|thread| thread.tid == id)
        }),
        _ => false,
    };
    for image in images {
        name_strangers(&image.files, &known, blockers);
    }
}

fn name_strangers(files: &FilesImage, known: &dyn Fn(i32, i32) -> bool, blockers: &mut Vec<Blocker>) {
    for fd in &files.fds {
        let Some(file) = files.files.get(fd.file as usize) else { continue };
        let (kind, id, _) = file.owner;
        if id != 0 && !known(kind, id) {
            let whom = match kind {
                OWNER_TID => "thread",
                OWNER_PGRP => "process group",
                _ => "process",
            };
            let what = format!("fd {}: its signals go to {whom} {id}, which is not saved with it", fd.fd);
            blockers.push(Blocker { kind: "fd", what });
        }
        let id = referred(file);
        if id != 0 && !known(ANY, id) {
            let name = match &file.kind {
                FileKind::Pidfd { .. } => "a pidfd".into(),
                _ => format!("{}, a file", String::from_utf8_lossy(&file.link)),
            };
            let what = format!("fd {}: {name} of process {id}, which is not saved with it", fd.fd);
            blockers.push(Blocker { kind: "fd", what });
        }
    }
}

/// The process or thread that a file is about; 0: none.
pub fn referred(file: &OpenFile) -> i32 {
    match file.kind {
        FileKind::Pidfd { pid } | FileKind::Proc { pid } => pid,
        _ => 0,
    }
}
