//! What epolls and inotifies watch, when all of it is there.
//!
//! The kernel knows an epoll's target by its file and the number under which it was added, so that it
//! is added by a process that has the file under that number: the epoll's own, or, where the number was
//! closed or is another file's now, a child of this program that puts it there.

use super::RestoreError;
use crate::image::{EpollTarget, FileKind, OpenFile, ProcessImage, WatchImage};
use crate::inventory::watches::{ONLY_FLAGS, is_watched, open_watched};
use crate::sys::close_range::place;
use crate::sys::fd::{pidfd_getfd, pidfd_open};
use crate::sys::fork::{Side, exit_now, fork};
use crate::sys::{inotify, pipe, wait};
use crate::tracee::{Call, Tracee};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::stat::Mode;
use std::collections::BTreeSet;
use std::ffi::{CString, OsStr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

/// Tells all epolls and inotifies what to watch, those that several processes have once.
pub(super) fn watch_all(images: &[ProcessImage], tracees: &mut [Tracee]) -> Result<(), RestoreError> {
    // An epoll in an epoll is ready only when it watches itself.
    for nested in [false, true] {
        each_once(images, &mut |who, fd, file| match &file.kind {
            FileKind::Epoll { targets } => watch(images, &mut tracees[who], who, fd, targets, nested),
            _ => Ok(()),
        })?;
    }
    each_once(images, &mut |who, fd, file| match &file.kind {
        FileKind::Inotify { watches } => watch_files(images[who].pid, fd, watches),
        _ => Ok(()),
    })
}

/// Calls `work` with each open file description: whose it is, a number of it there, and what it is.
fn each_once(
    images: &[ProcessImage],
    work: &mut dyn FnMut(usize, i32, &OpenFile) -> Result<(), RestoreError>,
) -> Result<(), RestoreError> {
    let mut done = BTreeSet::new();
    for (who, image) in images.iter().enumerate() {
        for (index, file) in image.files.files.iter().enumerate() {
            let Some(fd) = image.files.fds.iter().find(|fd| fd.file as usize == index) else { continue };
            if file.shared == 0 || done.insert(file.shared) {
                work(who, fd.fd, file)?;
            }
        }
    }
    Ok(())
}

fn failed(pid: i32, fd: i32) -> impl Fn(Errno) -> RestoreError {
    move |errno| RestoreError::file(format!("restoring what fd {fd} of process {pid} watches"), errno)
}

fn copy_of(pid: i32, fd: i32) -> Result<OwnedFd, Errno> {
    pidfd_getfd(pidfd_open(pid)?.as_fd(), fd)
}

/// Adds an epoll's targets: those that are epolls themselves (`nested`), or the others.
fn watch(
    images: &[ProcessImage],
    tracee: &mut Tracee,
    who: usize,
    fd: i32,
    targets: &[EpollTarget],
    nested: bool,
) -> Result<(), RestoreError> {
    let image = &images[who];
    let holder = |target: &EpollTarget| match target.at.0 {
        0 => Some(image),
        pid => images.iter().find(|image| image.pid == pid),
    };
    let kind = |target: &EpollTarget| {
        let files = &holder(target)?.files;
        let place = files.fds.iter().find(|fd| fd.fd == target.at.1)?.file;
        Some(&files.files.get(place as usize)?.kind)
    };
    let is_nested = |target: &&EpollTarget| matches!(kind(target), Some(FileKind::Epoll { .. })) == nested;
    let mut rest = Vec::new();
    for target in targets.iter().filter(is_nested) {
        let own = target.at == (0, target.fd);
        if own && !target.spent {
            rest.push(*target);
            continue;
        }
        // First, as long as nothing else in it can be ready.
        let at = failed(image.pid, fd);
        let Some(of) = holder(target) else {
            return Err(RestoreError::Unfit("the image is not consistent: what an epoll watches".into()));
        };
        let epoll = Epoll(copy_of(image.pid, fd).map_err(&at)?);
        let file = copy_of(of.pid, target.at.1).map_err(&at)?;
        match own {
            true => add_all(tracee, fd, &[armed(target)])?,
            false => change_elsewhere(&epoll, &file, &armed(target), libc::EPOLL_CTL_ADD).map_err(&at)?,
        }
        if target.spent {
            let is_pipe = matches!(kind(target), Some(FileKind::Pipe { internal: true }));
            spend(tracee, (fd, &epoll), &file, is_pipe, target)?;
        }
    }
    add_all(tracee, fd, &rest)
}

/// A one-shot target that has told is added so that anything makes it tell once more.
fn armed(target: &EpollTarget) -> EpollTarget {
    let all = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLPRI | EpollFlags::EPOLLRDHUP;
    let disarmed = target.events & !ONLY_FLAGS == 0;
    EpollTarget { events: target.events | if disarmed { all.bits() as u32 } else { 0 }, ..*target }
}

fn add_all(tracee: &mut Tracee, epoll: i32, targets: &[EpollTarget]) -> Result<(), RestoreError> {
    let calls: Vec<Call> = targets.iter().map(|target| control(libc::EPOLL_CTL_ADD, epoll, target)).collect();
    tracee.must_all(0, &calls)?;
    Ok(())
}

fn control(how: i32, epoll: i32, target: &EpollTarget) -> Call {
    // struct epoll_event is packed on x86-64.
    let mut event = target.events.to_le_bytes().to_vec();
    event.extend_from_slice(&target.data.to_le_bytes());
    let args = [epoll as u64, how as u64, target.fd as u64, 0, 0, 0];
    Call::must("watching a file", libc::SYS_epoll_ctl, args).input(3, &event)
}

/// Adds or changes a file under a number that is not its own any more.
fn change_elsewhere(epoll: &Epoll, file: &OwnedFd, target: &EpollTarget, how: i32) -> Result<(), Errno> {
    // Neither may be in the way of the number.
    let above = |fd: &OwnedFd| {
        nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(3)).map(crate::sys::fd::own)
    };
    let (mut epoll, mut file) = (above(&epoll.0)?, above(file)?);
    if epoll.as_raw_fd() == target.fd {
        epoll = above(&epoll)?;
    }
    if file.as_raw_fd() == target.fd {
        file = above(&file)?;
    }
    match fork(0, None)? {
        Side::Child => {
            let mut event = EpollEvent::new(EpollFlags::from_bits_retain(target.events as i32), target.data);
            let changed = place(file.as_raw_fd(), target.fd, true).and_then(|()| {
                let number = crate::sys::fd::own(target.fd);
                match how {
                    libc::EPOLL_CTL_MOD => Epoll(epoll).modify(number, &mut event),
                    _ => Epoll(epoll).add(number, event),
                }
            });
            exit_now(changed.err().map_or(0, |errno| errno as i32))
        }
        Side::Parent(child) => match wait::child(child)? {
            0 => Ok(()),
            status => Err(Errno::from_raw(libc::WEXITSTATUS(status))),
        },
    }
}

