//! Mappings and their contents.
//!
//! A mapping is made with its final protection at once: what cannot be written through
//! process_vm_writev(2) is written through `/proc/PID/mem`, which the kernel allows a tracer for
//! private memory of any protection.

use super::files::close_inside;
use super::{FileSource, RestoreError};
use crate::image::{Backing, ProcessImage, Vma, VmaFlags};
use crate::sys::process_vm;
use crate::tracee::{Tracee, TraceeError};
use std::collections::BTreeMap;

/// Files kept open while mappings of them are made.
const OPEN_FILES: usize = 64;
/// Zeros written over a private copy of a file's page.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// What is to come into the mappings.
pub struct Contents {
    vmas: Vec<Vma>,
    guards: Vec<(u64, u64)>,
}

/// Maps everything.
pub fn map_all(
    tracee: &mut Tracee,
    image: &ProcessImage,
    files: &mut dyn FileSource,
) -> Result<Contents, RestoreError> {
    let mut open: BTreeMap<(Vec<u8>, bool), i32> = BTreeMap::new();
    let mut shared: BTreeMap<u64, Vec<&Vma>> = BTreeMap::new();
    for vma in &image.mm.vmas {
        match &vma.backing {
            Backing::Anon => map(tracee, vma, vma.prot, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None)?,
            Backing::SharedAnon { id, .. } => {
                // Its place is taken now; the memory itself comes when all places are taken.
                map(tracee, vma, 0, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, None)?;
                shared.entry(*id).or_default().push(vma);
            }
            Backing::File(file) => {
                let writable = vma.shared && file.may_write;
                let key = (file.path.clone(), writable);
                let fd = match open.get(&key) {
                    Some(&fd) => fd,
                    None => {
                        if open.len() >= OPEN_FILES {
                            close_all(tracee, &mut open)?;
                        }
                        let fd = files.open_mapped(tracee, file, writable)?;
                        open.insert(key, fd);
                        fd
                    }
                };
                let kind = if vma.shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
                map(tracee, vma, vma.prot, kind, Some((fd, file.offset)))?;
            }
            Backing::Vdso | Backing::Vvar | Backing::Vsyscall => continue,
        }
        if vma.flags.contains(VmaFlags::HUGEPAGE) {
            advise(tracee, vma, libc::MADV_HUGEPAGE)?;
        }
    }
    close_all(tracee, &mut open)?;
    for group in shared.values() {
        map_shared(tracee, group)?;
    }
    Ok(Contents { vmas: image.mm.vmas.clone(), guards: image.mm.guards.clone() })
}

fn map(
    tracee: &mut Tracee,
    vma: &Vma,
    prot: u32,
    kind: libc::c_int,
    file: Option<(i32, u64)>,
) -> Result<(), RestoreError> {
    let mut flags = kind | libc::MAP_FIXED;
    if vma.flags.contains(VmaFlags::GROWSDOWN) {
        flags |= libc::MAP_GROWSDOWN;
    }
    if vma.flags.contains(VmaFlags::NORESERVE) {
        flags |= libc::MAP_NORESERVE;
    }
    let (fd, offset) = file.map_or((u64::MAX, 0), |(fd, offset)| (fd as u64, offset));
    let args = [vma.start, vma.end - vma.start, prot.into(), flags as u64, fd, offset];
    let got = tracee.must(0, "mapping memory", libc::SYS_mmap, args).map_err(|error| match error {
        TraceeError::Inside { errno, .. } => {
            RestoreError::file(format!("mapping {:x}-{:x} {}", vma.start, vma.end, name(vma)), errno)
        }
        other => other.into(),
    })?;
    if got as u64 != vma.start {
        return Err(RestoreError::Unfit(format!("a mapping came to {got:#x} instead of {:#x}", vma.start)));
    }
    Ok(())
}

fn name(vma: &Vma) -> String {
    match &vma.backing {
        Backing::File(file) => format!("of {}", String::from_utf8_lossy(&file.path)),
        _ => "of anonymous memory".into(),
    }
}

fn close_all(tracee: &mut Tracee, open: &mut BTreeMap<(Vec<u8>, bool), i32>) -> Result<(), RestoreError> {
    while let Some((_, fd)) = open.pop_first() {
        close_inside(tracee, fd)?;
    }
    Ok(())
}

/// Mappings of the same shared memory: made once where there is room, then duplicated to each place by
/// mremap(2) with an old length of 0, which for shared memory gives a second mapping.
fn map_shared(tracee: &mut Tracee, group: &[&Vma]) -> Result<(), RestoreError> {
    let offset = |vma: &Vma| match vma.backing {
        Backing::SharedAnon { offset, .. } => offset,
        _ => 0,
    };
    let low = group.iter().map(|vma| offset(vma)).min().unwrap_or(0);
    let high = group.iter().map(|vma| offset(vma) + (vma.end - vma.start)).max().unwrap_or(0);
    let prot = (libc::PROT_READ | libc::PROT_WRITE) as u64;
    let flags = (libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE) as u64;
    let args = [0, high - low, prot, flags, u64::MAX, 0];
    let whole = tracee.must(0, "making shared memory", libc::SYS_mmap, args)? as u64;
    for vma in group {
        let from = whole + offset(vma) - low;
        let how = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
        let args = [from, 0, vma.end - vma.start, how, vma.start, 0];
        tracee.must(0, "mapping shared memory", libc::SYS_mremap, args)?;
    }
    tracee.must(0, "unmapping", libc::SYS_munmap, [whole, high - low, 0, 0, 0, 0])?;
    Ok(())
}

