//! Memory of a frozen process, in runs.

use super::DumpError;
use crate::image::{Backing, MmImage, Vma, VmaFlags};
use crate::sys::pagemap_scan::{self, IS_FILE, IS_PFNZERO, Region};
use crate::sys::process_vm;
use crate::tracee::Tracee;
use std::collections::BTreeSet;
use std::fs::File;

/// Largest run, bytes: one buffer, used again, stays in the cache.
pub const RUN: usize = 1 << 20;
/// Shared anonymous memory up to this size is read whole, zeros and all.
const WHOLE_SHARED: u64 = 1 << 30;

/// A part of memory.
#[derive(Debug)]
pub enum Run<'a> {
    /// Contents.
    Data {
        /// Where.
        addr: u64,
        /// What; whole pages, at most 1 MiB.
        bytes: &'a [u8],
    },
    /// Zeros that must be there (a private copy of a file's page may be zero).
    Zero {
        /// Where.
        addr: u64,
        /// How much.
        len: u64,
    },
}

/// Calls `each` for all memory that the target cannot get elsewhere: present pages of anonymous
/// memory, and of private file mappings the pages that are the process' own copies.
///
/// Shared anonymous memory is given once, by the first mapping of it.
pub fn for_each_run<E: From<DumpError>>(
    tracee: &Tracee,
    mm: &MmImage,
    mut each: impl FnMut(Run<'_>) -> Result<(), E>,
) -> Result<(), E> {
    let pid = tracee.pid();
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).map_err(|source| DumpError::Proc {
        what: "pagemap",
        pid,
        source,
    })?;
    let mut buffer = vec![0u8; RUN];
    let mut seen = BTreeSet::new();
    for vma in &mm.vmas {
        if !has_contents(vma, &mut seen) {
            continue;
        }
        let private_file = matches!(vma.backing, Backing::File(_));
        let mut regions = pagemap_scan::occupied(&pagemap, vma.start, vma.end)
            .map_err(|errno| DumpError::Memory { pid, addr: vma.start, errno })?;
        if matches!(vma.backing, Backing::SharedAnon { .. }) && vma.end - vma.start <= WHOLE_SHARED {
            // The memory may hold pages that this mapping's page table does not show.
            regions = vec![Region { start: vma.start, end: vma.end, categories: 0 }];
        }
        for region in regions {
            if private_file && region.categories & IS_FILE != 0 {
                continue;
            }
            if region.categories & IS_PFNZERO != 0 {
                if private_file {
                    each(Run::Zero { addr: region.start, len: region.end - region.start })?;
                }
                continue;
            }
            let mut at = region.start;
            while at < region.end {
                let len = (region.end - at).min(RUN as u64) as usize;
                read(tracee, at, &mut buffer[..len])?;
                each(Run::Data { addr: at, bytes: &buffer[..len] })?;
                at += len as u64;
            }
        }
    }
    Ok(())
}

fn read(tracee: &Tracee, at: u64, buffer: &mut [u8]) -> Result<(), DumpError> {
    let pid = tracee.pid();
    // Refused for memory without PROT_READ; `/proc/PID/mem` reads that too (FOLL_FORCE).
    match process_vm::read(pid, at, buffer) {
        Ok(()) => Ok(()),
        Err(_) => Ok(tracee.read_mem(at, buffer)?),
    }
}

/// Whether a mapping's contents belong into the image. `seen`: shared memory already given, by id,
/// offset range.
fn has_contents(vma: &Vma, seen: &mut BTreeSet<(u64, u64, u64)>) -> bool {
    if vma.flags.intersects(VmaFlags::IO | VmaFlags::PFNMAP) {
        return false;
    }
    match &vma.backing {
        Backing::Anon => true,
        Backing::SharedAnon { id, offset } => seen.insert((*id, *offset, vma.end - vma.start)),
        Backing::File(_) => !vma.shared,
        Backing::Vdso | Backing::Vvar | Backing::Vsyscall => false,
    }
}
