//! `PAGEMAP_SCAN` (Documentation/admin-guide/mm/pagemap.rst, 6.7 on), and `/proc/PID/pagemap` itself
//! for kernels without it.

use nix::errno::Errno;
use std::fs::File;
use std::io;
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
/// Written since it was armed, or never armed; what is not there counts as written too.
pub const IS_WRITTEN: u64 = 1 << 1;
/// A guard page (`MADV_GUARD_INSTALL`); told by 6.16 and newer.
const IS_GUARD: u64 = 1 << 8;
/// Arms what is found, in the same walk of the page table (`PM_SCAN_WP_MATCHING`).
const ARM: u64 = 1;
/// Fails with `EPERM` at memory that is not registered (`PM_SCAN_CHECK_WPASYNC`).
const REGISTERED: u64 = 2;

#[repr(C)]
#[derive(Default)]
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
/// Ranges below this length are not looked at one by one, bytes.
const WINDOW: u64 = 32 << 20;
/// Nothing of a process is above (arch/x86/include/asm/page_64_types.h, `TASK_SIZE_MAX`).
const TOP: u64 = 0x7fff_ffff_f000;

/// Which pages are asked for.
#[derive(Clone, Copy, Default)]
struct Question {
    flags: u64,
    inverted: u64,
    all_of: u64,
    any_of: u64,
    tell: u64,
}

/// Memory of which a kind of page is asked for: `own` leaves out pages that are those of a file, which takes the
/// kernel twenty times as long to tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// First address.
    pub start: u64,
    /// One past the last.
    pub end: u64,
    /// Only the process' own pages.
    pub own: bool,
}

/// The page table of one process, as far as it may be seen.
pub struct Scanner {
    pagemap: File,
    /// One for all scans: to clear a fresh one costs more than most scans.
    batch: Vec<Region>,
    guards: bool,
    /// What was found in a range that was looked at with one question.
    seen: (u64, u64, Vec<Region>),
}

impl Scanner {
    /// Opens it.
    pub fn open(pid: i32) -> io::Result<Scanner> {
        let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
        let mut scanner = Scanner {
            pagemap,
            batch: vec![Region::default(); BATCH],
            guards: false,
            seen: (0, 0, Vec::new()),
        };
        let probe = Question { all_of: IS_GUARD, tell: IS_GUARD, ..Question::default() };
        // An unknown category is EINVAL.
        scanner.guards = scanner.scan(0, PAGE, &probe).is_ok();
        Ok(scanner)
    }

    /// Runs of pages in `start..end` that hold something (in memory or in swap), with their categories.
    ///
    /// `IS_FILE` is told only if `files` is set: it makes the kernel look at every page itself, which
    /// takes ten times as long. Small ranges are looked at together with what follows them, and later
    /// answered from that: the process must stand still, or a scanner be used for one look only.
    pub fn occupied(&mut self, start: u64, end: u64, files: bool) -> Result<Vec<Region>, Errno> {
        if end.saturating_sub(start) >= WINDOW {
            return self.look(start, end, files);
        }
        if start < self.seen.0 || end > self.seen.1 {
            let until = start.saturating_add(WINDOW).min(TOP).max(end);
            self.seen = (start, until, self.look(start, until, true)?);
        }
        let found = &self.seen.2;
        let first = found.partition_point(|region| region.end <= start);
        let inside = found[first..].iter().take_while(|region| region.start < end);
        let told = if files { u64::MAX } else { !IS_FILE };
        let clip = |region: &Region| Region {
            start: region.start.max(start),
            end: region.end.min(end),
            categories: region.categories & told,
        };
        Ok(inside.map(clip).collect())
    }

    fn look(&mut self, start: u64, end: u64, files: bool) -> Result<Vec<Region>, Errno> {
        let guard = if self.guards { IS_GUARD } else { 0 };
        let question = Question {
            inverted: guard,
            all_of: guard,
            any_of: IS_PRESENT | IS_SWAPPED,
            tell: IS_PRESENT | IS_SWAPPED | IS_PFNZERO | if files { IS_FILE } else { 0 },
            ..Question::default()
        };
        match self.scan(start, end, &question) {
            Err(Errno::ENOTTY) => from_pagemap(&self.pagemap, start, end),
            other => other,
        }
    }

