//! Mappings and their contents.
//!
//! A mapping is made with its final protection at once: what cannot be written through
//! process_vm_writev(2) is written through `/proc/PID/mem`, which the kernel allows a tracer for
//! private memory of any protection.

use super::objects::Source;
use super::pkeys::Keys;
use super::{FileSource, RestoreError, aio, huge};
use crate::image::objects::ObjectKey;
use crate::image::{Backing, MappedFile, ProcessImage, Vma, VmaFlags};
use crate::sys::process_vm;
use crate::tracee::{Call, Tracee, TraceeError};
use nix::errno::Errno;
use std::collections::{BTreeMap, BTreeSet};

/// A kind of mapping beside private and shared (Linux 6.11, mmap(2)).
const MAP_DROPPABLE: libc::c_int = 8;
/// Files kept open while mappings of them are made.
const OPEN_FILES: usize = 64;
/// Zeros written over a private copy of a file's page.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// What is to come into the mappings.
#[derive(Default)]
pub struct Contents {
    vmas: Vec<Vma>,
    guards: Vec<(u64, u64)>,
    keys: Keys,
}

/// Makes the mappings `vmas` of the image: all of them, or those that are not there already.
pub fn map_all(
    tracee: &mut Tracee,
    vmas: &[Vma],
    image: &ProcessImage,
    files: &mut dyn FileSource,
    keys: Keys,
) -> Result<Contents, RestoreError> {
    let mut open = OpenFiles::new();
    let mut objects: BTreeMap<ObjectKey, i32> = BTreeMap::new();
    let mut shared: BTreeMap<u64, Vec<&Vma>> = BTreeMap::new();
    let mut rings: Vec<&Vma> = Vec::new();
    let mut plan = Plan::default();
    for (at, vma) in vmas.iter().enumerate() {
        // What its protection alone would give another key is protected when it is there.
        let late = huge::is_protected_late(vma);
        let later = !late && keys.come_later(vma) && !is_placed_late(vma);
        let prot = match (late, later) {
            (true, _) => (libc::PROT_READ | libc::PROT_WRITE) as u32,
            (_, true) => 0,
            _ => vma.prot,
        };
        match &vma.backing {
            Backing::Anon => {
                let droppable = vma.flags.contains(VmaFlags::DROPPABLE);
                let kind = if droppable { MAP_DROPPABLE } else { libc::MAP_PRIVATE };
                plan.map(vma, prot, kind | libc::MAP_ANONYMOUS | huge::flags_of(vma), None);
            }
            Backing::SharedAnon { id, .. } => {
                // Its place is taken now; the memory itself comes when all places are taken.
                plan.map(vma, 0, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, None);
                shared.entry(*id).or_default().push(vma);
            }
            Backing::Aio { .. } => {
                plan.map(vma, 0, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, None);
                rings.push(vma);
            }
            Backing::File(file) => {
                let key = key_of(file, vma);
                if !open.contains_key(&key) {
                    plan.run(tracee)?;
                    close_all(tracee, std::mem::take(&mut open).into_values())?;
                    open = open_next(tracee, &vmas[at..], files)?;
                }
                let fd = open.get(&key).copied().expect("the first of those that are opened");
                let kind = if vma.shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
                plan.map(vma, prot, kind, Some((fd, file.offset)));
            }
            Backing::Object { key, offset, .. } => match files.object(*key)? {
                Source::Segment(id) => plan.attach(vma, id),
                Source::File(ours) => {
                    if objects.len() >= OPEN_FILES && !objects.contains_key(key) {
                        plan.run(tracee)?;
                        close_all(tracee, std::mem::take(&mut objects).into_values())?;
                    }
                    let fd = match objects.get(key) {
                        Some(&fd) => fd,
                        None => files.take_in(tracee, ours)?,
                    };
                    objects.insert(*key, fd);
                    let kind = if vma.shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
                    plan.map(vma, prot, kind, Some((fd, *offset)));
                }
            },
            Backing::Vdso | Backing::Vvar | Backing::Vsyscall => continue,
        }
        if later {
            plan.push(vma, keys.protect(vma));
        }
        // Where the mapping itself comes later, so does this.
        if !is_placed_late(vma) && vma.flags.contains(VmaFlags::HUGEPAGE) {
            plan.push(vma, advise(vma, libc::MADV_HUGEPAGE));
        }
    }
    plan.run(tracee)?;
    close_all(tracee, open.into_values().chain(objects.into_values()))?;
    for group in shared.values() {
        map_shared(tracee, group)?;
    }
    rings.into_iter().try_for_each(|vma| aio::make(tracee, &image.mm, vma))?;
    Ok(Contents { vmas: image.mm.vmas.clone(), guards: image.mm.guards.clone(), keys })
}

