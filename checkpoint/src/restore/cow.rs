//! A child that starts with its parent's memory: what it keeps of it, and which pages become others.
//!
//! A page of the parent's that nobody writes to stays one page for both. What the image gives anew is
//! compared first, so that it is not copied where it is the same; what it does not give is dropped.

use super::mappings::{self, Contents};
use super::pkeys::Keys;
use super::{FileSource, RestoreError};
use crate::image::kept::{Kept, kept, without};
use crate::image::{Backing, MmImage, ProcessImage, Vma};
use crate::sys::pagemap_scan::{IS_FILE, IS_PFNZERO, Scanner};
use crate::tracee::{Call, Tracee};
use std::collections::BTreeMap;

const PAGE: u64 = 4096;

/// What a child has of its parent's memory and is still to be asked about.
#[derive(Debug, Default)]
pub struct Inherited {
    kept: Vec<Kept>,
    /// Pages that are there: starts and ends. What is left at the end is not the child's.
    stale: BTreeMap<u64, u64>,
    /// The image tells which pages are the parent's: no need to compare.
    told: bool,
}

/// Unmaps what `tracee`, a fresh child with its parent's memory, does not keep; gives what it keeps.
pub fn empty(tracee: &mut Tracee, image: &ProcessImage, parent: &MmImage) -> Result<Vec<Kept>, RestoreError> {
    let kept = kept(parent, &image.mm);
    unmap_others(tracee, &kept)?;
    Ok(kept)
}

/// Makes the mappings that it has besides.
pub fn fit(
    tracee: &mut Tracee,
    image: &ProcessImage,
    kept: Vec<Kept>,
    files: &mut dyn FileSource,
    keys: Keys,
) -> Result<(Contents, Inherited), RestoreError> {
    let protect: Vec<Call> = kept
        .iter()
        .filter_map(|part| {
            let (prot, key) = part.prot?;
            Some(keys.protect_range(part.start, part.end, prot, key))
        })
        .collect();
    tracee.must_all(0, &protect)?;
    let missing: Vec<Vma> = image.mm.vmas.iter().flat_map(|vma| without(vma, &kept)).collect();
    let contents = mappings::map_all(tracee, &missing, image, files, keys)?;
    let stale = present(tracee, image, &kept)?;
    Ok((contents, Inherited { kept, stale, told: false }))
}

fn unmap_others(tracee: &mut Tracee, kept: &[Kept]) -> Result<(), RestoreError> {
    let unmap =
        |start: u64, end: u64| Call::must("unmapping", libc::SYS_munmap, [start, end - start, 0, 0, 0, 0]);
    let mut calls = Vec::new();
    for (start, end) in super::layout::own_ranges(tracee)? {
        let mut at = start;
        let from = kept.partition_point(|part| part.end <= start);
        for part in kept[from..].iter().take_while(|part| part.start < end) {
            if part.start > at {
                calls.push(unmap(at, part.start));
            }
            at = at.max(part.end);
        }
        if at < end {
            calls.push(unmap(at, end));
        }
    }
    tracee.must_all(0, &calls)?;
    Ok(())
}

/// The pages of the kept parts that are the parent's own: not those of a file behind them.
fn present(tracee: &Tracee, image: &ProcessImage, kept: &[Kept]) -> Result<BTreeMap<u64, u64>, RestoreError> {
    let failed = |source| RestoreError::File { what: "reading pagemap".into(), source };
    let mut scanner = Scanner::open(tracee.pid()).map_err(failed)?;
    let mut stale = BTreeMap::new();
    for part in kept {
        let at = image.mm.vmas.partition_point(|vma| vma.end <= part.start);
        if image.mm.vmas.get(at).is_some_and(|vma| matches!(vma.backing, Backing::Aio { .. })) {
            continue;
        }
        let of_file = image.mm.vmas.get(at).is_some_and(|vma| matches!(vma.backing, Backing::File(_)));
        let found = scanner
            .occupied(part.start, part.end, of_file)
            .map_err(|errno| RestoreError::file("reading pagemap", errno))?;
        for region in found {
            let skipped = if of_file { IS_FILE } else { IS_PFNZERO };
            if region.categories & skipped == 0 {
                stale.insert(region.start.max(part.start), region.end.min(part.end));
            }
        }
    }
    Ok(stale)
}

