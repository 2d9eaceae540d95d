//! Files: opened inside the task, made in this process, and epolls.

use super::RestoreError;
use super::mappings::put_path;
use crate::image::{FileKind, FilesImage, OpenFile};
use crate::sys::timerfd;
use crate::tracee::{Tracee, TraceeError};
use nix::fcntl::{OFlag, open};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::Mode;
use nix::unistd::{Whence, lseek};
use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;

/// Flags of open(2) that must not be repeated: the file exists.
///
/// Of O_TMPFILE only the bit that is not O_DIRECTORY; 0x20 is `__FMODE_EXEC` (linux/fs.h).
const ONCE: i32 = libc::O_CREAT
    | libc::O_EXCL
    | libc::O_TRUNC
    | libc::O_NOCTTY
    | (libc::O_TMPFILE & !libc::O_DIRECTORY)
    | 0x20;

/// Opens a file by path inside the task; gives its number there.
pub fn open_inside(tracee: &mut Tracee, path: &[u8], writable: bool) -> Result<i32, RestoreError> {
    let at = put_path(tracee, path)?;
    let access = if writable { libc::O_RDWR } else { libc::O_RDONLY };
    let flags = (access | libc::O_CLOEXEC | libc::O_NOCTTY) as u64;
    let args = [libc::AT_FDCWD as u64, at, flags, 0, 0, 0];
    match tracee.must(0, "opening a file", libc::SYS_openat, args) {
        Ok(fd) => Ok(fd as i32),
        Err(TraceeError::Inside { errno, .. }) => {
            Err(RestoreError::file(format!("opening {}", String::from_utf8_lossy(path)), errno))
        }
        Err(other) => Err(other.into()),
    }
}

pub(super) fn close_inside(tracee: &mut Tracee, fd: i32) -> Result<(), RestoreError> {
    tracee.must(0, "closing a file", libc::SYS_close, [fd as u64, 0, 0, 0, 0, 0])?;
    Ok(())
}

/// Makes an open file description like the recorded one, in this process: what is the same on every
/// node, and files and directories by their path.
///
/// Epolls are made by [`Rebuild::finish`](super::Rebuild::finish), because the kernel knows their
/// targets by number.
pub fn make_local(file: &OpenFile) -> Result<OwnedFd, RestoreError> {
    let failed = |errno| RestoreError::file(format!("making {}", String::from_utf8_lossy(&file.link)), errno);
    let nonblocking = file.flags as i32 & libc::O_NONBLOCK != 0;
    match &file.kind {
        FileKind::LocalDevice | FileKind::Regular { deleted: false } | FileKind::Directory => {
            open_path(file).map_err(failed)
        }
        FileKind::EventFd { count, semaphore } => {
            let mut flags = EfdFlags::EFD_CLOEXEC;
            flags.set(EfdFlags::EFD_NONBLOCK, nonblocking);
            flags.set(EfdFlags::EFD_SEMAPHORE, *semaphore);
            let made = EventFd::from_value_and_flags(0, flags).map_err(failed)?;
            if *count > 0 {
                made.write(*count).map_err(failed)?;
            }
            Ok(made.into())
        }
        FileKind::TimerFd { clock, ticks, settime_flags: _, value_ns, interval_ns } => {
            timerfd::make(*clock, nonblocking, *value_ns, *interval_ns, *ticks).map_err(failed)
        }
        FileKind::SignalFd { mask } => {
            let mut set = SigSet::empty();
            for signal in Signal::iterator().filter(|&signal| mask >> (signal as i32 - 1) & 1 == 1) {
                set.add(signal);
            }
            let mut flags = SfdFlags::SFD_CLOEXEC;
            flags.set(SfdFlags::SFD_NONBLOCK, nonblocking);
            if mask >> 31 != 0 {
                // nix knows no real-time signals.
                return crate::sys::signalfd::make(*mask, nonblocking).map_err(failed);
            }
            Ok(SignalFd::with_flags(&set, flags).map_err(failed)?.into())
        }
        other => Err(RestoreError::Unfit(format!(
            "{} cannot be made anew ({other:?})",
            String::from_utf8_lossy(&file.link)
        ))),
    }
}

fn open_path(file: &OpenFile) -> Result<OwnedFd, nix::errno::Errno> {
    let flags = (file.flags as i32 & !ONCE) | libc::O_CLOEXEC | libc::O_NOCTTY;
    let opened = open(OsStr::from_bytes(&file.link), OFlag::from_bits_retain(flags), Mode::empty())?;
    if file.pos > 0 && !matches!(file.kind, FileKind::LocalDevice) {
        lseek(&opened, file.pos as i64, Whence::SeekSet)?;
    }
    Ok(opened)
}

/// Makes the epolls inside the task, when all else that they watch is there; then tells them what to
/// watch, which may be each other.
pub(super) fn make_epolls(tracee: &mut Tracee, files: &FilesImage) -> Result<(), RestoreError> {
    for index in epolls(files) {
        make_epoll(tracee, files, index)?;
    }
    for index in epolls(files) {
        watch(tracee, files, index)?;
    }
    Ok(())
}

/// Indices of the epolls that have a descriptor.
fn epolls(files: &FilesImage) -> Vec<usize> {
    let is_epoll = |index: &usize| matches!(files.files[*index].kind, FileKind::Epoll { .. });
    (0..files.files.len()).filter(is_epoll).filter(|&index| number_of(files, index).is_some()).collect()
}

fn number_of(files: &FilesImage, index: usize) -> Option<i32> {
    files.fds.iter().find(|fd| fd.file as usize == index).map(|fd| fd.fd)
}

fn make_epoll(tracee: &mut Tracee, files: &FilesImage, index: usize) -> Result<(), RestoreError> {
    let args = [libc::EPOLL_CLOEXEC as u64, 0, 0, 0, 0, 0];
    let made = tracee.must(0, "making an epoll", libc::SYS_epoll_create1, args)?;
    let mut placed = false;
    for fd in files.fds.iter().filter(|fd| fd.file as usize == index) {
        if i64::from(fd.fd) == made {
            placed = true;
            let flag = if fd.cloexec { libc::FD_CLOEXEC as u64 } else { 0 };
            let args = [made as u64, libc::F_SETFD as u64, flag, 0, 0, 0];
            tracee.must(0, "setting close-on-exec", libc::SYS_fcntl, args)?;
        } else {
            let flags = if fd.cloexec { libc::O_CLOEXEC as u64 } else { 0 };
            let args = [made as u64, fd.fd as u64, flags, 0, 0, 0];
            tracee.must(0, "placing an epoll", libc::SYS_dup3, args)?;
        }
    }
    if !placed {
        close_inside(tracee, made as i32)?;
    }
    Ok(())
}

fn watch(tracee: &mut Tracee, files: &FilesImage, index: usize) -> Result<(), RestoreError> {
    let FileKind::Epoll { targets } = &files.files[index].kind else { return Ok(()) };
    let Some(epoll) = number_of(files, index) else { return Ok(()) };
    let scratch = tracee.scratch();
    for &(fd, events, data) in targets {
        // struct epoll_event is packed on x86-64.
        let mut event = events.to_le_bytes().to_vec();
        event.extend_from_slice(&data.to_le_bytes());
        tracee.write_mem(scratch, &event)?;
        let add = libc::EPOLL_CTL_ADD as u64;
        // A target that was closed and lives on in a copy cannot be named any more.
        tracee.syscall(0, libc::SYS_epoll_ctl, [epoll as u64, add, fd as u64, scratch, 0, 0])?;
    }
    Ok(())
}
