//! Locks and leases, taken again by those who held them, and the owners of open files.
//!
//! A lock that somebody else has taken meanwhile cannot be had, and nothing is restored then.

use super::RestoreError;
use super::mappings::put_bytes;
use crate::image::{LockImage, LockKind, OpenFile, ProcessImage};
use crate::inventory::owners::OWNER_PGRP;
use crate::sys::file_owner::{F_SETOWN_EX, F_SETSIG};
use crate::tracee::{Tracee, TraceeError};
use nix::errno::Errno;
use nix::unistd::{Pid, getpgid};

/// `struct flock` (linux/fcntl.h): type, whence, start, length, pid.
const FLOCK_LEN: usize = 32;

/// Takes the locks of all processes; each of them has its descriptors.
pub(super) fn take_all(images: &[ProcessImage], tracees: &mut [Tracee]) -> Result<(), RestoreError> {
    for (who, image) in images.iter().enumerate() {
        for (index, file) in image.files.files.iter().enumerate() {
            let Some(fd) = image.files.fds.iter().find(|fd| fd.file as usize == index) else { continue };
            for lock in &file.locks {
                let own = file.shared == 0 || lock.kind == LockKind::Posix;
                // What several processes have is held once; by the one that took it, if it has it still.
                if own || holder_of(images, file.shared, lock.pid) == Some(who) {
                    take(&mut tracees[who], fd.fd, file, lock)?;
                }
            }
        }
    }
    Ok(())
}

/// Of the processes that have a shared open file description, the one with this PID, or else the first.
fn holder_of(images: &[ProcessImage], shared: u32, pid: i32) -> Option<usize> {
    let has = |image: &ProcessImage| image.files.files.iter().any(|file| file.shared == shared);
    let named = images.iter().position(|image| image.pid == pid && has(image));
    named.or_else(|| images.iter().position(has))
}

fn take(tracee: &mut Tracee, fd: i32, file: &OpenFile, lock: &LockImage) -> Result<(), RestoreError> {
    let number = fd as u64;
    let (nr, args) = match &lock.kind {
        LockKind::Flock => {
            let how = if lock.exclusive { libc::LOCK_EX } else { libc::LOCK_SH } | libc::LOCK_NB;
            (libc::SYS_flock, [number, how as u64, 0, 0, 0, 0])
        }
        LockKind::Lease => {
            let how = if lock.exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
            (libc::SYS_fcntl, [number, libc::F_SETLEASE as u64, how as u64, 0, 0, 0])
        }
        LockKind::Posix | LockKind::Description => {
            let at = put_bytes(tracee, &range(lock))?;
            let command = if lock.kind == LockKind::Posix { libc::F_SETLK } else { libc::F_OFD_SETLK };
            (libc::SYS_fcntl, [number, command as u64, at, 0, 0, 0])
        }
        LockKind::Unknown { .. } => return Err(RestoreError::Unfit(lock.name())),
    };
    let pid = tracee.pid();
    let name = || format!("{} on {} (fd {fd} of process {pid})", lock.name(), lossy(&file.link));
    match tracee.must(0, "taking a lock", nr, args) {
        Ok(_) => Ok(()),
        Err(TraceeError::Inside { errno: Errno::EAGAIN | Errno::EACCES, .. }) => {
            let what = format!("{} cannot be taken again: {} it", name(), holder(file));
            Err(RestoreError::Unfit(what))
        }
        Err(TraceeError::Inside { errno, .. }) => {
            Err(RestoreError::file(format!("taking {}", name()), errno))
        }
        Err(other) => Err(other.into()),
    }
}

fn range(lock: &LockImage) -> [u8; FLOCK_LEN] {
    let mut bytes = [0; FLOCK_LEN];
    let kind = if lock.exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
    let length = if lock.end == u64::MAX { 0 } else { lock.end.saturating_sub(lock.start).saturating_add(1) };
    bytes[..2].copy_from_slice(&(kind as u16).to_le_bytes());
    bytes[8..16].copy_from_slice(&lock.start.to_le_bytes());
    bytes[16..24].copy_from_slice(&length.to_le_bytes());
    bytes
}

/// Who has a lock on the file now, as far as `/proc/locks` tells.
fn holder(file: &OpenFile) -> String {
    let inode = format!(":{}", file.stat.1);
    let text = std::fs::read_to_string("/proc/locks").unwrap_or_default();
    let pid = text.lines().find_map(|line| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let [_, _, _, _, pid, place, ..] = words.as_slice() else { return None };
        place.ends_with(&inode).then(|| pid.parse::<i32>().ok())?
    });
    match pid {
        Some(pid) if pid > 0 => format!("process {pid} uses"),
        _ => "somebody else uses".into(),
    }
}

fn lossy(link: &[u8]) -> String {
    String::from_utf8_lossy(link).into_owned()
}

/// Tells the open files whom to signal, and those with O_ASYNC to begin.
pub(super) fn set_owners(images: &[ProcessImage], tracees: &mut [Tracee]) -> Result<(), RestoreError> {
    for (who, image) in images.iter().enumerate() {
        for (index, file) in image.files.files.iter().enumerate() {
            let asynchronous = file.flags as i32 & libc::O_ASYNC != 0;
            if file.owner == (0, 0, 0) && !asynchronous {
                continue;
            }
            let Some(fd) = image.files.fds.iter().find(|fd| fd.file as usize == index) else { continue };
            // With the credentials of the owner: they decide who may be sent a signal.
            if file.shared == 0 || holder_of(images, file.shared, file.owner.1) == Some(who) {
                set_owner(&mut tracees[who], fd.fd, file, &images[0])?;
            }
        }
    }
    Ok(())
}

fn set_owner(tracee: &mut Tracee, fd: i32, file: &OpenFile, root: &ProcessImage) -> Result<(), RestoreError> {
    let (kind, mut id, signal) = file.owner;
    let mut control = |operation: &'static str, command: i32, argument: u64| {
        tracee.must(0, operation, libc::SYS_fcntl, [fd as u64, command as u64, argument, 0, 0, 0])
    };
    if signal != 0 {
        control("F_SETSIG", F_SETSIG, signal as u64)?;
    }
    if id != 0 {
        if kind == OWNER_PGRP && id == root.pgid {
            // The root is in the group of whoever restores it.
            id = getpgid(Some(Pid::from_raw(root.pid))).map_or(id, Pid::as_raw);
        }
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend_from_slice(&id.to_le_bytes());
        let at = put_bytes(tracee, &bytes)?;
        let args = [fd as u64, F_SETOWN_EX as u64, at, 0, 0, 0];
        tracee.must(0, "F_SETOWN_EX", libc::SYS_fcntl, args)?;
    }
    if file.flags as i32 & libc::O_ASYNC != 0 {
        let args = [fd as u64, libc::F_SETFL as u64, file.flags.into(), 0, 0, 0];
        tracee.must(0, "O_ASYNC", libc::SYS_fcntl, args)?;
    }
    Ok(())
}
