//! What has contents and no name: memfds, deleted files, shared memory. An image holds them once, for all
//! processes in it; what somebody outside uses as well would become two.

use super::family::Family;
use super::nameless::{self, is_nameless};
use super::{Blocker, Rules};
use crate::image::objects::{ObjectKey, SYSV};
use crate::image::{Backing, FilesImage, MappedFile, OpenFile, Vma};
use crate::proc::{self, maps};
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;

/// One System V segment (`/proc/sysvipc/shm`, proc_sysvipc(5)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// `shmid`.
    pub id: i32,
    /// `key_t`; 0: private, or removed.
    pub key: i32,
    /// Permission bits.
    pub mode: u32,
    /// It goes away with its last user.
    pub removed: bool,
    /// Length, bytes.
    pub size: u64,
    /// Owner: user id, group id.
    pub owner: (u32, u32),
}

/// The segments of this IPC namespace.
pub fn segments() -> Vec<Segment> {
    parse_segments(&fs::read_to_string("/proc/sysvipc/shm").unwrap_or_default())
}

/// ```text
///        key      shmid perms                  size  cpid  lpid nattch   uid   gid  cuid  cgid …
/// ```
fn parse_segments(text: &str) -> Vec<Segment> {
    /// linux/shm.h.
    const SHM_DEST: u32 = 0o1000;
    let of_line = |line: &str| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let mode = u32::from_str_radix(words.get(2)?, 8).ok()?;
        Some(Segment {
            key: words.first()?.parse().ok()?,
            id: words.get(1)?.parse().ok()?,
            mode: mode & 0o777,
            removed: mode & SHM_DEST != 0,
            size: words.get(3)?.parse().ok()?,
            owner: (words.get(7)?.parse().ok()?, words.get(8)?.parse().ok()?),
        })
    };
    text.lines().skip(1).filter_map(of_line).collect()
}

/// The id of the segment behind a mapping: the kernel shows it as the inode number (ipc/shm.c).
pub fn segment_of(file: &MappedFile) -> Option<i32> {
    let is_segment = file.deleted && file.path.starts_with(b"/SYSV");
    is_segment.then(|| i32::try_from(file.ino).ok()).flatten()
}

/// Whether an open file's contents are those of an object.
pub fn is_object(file: &OpenFile) -> bool {
    is_nameless(file) && file.flags & libc::O_PATH as u32 == 0
}

/// Opened with `O_TMPFILE`: it never had a name, and may be given one (linkat(2)).
pub fn is_temporary(file: &OpenFile) -> bool {
    file.flags as i32 & libc::O_TMPFILE & !libc::O_DIRECTORY != 0
}

/// How a mapping of a file without a name is known to `maps`: device, inode number, the name it had.
fn without_name(vma: &Vma) -> Option<(u64, u64, &[u8])> {
    match &vma.backing {
        // A segment may have other users, as a file may.
        Backing::File(file) if file.deleted && segment_of(file).is_none() => {
            Some((file.dev, file.ino, &file.path))
        }
        _ => None,
    }
}

/// Whether it is a mapping of a deleted file that shows there what is written into memory. Where files stay at
/// home, such a file is an object, and any other deleted one is not.
pub fn writes_to_deleted(vma: &Vma) -> bool {
    let of_its_own = |path: &[u8]| path.starts_with(b"/memfd:") || path.starts_with(b"/SYSV");
    let writes = |file: &MappedFile| file.deleted && file.may_write && !of_its_own(&file.path);
    vma.shared && matches!(&vma.backing, Backing::File(file) if writes(file))
}

/// What is mapped and cannot be an object after all, and what processes outside the family map as well.
/// Of open files [`super::nameless`] tells.
pub fn blockers(pid: i32, family: &Family, vmas: &[Vma], rules: Rules, blockers: &mut Vec<Blocker>) {
    anonymous_outside(family, vmas, blockers);
    let mut mapped: BTreeSet<(u64, u64, &[u8])> = vmas.iter().filter_map(without_name).collect();
    match rules {
        Rules::Standalone => segments_in_parts(vmas, blockers),
        Rules::Homed => {
            let written = vmas.iter().filter(|vma| writes_to_deleted(vma));
            blockers.extend(written.clone().filter_map(|vma| why_not_deleted(pid, family, vma)));
            let written: BTreeSet<(u64, u64, &[u8])> = written.filter_map(without_name).collect();
            mapped.retain(|known| known.2.starts_with(b"/memfd:") || written.contains(known));
        }
    }
    if mapped.is_empty() {
        // The usual case: nobody else has to be looked at.
        return;
    }
    let other = proc::pids().into_iter().find(|&other| !family.has(other) && maps_one_of(other, &mapped));
    if let Some(other) = other {
        let what = format!("it shares a mapped file without a name with process {other}");
        blockers.push(Blocker { kind: "mapping", what });
    }
}

