//! `PAGEMAP_SCAN` (Documentation/admin-guide/mm/pagemap.rst, 6.7 on), and `/proc/PID/pagemap` itself
//! for kernels without it.

use nix::errno::Errno;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// A page of a file mapping is the file's own (not a private copy).
pub const IS_FILE: u64 = 1 << 2;
/// In memory.
pub const IS_PRESENT: u64 = 1 << 3;
/// In swap.
pub const IS_SWAPPED: u64 = 1 << 4;
/// The kernel's zero page.
pub const IS_PFNZERO: u64 = 1 << 5;

#[repr(C)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// A run of pages of the same categories.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Region {
    /// First address.
    pub start: u64,
    /// One past the last.
    pub end: u64,
    /// `IS_*`.
    pub categories: u64,
}

const _: () = assert!(size_of::<ScanArg>() == 96 && size_of::<Region>() == 24);
/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
const BATCH: usize = 4096;
const PAGE: u64 = 4096;

/// Runs of pages in `start..end` that hold something (in memory or in swap), with their categories.
pub fn occupied(pagemap: &File, start: u64, end: u64) -> Result<Vec<Region>, Errno> {
    let mut out = Vec::new();
    let mut at = start;
    while at < end {
        let mut batch = vec![Region::default(); BATCH];
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            flags: 0,
            start: at,
            end,
            walk_end: 0,
            vec: batch.as_mut_ptr() as u64,
            vec_len: BATCH as u64,
            max_pages: 0,
            category_inverted: 0,
            category_mask: 0,
            category_anyof_mask: IS_PRESENT | IS_SWAPPED,
            return_mask: IS_FILE | IS_PRESENT | IS_SWAPPED | IS_PFNZERO,
        };
        // SAFETY: `arg` and the vector it names outlive the call, with the sizes given.
        let got = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
        match Errno::result(got) {
            Ok(n) => out.extend_from_slice(&batch[..n as usize]),
            Err(Errno::ENOTTY) => return from_pagemap(pagemap, start, end),
            Err(errno) => return Err(errno),
        }
        if arg.walk_end <= at {
            break;
        }
        at = arg.walk_end;
    }
    Ok(out)
}

fn from_pagemap(pagemap: &File, start: u64, end: u64) -> Result<Vec<Region>, Errno> {
    let mut out: Vec<Region> = Vec::new();
    let mut words = vec![0u8; 8 * 4096];
    let mut at = start;
    while at < end {
        let pages = ((end - at) / PAGE).min(4096);
        let bytes = &mut words[..pages as usize * 8];
        pagemap
            .read_exact_at(bytes, at / PAGE * 8)
            .map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
        for (page, word) in bytes.chunks_exact(8).enumerate() {
            let entry = u64::from_le_bytes(word.try_into().expect("eight bytes"));
            let mut categories = 0;
            if entry >> 63 & 1 == 1 {
                categories |= IS_PRESENT;
            }
            if entry >> 62 & 1 == 1 {
                categories |= IS_SWAPPED;
            }
            if entry >> 61 & 1 == 1 {
                categories |= IS_FILE;
            }
            if categories & (IS_PRESENT | IS_SWAPPED) == 0 {
                continue;
            }
            let from = at + page as u64 * PAGE;
            match out.last_mut() {
                Some(last) if last.end == from && last.categories == categories => last.end += PAGE,
                _ => out.push(Region { start: from, end: from + PAGE, categories }),
            }
        }
        at += pages * PAGE;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_touched_pages() {
        let mut memory = vec![0u8; 64 * 4096];
        let first = (memory.as_ptr() as u64).next_multiple_of(PAGE);
        let offset = (first - memory.as_ptr() as u64) as usize;
        memory[offset + 5 * 4096] = 1;
        let pagemap = File::open("/proc/self/pagemap").expect("pagemap");
        for find in [occupied, from_pagemap] {
            let regions = find(&pagemap, first, first + 32 * PAGE).expect("scans");
            let page = first + 5 * PAGE;
            assert!(
                regions.iter().any(|r| r.start <= page && page < r.end && r.categories & IS_PRESENT != 0)
            );
        }
        assert_eq!(memory[offset + 5 * 4096], 1);
    }
}
