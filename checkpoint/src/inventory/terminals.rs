//! Pseudo-terminals within the tree: their masters are among its files.

use super::Blocker;
use crate::image::{FileKind, FilesImage};
use crate::proc::{self, fdinfo::FdInfo, status::Stat};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;

/// Documentation/admin-guide/devices.txt: the slaves' major number.
const SLAVES: u32 = 136;

/// The number of a slave.
pub fn index_of(rdev: u64) -> Option<u32> {
    (libc::major(rdev) == SLAVES).then(|| libc::minor(rdev))
}

/// The number of a master, from its `fdinfo`.
pub fn master(info: &FdInfo) -> Option<u32> {
    info.number("tty-index", 10).and_then(|index| u32::try_from(index).ok())
}

/// The pseudo-terminals whose masters these tables have, each with a process and descriptor.
pub fn masters(tables: &[(i32, &FilesImage)]) -> BTreeMap<u32, (i32, i32)> {
    let mut found = BTreeMap::new();
    for &(pid, files) in tables {
        for fd in &files.fds {
            if let Some(FileKind::PtyMaster { index }) =
                files.files.get(fd.file as usize).map(|file| &file.kind)
            {
                found.entry(*index).or_insert((pid, fd.fd));
            }
        }
    }
    found
}

/// Says of the slaves of those masters that they are within the image; `/dev/tty` is the one that
/// controls the process.
pub fn mark(pid: i32, files: &mut FilesImage, masters: &BTreeMap<u32, (i32, i32)>) {
    let controlling = controlling(pid);
    for file in files.files.iter_mut().filter(|file| file.kind == FileKind::Tty) {
        let index = index_of(file.stat.3);
        if file.link.ends_with(b" (deleted)") {
            file.kind = FileKind::Unsupported { what: "a terminal whose other side is gone".into() };
        } else if let Some(index) = index.filter(|index| masters.contains_key(index)) {
            file.kind = FileKind::PtySlave { index };
        } else if let (None, Some(index)) = (index, controlling.filter(|index| masters.contains_key(index))) {
            // /dev/tty.
            file.kind = FileKind::PtySlave { index };
        }
    }
}

/// The pseudo-terminal that controls a process.
fn controlling(pid: i32) -> Option<u32> {
    // proc_pid_stat(5): tty_nr, as the kernel's new encoding of a device number.
    let device = Stat::read(pid).ok()?.number(7)? as u32;
    let (major, minor) = (device >> 8 & 0xfff, device & 0xff | device >> 12 & 0xfff00);
    (major == SLAVES).then_some(minor)
}

/// What keeps the tree's pseudo-terminals here: processes outside that have a side of one.
pub fn blockers(tables: &[(i32, &FilesImage)], family: &[i32]) -> Vec<(i32, Blocker)> {
    let masters = masters(tables);
    if masters.is_empty() {
        // The usual case: nobody else's table has to be looked at.
        return Vec::new();
    }
    let inside: BTreeSet<i32> = family.iter().copied().chain([std::process::id() as i32]).collect();
    let mut found = Vec::new();
    for pid in proc::pids().into_iter().filter(|pid| !inside.contains(pid)) {
        for index in of_stranger(pid) {
            if let Some(&(owner, fd)) = masters.get(&index) {
                let comm = proc::read(pid, "comm").unwrap_or_default();
                let comm = String::from_utf8_lossy(&comm).trim().to_string();
                let what =
                    format!("fd {fd}: the terminal /dev/pts/{index}, which process {pid} ({comm}) has too");
                found.push((owner, Blocker { kind: "fd", what }));
            }
        }
    }
    found
}

/// The pseudo-terminals that a process outside has: its controlling one, and those that it has open.
fn of_stranger(pid: i32) -> BTreeSet<u32> {
    let mut found: BTreeSet<u32> = controlling(pid).into_iter().collect();
    let Ok(dir) = fs::read_dir(format!("/proc/{pid}/fd")) else { return found };
    for entry in dir.flatten() {
        let Ok(link) = fs::read_link(entry.path()) else { continue };
        let Some(text) = link.to_str() else { continue };
        if text.ends_with("/ptmx") {
            let name = entry.file_name();
            let info = proc::read(pid, &format!("fdinfo/{}", name.to_string_lossy())).ok();
            found.extend(info.and_then(|info| FdInfo::parse(&info)).and_then(|info| master(&info)));
        } else if let Some(number) = text.strip_prefix("/dev/pts/") {
            found.extend(number.parse::<u32>().ok());
        }
    }
    found
}
