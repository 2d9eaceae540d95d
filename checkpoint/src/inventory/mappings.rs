//! Mappings: what they are, which of them cannot be carried, and how much memory they hold.

use super::{Blocker, Rules};
use crate::image::{Backing, MappedFile, Vma, VmaFlags};
use crate::proc::{self, maps};
use crate::sys::pagemap_scan::{IS_FILE, Scanner};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;

/// Mappings of a process, with deleted files recognised by what their name stands for now.
pub fn read(pid: i32) -> io::Result<Vec<Vma>> {
    let mut vmas = maps::parse(&proc::read(pid, "smaps")?);
    for vma in &mut vmas {
        if let Backing::File(file) = &mut vma.backing {
            let gone = !names_file(pid, &file.path, file.dev, file.ino);
            if gone && let Some(path) = file.path.strip_suffix(b" (deleted)") {
                file.path = path.to_vec();
            }
            file.deleted = gone;
        }
    }
    Ok(vmas)
}

/// Whether `path`, as the process sees it, is the file with this inode number.
///
/// The device is compared only if the mount is not an overlay or a subvolume, where `stat` and `maps`
/// name different ones.
pub(crate) fn names_file(pid: i32, path: &[u8], dev: u64, ino: u64) -> bool {
    use std::os::unix::ffi::OsStrExt;
    let mut full = format!("/proc/{pid}/root").into_bytes();
    full.extend_from_slice(path);
    let Ok(found) = fs::symlink_metadata(std::ffi::OsStr::from_bytes(&full)) else { return false };
    found.ino() == ino && (found.dev() == dev || libc::major(dev) == 0 || libc::major(found.dev()) == 0)
}

/// Mappings that cannot be carried.
pub fn blockers(vmas: &[Vma], rules: Rules, blockers: &mut Vec<Blocker>) {
    for vma in vmas {
        let Some(why) = why_not(vma, rules) else { continue };
        let name = match &vma.backing {
            Backing::File(file) => String::from_utf8_lossy(&file.path).into_owned(),
            _ => "memory".into(),
        };
        let what = format!("mapping {:x}-{:x} of {name}: {why}", vma.start, vma.end);
        blockers.push(Blocker { kind: "mapping", what });
    }
}

fn why_not(vma: &Vma, rules: Rules) -> Option<&'static str> {
    if matches!(vma.backing, Backing::Vvar | Backing::Vdso | Backing::Vsyscall) {
        return None;
    }
    let flags = vma.flags;
    if flags.contains(VmaFlags::HUGETLB) {
        return Some("explicit huge pages (hugetlb)");
    }
    if flags.intersects(VmaFlags::IO | VmaFlags::PFNMAP) {
        return Some("memory of a device");
    }
    if flags.contains(VmaFlags::USERFAULT) {
        return Some("registered with the program's own userfaultfd");
    }
    if flags.contains(VmaFlags::SEALED) {
        return Some("sealed (mseal): it could not be given back");
    }
    match &vma.backing {
        Backing::File(file) => why_not_file(file, vma.shared, rules),
        _ => None,
    }
}

fn why_not_file(file: &MappedFile, shared: bool, rules: Rules) -> Option<&'static str> {
    let path = file.path.as_slice();
    let is = |prefix: &[u8]| path.starts_with(prefix);
    // Files without a name; the kernel's names for them are fixed.
    if file.deleted && is(b"/SYSV") {
        Some("System V shared memory")
    } else if file.deleted && is(b"/memfd:") {
        Some("a memfd")
    } else if file.deleted && is(b"/[aio]") {
        Some("an asynchronous I/O context")
    } else if !is(b"/") {
        Some("a kernel object")
    } else if is(b"/dev/shm/") && shared && file.may_write {
        Some("POSIX shared memory, mapped writable")
    } else if is(b"/dev/") && !is(b"/dev/shm/") {
        Some("memory of a device")
    } else if shared && file.may_write {
        Some("a file mapped shared and writable")
    } else if file.deleted && rules == Rules::Standalone {
        Some("the file has been deleted or replaced")
    } else {
        None
    }
}

/// Shared anonymous memory that another process maps as well.
pub fn shared_memory(pid: i32, vmas: &[Vma], blockers: &mut Vec<Blocker>) {
    let id_of = |vma: &Vma| match vma.backing {
        Backing::SharedAnon { id, .. } => Some(id),
        _ => None,
    };
    let ids: Vec<u64> = vmas.iter().filter_map(id_of).collect();
    if ids.is_empty() {
        return;
    }
    for other in proc::pids().into_iter().filter(|&other| other != pid) {
        let Ok(text) = proc::read(other, "maps") else { continue };
        let theirs = maps::parse(&text);
        if theirs.iter().filter_map(id_of).any(|id| ids.contains(&id)) {
            let what = format!("it shares anonymous memory with process {other}");
            blockers.push(Blocker { kind: "mapping", what });
        }
    }
}

/// Bytes that an image would hold: private pages in memory or swap, and shared anonymous ones.
pub fn occupied_bytes(pid: i32, vmas: &[Vma]) -> u64 {
    let Ok(mut scanner) = Scanner::open(pid) else { return 0 };
    let mut bytes = 0;
    for vma in vmas.iter().filter(|vma| !vma.flags.intersects(VmaFlags::IO | VmaFlags::PFNMAP)) {
        let file = match vma.backing {
            Backing::Anon | Backing::SharedAnon { .. } => false,
            Backing::File(_) if !vma.shared => true,
            _ => continue,
        };
        let regions = scanner.occupied(vma.start, vma.end, file).unwrap_or_default();
        let own = regions.iter().filter(|region| !file || region.categories & IS_FILE == 0);
        bytes += own.map(|region| region.end - region.start).sum::<u64>();
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &[u8], deleted: bool) -> MappedFile {
        MappedFile { path: path.to_vec(), deleted, dev: 1, ino: 1, offset: 0, may_write: true }
    }

    #[test]
    fn names_what_it_refuses() {
        let why = |path: &[u8], deleted, shared, rules| why_not_file(&file(path, deleted), shared, rules);
        assert_eq!(why(b"/SYSV00000000", true, true, Rules::Homed), Some("System V shared memory"));
        // A file of the user's with such a name is a file.
        assert_eq!(why(b"/SYSV00000000", false, false, Rules::Homed), None);
        assert_eq!(why(b"/memfd:x", true, false, Rules::Homed), Some("a memfd"));
        assert_eq!(why(b"anon_inode:[io_uring]", false, true, Rules::Homed), Some("a kernel object"));
        assert_eq!(why(b"/dev/shm/x", false, false, Rules::Homed), None);
        assert!(why(b"/dev/shm/x", false, true, Rules::Homed).is_some_and(|why| why.contains("POSIX")));
        assert_eq!(why(b"/dev/mem", false, false, Rules::Homed), Some("memory of a device"));
        assert_eq!(why(b"/lib/x.so", true, false, Rules::Homed), None);
        assert!(why(b"/lib/x.so", true, false, Rules::Standalone).is_some());
    }
}
