//! Mappings: what they are, which of them cannot be carried, and how much memory they hold.

use super::{Blocker, Rules};
use crate::image::{Backing, HUGE_PAGE_SHIFTS, MappedFile, Vma, VmaFlags};
use crate::proc::{self, maps, vm_flags};
use crate::sys::bpf;
use crate::sys::pagemap_scan::{IS_FILE, Scanner};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;

/// With a longer `maps` (some 600 mappings), to learn what the kernel's flags mean takes less than `smaps`.
const LONG: usize = 48 << 10;

/// Mappings of a process, with deleted files recognised by what their name stands for now.
pub fn read(pid: i32) -> io::Result<Vec<Vma>> {
    match bpf::is_prepared() {
        true => read_knowing(pid, &proc::read(pid, "maps")?),
        false => of_text(pid, &proc::read(pid, "smaps")?),
    }
}

/// The same of a process whose `maps` has been read since it stands still: without `smaps`, if the kernel tells the
/// flags the short way ([`vm_flags`]).
pub fn read_knowing(pid: i32, maps: &[u8]) -> io::Result<Vec<Vma>> {
    let mut vmas = maps::parse(maps);
    match (bpf::is_prepared() || maps.len() >= LONG) && vm_flags::complete(pid, &mut vmas) {
        true => knowing_files(pid, vmas),
        false => of_text(pid, &proc::read(pid, "smaps")?),
    }
}

/// The same without flags and protection keys, which take the kernel ten times as long to tell: it goes
/// through the page tables for them.
pub fn read_quickly(pid: i32) -> io::Result<Vec<Vma>> {
    let text = proc::read(pid, "maps")?;
    match memchr::memmem::find(&text, b"/SYSV") {
        // How long one is depends on the size of its pages.
        Some(_) => read(pid),
        None => of_text(pid, &text),
    }
}

/// The same from the text of `maps` or `smaps`.
pub(crate) fn of_text(pid: i32, text: &[u8]) -> io::Result<Vec<Vma>> {
    knowing_files(pid, maps::parse(text))
}

/// Finds out what is behind the names of files.
fn knowing_files(pid: i32, mut vmas: Vec<Vma>) -> io::Result<Vec<Vma>> {
    // A library is mapped in several parts, one after the other.
    let mut last: Option<(Vec<u8>, u64, u64, bool)> = None;
    for vma in &mut vmas {
        if let Backing::File(file) = &mut vma.backing {
            let gone = match &last {
                Some((path, dev, ino, gone)) if (path, *dev, *ino) == (&file.path, file.dev, file.ino) => {
                    *gone
                }
                _ => !names_file(pid, &file.path, file.dev, file.ino),
            };
            last = Some((file.path.clone(), file.dev, file.ino, gone));
            if gone && let Some(path) = file.path.strip_suffix(b" (deleted)") {
                file.path = path.to_vec();
            }
            file.deleted = gone;
            if let Some(ring) = ring(file) {
                vma.backing = ring;
            }
        }
    }
    Ok(vmas)
}

/// The ring of an asynchronous I/O context, from its beginning: the kernel's own file system of them, which nobody can
/// mount, has no device (aio_init_fs_context in fs/aio.c).
fn ring(file: &MappedFile) -> Option<Backing> {
    let is_one = file.deleted && file.path == b"/[aio]" && libc::major(file.dev) == 0 && file.offset == 0;
    is_one.then_some(Backing::Aio { id: file.ino })
}

/// Whether `path`, as `/proc` tells it, is the file with this inode number.
///
/// The device is compared only if the mount is not an overlay or a subvolume, where `stat` and `maps`
/// name different ones.
pub(crate) fn names_file(pid: i32, path: &[u8], dev: u64, ino: u64) -> bool {
    use std::os::unix::ffi::OsStrExt;
    let is_it = |root: &str| {
        let full = [root.as_bytes(), path].concat();
        let Ok(found) = fs::symlink_metadata(std::ffi::OsStr::from_bytes(&full)) else { return false };
        found.ino() == ino && (found.dev() == dev || libc::major(dev) == 0 || libc::major(found.dev()) == 0)
    };
    // Paths are told as this program sees them (d_path in fs/d_path.c). Those of a process in another mount
    // namespace are the same from its root, unless that is a part of what is mounted here (chroot(2)).
    is_it(&format!("/proc/{pid}/root")) || proc::link(pid, "root").is_ok_and(|root| root != b"/") && is_it("")
}

