//! Memory of a frozen process, in runs.

use super::DumpError;
use super::shared::{Given, data_ranges};
use crate::image::{Backing, MmImage, Vma, VmaFlags};
use crate::sys::pagemap_scan::{IS_FILE, IS_PFNZERO, Region, Scanner};
use crate::sys::process_vm;
use crate::tracee::Tracee;
use nix::errno::Errno;

/// Largest run, bytes: one buffer, used again, stays in the cache.
pub const RUN: usize = 1 << 20;

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
    let mut scanner =
        Scanner::open(pid).map_err(|source| DumpError::Proc { what: "pagemap", pid, source })?;
    let mut buffer = vec![0u8; RUN];
    let mut given = Given::default();
    for vma in mm.vmas.iter().filter(|vma| !vma.flags.intersects(VmaFlags::IO | VmaFlags::PFNMAP)) {
        for region in regions(pid, &mut scanner, &mut given, vma)? {
            if region.categories & IS_PFNZERO != 0 {
                // Fresh anonymous memory is zero anyway.
                if matches!(vma.backing, Backing::File(_)) {
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

/// The parts of a mapping whose contents belong into the image.
fn regions(pid: i32, scanner: &mut Scanner, given: &mut Given, vma: &Vma) -> Result<Vec<Region>, DumpError> {
    let failed = |errno: Errno| DumpError::Memory { pid, addr: vma.start, errno };
    match &vma.backing {
        Backing::Anon => scanner.occupied(vma.start, vma.end, false).map_err(failed),
        Backing::File(_) if !vma.shared => {
            let mut found = scanner.occupied(vma.start, vma.end, true).map_err(failed)?;
            found.retain(|region| region.categories & IS_FILE == 0);
            Ok(found)
        }
        Backing::SharedAnon { id, offset } => {
            let fresh = given.take(*id, *offset, vma.end - vma.start);
            data_ranges(pid, vma, *offset, &fresh).map_err(|source| DumpError::Proc {
                what: "map_files",
                pid,
                source,
            })
        }
        Backing::File(_) | Backing::Vdso | Backing::Vvar | Backing::Vsyscall => Ok(Vec::new()),
    }
}

fn read(tracee: &Tracee, at: u64, buffer: &mut [u8]) -> Result<(), DumpError> {
    let pid = tracee.pid();
    // Refused for memory without PROT_READ; `/proc/PID/mem` reads that too (FOLL_FORCE).
    match process_vm::read(pid, at, buffer) {
        Ok(()) => Ok(()),
        Err(_) => Ok(tracee.read_mem(at, buffer)?),
    }
}
