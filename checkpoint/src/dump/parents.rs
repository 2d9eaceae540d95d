//! Which pages of a process are its parent's or somebody else's too: fork copies no page until one of
//! both writes to it, and until then the page tables of both name the same frame.
//!
//! `/proc/PID/pagemap` tells frames to those who have CAP_SYS_ADMIN (Documentation/admin-guide/mm/pagemap.rst);
//! without it nothing is told to be common, and a restore compares the contents.
//!
//! process_vm_readv(2) must not be used on such pages: it pins what it reads, for which the kernel gives
//! the process a copy of its own (`gup_must_unshare`, mm/gup.c). A dump would leave a tree that needs
//! several times its memory.

use super::DumpError;
use crate::image::MmImage;
use crate::image::kept::{Kept, kept};
use std::fs::File;
use std::os::unix::fs::FileExt;

const PAGE: u64 = 4096;
/// Entries read at a time, at most.
const BATCH: u64 = 4096;
/// And at least: small mappings mostly stand side by side, and the kernel gives a page of entries at a time.
const AHEAD: u64 = 512;

/// Whose pages are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whose {
    /// Nobody else's.
    Own,
    /// Somebody else's too.
    Common,
    /// Its parent's, at the same place.
    Parents,
}

/// The page table of a process, and its parent's.
pub struct Frames {
    pid: i32,
    own: Table,
    parent: Option<(Vec<Kept>, Table)>,
}

/// A page table, and what was read of it last: nothing of it changes.
struct Table {
    file: File,
    /// Number of the first page.
    first: u64,
    entries: Vec<u8>,
}

impl Table {
    fn open(pid: i32) -> std::io::Result<Table> {
        Ok(Table { file: File::open(format!("/proc/{pid}/pagemap"))?, first: 0, entries: Vec::new() })
    }

    /// The entries of these pages.
    fn read(&mut self, page: u64, count: u64) -> std::io::Result<&[u8]> {
        let is_there = page >= self.first && page + count <= self.first + self.entries.len() as u64 / 8;
        if !is_there {
            self.entries.resize(count.max(AHEAD) as usize * 8, 0);
            self.first = page;
            let got = self.file.read_at(&mut self.entries, page * 8)?;
            // Behind the last page there is nothing.
            self.entries.truncate(got / 8 * 8);
        }
        let from = (page - self.first) as usize * 8;
        let wanted = self.entries.get(from..from + count as usize * 8);
        wanted.ok_or_else(|| std::io::ErrorKind::UnexpectedEof.into())
    }
}

impl Frames {
    pub fn open(pid: i32, mm: &MmImage, parent: Option<(i32, &MmImage)>) -> Result<Frames, DumpError> {
        let open =
            |pid: i32| Table::open(pid).map_err(|source| DumpError::Proc { what: "pagemap", pid, source });
        let parent = match parent {
            Some((parent, theirs)) => Some((kept(theirs, mm), open(parent)?)),
            None => None,
        };
        Ok(Frames { pid, own: open(pid)?, parent })
    }

    /// Splits a range of private memory into parts: start, end, and whose they are.
    pub fn split(&mut self, start: u64, end: u64) -> Result<Vec<(u64, u64, Whose)>, DumpError> {
        let mut out: Vec<(u64, u64, Whose)> = Vec::new();
        let mut at = start;
        while at < end {
            let (stop, kept) = self.next_part(at, end);
            let pages = ((stop - at) / PAGE).clamp(1, BATCH);
            let failed = |source| DumpError::Proc { what: "pagemap", pid: self.pid, source };
            let mine = self.own.read(at / PAGE, pages).map_err(failed)?;
            let theirs = match self.parent.as_mut().filter(|_| kept) {
                Some((_, table)) => table.read(at / PAGE, pages).map_err(failed)?,
                None => &[],
            };
            let theirs = theirs.chunks_exact(8).map(word).chain(std::iter::repeat(0));
            for (mine, theirs) in mine.chunks_exact(8).map(word).zip(theirs) {
                let whose = whose(mine, theirs);
                match out.last_mut() {
                    Some(last) if last.1 == at && last.2 == whose => last.1 = at + PAGE,
                    _ => out.push((at, at + PAGE, whose)),
                }
                at += PAGE;
            }
        }
        Ok(out)
    }

    /// How far what is at `at` goes on, at most to `end`, and whether it may be the parent's.
    fn next_part(&self, at: u64, end: u64) -> (u64, bool) {
        let Some((kept, _)) = &self.parent else { return (end, false) };
        match kept.get(kept.partition_point(|part| part.end <= at)) {
            Some(part) if part.start <= at => (part.end.min(end), true),
            Some(part) => (part.start.min(end), false),
            None => (end, false),
        }
    }
}

fn word(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes.try_into().expect("eight bytes"))
}

/// From the entries of a page in both tables.
fn whose(mine: u64, theirs: u64) -> Whose {
    const PRESENT_OR_SWAPPED: u64 = 3 << 62;
    const EXCLUSIVE: u64 = 1 << 56;
    const FRAME: u64 = (1 << 55) - 1;
    // One frame, or one place in the swap.
    let what = PRESENT_OR_SWAPPED | FRAME;
    if mine & PRESENT_OR_SWAPPED != 0 && mine & FRAME != 0 && mine & what == theirs & what {
        Whose::Parents
    } else if mine >> 63 == 1 && mine & EXCLUSIVE == 0 {
        Whose::Common
    } else {
        Whose::Own
    }
}

#[cfg(test)]
mod tests {
    use super::{Whose, whose};

    #[test]
    fn one_frame() {
        let (present, exclusive) = (1 << 63, 1 << 56);
        assert_eq!(whose(present | 0x1234, present | 0x1234 | 1 << 55), Whose::Parents);
        assert_eq!(whose(present | 0x1234, present | 0x1235), Whose::Common);
        assert_eq!(whose(present | 0x1234, 1 << 62 | 0x1234), Whose::Common);
        assert_eq!(whose(present | exclusive | 0x1234, 0), Whose::Own);
        // Hidden, or not there.
        assert_eq!(whose(present, present), Whose::Common);
        assert_eq!(whose(0, 0), Whose::Own);
    }
}