/// Mappings that cannot be carried.
pub fn blockers(vmas: &[Vma], rules: Rules, blockers: &mut Vec<Blocker>) {
    for vma in vmas {
        let Some(why) = why_not(vma, rules) else { continue };
        let name = match &vma.backing {
            Backing::File(file) => String::from_utf8_lossy(&file.path).into_owned(),
            Backing::Aio { .. } => "/[aio]".into(),
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
    if let (true, Some(why)) = (vma.is_huge(), why_not_huge(vma, rules)) {
        return Some(why);
    }
    if flags.intersects(VmaFlags::IO | VmaFlags::PFNMAP) {
        return Some("memory of a device");
    }
    if flags.contains(VmaFlags::USERFAULT) {
        return Some("registered with the program's own userfaultfd");
    }
    // A process that is ended after its dump gives all back by that; a deputy has to be emptied.
    if flags.contains(VmaFlags::SEALED) && rules == Rules::Homed {
        return Some("sealed (mseal): it could not be given back");
    }
    match &vma.backing {
        Backing::File(file) => why_not_file(file, rules),
        // What it reads and writes is at home.
        Backing::Aio { .. } if rules == Rules::Homed => Some("an asynchronous I/O context"),
        Backing::Aio { .. } if vma.prot & libc::PROT_WRITE as u32 == 0 => {
            Some("an asynchronous I/O context whose ring it must not write to")
        }
        _ => None,
    }
}

/// Explicit huge pages: those of memory are carried, those of a mounted file system are its affair.
fn why_not_huge(vma: &Vma, rules: Rules) -> Option<&'static str> {
    if rules == Rules::Homed {
        return Some("explicit huge pages (hugetlb)");
    }
    if !HUGE_PAGE_SHIFTS.contains(&vma.page_shift) {
        return Some("huge pages of an unknown size");
    }
    match &vma.backing {
        Backing::File(file) => {
            let of_memory = file.path.starts_with(b"/memfd:") || file.path.starts_with(b"/SYSV");
            (!file.deleted || !of_memory).then_some("a file of huge pages (hugetlbfs)")
        }
        _ => None,
    }
}

fn why_not_file(file: &MappedFile, rules: Rules) -> Option<&'static str> {
    let path = file.path.as_slice();
    let is = |prefix: &[u8]| path.starts_with(prefix);
    // Files without a name; the kernel's names for them are fixed.
    if file.deleted && is(b"/SYSV") {
        (rules == Rules::Homed).then_some("System V shared memory")
    } else if file.deleted && is(b"/memfd:") {
        None
    } else if file.deleted && is(b"/[aio]") {
        // A ring whole is none of these.
        Some("a part of the ring of an asynchronous I/O context")
    } else if file.deleted && is(b"/secretmem") {
        Some("secret memory (memfd_secret)")
    } else if !is(b"/") || file.deleted && is(b"/dmabuf:") {
        Some("a kernel object")
    } else if is(b"/dev/") && !is(b"/dev/shm/") {
        Some("memory of a device")
    } else {
        None
    }
}

/// Bytes that an image would hold: private pages in memory or swap, and shared anonymous ones.
pub fn occupied_bytes(pid: i32, vmas: &[Vma]) -> u64 {
    let Ok(mut scanner) = Scanner::open(pid) else { return 0 };
    let mut bytes = 0;
    for vma in vmas.iter().filter(|vma| !vma.flags.intersects(VmaFlags::IO | VmaFlags::PFNMAP)) {
        let file = match vma.backing {
            Backing::Anon | Backing::SharedAnon { .. } => false,
            Backing::File(_) | Backing::Object { .. } if !vma.shared => true,
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
    fn huge_pages_of_memory_only() {
        let why = |backing: Backing, page_shift, rules| {
            let flags = VmaFlags::HUGETLB;
            let (start, end, name) = (0x4000_0000, 0x8000_0000, None);
            let vma = Vma { start, end, prot: 3, backing, shared: true, flags, name, pkey: 0, page_shift };
            why_not(&vma, rules)
        };
        let homed = why(Backing::Anon, 21, Rules::Homed);
        assert_eq!(homed, Some("explicit huge pages (hugetlb)"));
        assert_eq!(why(Backing::Anon, 21, Rules::Standalone), None);
        assert!(why(Backing::Anon, 16, Rules::Standalone).is_some_and(|why| why.contains("size")));
        let of_file = |path: &[u8], deleted| Backing::File(file(path, deleted));
        assert_eq!(why(of_file(b"/memfd:x", true), 30, Rules::Standalone), None);
        assert!(
            why(of_file(b"/mnt/x", true), 21, Rules::Standalone).is_some_and(|why| why.contains("hugetlbfs"))
        );
        assert!(why(of_file(b"/memfd:x", false), 21, Rules::Standalone).is_some());
    }

    #[test]
    fn names_what_it_refuses() {
        let why = |path: &[u8], deleted, rules| why_not_file(&file(path, deleted), rules);
        assert_eq!(why(b"/SYSV00000000", true, Rules::Homed), Some("System V shared memory"));
        // A file of the user's with such a name is a file.
        assert_eq!(why(b"/SYSV00000000", false, Rules::Homed), None);
        assert_eq!(why(b"/memfd:x", true, Rules::Homed), None);
        assert_eq!(why(b"anon_inode:[io_uring]", false, Rules::Homed), Some("a kernel object"));
        assert_eq!(why(b"/dev/shm/x", false, Rules::Homed), None);
        assert_eq!(why(b"/dev/mem", false, Rules::Homed), Some("memory of a device"));
        assert_eq!(why(b"/lib/x.so", true, Rules::Homed), None);
        // In an image that stands alone they are objects.
        assert_eq!(why(b"/lib/x.so", true, Rules::Standalone), None);
        assert_eq!(why(b"/memfd:x", true, Rules::Standalone), None);
        assert!(why(b"/secretmem", true, Rules::Standalone).is_some_and(|why| why.contains("secret")));
    }
}
