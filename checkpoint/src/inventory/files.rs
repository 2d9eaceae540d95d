//! The descriptor table, and what each open file description is.

use super::mappings::names_file;
use super::sockets;
use crate::image::{FdImage, FileKind, FilesImage, OpenFile};
use crate::proc::{self, fdinfo::FdInfo};
use crate::sys::{fd, kcmp};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

/// Bound on the descriptors looked at.
const MAX_FDS: usize = 1 << 20;

/// Reads the table of a process that is carried with the `family`, itself among it.
pub fn read(pid: i32, family: &[i32]) -> io::Result<FilesImage> {
    let mut numbers: Vec<i32> = fs::read_dir(format!("/proc/{pid}/fd"))?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .take(MAX_FDS)
        .collect();
    numbers.sort_unstable();
    let mut image = FilesImage::default();
    // Same inode, position and flags: perhaps the same open file description.
    let mut alike: BTreeMap<(u64, u64, u64, u32), Vec<u32>> = BTreeMap::new();
    for fd in numbers {
        let Some((cloexec, file)) = read_one(pid, fd) else { continue };
        let key = (file.stat.0, file.stat.1, file.pos, file.flags);
        let known = alike.entry(key).or_default();
        let same = known.iter().copied().find(|&index| {
            let first = image.fds.iter().find(|other| other.file == index);
            first.is_some_and(|first| kcmp::same_file(pid, first.fd, pid, fd).unwrap_or(false))
        });
        let index = same.unwrap_or_else(|| {
            let index = image.files.len() as u32;
            known.push(index);
            image.files.push(file);
            index
        });
        image.fds.push(FdImage { fd, cloexec, file: index });
    }
    mark_internal_pipes(pid, family, &mut image);
    Ok(image)
}

/// `None`: it was closed meanwhile.
fn read_one(pid: i32, fd: i32) -> Option<(bool, OpenFile)> {
    let link = proc::link(pid, &format!("fd/{fd}")).ok()?;
    let info = FdInfo::parse(&proc::read(pid, &format!("fdinfo/{fd}")).ok()?)?;
    let cloexec = info.flags & libc::O_CLOEXEC as u32 != 0;
    let flags = info.flags & !(libc::O_CLOEXEC as u32);
    let meta = fs::metadata(format!("/proc/{pid}/fd/{fd}")).ok()?;
    let stat = (meta.dev(), meta.ino(), meta.mode(), meta.rdev());
    let kind = classify(pid, fd, &link, &info, &meta);
    let owner = if flags & libc::O_ASYNC as u32 != 0 { (1, 0, 0) } else { (0, 0, 0) };
    Some((cloexec, OpenFile { flags, pos: info.pos, link, stat, owner, kind, shared: 0 }))
}

fn classify(pid: i32, fd: i32, link: &[u8], info: &FdInfo, meta: &fs::Metadata) -> FileKind {
    if let Some(kind) = anon_inode(pid, fd, link, info) {
        return kind;
    }
    let unsupported = |what: String| FileKind::Unsupported { what };
    match meta.mode() & libc::S_IFMT {
        libc::S_IFREG if link.starts_with(b"/memfd:") => unsupported("a memfd".into()),
        libc::S_IFREG if link.first() != Some(&b'/') => {
            unsupported(format!("a kernel file, {}", String::from_utf8_lossy(link)))
        }
        libc::S_IFREG => regular(pid, fd, link, meta),
        libc::S_IFDIR => FileKind::Directory,
        libc::S_IFIFO => FileKind::Pipe { internal: false },
        libc::S_IFCHR => character_device(meta.rdev(), link),
        libc::S_IFSOCK => unsupported(sockets::describe(pid, fd, meta.ino())),
        libc::S_IFBLK => unsupported(format!("a block device, {}", String::from_utf8_lossy(link))),
        _ => unsupported(format!("something unknown, {}", String::from_utf8_lossy(link))),
    }
}

fn anon_inode(pid: i32, fd: i32, link: &[u8], info: &FdInfo) -> Option<FileKind> {
    let name = link.strip_prefix(b"anon_inode:")?;
    Some(match name {
        b"[eventfd]" => FileKind::EventFd {
            count: info.number("eventfd-count", 16)?,
            semaphore: info.number("eventfd-semaphore", 10).unwrap_or(0) != 0,
        },
        b"[eventpoll]" => epoll(pid, fd, info.epoll_targets()),
        b"[timerfd]" => FileKind::TimerFd {
            clock: info.number("clockid", 10)? as i32,
            ticks: info.number("ticks", 10).unwrap_or(0),
            settime_flags: info.number("settime flags", 8).unwrap_or(0) as u32,
            value_ns: info.timer("it_value")?,
            interval_ns: info.timer("it_interval")?,
        },
        b"[signalfd]" => FileKind::SignalFd { mask: info.number("sigmask", 16)? },
        other => {
            let name = String::from_utf8_lossy(other).trim_matches(['[', ']']).to_string();
            FileKind::Unsupported { what: format!("a kernel object of type {name}") }
        }
    })
}

