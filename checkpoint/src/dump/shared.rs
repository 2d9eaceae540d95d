//! Shared anonymous memory: a file of the kernel's tmpfs without a name.
//!
//! A mapping's page table tells little about it (pages come into it one fault at a time, and are not
//! copied on fork), and reading a hole would fill it. The file itself, by `/proc/PID/map_files`
//! (proc(5)), tells exactly what there is.

use crate::image::Vma;
use crate::sys::pagemap_scan::Region;
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;

/// What has been given already: several mappings may show the same memory.
#[derive(Debug, Default)]
pub struct Given(BTreeMap<u64, Vec<(u64, u64)>>);

impl Given {
    /// The parts of `offset..offset + len` of file `id` that were not asked for before.
    pub fn take(&mut self, id: u64, offset: u64, len: u64) -> Vec<(u64, u64)> {
        let before = self.0.entry(id).or_default();
        let end = offset.saturating_add(len);
        let mut fresh = Vec::new();
        let mut at = offset;
        for &(from, to) in before.iter() {
            if from > at && from < end {
                fresh.push((at, from));
            }
            at = at.max(to.min(end));
        }
        if at < end {
            fresh.push((at, end));
        }
        before.push((offset, end));
        before.sort_unstable();
        fresh
    }
}

/// Where in the mapping there is data, of the parts `wanted` (offsets in the file).
pub fn data_ranges(pid: i32, vma: &Vma, offset: u64, wanted: &[(u64, u64)]) -> io::Result<Vec<Region>> {
    let whole = |&(from, to): &(u64, u64)| place(vma, offset, from, to);
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let path = format!("/proc/{pid}/map_files/{:x}-{:x}", vma.start, vma.end);
    let file = match File::open(path) {
        Ok(file) => file,
        // Needs CAP_CHECKPOINT_RESTORE; without it everything is read, holes too.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            return Ok(wanted.iter().map(whole).collect());
        }
        Err(error) => return Err(error),
    };
    let mut out = Vec::new();
    for &(from, to) in wanted {
        let mut at = from;
        while at < to {
            let start = match lseek(&file, at as i64, Whence::SeekData) {
                Ok(start) if (start as u64) < to => start as u64,
                // ENXIO: no data from here on.
                Ok(_) | Err(Errno::ENXIO) => break,
                Err(errno) => return Err(errno.into()),
            };
            let end = lseek(&file, start as i64, Whence::SeekHole)? as u64;
            if end <= start {
                break;
            }
            out.push(place(vma, offset, start, end.next_multiple_of(4096).min(to)));
            at = end;
        }
    }
    Ok(out)
}

fn place(vma: &Vma, offset: u64, from: u64, to: u64) -> Region {
    let at = |position: u64| vma.start + (position - offset);
    Region { start: at(from), end: at(to), categories: 0 }
}

#[cfg(test)]
mod tests {
    use super::Given;

    #[test]
    fn gives_each_part_once() {
        let mut given = Given::default();
        assert_eq!(given.take(1, 0x1000, 0x1000), [(0x1000, 0x2000)]);
        assert_eq!(given.take(1, 0, 0x4000), [(0, 0x1000), (0x2000, 0x4000)]);
        assert_eq!(given.take(1, 0x800, 0x3000), []);
        assert_eq!(given.take(1, 0x3000, 0x2000), [(0x4000, 0x5000)]);
        assert_eq!(given.take(2, 0x3000, 0x1000), [(0x3000, 0x4000)]);
    }
}
