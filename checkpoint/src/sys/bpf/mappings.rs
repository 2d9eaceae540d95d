//! The mappings of a process with their flags, as the kernel has them.

use super::Target;
use super::program::OF_MAPPING;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, mprotect, munmap};
use std::ffi::c_void;
use std::fs::File;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

const PAGE: usize = 4096;
const TWO_PAGES: NonZeroUsize = NonZeroUsize::new(2 * PAGE).expect("not zero");

/// A mapping, and its flags in the kernel's own numbers (`vm_flags`), which are good for comparing alone: they
/// are not the same in all kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// One past the last.
    pub end: u64,
    /// `VM_*`.
    pub flags: u64,
}

/// The mappings of the process that a thread belongs to, by their addresses. `None`: the kernel does not let
/// itself be asked.
pub fn look(tid: i32) -> Option<Vec<Mapping>> {
    let program = super::programs()?.of_mappings.as_ref()?;
    let follows = |[_, end, _]: &Row, [start, ..]: &Row| start >= end;
    let rows: Vec<Row> = super::rows(program, Target::Task(tid), follows).ok()?;
    // None at all: of a task that has ended, or of none.
    (!rows.is_empty())
        .then(|| rows.into_iter().map(|[start, end, flags]| Mapping { start, end, flags }).collect())
}

type Row = [u64; OF_MAPPING.len()];

/// Mappings of ours of the kinds that most programs have, of which this one has not all at every moment.
pub struct Samples(Vec<NonNull<c_void>>);

impl Samples {
    /// What cannot be mapped is left out.
    pub fn map() -> Samples {
        let (read, write, run) = (ProtFlags::PROT_READ, ProtFlags::PROT_WRITE, ProtFlags::PROT_EXEC);
        let none = ProtFlags::PROT_NONE;
        let mut samples = Samples(Vec::new());
        for protection in [none, read, read | write, read | run, read | write | run] {
            for more in [MapFlags::empty(), MapFlags::MAP_NORESERVE, MapFlags::MAP_STACK] {
                for first in [none, read | write] {
                    samples.anonymous(first, protection, MapFlags::MAP_PRIVATE | more);
                }
            }
        }
        samples.anonymous(read | write, read | write, MapFlags::MAP_SHARED);
        if let Ok(program) = File::open("/proc/self/exe") {
            for protection in [none, read, read | write, read | run] {
                samples.file(&program, protection, MapFlags::MAP_PRIVATE);
            }
            samples.file(&program, read, MapFlags::MAP_SHARED);
        }
        samples
    }

    /// Two pages of memory, the second one with another protection later, as the C library makes the stack of a thread
    /// and its guard page.
    fn anonymous(&mut self, first: ProtFlags, then: ProtFlags, flags: MapFlags) {
        // SAFETY: new mappings where the kernel finds room, and a part of one.
        unsafe {
            let Ok(at) = mmap_anonymous(None, TWO_PAGES, first, flags) else { return };
            self.0.push(at);
            if first.contains(ProtFlags::PROT_WRITE) {
                // What has had a page stays accounted for when it becomes read-only (mprotect_fixup, mm/mprotect.c).
                at.cast::<u8>().write_volatile(0);
            }
            if first != then {
                let _ = mprotect(at.byte_add(PAGE), PAGE, then);
            }
        }
    }

    fn file(&mut self, file: &File, protection: ProtFlags, flags: MapFlags) {
        // SAFETY: a new mapping where the kernel finds room.
        let got = unsafe { mmap(None, TWO_PAGES, protection, flags, file, 0) };
        self.0.extend(got);
    }
}

impl Drop for Samples {
    fn drop(&mut self) {
        for &at in &self.0 {
            // SAFETY: mapped by us, as long, and used by nobody.
            let _ = unsafe { munmap(at, TWO_PAGES.get()) };
        }
    }
}
