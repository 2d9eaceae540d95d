//! Memory of a frozen process, in runs.

use super::DumpError;
use super::loader::{Loader, RUN};
use super::parents::{Frames, Whose};
use super::shared::{Given, data_ranges};
use crate::image::{Backing, MmImage, Vma, VmaFlags};
use crate::sys::pagemap_scan::{IS_FILE, IS_PFNZERO, Region, Scanner};
use crate::tracee::Tracee;
use nix::errno::Errno;

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
    /// Pages that are the same as the parent's at the same place.
    Same {
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
    each: impl FnMut(Run<'_>) -> Result<(), E>,
) -> Result<(), E> {
    runs(tracee, mm, Frames::open(tracee.pid(), mm, None)?, each)
}

/// The same of a child whose parent is frozen too: `parent` is its PID and its memory. Pages that both
/// share are told as such ([`Run::Same`]).
pub fn for_each_run_of_child<E: From<DumpError>>(
    tracee: &Tracee,
    mm: &MmImage,
    parent: (i32, &MmImage),
    each: impl FnMut(Run<'_>) -> Result<(), E>,
) -> Result<(), E> {
    let frames = Frames::open(tracee.pid(), mm, Some(parent))?;
    runs(tracee, mm, frames, each)
}

fn runs<E: From<DumpError>>(
    tracee: &Tracee,
    mm: &MmImage,
    mut frames: Frames,
    mut each: impl FnMut(Run<'_>) -> Result<(), E>,
) -> Result<(), E> {
    let pid = tracee.pid();
    let mut scanner =
        Scanner::open(pid).map_err(|source| DumpError::Proc { what: "pagemap", pid, source })?;
    let memory = tracee.memory().map_err(DumpError::from)?;
    std::thread::scope(|scope| {
        let mut loader = Loader::new(scope, &memory);
        let mut given = Given::default();
        for vma in mm.vmas.iter().filter(|vma| !vma.flags.intersects(VmaFlags::IO | VmaFlags::PFNMAP)) {
            for region in regions(pid, &mut scanner, &mut given, vma)? {
                if region.categories & IS_PFNZERO != 0 {
                    // Fresh anonymous memory is zero anyway.
                    if matches!(vma.backing, Backing::File(_) | Backing::Object { .. }) {
                        each(Run::Zero { addr: region.start, len: region.end - region.start })?;
                    }
                    continue;
                }
                let parts = match vma.shared {
                    true => vec![(region.start, region.end, Whose::Own)],
                    false => frames.split(region.start, region.end)?,
                };
                for (start, end, whose) in parts {
                    match whose {
                        // Not all kernels tell whose a page is, and one of a few must not be copied ([`super::parents`]).
                        Whose::Own if !vma.is_huge() => {
                            let mut data = |addr: u64, bytes: &[u8]| each(Run::Data { addr, bytes });
                            loader.add(start, end, &mut data)?;
                        }
                        Whose::Own | Whose::Common => read_common(tracee, start, end, &mut each)?,
                        Whose::Parents => each(Run::Same { addr: start, len: end - start })?,
                    }
                }
            }
        }
        loader.finish(&mut |addr: u64, bytes: &[u8]| each(Run::Data { addr, bytes }))
    })
}

/// The parts of a mapping whose contents belong into the image.
fn regions(pid: i32, scanner: &mut Scanner, given: &mut Given, vma: &Vma) -> Result<Vec<Region>, DumpError> {
    let failed = |errno: Errno| DumpError::Memory { pid, addr: vma.start, errno };
    match &vma.backing {
        Backing::Anon => scanner.occupied(vma.start, vma.end, false).map_err(failed),
        Backing::File(_) | Backing::Object { .. } if !vma.shared => {
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
        Backing::File(_)
        | Backing::Object { .. }
        | Backing::Vdso
        | Backing::Vvar
        | Backing::Vsyscall
        | Backing::Aio { .. } => Ok(Vec::new()),
    }
}

/// Reads pages that other processes have too, so that they stay common.
fn read_common<E: From<DumpError>>(
    tracee: &Tracee,
    start: u64,
    end: u64,
    each: &mut impl FnMut(Run<'_>) -> Result<(), E>,
) -> Result<(), E> {
    let mut buffer = vec![0; (end - start).min(RUN as u64) as usize];
    let mut at = start;
    while at < end {
        let bytes = &mut buffer[..(end - at).min(RUN as u64) as usize];
        tracee.read_mem(at, bytes).map_err(DumpError::from)?;
        each(Run::Data { addr: at, bytes })?;
        at += bytes.len() as u64;
    }
    Ok(())
}
