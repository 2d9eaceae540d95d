//! The address space's frame: emptying it, what the kernel keeps in `mm_struct`, and the
//! working directory.

use super::RestoreError;
use super::files::open_inside;
use crate::image::{Backing, FsImage, ProcessImage, Vma};
use crate::tracee::{Call, Tracee};
use std::fs;

const PR_SET_MM: u64 = 35;
const PR_SET_MM_MAP: u64 = 14;

/// Unmaps everything but the stub and the kernel's own mappings.
pub fn empty(tracee: &mut Tracee) -> Result<(), RestoreError> {
    let unmap = |(start, end): (u64, u64)| {
        Call::must("unmapping", libc::SYS_munmap, [start, end - start, 0, 0, 0, 0])
    };
    let calls: Vec<Call> = own_ranges(tracee)?.into_iter().map(unmap).collect();
    tracee.must_all(0, &calls)?;
    Ok(())
}

/// Starts and ends of all mappings but the stub's and the kernel's own.
pub fn own_ranges(tracee: &Tracee) -> Result<Vec<(u64, u64)>, RestoreError> {
    let (stub, stub_len) = tracee.stub_range().ok_or_else(no_stub)?;
    // The vDSO, its data, vsyscall: read once for both.
    let maps = parsed_maps(tracee.pid())?;
    let kept = |vma: &&Vma| {
        is_special(vma) || (stub <= vma.start && vma.end <= stub + stub_len) || vma.start >= 1 << 63
    };
    Ok(maps.iter().filter(|vma| !kept(vma)).map(|vma| (vma.start, vma.end)).collect())
}

fn parsed_maps(pid: i32) -> Result<Vec<Vma>, RestoreError> {
    let maps = crate::proc::read(pid, "maps")
        .map_err(|source| RestoreError::File { what: "reading maps".into(), source })?;
    Ok(crate::proc::maps::parse(&maps))
}

fn is_special(vma: &Vma) -> bool {
    matches!(vma.backing, Backing::Vdso | Backing::Vvar | Backing::Vsyscall)
}

pub fn no_stub() -> RestoreError {
    RestoreError::Unfit("there is no stub in the task".into())
}

/// The vDSO, its data, vsyscall.
pub fn special_ranges(pid: i32) -> Result<Vec<(Backing, u64, u64)>, RestoreError> {
    let special = parsed_maps(pid)?.into_iter().filter(is_special);
    Ok(special.map(|vma| (vma.backing, vma.start, vma.end)).collect())
}

/// What `ps` and `brk` know: `PR_SET_MM_MAP` (prctl(2)).
pub fn set_mm(tracee: &mut Tracee, image: &ProcessImage, exe: bool) -> Result<(), RestoreError> {
    let scratch = tracee.scratch();
    let auxv = scratch + 256;
    if image.mm.auxv.len() > Tracee::SCRATCH_LEN - 256 {
        return Err(RestoreError::Unfit("its auxiliary vector is too long".into()));
    }
    let exe_fd = if exe { Some(open_inside(tracee, &image.mm.exe, false)?) } else { None };
    tracee.write_mem(auxv, &image.mm.auxv)?;
    let mut map: Vec<u8> = image.mm.layout.iter().flat_map(|word| word.to_le_bytes()).collect();
    map.extend_from_slice(&auxv.to_le_bytes());
    map.extend_from_slice(&(image.mm.auxv.len() as u32).to_le_bytes());
    map.extend_from_slice(&exe_fd.map_or(u32::MAX, |fd| fd as u32).to_le_bytes());
    tracee.write_mem(scratch, &map)?;
    let args = [PR_SET_MM, PR_SET_MM_MAP, scratch, map.len() as u64, 0, 0];
    let mut calls = vec![Call::must("setting the memory layout", libc::SYS_prctl, args)];
    if let Some(fd) = exe_fd {
        calls.push(Call::must("closing a file", libc::SYS_close, [fd as u64, 0, 0, 0, 0, 0]));
    }
    tracee.must_all(0, &calls)?;
    let pid = tracee.pid();
    let _ = fs::write(format!("/proc/{pid}/coredump_filter"), format!("{:#x}", image.mm.coredump_filter));
    let huge_pages = super::traits::huge_pages(&image.mm, &image.traits);
    tracee.must_all(0, &huge_pages.into_iter().collect::<Vec<Call>>())?;
    Ok(())
}

/// Working directory, umask, and where there may be one, root: of a thread and those that share them.
pub fn fs(tid: i32, fs: &FsImage, root: bool) -> Vec<Call> {
    let mut calls = vec![Call::must("umask", libc::SYS_umask, [fs.umask.into(), 0, 0, 0, 0, 0])];
    let now = crate::proc::link(tid, "cwd").unwrap_or_default();
    if now != fs.cwd && !fs.cwd_deleted {
        calls.push(Call::must("entering the working directory", libc::SYS_chdir, [0; 6]).string(0, &fs.cwd));
    }
    // After the directory, whose name is told from here.
    if root && fs.root != b"/" && crate::proc::link(tid, "root").unwrap_or_default() != fs.root {
        calls.push(Call::must("entering its root (chroot)", libc::SYS_chroot, [0; 6]).string(0, &fs.root));
    }
    calls
}

/// Registers for what it has registered for by membarrier(2).
pub fn membarrier(image: &ProcessImage) -> impl Iterator<Item = Call> {
    let registered = image.misc.membarrier;
    let commands = (0..u32::BITS).map(|bit| 1 << bit).filter(move |command| registered & command != 0);
    commands.map(|command: u32| {
        Call::must("membarrier (registering)", libc::SYS_membarrier, [command.into(), 0, 0, 0, 0, 0])
    })
}

/// Subreaper, OOM score.
pub fn misc(pid: i32, image: &ProcessImage) -> Vec<Call> {
    let misc = &image.misc;
    // The personality is each thread's own, and comes with the threads.
    let mut calls = Vec::new();
    if misc.child_subreaper {
        let args = [libc::PR_SET_CHILD_SUBREAPER as u64, 1, 0, 0, 0, 0];
        calls.push(Call::must("PR_SET_CHILD_SUBREAPER", libc::SYS_prctl, args));
    }
    // Lowering it needs a capability that we may not have; the kernel's default is right then.
    let _ = fs::write(format!("/proc/{pid}/oom_score_adj"), misc.oom_score_adj.to_string());
    calls
}

/// Whether others may look at it.
pub fn dumpable(image: &ProcessImage) -> Vec<Call> {
    // 2 (root only) can only come about by itself, and has, if it is to be.
    if image.misc.dumpable > 1 {
        return Vec::new();
    }
    let args = [libc::PR_SET_DUMPABLE as u64, image.misc.dumpable.into(), 0, 0, 0, 0];
    vec![Call::must("PR_SET_DUMPABLE", libc::SYS_prctl, args)]
}