/// A deleted file that is written through memory, and would become two files.
fn why_not_deleted(pid: i32, family: &Family, vma: &Vma) -> Option<Blocker> {
    let Backing::File(file) = &vma.backing else { return None };
    let meta = fs::metadata(format!("/proc/{pid}/map_files/{:x}-{:x}", vma.start, vma.end)).ok()?;
    let why = match meta.nlink() {
        0 => {
            let other = nameless::holder_outside(family, (meta.dev(), meta.ino()))?;
            format!("a deleted file, mapped shared, which process {other} has open as well")
        }
        _ => "a deleted file, mapped shared and writable, which has another name".into(),
    };
    let name = String::from_utf8_lossy(&file.path);
    let what = format!("mapping {:x}-{:x} of {name}: {why}", vma.start, vma.end);
    Some(Blocker { kind: "mapping", what })
}

/// Deleted files that are written through memory by one of the processes and open in a way that only the file at
/// home can have; for each process.
pub fn open_as_well(tables: &[(&FilesImage, &[Vma])]) -> Vec<Vec<Blocker>> {
    let vmas = tables.iter().flat_map(|(_, vmas)| *vmas).filter(|vma| writes_to_deleted(vma));
    let written: BTreeSet<(u64, &[u8])> =
        vmas.filter_map(without_name).map(|(_, ino, path)| (ino, path)).collect();
    let of_one = |files: &FilesImage| {
        let open = files.files.iter().enumerate().filter(|(_, file)| {
            let path = file.link.strip_suffix(b" (deleted)").unwrap_or(&file.link);
            is_object(file) && !file.kind.is_memfd() && written.contains(&(file.stat.1, path))
        });
        open.filter_map(|(index, file)| {
            let fd = files.fds.iter().find(|fd| fd.file as usize == index)?;
            let how = match (is_temporary(file), file.locks.is_empty()) {
                (true, _) => "opened without a name (O_TMPFILE)",
                (false, false) => "with a lock",
                (false, true) => return None,
            };
            let name = String::from_utf8_lossy(&file.link);
            let what = format!("fd {}: the file {name}, {how}, is mapped shared and writable", fd.fd);
            Some(Blocker { kind: "fd", what })
        })
        .collect()
    };
    tables.iter().map(|(files, _)| of_one(files)).collect()
}

/// Shared anonymous memory that another process maps as well.
fn anonymous_outside(family: &Family, vmas: &[Vma], blockers: &mut Vec<Blocker>) {
    let ids: BTreeSet<u64> = vmas.iter().filter_map(Vma::anonymous_id).collect();
    if ids.is_empty() {
        return;
    }
    let all = family.anonymous_memory();
    let others = ids.iter().filter_map(|id| all.get(id)).flatten().filter(|&&other| !family.has(other));
    let others: BTreeSet<i32> = others.copied().filter(|&other| !family.is_newcomer(other)).collect();
    if let Some(other) = others.first() {
        let more = match others.len() {
            1 => String::new(),
            n => format!(" and {} more", n - 1),
        };
        let what = format!("it shares anonymous memory with process {other}{more}");
        blockers.push(Blocker { kind: "mapping", what });
    }
}

/// A segment is attached whole (shmat(2)).
fn segments_in_parts(vmas: &[Vma], blockers: &mut Vec<Blocker>) {
    let mut all: Option<Vec<Segment>> = None;
    for vma in vmas {
        let Backing::File(file) = &vma.backing else { continue };
        let Some(id) = segment_of(file) else { continue };
        let known = all.get_or_insert_with(segments).iter().find(|segment| segment.id == id);
        let length = known.map(|segment| segment.size.next_multiple_of(1 << vma.page_shift));
        if file.offset != 0 || length != Some(vma.end - vma.start) {
            let what = format!(
                "mapping {:x}-{:x}: a part of System V segment {id} (what was attached has been unmapped or \
                 protected in parts)",
                vma.start, vma.end
            );
            blockers.push(Blocker { kind: "mapping", what });
        }
    }
}

fn maps_one_of(pid: i32, wanted: &BTreeSet<(u64, u64, &[u8])>) -> bool {
    let Ok(text) = proc::read(pid, "maps") else { return false };
    if !text.windows(9).any(|window| window == b"(deleted)") {
        return false;
    }
    maps::parse(&text).iter().any(|vma| match &vma.backing {
        Backing::File(file) => {
            let path = file.path.strip_suffix(b" (deleted)").unwrap_or(&file.path);
            wanted.contains(&(file.dev, file.ino, path))
        }
        _ => false,
    })
}

/// The key of a segment.
pub fn segment_key(id: i32) -> ObjectKey {
    (SYSV, id as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_of_a_table() {
        let text = "       key      shmid perms                  size  cpid  lpid nattch   uid   gid  cuid  cgid      atime      dtime      ctime                   rss                  swap\n\
         1234567          3  1600                 65536    11    12      2    33    44    33    44 1700000000          0 1700000000                  4096                     0\n\
         x y z\n";
        let found = parse_segments(text);
        assert_eq!(
            found,
            [Segment { id: 3, key: 1_234_567, mode: 0o600, removed: true, size: 65536, owner: (33, 44) }]
        );
    }
}