/// Whether its place is taken first, and it comes when all places are taken; it is protected at the end.
fn is_placed_late(vma: &Vma) -> bool {
    matches!(vma.backing, Backing::SharedAnon { .. } | Backing::Aio { .. })
}

/// Numbers, inside, by path and whether it can be written.
type OpenFiles = BTreeMap<(Vec<u8>, bool), i32>;

fn key_of(file: &MappedFile, vma: &Vma) -> (Vec<u8>, bool) {
    (file.path.clone(), vma.shared && file.may_write)
}

/// Opens the files of the mappings that come next, as many as may be open.
fn open_next(
    tracee: &mut Tracee,
    vmas: &[Vma],
    files: &mut dyn FileSource,
) -> Result<OpenFiles, RestoreError> {
    let mut wanted: Vec<(&MappedFile, bool)> = Vec::new();
    let mut keys = BTreeSet::new();
    for vma in vmas {
        let Backing::File(file) = &vma.backing else { continue };
        let key = key_of(file, vma);
        if !keys.contains(&key) {
            if wanted.len() == OPEN_FILES {
                break;
            }
            wanted.push((file, key.1));
            keys.insert(key);
        }
    }
    let opened = files.open_all_mapped(tracee, &wanted)?;
    let key = |(file, writable): (&MappedFile, bool)| (file.path.clone(), writable);
    Ok(wanted.into_iter().map(key).zip(opened).collect())
}

/// Calls about mappings, to be run in one batch.
#[derive(Default)]
struct Plan<'a> {
    calls: Vec<Call>,
    /// For each call the mapping it is about.
    about: Vec<&'a Vma>,
}

impl<'a> Plan<'a> {
    fn push(&mut self, vma: &'a Vma, call: Call) {
        self.calls.push(call);
        self.about.push(vma);
    }

    fn map(&mut self, vma: &'a Vma, prot: u32, kind: libc::c_int, file: Option<(i32, u64)>) {
        let mut flags = kind | libc::MAP_FIXED;
        if vma.flags.contains(VmaFlags::GROWSDOWN) {
            flags |= libc::MAP_GROWSDOWN;
        }
        if vma.flags.contains(VmaFlags::NORESERVE) {
            flags |= libc::MAP_NORESERVE;
        }
        let (fd, offset) = file.map_or((u64::MAX, 0), |(fd, offset)| (fd as u64, offset));
        let args = [vma.start, vma.end - vma.start, prot.into(), flags as u64, fd, offset];
        self.push(vma, Call::must(MAPPING, libc::SYS_mmap, args));
    }

    /// A System V segment.
    fn attach(&mut self, vma: &'a Vma, id: i32) {
        let has = |bit: libc::c_int| vma.prot & bit as u32 != 0;
        let flags = libc::SHM_REMAP
            | if has(libc::PROT_WRITE) { 0 } else { libc::SHM_RDONLY }
            | if has(libc::PROT_EXEC) { libc::SHM_EXEC } else { 0 };
        let args = [id as u64, vma.start, flags as u64, 0, 0, 0];
        self.push(vma, Call::must(ATTACHING, libc::SYS_shmat, args));
    }

    /// Runs them, and forgets them.
    fn run(&mut self, tracee: &mut Tracee) -> Result<(), RestoreError> {
        let replies = tracee.batch(0, &self.calls)?;
        for ((call, vma), reply) in self.calls.iter().zip(&self.about).zip(&replies) {
            if let Some(errno) = reply.errno().filter(|_| call.is_must()) {
                let what = format!("{} {:x}-{:x} {}", call.operation(), vma.start, vma.end, name(vma));
                return Err(for_want_of_pages(RestoreError::file(what, errno), vma));
            }
            if matches!(call.operation(), MAPPING | ATTACHING) && reply.value as u64 != vma.start {
                return Err(RestoreError::Unfit(format!(
                    "a mapping came to {:#x} instead of {:#x}",
                    reply.value, vma.start
                )));
            }
        }
        self.calls.clear();
        self.about.clear();
        Ok(())
    }
}