    /// Guard pages of the whole process: starts and ends.
    pub fn guards(&mut self) -> Result<Vec<(u64, u64)>, Errno> {
        if !self.guards {
            return Ok(Vec::new());
        }
        let question = Question { all_of: IS_GUARD, tell: IS_GUARD, ..Question::default() };
        let found = self.scan(0, TOP, &question)?;
        Ok(found.into_iter().map(|region| (region.start, region.end)).collect())
    }

    fn scan(&mut self, start: u64, end: u64, question: &Question) -> Result<Vec<Region>, Errno> {
        let mut out = Vec::new();
        let mut at = start;
        while at < end {
            let (found, walk_end) = self.step(at, end, question)?;
            out.extend_from_slice(found);
            if walk_end <= at {
                break;
            }
            at = walk_end;
        }
        Ok(out)
    }

    /// One call: what it found, and how far it looked.
    fn step(&mut self, start: u64, end: u64, question: &Question) -> Result<(&[Region], u64), Errno> {
        let mut arg = ScanArg {
            size: size_of::<ScanArg>() as u64,
            flags: question.flags,
            start,
            end,
            vec: self.batch.as_mut_ptr() as u64,
            vec_len: self.batch.len() as u64,
            category_inverted: question.inverted,
            category_mask: question.all_of,
            category_anyof_mask: question.any_of,
            return_mask: question.tell,
            ..ScanArg::default()
        };
        // SAFETY: `arg` and the vector it names outlive the call, with the sizes given.
        let got = unsafe { libc::ioctl(self.pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
        let n = Errno::result(got)? as usize;
        Ok((self.batch.get(..n).ok_or(Errno::EPROTO)?, arg.walk_end))
    }
}

/// Memory that is registered with a userfaultfd for tracking ([`super::userfaultfd::Tracking`]): one call each, which
/// tells what it found and how far it looked. `EPERM`: not all of it is registered.
impl Scanner {
    /// Pages that are there and were written since they were armed; arms them again.
    pub fn rearm(&mut self, part: Part) -> Result<(&[Region], u64), Errno> {
        let question = self.there(part).and(IS_WRITTEN, ARM | REGISTERED);
        self.tracked(part, &question)
    }

    /// Pages that are there, armed before or not; arms them.
    pub fn arm_all(&mut self, part: Part) -> Result<(&[Region], u64), Errno> {
        let question = self.there(part).and(0, ARM | REGISTERED);
        self.tracked(part, &question)
    }

    /// The same; arms nothing.
    pub fn written(&mut self, part: Part) -> Result<(&[Region], u64), Errno> {
        let question = self.there(part).and(IS_WRITTEN, REGISTERED);
        self.tracked(part, &question)
    }

    /// Pages that are there, registered or not. Arms nothing.
    pub fn present(&mut self, part: Part) -> Result<(&[Region], u64), Errno> {
        let question = self.there(part);
        self.tracked(part, &question)
    }

    /// Pages that were written since they were armed, with `IS_PRESENT` or `IS_SWAPPED`, and ranges where there
    /// is no page, with neither. Arms nothing. Of ordinary private anonymous memory only: elsewhere the kernel does
    /// not tell all ranges without a page.
    pub fn written_or_absent(&mut self, part: Part) -> Result<(&[Region], u64), Errno> {
        let question = Question {
            flags: REGISTERED,
            all_of: IS_WRITTEN,
            tell: IS_WRITTEN | IS_PRESENT | IS_SWAPPED | IS_PFNZERO | self.guard(),
            ..Question::default()
        };
        self.tracked(part, &question)
    }

    /// The same without pages that are present.
    pub fn absent(&mut self, part: Part) -> Result<(&[Region], u64), Errno> {
        let question = Question {
            flags: REGISTERED,
            inverted: IS_PRESENT,
            all_of: IS_WRITTEN | IS_PRESENT,
            tell: IS_WRITTEN | IS_PRESENT | IS_SWAPPED | self.guard(),
            ..Question::default()
        };
        self.tracked(part, &question)
    }

    fn guard(&self) -> u64 {
        if self.guards { IS_GUARD } else { 0 }
    }

    fn there(&self, part: Part) -> Question {
        let file = if part.own { IS_FILE } else { 0 };
        Question {
            flags: 0,
            inverted: self.guard() | file,
            all_of: self.guard() | file,
            any_of: IS_PRESENT | IS_SWAPPED,
            tell: IS_PRESENT | IS_SWAPPED | IS_PFNZERO,
        }
    }

    fn tracked(&mut self, part: Part, question: &Question) -> Result<(&[Region], u64), Errno> {
        let (found, walk_end) = self.step(part.start, part.end, question)?;
        match walk_end > part.start {
            true => Ok((found, walk_end.min(part.end))),
            // A page that is larger than the kernel arms (pagemap_scan_hugetlb_entry in fs/proc/task_mmu.c).
            false => Err(Errno::EOPNOTSUPP),
        }
    }
}

impl Question {
    fn and(mut self, all_of: u64, flags: u64) -> Question {
        self.all_of |= all_of;
        self.flags |= flags;
        self
    }
}

impl Region {
    /// Whether there is a page, in memory or in swap; a guard page is none.
    pub fn is_there(&self) -> bool {
        self.categories & (IS_PRESENT | IS_SWAPPED) != 0 && self.categories & IS_GUARD == 0
    }
}

fn from_pagemap(pagemap: &File, start: u64, end: u64) -> Result<Vec<Region>, Errno> {
    let mut out: Vec<Region> = Vec::new();
    let mut words = vec![0u8; 8 * 4096];
    let mut at = start;
    while at < end {
        let pages = ((end - at) / PAGE).clamp(1, 4096);
        let bytes = &mut words[..pages as usize * 8];
        pagemap
            .read_exact_at(bytes, at / PAGE * 8)
            .map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
        for (page, word) in bytes.chunks_exact(8).enumerate() {
            let entry = u64::from_le_bytes(word.try_into().expect("eight bytes"));
            let categories = categories_of(entry);
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

fn categories_of(entry: u64) -> u64 {
    let bit = |at: u32, category: u64| if entry >> at & 1 == 1 { category } else { 0 };
    // Bit 58: a guard page, which looks as if it were in swap.
    if entry >> 58 & 1 == 1 {
        return 0;
    }
    bit(63, IS_PRESENT) | bit(62, IS_SWAPPED) | bit(61, IS_FILE)
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
        let mut scanner = Scanner::open(std::process::id() as i32).expect("pagemap");
        let by_scan = scanner.occupied(first, first + 32 * PAGE, true).expect("scans");
        let by_reading = from_pagemap(&scanner.pagemap, first, first + 32 * PAGE).expect("reads");
        for regions in [by_scan, by_reading] {
            let page = first + 5 * PAGE;
            assert!(
                regions.iter().any(|r| r.start <= page && page < r.end && r.categories & IS_PRESENT != 0)
            );
        }
        assert_eq!(memory[offset + 5 * 4096], 1);
    }

    #[test]
    fn tells_the_files_pages_from_the_process_own() {
        let scanner_pid = std::process::id() as i32;
        let mut scanner = Scanner::open(scanner_pid).expect("pagemap");
        let code = tells_the_files_pages_from_the_process_own as *const () as u64 / PAGE * PAGE;
        let regions = scanner.occupied(code, code + PAGE, true).expect("scans");
        assert!(regions.iter().all(|region| region.categories & IS_FILE != 0), "{regions:?}");
        assert!(!regions.is_empty());
    }

    #[test]
    fn a_guard_page_holds_nothing() {
        assert_eq!(categories_of(1 << 58 | 1 << 62), 0);
        assert_eq!(categories_of(1 << 63), IS_PRESENT);
    }
}
