//! Protection keys (pkeys(7)): which a process has allocated, which one the kernel has taken for its
//! execute-only memory, and mappings that have one.
//!
//! The kernel gives the lowest free key: with all others allocated, it gives the one that is wanted. A key in use
//! by a mapping may be free (pkey_free(2) does not look), so that it is held until all mappings are made.
//! What a thread may do with a key is in its PKRU, a part of the extended state.

use super::RestoreError;
use crate::image::cpu::CpuImage;
use crate::image::{MmImage, Vma};
use crate::tracee::{Call, Tracee};

/// Keys there are; 0 is everybody's.
pub const KEYS: u8 = 16;

/// The keys of a task, arranged.
#[derive(Debug, Clone, Copy, Default)]
pub struct Keys {
    /// This CPU and kernel have them.
    here: bool,
    /// The kernel's, for execute-only memory.
    execute_only: Option<u8>,
    /// Held although the process has freed them, one bit each.
    freed: u16,
}

/// The key of the kernel's: one that the process has not allocated, on memory that can be executed and no more.
fn execute_only(mm: &MmImage) -> Option<u8> {
    let is_that = |vma: &&Vma| vma.prot == libc::PROT_EXEC as u32 && !is_allocated(mm, vma.pkey);
    mm.vmas.iter().find(is_that).map(|vma| vma.pkey)
}

fn is_allocated(mm: &MmImage, key: u8) -> bool {
    key == 0 || mm.pkeys >> key & 1 == 1
}

/// Whether the CPU has them, and the kernel has enabled them (CPUID leaf 7, OSPKE).
fn are_here(cpu: &CpuImage) -> bool {
    cpu.register(7, 0, 2) >> 4 & 1 == 1
}

/// Whether this CPU (`here`) has the keys that the image uses.
pub fn check(mm: &MmImage, here: &CpuImage) -> Result<(), RestoreError> {
    if mm.vmas.iter().any(|vma| vma.pkey >= KEYS) {
        return Err(RestoreError::Unfit("the image is not consistent: a protection key".into()));
    }
    let uses = mm.pkeys & !1 != 0 || mm.vmas.iter().any(|vma| vma.pkey != 0);
    if uses && !are_here(here) {
        let what = "it uses protection keys (pkeys(7)), which this CPU or kernel does not have";
        return Err(RestoreError::Unfit(what.into()));
    }
    Ok(())
}

impl Keys {
    /// Makes the task's keys those of the image, whatever it has of its parent or of before.
    pub fn arrange(tracee: &mut Tracee, mm: &MmImage) -> Result<Keys, RestoreError> {
        if !are_here(CpuImage::here()) {
            return Ok(Keys::default());
        }
        let execute_only = execute_only(mm);
        let in_use = mm.vmas.iter().fold(mm.pkeys, |keys, vma| keys | 1 << vma.pkey);
        let allocate = Call::may("pkey_alloc", libc::SYS_pkey_alloc, [0; 6]);
        let mut calls = vec![allocate; KEYS as usize - 1];
        if let Some(key) = execute_only {
            calls.push(free(key));
            // Of any such memory: the kernel keeps the key for all that comes.
            let scratch = tracee.scratch();
            calls.extend([libc::PROT_EXEC, libc::PROT_READ | libc::PROT_WRITE].map(|prot| {
                let args = [scratch, 4096, prot as u64, 0, 0, 0];
                Call::must("taking a key for execute-only memory", libc::SYS_mprotect, args)
            }));
        }
        calls.extend((1..KEYS).filter(|&key| in_use >> key & 1 == 0).map(free));
        tracee.must_all(0, &calls)?;
        // What is asked for is found as a dump finds it.
        let held = allocated(&tracee.must_all(0, &questions())?);
        let ours = execute_only.map_or(0, |key| 1 << key);
        if held | 1 != (in_use & !ours) | 1 {
            let what =
                "its protection keys cannot be made: its parent has another one for execute-only memory";
            return Err(RestoreError::Unfit(what.into()));
        }
        let freed = in_use & !mm.pkeys & !ours & !1;
        Ok(Keys { here: true, execute_only, freed })
    }