/// What mmap(2) is for.
const MAPPING: &str = "mapping";
/// What shmat(2) is for.
const ATTACHING: &str = "attaching";

fn for_want_of_pages(error: RestoreError, vma: &Vma) -> RestoreError {
    match vma.is_huge() {
        true => huge::why(error, vma.page_shift, (vma.end - vma.start) >> vma.page_shift),
        false => error,
    }
}

fn name(vma: &Vma) -> String {
    match &vma.backing {
        Backing::File(file) => format!("of {}", String::from_utf8_lossy(&file.path)),
        Backing::Object { .. } => "of a file without a name".into(),
        _ => "of anonymous memory".into(),
    }
}

fn close_all(tracee: &mut Tracee, open: impl Iterator<Item = i32>) -> Result<(), RestoreError> {
    let close = |fd: i32| Call::must("closing a file", libc::SYS_close, [fd as u64, 0, 0, 0, 0, 0]);
    tracee.must_all(0, &open.map(close).collect::<Vec<Call>>())?;
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
    let unreserved = group.iter().all(|vma| vma.flags.contains(VmaFlags::NORESERVE));
    let reserve = if unreserved { libc::MAP_NORESERVE } else { 0 };
    let flags = (libc::MAP_SHARED | libc::MAP_ANONYMOUS | reserve) as u64;
    let args = [0, high - low, prot, flags, u64::MAX, 0];
    let whole = tracee.must(0, "making shared memory", libc::SYS_mmap, args)? as u64;
    let place = |vma: &&Vma| {
        let from = whole + offset(vma) - low;
        let how = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
        let args = [from, 0, vma.end - vma.start, how, vma.start, 0];
        Call::must("mapping shared memory", libc::SYS_mremap, args)
    };
    let mut calls: Vec<Call> = group.iter().map(place).collect();
    calls.push(Call::must("unmapping", libc::SYS_munmap, [whole, high - low, 0, 0, 0, 0]));
    tracee.must_all(0, &calls)?;
    Ok(())
}

fn advise(vma: &Vma, advice: libc::c_int) -> Call {
    let args = [vma.start, vma.end - vma.start, advice as u64, 0, 0, 0];
    Call::must("madvise for", libc::SYS_madvise, args)
}

impl Contents {
    /// Places contents.
    pub fn data(&self, tracee: &Tracee, addr: u64, bytes: &[u8]) -> Result<(), RestoreError> {
        match process_vm::write(tracee.pid(), addr, bytes) {
            Ok(()) => Ok(()),
            Err(_) => tracee.write_mem(addr, bytes).map_err(|error| self.why_not_written(addr, error)),
        }
    }

    fn why_not_written(&self, addr: u64, error: TraceeError) -> RestoreError {
        let vma = self.vmas.get(self.vmas.partition_point(|vma| vma.end <= addr));
        match vma.filter(|vma| vma.is_huge() && vma.start <= addr) {
            Some(vma) => {
                huge::why(RestoreError::file("filling huge pages", Errno::ENOMEM), vma.page_shift, 0)
            }
            None => error.into(),
        }
    }

    /// Makes a range zero: fresh anonymous memory is.
    pub fn zero(&self, tracee: &Tracee, addr: u64, len: u64) -> Result<(), RestoreError> {
        let first = self.vmas.partition_point(|vma| vma.end <= addr);
        for vma in self.vmas[first..].iter().take_while(|vma| vma.start < addr + len) {
            // A huge page of zeros is one that was made.
            if !vma.is_huge() && !matches!(vma.backing, Backing::File(_) | Backing::Object { .. }) {
                continue;
            }
            let (mut at, end) = (addr.max(vma.start), (addr + len).min(vma.end));
            while at < end {
                let n = (end - at).min(ZEROS.len() as u64);
                tracee
                    .write_mem(at, &ZEROS[..n as usize])
                    .map_err(|error| self.why_not_written(at, error))?;
                at += n;
            }
        }
        Ok(())
    }

