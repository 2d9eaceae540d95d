//! Files: opened inside the task, made in this process, and epolls.

use super::RestoreError;
use crate::image::{FileKind, FilesImage, OpenFile};
use crate::sys::fork::{Side, exit_now, fork};
use crate::sys::{fd, file_owner, inotify, timerfd, wait};
use crate::tracee::{Call, Tracee};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::epoll::{Epoll, EpollCreateFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::Mode;
use nix::unistd::{Whence, lseek};
use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

/// Flags of open(2) that must not be repeated: the file exists.
///
/// Of O_TMPFILE only the bit that is not O_DIRECTORY; 0x20 is `__FMODE_EXEC` (linux/fs.h).
const ONCE: i32 = libc::O_CREAT
    | libc::O_EXCL
    | libc::O_TRUNC
    | libc::O_NOCTTY
    | (libc::O_TMPFILE & !libc::O_DIRECTORY)
    // Only F_SETFL makes it work ([`super::locks::set_owners`]).
    | libc::O_ASYNC
    | 0x20;

/// Opens a file by path inside the task; gives its number there.
pub fn open_inside(tracee: &mut Tracee, path: &[u8], writable: bool) -> Result<i32, RestoreError> {
    open_all_inside(tracee, &[(path, writable)]).map(|fds| fds[0])
}

/// The same of several files, each with whether it is to be writable.
pub(super) fn open_all_inside(
    tracee: &mut Tracee,
    files: &[(&[u8], bool)],
) -> Result<Vec<i32>, RestoreError> {
    let open = |&(path, writable): &(&[u8], bool)| {
        let access = if writable { libc::O_RDWR } else { libc::O_RDONLY };
        let flags = (access | libc::O_CLOEXEC | libc::O_NOCTTY) as u64;
        let args = [libc::AT_FDCWD as u64, 0, flags, 0, 0, 0];
        Call::must("opening a file", libc::SYS_openat, args).string(1, path)
    };
    let calls: Vec<Call> = files.iter().map(open).collect();
    let replies = tracee.batch(0, &calls)?;
    for ((path, _), reply) in files.iter().zip(&replies) {
        if let Some(errno) = reply.errno() {
            return Err(RestoreError::file(format!("opening {}", String::from_utf8_lossy(path)), errno));
        }
    }
    Ok(replies.iter().map(|reply| reply.value as i32).collect())
}

pub(super) fn close_inside(tracee: &mut Tracee, fd: i32) -> Result<(), RestoreError> {
    tracee.must(0, "closing a file", libc::SYS_close, [fd as u64, 0, 0, 0, 0, 0])?;
    Ok(())
}

/// Makes an open file description like the recorded one, in this process: what is the same on every
/// node, and files and directories by their path. Epolls and inotifies do not watch anything yet.
pub fn make_local(file: &OpenFile) -> Result<OwnedFd, RestoreError> {
    let failed = |errno| RestoreError::file(format!("making {}", String::from_utf8_lossy(&file.link)), errno);
    let nonblocking = file.flags as i32 & libc::O_NONBLOCK != 0;
    match &file.kind {
        FileKind::LocalDevice | FileKind::Regular { deleted: false } | FileKind::Proc { pid: _ } => {
            open_path(file).map_err(failed)
        }
        FileKind::Directory => open_directory(file),
        FileKind::Path { deleted: false } => open_place(file),
        FileKind::Namespace => open_namespace(file),
        FileKind::Inotify { .. } => inotify::make(nonblocking).map_err(failed),
        // What it watches comes when all of that is there ([`super::watches`]).
        FileKind::Epoll { .. } => {
            Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map(|made| made.0).map_err(failed)
        }
        FileKind::Pidfd { pid } => make_pidfd(*pid, file.flags).map_err(failed),
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
        FileKind::TimerFd { clock, ticks, value_ns, interval_ns, .. } => {
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

/// Flags for opening it once more.
pub(super) fn flags_to_open(file: &OpenFile) -> i32 {
    (file.flags as i32 & !ONCE) | libc::O_CLOEXEC | libc::O_NOCTTY
}

fn open_path(file: &OpenFile) -> Result<OwnedFd, Errno> {
    let flags = OFlag::from_bits_retain(flags_to_open(file));
    let opened = open(OsStr::from_bytes(&file.link), flags, Mode::empty())?;
    set_position(file, &opened)?;
    Ok(opened)
}

/// The position, and the hint for writes.
pub(super) fn set_position(file: &OpenFile, opened: &OwnedFd) -> Result<(), Errno> {
    if file.write_hint != 0 {
        // Not every file system keeps one, and it is only a hint.
        let _ = file_owner::set_write_hint(opened.as_fd(), file.write_hint);
    }
    if file.pos > 0 && !matches!(file.kind, FileKind::LocalDevice) {
        lseek(opened, file.pos as i64, Whence::SeekSet)?;
    }
    Ok(())
}

/// A directory by its path, or a removed one: its name with the kernel's word for that leads nowhere.
fn open_directory(file: &OpenFile) -> Result<OwnedFd, RestoreError> {
    match open_path(file) {
        Err(Errno::ENOENT) if file.link.ends_with(b" (deleted)") => {
            super::nameless::open_removed_directory(file, flags_to_open(file))
        }
        opened => opened.map_err(|errno| {
            RestoreError::file(format!("opening {}", String::from_utf8_lossy(&file.link)), errno)
        }),
    }
}

/// What was opened with O_PATH; a symbolic link too.
fn open_place(file: &OpenFile) -> Result<OwnedFd, RestoreError> {
    let name = String::from_utf8_lossy(&file.link);
    let flags = (file.flags as i32 & !ONCE) | libc::O_PATH | libc::O_CLOEXEC;
    let opened = open(OsStr::from_bytes(&file.link), OFlag::from_bits_retain(flags), Mode::empty())
        .map_err(|errno| RestoreError::file(format!("opening {name}"), errno))?;
    let found = nix::sys::stat::fstat(&opened)
        .map_err(|errno| RestoreError::file(format!("looking at {name}"), errno))?;
    if found.st_ino != file.stat.1 {
        return Err(RestoreError::Unfit(format!("{name} has been replaced")));
    }
    Ok(opened)
}

fn open_namespace(file: &OpenFile) -> Result<OwnedFd, RestoreError> {
    let name = String::from_utf8_lossy(&file.link).into_owned();
    let kind = name.split(':').next().unwrap_or_default();
    let path = format!("/proc/self/ns/{kind}");
    let same =
        !kind.contains('/') && std::fs::read_link(&path).is_ok_and(|ours| ours.as_os_str() == name.as_str());
    if !same {
        return Err(RestoreError::Unfit(format!("the namespace {name} is another one here")));
    }
    open(path.as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(|errno| RestoreError::file(format!("opening {name}"), errno))
}

fn make_pidfd(pid: i32, flags: u32) -> Result<OwnedFd, Errno> {
    /// `PIDFD_THREAD` (linux/pidfd.h).
    const THREAD: u32 = libc::O_EXCL as u32;
    let flags = flags & (libc::O_NONBLOCK as u32 | THREAD);
    if pid != 0 {
        return fd::pidfd_open_with(pid, flags);
    }
    // One that has ended and was waited for: any such will do.
    match fork(0, None)? {
        Side::Child => exit_now(0),
        Side::Parent(child) => {
            let made = fd::pidfd_open_with(child, flags);
            wait::child(child)?;
            made
        }
    }
}

/// Makes the epolls inside the task (of a guest, whose table another program has built), when all else that they watch is there; then tells them what to
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
    for target in targets {
        // struct epoll_event is packed on x86-64.
        let mut event = target.events.to_le_bytes().to_vec();
        event.extend_from_slice(&target.data.to_le_bytes());
        tracee.write_mem(scratch, &event)?;
        let add = libc::EPOLL_CTL_ADD as u64;
        // A target that was closed and lives on in a copy cannot be named any more.
        tracee.syscall(0, libc::SYS_epoll_ctl, [epoll as u64, add, target.fd as u64, scratch, 0, 0])?;
    }
    Ok(())
}
