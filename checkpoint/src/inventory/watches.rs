//! What epolls and inotifies watch, and by what it can be found again.

use crate::image::{EpollTarget, FileKind, FilesImage, WatchImage};
use crate::proc;
use crate::sys::fd::{pidfd_getfd, pidfd_open};
use crate::sys::file_handle::{self, FileHandle};
use crate::sys::{kcmp, pipe};
use nix::errno::Errno;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;

/// An epoll knows its targets by number *and* open file: one that was closed under its number may live
/// on in a copy, here or in a relative's table. Is it nowhere to be found, it cannot be added again.
pub fn epoll(pid: i32, fd: i32, family: &[i32], targets: Vec<(EpollTarget, u64)>) -> FileKind {
    let mut seen: BTreeMap<i32, u32> = BTreeMap::new();
    let mut found = Vec::with_capacity(targets.len());
    for (mut target, ino) in targets {
        let which = seen.entry(target.fd).or_default();
        let is = |of: i32, number: i32| {
            kcmp::same_epoll_target((of, number), (pid, fd), target.fd, *which).unwrap_or_else(|errno| {
                // Where the kernel cannot compare (CONFIG_KCMP), the number is believed. EBADF: closed.
                errno != Errno::EBADF && (of, number) == (pid, target.fd)
            })
        };
        if !is(pid, target.fd) {
            match elsewhere(pid, family, ino, &is) {
                Some(at) => target.at = at,
                None => {
                    let what = format!("an epoll that watches a file which was closed as fd {}", target.fd);
                    return FileKind::Unsupported { what };
                }
            }
        }
        *which += 1;
        found.push(target);
    }
    FileKind::Epoll { targets: found }
}

/// The process (0: its own) and number under which a file is open now.
fn elsewhere(pid: i32, family: &[i32], ino: u64, is: &dyn Fn(i32, i32) -> bool) -> Option<(i32, i32)> {
    let relatives = family.iter().copied().filter(|&other| other != pid);
    std::iter::once(pid).chain(relatives).find_map(|of| {
        let dir = fs::read_dir(format!("/proc/{of}/fd")).ok()?;
        let number = dir.flatten().find_map(|entry| {
            let number = entry.file_name().to_str()?.parse().ok()?;
            let alike = ino == 0 || fs::metadata(entry.path()).is_ok_and(|meta| meta.ino() == ino);
            (alike && is(of, number)).then_some(number)
        })?;
        Some((if of == pid { 0 } else { of }, number))
    })
}

/// An inotify, if all that it watches can be found and no event would be lost.
pub fn inotify(pid: i32, fd: i32, mut watches: Vec<WatchImage>) -> FileKind {
    let copy = pidfd_open(pid).and_then(|pidfd| pidfd_getfd(pidfd.as_fd(), fd));
    if copy.and_then(|copy| pipe::filled(copy.as_fd())).unwrap_or(0) > 0 {
        return FileKind::Unsupported { what: "an inotify with events that have not been read yet".into() };
    }
    let mut finder = Finder::new(pid);
    for watch in &mut watches {
        watch.path = finder.path_of(watch).unwrap_or_default();
        if watch.path.is_empty() {
            let what = format!(
                "a kernel object of type inotify, which watches a file without a name (inode {} of device {}:{})",
                watch.ino,
                libc::major(watch.dev),
                libc::minor(watch.dev)
            );
            return FileKind::Unsupported { what };
        }
    }
    // The numbers are given out in rising order.
    watches.sort_unstable_by_key(|watch| watch.wd);
    FileKind::Inotify { watches }
}

/// Finds the names of watched files.
struct Finder {
    pid: i32,
    /// Looked at when handles do not help (overlays): what the process has to do with.
    candidates: Option<Vec<Vec<u8>>>,
}

impl Finder {
    fn new(pid: i32) -> Finder {
        Finder { pid, candidates: None }
    }

    fn path_of(&mut self, watch: &WatchImage) -> Option<Vec<u8>> {
        let by_handle = open_watched(watch).and_then(|file| {
            let path = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).ok()?;
            Some(path.into_os_string().into_vec())
        });
        by_handle.filter(|path| is_watched(path, watch)).or_else(|| {
            let pid = self.pid;
            let candidates = self.candidates.get_or_insert_with(|| candidates(pid));
            candidates.iter().find(|path| is_watched(path, watch)).cloned()
        })
    }
}