impl Inherited {
    /// The pages are as the parent's.
    pub fn same(&mut self, addr: u64, len: u64) -> Result<(), RestoreError> {
        self.told = true;
        let mut at = addr;
        let end = addr.checked_add(len);
        for part in &self.kept {
            if part.start <= at && at < part.end {
                at = part.end;
            }
        }
        if end.is_none_or(|end| at < end) {
            let what = "the image is not consistent: pages are said to be the parent's that cannot be";
            return Err(RestoreError::Unfit(what.into()));
        }
        self.take(addr, addr + len);
        Ok(())
    }

    /// The parts of `bytes`, to come to `addr`, that are not there already.
    pub fn different<'a>(&mut self, tracee: &Tracee, addr: u64, bytes: &'a [u8]) -> Vec<(u64, &'a [u8])> {
        let end = addr + bytes.len() as u64;
        let there = self.take(addr, end);
        if self.told || there.is_empty() {
            return vec![(addr, bytes)];
        }
        let mut out: Vec<(u64, &[u8])> = Vec::new();
        let mut write = |from: u64, to: u64| {
            let part = &bytes[(from - addr) as usize..(to - addr) as usize];
            match out.last_mut() {
                Some((start, last)) if *start + last.len() as u64 == from => {
                    *last = &bytes[(*start - addr) as usize..(to - addr) as usize];
                }
                _ => out.push((from, part)),
            }
        };
        let mut at = addr;
        let mut page = vec![0; PAGE as usize];
        for (from, to) in there {
            if from > at {
                write(at, from);
            }
            at = from;
            while at < to {
                let wanted = &bytes[(at - addr) as usize..(at + PAGE - addr) as usize];
                // Not by process_vm_readv(2), for which the kernel makes a copy of the page.
                let same = tracee.read_mem(at, &mut page).is_ok() && page == wanted;
                if !same {
                    write(at, at + PAGE);
                }
                at += PAGE;
            }
        }
        if at < end {
            write(at, end);
        }
        out
    }

    /// The range has been written by others.
    pub fn written(&mut self, addr: u64, len: u64) {
        self.take(addr, addr.saturating_add(len));
    }

    /// Drops what is not the child's.
    pub fn drop_stale(&mut self, tracee: &mut Tracee) -> Result<(), RestoreError> {
        let drop = |(start, end): (u64, u64)| {
            let args = [start, end - start, libc::MADV_DONTNEED as u64, 0, 0, 0];
            Call::must("dropping pages", libc::SYS_madvise, args)
        };
        let calls: Vec<Call> = std::mem::take(&mut self.stale).into_iter().map(drop).collect();
        tracee.must_all(0, &calls)?;
        Ok(())
    }

    /// Takes a range out of the pages that are there; what of it was there.
    fn take(&mut self, addr: u64, end: u64) -> Vec<(u64, u64)> {
        let mut out = Vec::new();
        let first = self.stale.range(..=addr).next_back().map_or(addr, |(&start, _)| start);
        let touched: Vec<(u64, u64)> = self
            .stale
            .range(first..end)
            .map(|(&from, &to)| (from, to))
            .filter(|&(_, to)| to > addr)
            .collect();
        for (from, to) in touched {
            self.stale.remove(&from);
            if from < addr {
                self.stale.insert(from, addr);
            }
            if to > end {
                self.stale.insert(end, to);
            }
            out.push((from.max(addr), to.min(end)));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_stale() {
        let mut inherited = Inherited {
            kept: vec![Kept { start: 0x1000, end: 0x9000, prot: None }],
            stale: BTreeMap::from([(0x1000, 0x4000), (0x6000, 0x8000)]),
            told: false,
        };
        assert_eq!(inherited.take(0x2000, 0x7000), [(0x2000, 0x4000), (0x6000, 0x7000)]);
        assert_eq!(inherited.stale, BTreeMap::from([(0x1000, 0x2000), (0x7000, 0x8000)]));
        assert!(inherited.same(0x1000, 0x1000).is_ok());
        assert_eq!(inherited.stale, BTreeMap::from([(0x7000, 0x8000)]));
        assert!(inherited.same(0x8000, 0x2000).is_err());
        assert!(inherited.same(0x8000, u64::MAX).is_err());
        assert!(inherited.take(0x7000, 0x7000).is_empty());
    }
}