fn regular(pid: i32, fd: i32, link: &[u8], meta: &fs::Metadata) -> FileKind {
    match special_file_system(pid, fd) {
        Some(what) => FileKind::Unsupported { what: format!("{what}, {}", String::from_utf8_lossy(link)) },
        None => FileKind::Regular { deleted: !names_file(pid, link, meta.dev(), meta.ino()) },
    }
}

/// Files that are no data but the kernel's answers, by the file system's magic number.
fn special_file_system(pid: i32, fd: i32) -> Option<&'static str> {
    /// linux/magic.h does not have it (ipc/mqueue.c).
    const MQUEUE_MAGIC: i64 = 0x1980_0202;
    let found = nix::sys::statfs::statfs(format!("/proc/{pid}/fd/{fd}").as_str()).ok()?;
    match found.filesystem_type().0 {
        libc::PROC_SUPER_MAGIC => Some("a file of the process file system"),
        MQUEUE_MAGIC => Some("a POSIX message queue"),
        _ => None,
    }
}

/// An epoll knows its targets by number *and* open file: one that was closed and lives on in a copy
/// cannot be added again.
fn epoll(pid: i32, fd: i32, targets: Vec<(i32, u32, u64)>) -> FileKind {
    let mut seen: BTreeMap<i32, u32> = BTreeMap::new();
    for &(target, ..) in &targets {
        let which = seen.entry(target).or_default();
        // Where the kernel cannot compare (CONFIG_KCMP), the number is believed.
        if !kcmp::same_epoll_target(pid, target, fd, target, *which).unwrap_or_else(|errno| {
            // EBADF: closed. ENOENT: it is watched no more.
            !matches!(errno, nix::errno::Errno::EBADF)
        }) {
            let what = format!("an epoll that watches a file which was closed as fd {target}");
            return FileKind::Unsupported { what };
        }
        *which += 1;
    }
    FileKind::Epoll { targets }
}

fn character_device(rdev: u64, link: &[u8]) -> FileKind {
    match (libc::major(rdev), libc::minor(rdev)) {
        // null, zero, full, random, urandom (Documentation/admin-guide/devices.txt).
        (1, 3 | 5 | 7 | 8 | 9) => FileKind::LocalDevice,
        // Consoles and serial lines, /dev/tty, pseudo-terminals.
        (4 | 5 | 136..=143, _) if rdev != libc::makedev(5, 2) => FileKind::Tty,
        (5, 2) => FileKind::Unsupported { what: "the master side of a pseudo-terminal".into() },
        _ => FileKind::Unsupported { what: format!("the device {}", String::from_utf8_lossy(link)) },
    }
}

/// A pipe is internal if nobody outside the family has either end; one end may be gone altogether.
fn mark_internal_pipes(pid: i32, family: &[i32], image: &mut FilesImage) {
    let mut ends: BTreeMap<u64, (bool, bool)> = BTreeMap::new();
    for file in image.files.iter().filter(|file| file.link.starts_with(b"pipe:")) {
        let access = file.flags as i32 & libc::O_ACCMODE;
        let (reads, writes) = ends.entry(file.stat.1).or_default();
        *reads |= access != libc::O_WRONLY;
        *writes |= access != libc::O_RDONLY;
    }
    for (index, file) in image.files.iter().enumerate() {
        let Some(fd) = image.fds.iter().find(|fd| fd.file as usize == index) else { continue };
        // The end that is missing here may be a relative's.
        if family.len() <= 1
            && ends.get(&file.stat.1).is_some_and(|&(reads, writes)| !(reads && writes))
            && !other_end_is_gone(pid, fd.fd)
        {
            ends.remove(&file.stat.1);
        }
    }
    if ends.is_empty() {
        // The usual case: nobody else's table has to be looked at.
        return;
    }
    let outside = inodes_outside(family);
    for file in &mut image.files {
        if let FileKind::Pipe { internal } = &mut file.kind {
            *internal = ends.contains_key(&file.stat.1) && !outside.contains(&file.stat.1);
        }
    }
}

/// Whether nobody has the other end of a pipe; also `true` if that cannot be asked.
fn other_end_is_gone(pid: i32, fd: i32) -> bool {
    let copy = fd::pidfd_open(pid).and_then(|pidfd| fd::pidfd_getfd(pidfd.as_fd(), fd));
    let Ok(copy) = copy else { return true };
    let mut asked = [PollFd::new(copy.as_fd(), PollFlags::empty())];
    // Nothing is asked for but what is always told.
    let polled = poll(&mut asked, PollTimeout::ZERO);
    let told = asked[0].revents().unwrap_or(PollFlags::empty());
    polled.is_err() || told.intersects(PollFlags::POLLHUP | PollFlags::POLLERR)
}

fn inodes_outside(family: &[i32]) -> BTreeSet<u64> {
    let mut out = BTreeSet::new();
    for other in proc::pids().into_iter().filter(|other| !family.contains(other)) {
        let Ok(dir) = fs::read_dir(format!("/proc/{other}/fd")) else { continue };
        for entry in dir.flatten() {
            let Ok(link) = fs::read_link(entry.path()) else { continue };
            let text = link.to_string_lossy();
            let number = text.strip_prefix("pipe:[").and_then(|rest| rest.strip_suffix(']'));
            out.extend(number.and_then(|number| number.parse::<u64>().ok()));
        }
    }
    out
}