/// Whether this path leads to what is watched.
pub(crate) fn is_watched(path: &[u8], watch: &WatchImage) -> bool {
    path.first() == Some(&b'/')
        && fs::symlink_metadata(OsStr::from_bytes(path)).is_ok_and(|found| {
            let same_device = found.dev() == watch.dev || libc::major(found.dev()) == 0;
            found.ino() == watch.ino && same_device
        })
}

/// Opens (`O_PATH`) what is watched by its handle, through any mount of its file system.
pub(crate) fn open_watched(watch: &WatchImage) -> Option<std::os::fd::OwnedFd> {
    let handle = FileHandle::of_parts(watch.handle.0, &watch.handle.1)?;
    let wanted = format!("{}:{}", libc::major(watch.dev), libc::minor(watch.dev));
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    mounts.lines().find_map(|line| {
        // proc_pid_mountinfo(5): id, parent, major:minor, root, mount point.
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        if *words.get(2)? != wanted {
            return None;
        }
        let mount = File::open(unescaped(words.get(4)?)).ok()?;
        file_handle::open(mount.as_fd(), &handle, libc::O_PATH).ok()
    })
}

/// Blanks and the like are `\040` there.
fn unescaped(text: &str) -> std::path::PathBuf {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let code = bytes.get(at + 1..at + 4).filter(|_| bytes[at] == b'\\');
        match code.and_then(|code| u8::from_str_radix(std::str::from_utf8(code).ok()?, 8).ok()) {
            Some(byte) => {
                out.push(byte);
                at += 4;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    std::ffi::OsString::from_vec(out).into()
}

/// Paths that a process has to do with: its open files, its directories, and those that they are in.
fn candidates(pid: i32) -> Vec<Vec<u8>> {
    let names = ["cwd", "root", "exe"].map(str::to_string);
    let numbers = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let files = numbers.filter_map(|entry| Some(format!("fd/{}", entry.file_name().to_str()?)));
    let mut out = BTreeSet::new();
    for name in names.into_iter().chain(files) {
        let Ok(mut path) = proc::link(pid, &name) else { continue };
        while path.first() == Some(&b'/') && out.insert(path.clone()) {
            let end = path.iter().rposition(|&byte| byte == b'/').unwrap_or(0);
            path.truncate(end.max(1));
        }
    }
    out.into_iter().collect()
}

/// Marks the targets whose event was taken before the epoll's process was frozen: they must not be
/// told once more. `pid` has the epolls of `files`; all who could change anything stand still.
pub fn mark_spent(pid: i32, files: &mut FilesImage) {
    let Ok(pidfd) = pidfd_open(pid) else { return };
    for index in 0..files.files.len() {
        let number = files.fds.iter().find(|fd| fd.file as usize == index).map(|fd| fd.fd);
        let (Some(number), FileKind::Epoll { targets }) = (number, &mut files.files[index].kind) else {
            continue;
        };
        let quiet = !ready(pidfd.as_fd(), number, POLLIN);
        for target in targets {
            let armed = target.events & !ONLY_FLAGS != 0;
            let one_shot = target.events & libc::EPOLLONESHOT as u32 != 0;
            let edge = target.events & libc::EPOLLET as u32 != 0;
            // With anything ready, nobody can tell which targets are: they are told anew.
            let taken =
                || target.at.0 == 0 && quiet && ready(pidfd.as_fd(), target.at.1, target.events as u16);
            target.spent = one_shot && !armed || edge && armed && taken();
        }
    }
}

/// `EP_PRIVATE_BITS` (fs/eventpoll.c): all that is left of a one-shot target's events.
pub(crate) const ONLY_FLAGS: u32 =
    (libc::EPOLLWAKEUP | libc::EPOLLONESHOT | libc::EPOLLET | libc::EPOLLEXCLUSIVE) as u32;
const POLLIN: u16 = libc::POLLIN as u16;

fn ready(pidfd: std::os::fd::BorrowedFd<'_>, fd: i32, events: u16) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let Ok(copy) = pidfd_getfd(pidfd, fd) else { return false };
    let mut asked = [PollFd::new(copy.as_fd(), PollFlags::from_bits_truncate(events as i16))];
    poll(&mut asked, PollTimeout::ZERO).is_ok_and(|count| count > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn unescaping_never_panics(text in "[\\\\0-9a-zé]{0,20}") {
            unescaped(&text);
        }
    }

    #[test]
    fn names_with_blanks() {
        assert_eq!(unescaped("/a\\040b\\134"), std::path::PathBuf::from("/a b\\"));
        assert_eq!(unescaped("/a\\04"), std::path::PathBuf::from("/a\\04"));
    }
}