fn advise(tracee: &mut Tracee, vma: &Vma, advice: libc::c_int) -> Result<(), RestoreError> {
    let args = [vma.start, vma.end - vma.start, advice as u64, 0, 0, 0];
    tracee.must(0, "madvise", libc::SYS_madvise, args)?;
    Ok(())
}

impl Contents {
    /// Places contents.
    pub fn data(&self, tracee: &Tracee, addr: u64, bytes: &[u8]) -> Result<(), RestoreError> {
        match process_vm::write(tracee.pid(), addr, bytes) {
            Ok(()) => Ok(()),
            Err(_) => Ok(tracee.write_mem(addr, bytes)?),
        }
    }

    /// Makes a range zero: fresh anonymous memory is.
    pub fn zero(&self, tracee: &Tracee, addr: u64, len: u64) -> Result<(), RestoreError> {
        for vma in self.vmas.iter().filter(|vma| vma.start < addr + len && vma.end > addr) {
            if !matches!(vma.backing, Backing::File(_)) {
                continue;
            }
            let (mut at, end) = (addr.max(vma.start), (addr + len).min(vma.end));
            while at < end {
                let n = (end - at).min(ZEROS.len() as u64);
                tracee.write_mem(at, &ZEROS[..n as usize])?;
                at += n;
            }
        }
        Ok(())
    }

    /// What had to wait until the contents were there.
    pub fn settle(self, tracee: &mut Tracee) -> Result<(), RestoreError> {
        for &(start, end) in &self.guards {
            // Before anything is locked: guards are refused there (madvise(2)).
            let args = [start, end - start, MADV_GUARD_INSTALL, 0, 0, 0];
            if tracee.syscall(0, libc::SYS_madvise, args)? != 0 {
                // Before 6.13: no access at all is the same to the program.
                tracee.must(
                    0,
                    "making a guard page",
                    libc::SYS_mprotect,
                    [start, end - start, 0, 0, 0, 0],
                )?;
            }
        }
        for vma in &self.vmas {
            if matches!(vma.backing, Backing::Vdso | Backing::Vvar | Backing::Vsyscall) {
                continue;
            }
            let length = vma.end - vma.start;
            if matches!(vma.backing, Backing::SharedAnon { .. }) {
                let args = [vma.start, length, vma.prot.into(), 0, 0, 0];
                tracee.must(0, "protecting shared memory", libc::SYS_mprotect, args)?;
            }
            for (flag, advice) in ADVICE {
                if vma.flags.contains(flag) {
                    advise(tracee, vma, advice)?;
                }
            }
            if vma.flags.contains(VmaFlags::LOCKED) {
                let on_fault = u64::from(vma.flags.contains(VmaFlags::LOCKONFAULT));
                // The limit may be lower on this node: memory that is not locked still works.
                tracee.syscall(0, libc::SYS_mlock2, [vma.start, length, on_fault, 0, 0, 0])?;
            }
            if let Some(name) = &vma.name {
                set_name(tracee, vma, name)?;
            }
        }
        Ok(())
    }
}

/// Linux 6.13.
const MADV_GUARD_INSTALL: u64 = 102;

const ADVICE: [(VmaFlags, libc::c_int); 7] = [
    (VmaFlags::NOHUGEPAGE, libc::MADV_NOHUGEPAGE),
    (VmaFlags::DONTFORK, libc::MADV_DONTFORK),
    (VmaFlags::WIPEONFORK, libc::MADV_WIPEONFORK),
    (VmaFlags::DONTDUMP, libc::MADV_DONTDUMP),
    (VmaFlags::MERGEABLE, libc::MADV_MERGEABLE),
    (VmaFlags::SEQ_READ, libc::MADV_SEQUENTIAL),
    (VmaFlags::RAND_READ, libc::MADV_RANDOM),
];

fn set_name(tracee: &mut Tracee, vma: &Vma, name: &[u8]) -> Result<(), RestoreError> {
    const PR_SET_VMA: u64 = 0x5356_4d41;
    let at = put_path(tracee, name)?;
    // Kernels without CONFIG_ANON_VMA_NAME refuse; the name is for people only.
    tracee.syscall(0, libc::SYS_prctl, [PR_SET_VMA, 0, vma.start, vma.end - vma.start, at, 0])?;
    Ok(())
}

/// Writes a NUL-terminated string into the scratch area; gives its address.
pub fn put_path(tracee: &mut Tracee, path: &[u8]) -> Result<u64, RestoreError> {
    if path.len() >= Tracee::SCRATCH_LEN || path.contains(&0) {
        return Err(RestoreError::Unfit(format!("the path {} is too long", String::from_utf8_lossy(path))));
    }
    let scratch = tracee.scratch();
    let mut bytes = path.to_vec();
    bytes.push(0);
    tracee.write_mem(scratch, &bytes)?;
    Ok(scratch)
}
