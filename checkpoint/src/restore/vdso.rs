//! The vDSO where the process expects it.
//!
//! A process keeps the addresses of the vDSO's functions. If this kernel's is the one it knows, or has the
//! functions at the same places, it is moved to where that was. If it is another one (an image of another kernel),
//! this kernel's stays where there is room, and at the old place comes a copy of the old one, in memory
//! of the process' own, with a jump at the beginning of each function:
//!
//! ```text
//! old place   ELF headers, symbols   clock_gettime: jmp [new place + its offset there] …
//! new place   [vvar] [vdso]          this kernel's
//! ```
//!
//! A function that this kernel's vDSO lacks becomes a system call. A thread that stands in the old one
//! cannot go on: its code reads data that is there no more.

use super::RestoreError;
use super::layout::special_ranges;
use crate::image::{Backing, ProcessImage};
use crate::proc::elf::functions;
use crate::tracee::{Call, Tracee, TraceeError};
use std::collections::BTreeMap;

/// `arch_prctl(2)`: map the vDSO at an address (arch/x86/include/uapi/asm/prctl.h).
const ARCH_MAP_VDSO_64: u64 = 0x2003;
const PAGE: u64 = 4096;
/// `jmp [rip]`, with the address behind it.
const JUMP: [u8; 6] = [0xff, 0x25, 0, 0, 0, 0];
/// A jump, and the address.
const JUMP_LEN: usize = JUMP.len() + 8;
/// Index of the instruction pointer in `struct user_regs_struct`.
const RIP: usize = 16;

/// What a function can be replaced by: system calls with the same arguments.
const CALLS: [(&[u8], libc::c_long); 6] = [
    (b"clock_gettime", libc::SYS_clock_gettime),
    (b"clock_getres", libc::SYS_clock_getres),
    (b"gettimeofday", libc::SYS_gettimeofday),
    (b"time", libc::SYS_time),
    (b"getcpu", libc::SYS_getcpu),
    (b"getrandom", libc::SYS_getrandom),
];

/// A vDSO with its data: mappings that follow each other.
struct Place {
    ranges: Vec<(u64, u64)>,
    code: (u64, u64),
}

impl Place {
    fn of(mappings: impl Iterator<Item = (Backing, u64, u64)>) -> Option<Place> {
        let ours: Vec<(Backing, u64, u64)> =
            mappings.filter(|(backing, ..)| matches!(backing, Backing::Vdso | Backing::Vvar)).collect();
        let code = ours.iter().find(|(backing, ..)| *backing == Backing::Vdso)?;
        Some(Place {
            code: (code.1, code.2),
            ranges: ours.iter().map(|&(_, start, end)| (start, end)).collect(),
        })
    }

    fn start(&self) -> u64 {
        self.ranges[0].0
    }

    fn shape(&self) -> Vec<(u64, u64)> {
        self.ranges.iter().map(|&(start, end)| (start - self.start(), end - self.start())).collect()
    }

    fn overlaps(&self, image: &ProcessImage) -> bool {
        let with =
            |&(start, end): &(u64, u64)| image.mm.vmas.iter().any(|vma| vma.start < end && start < vma.end);
        self.ranges.iter().any(with)
    }
}

fn unfit(what: impl Into<String>) -> RestoreError {
    RestoreError::Unfit(what.into())
}

/// Puts it in place. `copies`: it may be another kernel's.
pub fn place(tracee: &mut Tracee, image: &ProcessImage, copies: bool) -> Result<(), RestoreError> {
    let was = Place::of(image.mm.vmas.iter().map(|vma| (vma.backing.clone(), vma.start, vma.end)));
    let here = Place::of(special_ranges(tracee.pid())?.into_iter());
    let (Some(was), Some(here)) = (was, here) else { return Ok(()) };
    let code = read(tracee, here.code)?;
    if fits(&was, &here, image, &code) {
        move_to(tracee, &here, was.start())?;
        tracee.vdso_is_at(&code, was.start() + (here.code.0 - here.start()));
        return Ok(());
    }
    let other = "the vDSO of this kernel is another one than that of the kernel the process was on";
    if !copies || image.mm.vdso.is_empty() {
        return Err(unfit(other));
    }
    if image.mm.vdso.len() as u64 != was.code.1 - was.code.0 || was.code.0 % PAGE != 0 {
        return Err(unfit("the image is not consistent: its vDSO has not the size of its mapping"));
    }
    if let Some(thread) = standing_in(image, was.code) {
        return Err(unfit(format!("{other}, and thread {thread} stands in it: save it once more")));
    }
    let mut base = here.code.0;
    if here.overlaps(image) {
        let to = free_place(tracee, image, &here)?;
        move_to(tracee, &here, to)?;
        base = to + (here.code.0 - here.start());
    }
    let old = patched(&image.mm.vdso, &functions(&code), base)
        .ok_or_else(|| unfit("the vDSO in the image has functions that cannot be led to this kernel's"))?;
    put(tracee, was.code.0, &old)
}

/// Whether this kernel's can be where the image's was.
fn fits(was: &Place, here: &Place, image: &ProcessImage, code: &[u8]) -> bool {
    let (old, same_shape) = (&image.mm.vdso, was.shape() == here.shape());
    if old.is_empty() || old == code {
        return same_shape;
    }
    // The same functions at the same places: of the same build, fitted to another CPU.
    let (ours, theirs) = (functions(code), functions(old));
    same_shape
        && old.len() == code.len()
        && ours == theirs
        && !ours.is_empty()
        && standing_in(image, was.code).is_none()
}

