//! Open files whose name is gone: what an image can hold of them.

use super::family::Family;
use super::{Blocker, Rules};
use crate::image::{FileKind, FilesImage, LockKind, OpenFile};
use crate::proc;
use std::fs;
use std::os::unix::fs::MetadataExt;

/// Whether it is a regular file without a name, or a memfd, which never has one.
pub fn is_nameless(file: &OpenFile) -> bool {
    file.kind.is_memfd() || matches!(file.kind, FileKind::Regular { deleted: true })
}

/// Why the contents of such a file cannot be carried, if that can be seen.
pub fn why_not(file: &OpenFile, meta: &fs::Metadata) -> Option<String> {
    if file.kind.is_memfd() {
        return None;
    }
    let name = String::from_utf8_lossy(&file.link);
    if !file.link.ends_with(b" (deleted)") {
        return Some(format!("a file to which its name {name} does not lead"));
    }
    // One that was opened with O_TMPFILE has none, or may get one.
    if meta.nlink() > 0 {
        return Some(format!("a deleted file, {name}, which has another name"));
    }
    // Opening it to read would break the lease.
    let leased = file.locks.iter().any(|lock| lock.kind == LockKind::Lease);
    leased.then(|| format!("a deleted file with a lease, {name}"))
}

/// Looks at the files of a live process. Deleted files stay open at home, where there is one.
pub fn blockers(pid: i32, family: &Family, files: &FilesImage, rules: Rules, blockers: &mut Vec<Blocker>) {
    let concerned = |file: &OpenFile| match rules {
        Rules::Standalone => is_nameless(file),
        Rules::Homed => file.kind.is_memfd(),
    };
    for (index, file) in files.files.iter().enumerate().filter(|(_, file)| concerned(file)) {
        let Some(fd) = files.fds.iter().find(|fd| fd.file as usize == index) else { continue };
        let Ok(meta) = fs::metadata(format!("/proc/{pid}/fd/{}", fd.fd)) else { continue };
        let why = why_not(file, &meta).or_else(|| {
            let other = holder_outside(family, (file.stat.0, file.stat.1))?;
            let (name, what) = (String::from_utf8_lossy(&file.link), kind(file));
            Some(format!("{what}, {name}, which process {other} has open as well"))
        });
        if let Some(why) = why {
            blockers.push(Blocker { kind: "fd", what: format!("fd {}: {why}", fd.fd) });
        }
    }
}

fn kind(file: &OpenFile) -> &'static str {
    match file.kind {
        FileKind::Memfd | FileKind::HugeMemfd => "a memfd",
        _ => "a deleted file",
    }
}

/// A process outside that has the file open, and would not see what ours write to a copy.
pub(super) fn holder_outside(family: &Family, id: (u64, u64)) -> Option<i32> {
    let us = std::process::id() as i32;
    proc::pids().into_iter().filter(|&other| !family.has(other) && other != us).find(|other| {
        let Ok(dir) = fs::read_dir(format!("/proc/{other}/fd")) else { return false };
        dir.flatten().any(|entry| {
            let absolute = fs::read_link(entry.path()).is_ok_and(|link| link.is_absolute());
            absolute && fs::metadata(entry.path()).is_ok_and(|meta| (meta.dev(), meta.ino()) == id)
        })
    })
}