    /// Whether a mapping made with its protection alone has another key.
    pub fn come_later(&self, vma: &Vma) -> bool {
        let by_itself = match vma.prot == libc::PROT_EXEC as u32 {
            true => self.execute_only.unwrap_or(0),
            false => 0,
        };
        self.here && (vma.pkey != by_itself || vma.prot == libc::PROT_EXEC as u32 && vma.pkey == 0)
    }

    /// Protects a range as a mapping of the image, with its key.
    pub fn protect(&self, vma: &Vma) -> Call {
        self.protect_range(vma.start, vma.end, vma.prot, vma.pkey)
    }

    /// The same of a part.
    pub fn protect_range(&self, start: u64, end: u64, prot: u32, key: u8) -> Call {
        let args = [start, end - start, prot.into(), key.into(), 0, 0];
        match self.here && self.execute_only != Some(key) {
            true => Call::must("protecting", libc::SYS_pkey_mprotect, args),
            false => Call::must("protecting", libc::SYS_mprotect, args),
        }
    }

    /// When all mappings are made.
    pub fn settle(&self) -> Vec<Call> {
        (1..KEYS).filter(|&key| self.freed >> key & 1 == 1).map(free).collect()
    }
}

fn free(key: u8) -> Call {
    Call::may("pkey_free", libc::SYS_pkey_free, [key.into(), 0, 0, 0, 0, 0])
}

/// Calls that tell which keys are allocated and change nothing: no memory is at that address, which is looked
/// at after the key (do_mprotect_pkey in mm/mprotect.c).
pub fn questions() -> Vec<Call> {
    const NOWHERE: u64 = 0xffff_8000_0000_0000;
    let ask =
        |key: u8| Call::may("pkey_mprotect", libc::SYS_pkey_mprotect, [NOWHERE, 4096, 0, key.into(), 0, 0]);
    (0..KEYS).map(ask).collect()
}

/// One bit for each allocated key, by the replies to the [`questions`].
pub fn allocated(replies: &[crate::tracee::Reply]) -> u16 {
    let is = |reply: &crate::tracee::Reply| reply.errno() == Some(nix::errno::Errno::ENOMEM);
    replies.iter().enumerate().filter(|(_, reply)| is(reply)).fold(0, |keys, (key, _)| keys | 1 << key)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Backing, VmaFlags};

    fn mm(pkeys: u16, vmas: &[(u32, u8)]) -> MmImage {
        let vma = |(n, &(prot, pkey)): (u64, &(u32, u8))| Vma {
            start: n * 0x1000,
            end: (n + 1) * 0x1000,
            prot,
            backing: Backing::Anon,
            shared: false,
            flags: VmaFlags::empty(),
            name: None,
            pkey,
            page_shift: crate::image::PAGE_SHIFT,
        };
        MmImage { vmas: (1..).zip(vmas).map(vma).collect(), pkeys, ..MmImage::default() }
    }

    #[test]
    fn a_cpu_without_them_is_refused_what_uses_them() {
        let without = CpuImage::default();
        let with = CpuImage { leaves: vec![(7, 0, [0, 0, 1 << 4, 0])], ..CpuImage::default() };
        let uses = |mm: &MmImage, cpu| match check(mm, cpu) {
            Err(error) => error.to_string().contains("it uses protection keys (pkeys(7)), which this CPU"),
            Ok(()) => false,
        };
        assert!(uses(&mm(0b11, &[]), &without) && uses(&mm(1, &[(4, 1)]), &without));
        assert!(!uses(&mm(0b11, &[(3, 1)]), &with) && !uses(&mm(1, &[(4, 0)]), &without));
        assert!(
            check(&mm(1, &[(3, 16)]), &with).is_err_and(|error| error.to_string().contains("consistent"))
        );
    }

    #[test]
    fn the_kernels_own_key() {
        assert_eq!(execute_only(&mm(0b1001, &[(3, 2), (4, 3), (4, 2)])), Some(2));
        assert_eq!(execute_only(&mm(0b1001, &[(3, 2), (4, 3), (4, 0)])), None);
    }
}