/// A thread that is in the middle of it.
fn standing_in(image: &ProcessImage, (start, end): (u64, u64)) -> Option<i32> {
    let inside = |regs: &[u64]| regs.get(RIP).is_some_and(|rip| (start..end).contains(rip));
    image.threads.iter().find(|thread| inside(&thread.regs)).map(|thread| thread.tid)
}

fn read(tracee: &Tracee, (start, end): (u64, u64)) -> Result<Vec<u8>, RestoreError> {
    let mut bytes = vec![0; (end - start) as usize];
    tracee.read_mem(start, &mut bytes)?;
    Ok(bytes)
}

fn move_to(tracee: &mut Tracee, here: &Place, to: u64) -> Result<(), RestoreError> {
    if to == here.start() {
        return Ok(());
    }
    tracee.vdso_moves();
    for &(start, end) in &here.ranges {
        tracee.must(0, "unmapping the vDSO", libc::SYS_munmap, [start, end - start, 0, 0, 0, 0])?;
    }
    let got = tracee.syscall(0, libc::SYS_arch_prctl, [ARCH_MAP_VDSO_64, to, 0, 0, 0, 0])?;
    if got <= 0 {
        let errno = nix::errno::Errno::from_raw(-got as i32);
        return Err(TraceeError::Inside { operation: "mapping the vDSO", tid: tracee.pid(), errno }.into());
    }
    Ok(())
}

/// Room for it that neither the image nor what is there has, above which nothing grows.
fn free_place(tracee: &Tracee, image: &ProcessImage, here: &Place) -> Result<u64, RestoreError> {
    /// Below the stack's end (`TASK_SIZE`), as high as the kernel would put it.
    const HIGHEST: u64 = 0x7fff_ffff_0000;
    const LOWEST: u64 = 0x1_0000;
    let len = here.ranges.last().map_or(0, |last| last.1 - here.start());
    let room = len + 2 * PAGE;
    let mut taken: Vec<(u64, u64)> = image.mm.vmas.iter().map(|vma| (vma.start, vma.end)).collect();
    taken.extend(tracee.ranges()?.into_iter().map(|(start, end, _)| (start, end)));
    taken.sort_unstable();
    let mut end = HIGHEST;
    for &(start, above) in taken.iter().rev() {
        if end >= room && above <= end - room {
            break;
        }
        end = end.min(start);
    }
    match end >= room + LOWEST {
        true => Ok(end - room + PAGE),
        false => Err(unfit("there is no room for this kernel's vDSO")),
    }
}

/// The old vDSO, each function of which leads to that of the new one at `base`. `None`: it cannot.
fn patched(old: &[u8], new: &BTreeMap<Vec<u8>, u64>, base: u64) -> Option<Vec<u8>> {
    let functions = functions(old);
    // Two names of one function are one place.
    let mut places: BTreeMap<u64, &[u8]> = BTreeMap::new();
    for (name, &at) in &functions {
        let known = places.entry(at).or_insert(name);
        if !new.contains_key(*known) {
            *known = name;
        }
    }
    if places.is_empty() {
        return None;
    }
    let mut out = old.to_vec();
    let mut end = 0;
    for (at, name) in places {
        let at = usize::try_from(at).ok()?;
        if at < end {
            return None;
        }
        let code = match (new.get(name), CALLS.iter().find(|(call, _)| *call == name)) {
            (Some(offset), _) => [&JUMP[..], &base.checked_add(*offset)?.to_le_bytes()].concat(),
            // mov eax, NUMBER; syscall; ret
            (None, Some((_, number))) => {
                [&[0xb8][..], &u32::try_from(*number).ok()?.to_le_bytes(), &[0x0f, 0x05, 0xc3]].concat()
            }
            // Of no use without its kernel; whoever asks it gets what a missing call gives.
            // mov rax, -ENOSYS; ret
            (None, None) => {
                let error = -libc::ENOSYS;
                [&[0x48, 0xc7, 0xc0][..], &error.to_le_bytes(), &[0xc3]].concat()
            }
        };
        out.get_mut(at..at + code.len())?.copy_from_slice(&code);
        end = at + JUMP_LEN;
    }
    Some(out)
}

fn put(tracee: &mut Tracee, at: u64, bytes: &[u8]) -> Result<(), RestoreError> {
    let len = bytes.len() as u64;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    let writable = (libc::PROT_READ | libc::PROT_WRITE) as u64;
    let map = Call::must("mapping", libc::SYS_mmap, [at, len, writable, flags as u64, u64::MAX, 0]);
    tracee.must_all(0, &[map])?;
    tracee.write_mem(at, bytes)?;
    let executable = (libc::PROT_READ | libc::PROT_EXEC) as u64;
    tracee.must(0, "protecting memory", libc::SYS_mprotect, [at, len, executable, 0, 0, 0])?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_lead_to_others() {
        assert_eq!(patched(&[0; 4096], &BTreeMap::new(), 0x1000), None);
        assert_eq!(patched(b"\x7fELF\x02\x01", &BTreeMap::new(), 0x1000), None);
    }
}