/// Takes the event of a target that had been taken before it was saved.
fn spend(
    tracee: &mut Tracee,
    (fd, epoll): (i32, &Epoll),
    file: &OwnedFd,
    is_pipe: bool,
    target: &EpollTarget,
) -> Result<(), RestoreError> {
    let at = failed(tracee.pid(), fd);
    let take = || {
        let mut events = [EpollEvent::empty()];
        epoll.wait(&mut events, EpollTimeout::ZERO)
    };
    if take().map_err(&at)? > 0 {
        return Ok(());
    }
    if is_pipe && target.events & !ONLY_FLAGS == 0 {
        // Something is written to it, and read again.
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let both = open(path.as_str(), OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC, Mode::empty());
        let both = both.map_err(&at)?;
        if pipe::filled(both.as_fd()).map_err(&at)? == 0 && nix::unistd::write(&both, b"x").is_ok() {
            let taken = take();
            nix::unistd::read(&both, &mut [0]).map_err(&at)?;
            if taken.map_err(&at)? > 0 {
                return Ok(());
            }
        }
    }
    if target.events & !ONLY_FLAGS != 0 {
        return Ok(());
    }
    // It is not ready for anything: as it was, but that the kernel adds errors and hang-ups.
    match target.at == (0, target.fd) {
        true => tracee.must_all(0, &[control(libc::EPOLL_CTL_MOD, fd, target)]).map(drop)?,
        false => change_elsewhere(epoll, file, target, libc::EPOLL_CTL_MOD).map_err(&at)?,
    }
    Ok(())
}

/// Adds what an inotify watches, under the same numbers.
fn watch_files(pid: i32, fd: i32, watches: &[WatchImage]) -> Result<(), RestoreError> {
    let at = failed(pid, fd);
    let copy = copy_of(pid, fd).map_err(&at)?;
    let mut last = 0;
    for watch in watches {
        if watch.wd <= last {
            return Err(RestoreError::Unfit("the image is not consistent: numbers of watches".into()));
        }
        last = watch.wd;
        let file = find(watch)?;
        let path = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd())).expect("no NUL in a number");
        inotify::watch(copy.as_fd(), &path, watch.mask, watch.wd).map_err(&at)?;
    }
    Ok(())
}

/// The watched file by its path, or wherever it has been moved.
fn find(watch: &WatchImage) -> Result<OwnedFd, RestoreError> {
    if is_watched(&watch.path, watch) {
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        if let Ok(file) = open(OsStr::from_bytes(&watch.path), flags, Mode::empty()) {
            return Ok(file);
        }
    }
    open_watched(watch).ok_or_else(|| {
        let name = String::from_utf8_lossy(&watch.path);
        RestoreError::Unfit(format!("{name}, which it watches for changes, is not there any more"))
    })
}
