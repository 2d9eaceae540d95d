//! The address space's frame: emptying it, the vDSO, what the kernel keeps in `mm_struct`, and the
//! working directory.

use super::files::{close_inside, open_inside};
use super::{RestoreError, mappings};
use crate::image::{Backing, ProcessImage};
use crate::tracee::{Tracee, TraceeError};
use std::fs;

/// `arch_prctl(2)`: map the vDSO at an address (arch/x86/include/uapi/asm/prctl.h).
const ARCH_MAP_VDSO_64: u64 = 0x2003;
const PR_SET_MM: u64 = 35;
const PR_SET_MM_MAP: u64 = 14;

/// Unmaps everything but the stub and the kernel's own mappings.
pub fn empty(tracee: &mut Tracee) -> Result<(), RestoreError> {
    let (stub, stub_len) = tracee.stub_range().ok_or_else(no_stub)?;
    let special = special_ranges(tracee.pid())?;
    for (start, end, _) in tracee.ranges()? {
        let kept = special.iter().any(|&(s, e)| s <= start && end <= e)
            || (stub <= start && end <= stub + stub_len)
            || start >= 1 << 63;
        if !kept {
            tracee.must(0, "unmapping", libc::SYS_munmap, [start, end - start, 0, 0, 0, 0])?;
        }
    }
    Ok(())
}

pub fn no_stub() -> RestoreError {
    RestoreError::Unfit("there is no stub in the task".into())
}

/// The vDSO, its data, vsyscall.
fn special_ranges(pid: i32) -> Result<Vec<(u64, u64)>, RestoreError> {
    let maps = crate::proc::read(pid, "maps")
        .map_err(|source| RestoreError::File { what: "reading maps".into(), source })?;
    Ok(crate::proc::maps::parse(&maps)
        .into_iter()
        .filter(|vma| matches!(vma.backing, Backing::Vdso | Backing::Vvar | Backing::Vsyscall))
        .map(|vma| (vma.start, vma.end))
        .collect())
}

/// Puts the vDSO where the image has it. Both kernels must lay it out alike.
pub fn place_vdso(tracee: &mut Tracee, image: &ProcessImage) -> Result<(), RestoreError> {
    let is_ours = |backing: &Backing| matches!(backing, Backing::Vdso | Backing::Vvar);
    let wanted: Vec<(u64, u64)> =
        image.mm.vmas.iter().filter(|vma| is_ours(&vma.backing)).map(|v| (v.start, v.end)).collect();
    let here: Vec<(u64, u64)> =
        special_ranges(tracee.pid())?.into_iter().filter(|&(start, _)| start < 1 << 63).collect();
    let (Some(&(want, _)), Some(&(have, _))) = (wanted.first(), here.first()) else { return Ok(()) };
    let shape = |ranges: &[(u64, u64)], base: u64| -> Vec<(u64, u64)> {
        ranges.iter().map(|&(s, e)| (s - base, e - base)).collect()
    };
    if shape(&wanted, want) != shape(&here, have) {
        return Err(RestoreError::Unfit(
            "the vDSO of this kernel has another layout than the one the process uses".into(),
        ));
    }
    if want == have {
        return Ok(());
    }
    for &(start, end) in &here {
        tracee.must(0, "unmapping the vDSO", libc::SYS_munmap, [start, end - start, 0, 0, 0, 0])?;
    }
    let got = tracee.syscall(0, libc::SYS_arch_prctl, [ARCH_MAP_VDSO_64, want, 0, 0, 0, 0])?;
    if got <= 0 {
        let errno = nix::errno::Errno::from_raw(-got as i32);
        return Err(TraceeError::Inside { operation: "mapping the vDSO", tid: tracee.pid(), errno }.into());
    }
    Ok(())
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
    let result = tracee.must(0, "setting the memory layout", libc::SYS_prctl, args);
    if let Some(fd) = exe_fd {
        close_inside(tracee, fd)?;
    }
    result?;
    let pid = tracee.pid();
    let _ = fs::write(format!("/proc/{pid}/coredump_filter"), format!("{:#x}", image.mm.coredump_filter));
    if image.mm.thp_disable {
        let args = [libc::PR_SET_THP_DISABLE as u64, 1, 0, 0, 0, 0];
        tracee.must(0, "PR_SET_THP_DISABLE", libc::SYS_prctl, args)?;
    }
    Ok(())
}

/// Working directory and umask.
pub fn set_fs(tracee: &mut Tracee, image: &ProcessImage) -> Result<(), RestoreError> {
    tracee.must(0, "umask", libc::SYS_umask, [image.fs.umask.into(), 0, 0, 0, 0, 0])?;
    let now = crate::proc::link(tracee.pid(), "cwd").unwrap_or_default();
    if now == image.fs.cwd || image.fs.cwd_deleted {
        return Ok(());
    }
    let path = mappings::put_path(tracee, &image.fs.cwd)?;
    tracee.must(0, "entering the working directory", libc::SYS_chdir, [path, 0, 0, 0, 0, 0])?;
    Ok(())
}

/// Personality, subreaper, OOM score.
pub fn set_misc(tracee: &mut Tracee, image: &ProcessImage) -> Result<(), RestoreError> {
    let misc = &image.misc;
    tracee.must(0, "personality", libc::SYS_personality, [misc.personality.into(), 0, 0, 0, 0, 0])?;
    if misc.child_subreaper {
        let args = [libc::PR_SET_CHILD_SUBREAPER as u64, 1, 0, 0, 0, 0];
        tracee.must(0, "PR_SET_CHILD_SUBREAPER", libc::SYS_prctl, args)?;
    }
    // Lowering it needs a capability that we may not have; the kernel's default is right then.
    let _ = fs::write(format!("/proc/{}/oom_score_adj", tracee.pid()), misc.oom_score_adj.to_string());
    Ok(())
}

/// Whether others may look at it.
pub fn set_dumpable(tracee: &mut Tracee, image: &ProcessImage) -> Result<(), RestoreError> {
    // 2 (root only) can only come about by itself, and has, if it is to be.
    if image.misc.dumpable <= 1 {
        let args = [libc::PR_SET_DUMPABLE as u64, image.misc.dumpable.into(), 0, 0, 0, 0];
        tracee.must(0, "PR_SET_DUMPABLE", libc::SYS_prctl, args)?;
    }
    Ok(())
}