    /// What had to wait until the contents were there.
    pub fn settle(self, tracee: &mut Tracee) -> Result<(), RestoreError> {
        // Before anything is locked: guards are refused there (madvise(2)).
        make_guards(tracee, &self.guards)?;
        let mut plan = Plan::default();
        for (flag, advice) in ADVICE {
            // Stacks of many threads stand side by side.
            for run in runs(&self.vmas, flag) {
                let length = run[run.len() - 1].end - run[0].start;
                let args = [run[0].start, length, advice as u64, 0, 0, 0];
                plan.push(&run[0], Call::must("madvise for", libc::SYS_madvise, args));
            }
        }
        for vma in &self.vmas {
            if matches!(vma.backing, Backing::Vdso | Backing::Vvar | Backing::Vsyscall) {
                continue;
            }
            let length = vma.end - vma.start;
            if is_placed_late(vma) {
                plan.push(vma, self.keys.protect(vma));
                if vma.flags.contains(VmaFlags::HUGEPAGE) {
                    plan.push(vma, advise(vma, libc::MADV_HUGEPAGE));
                }
            }
            if huge::is_protected_late(vma) {
                plan.push(vma, self.keys.protect(vma));
            }
            if vma.flags.contains(VmaFlags::LOCKED) {
                let on_fault = u64::from(vma.flags.contains(VmaFlags::LOCKONFAULT));
                let args = [vma.start, length, on_fault, 0, 0, 0];
                // The limit may be lower on this node: memory that is not locked still works.
                plan.push(vma, Call::may("locking", libc::SYS_mlock2, args));
            }
            if let Some(name) = &vma.name {
                const PR_SET_VMA: u64 = 0x5356_4d41;
                // Kernels without CONFIG_ANON_VMA_NAME refuse; the name is for people only.
                let args = [PR_SET_VMA, 0, vma.start, length, 0, 0];
                plan.push(vma, Call::may("naming", libc::SYS_prctl, args).string(4, name));
            }
        }
        // Nothing can be done to them after that (mseal(2)).
        for vma in self.vmas.iter().filter(|vma| vma.flags.contains(VmaFlags::SEALED)) {
            if matches!(vma.backing, Backing::Vdso | Backing::Vvar | Backing::Vsyscall) {
                continue;
            }
            let args = [vma.start, vma.end - vma.start, 0, 0, 0, 0];
            plan.push(vma, Call::must("sealing", libc::SYS_mseal, args));
        }
        plan.run(tracee)?;
        tracee.must_all(0, &self.keys.settle())?;
        Ok(())
    }
}

/// Mappings with a flag, those together that have no gap between them.
fn runs(vmas: &[Vma], flag: VmaFlags) -> impl Iterator<Item = &[Vma]> {
    let has = move |vma: &Vma| {
        let special = matches!(vma.backing, Backing::Vdso | Backing::Vvar | Backing::Vsyscall);
        !special && vma.flags.contains(flag)
    };
    let runs = vmas.chunk_by(move |one, next| has(one) && has(next) && one.end == next.start);
    runs.filter(move |run| has(&run[0]))
}

fn make_guards(tracee: &mut Tracee, guards: &[(u64, u64)]) -> Result<(), RestoreError> {
    let install = |&(start, end): &(u64, u64)| {
        let args = [start, end - start, MADV_GUARD_INSTALL, 0, 0, 0];
        Call::may("making guard pages", libc::SYS_madvise, args)
    };
    let replies = tracee.batch(0, &guards.iter().map(install).collect::<Vec<Call>>())?;
    // Before 6.13: no access at all is the same to the program.
    let refused = guards.iter().zip(&replies).filter(|(_, reply)| reply.value != 0);
    let calls: Vec<Call> = refused
        .map(|(&(start, end), _)| {
            Call::must("making guard pages", libc::SYS_mprotect, [start, end - start, 0, 0, 0, 0])
        })
        .collect();
    tracee.must_all(0, &calls)?;
    Ok(())
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

/// Puts a few bytes into the task's scratch area.
pub fn put_bytes(tracee: &mut Tracee, bytes: &[u8]) -> Result<u64, RestoreError> {
    let scratch = tracee.scratch();
    tracee.write_mem(scratch, bytes)?;
    Ok(scratch)
}
