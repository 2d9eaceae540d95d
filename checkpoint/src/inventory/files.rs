//! The descriptor table, and what each open file description is.

use super::family::Family;
use super::mappings::names_file;
use super::{locks, pipes, sockets, timers, watches};
use crate::image::{FdImage, FileKind, FilesImage, OpenFile};
use crate::proc::{self, fdinfo::FdInfo};
use crate::sys::{fd, file_owner, kcmp};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

/// Bound on the descriptors looked at.
const MAX_FDS: usize = 1 << 20;

/// Reads the table of a process that is carried with the `family`, itself among it.
pub fn read(pid: i32, family: &Family) -> io::Result<FilesImage> {
    let mut numbers: Vec<i32> = fs::read_dir(format!("/proc/{pid}/fd"))?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .take(MAX_FDS)
        .collect();
    numbers.sort_unstable();
    let mut image = FilesImage::default();
    let pidfd = fd::pidfd_open(pid).ok();
    // Same inode, position and flags: perhaps the same open file description.
    let mut alike: BTreeMap<(u64, u64, u64, u32), Vec<u32>> = BTreeMap::new();
    for fd in numbers {
        let Some((cloexec, file)) = read_one(pid, fd, family, pidfd.as_ref()) else { continue };
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
    pipes::mark_internal(pid, family, &mut image);
    Ok(image)
}

/// One descriptor: whether it is closed on exec, and what it names. `None`: it was closed meanwhile.
pub fn read_one(pid: i32, fd: i32, family: &[i32], pidfd: Option<&OwnedFd>) -> Option<(bool, OpenFile)> {
    let link = proc::link(pid, &format!("fd/{fd}")).ok()?;
    let info = FdInfo::parse(&proc::read(pid, &format!("fdinfo/{fd}")).ok()?)?;
    let cloexec = info.flags & libc::O_CLOEXEC as u32 != 0;
    let flags = info.flags & !(libc::O_CLOEXEC as u32);
    let meta = fs::metadata(format!("/proc/{pid}/fd/{fd}")).ok()?;
    let stat = (meta.dev(), meta.ino(), meta.mode(), meta.rdev());
    let kind = classify((pid, fd), family, &link, &info, &meta);
    let (owner, write_hint) = told_inside(pidfd, fd, flags);
    let locks = locks::parse_all(info.locks());
    let pos = info.pos;
    Some((cloexec, OpenFile { flags, pos, link, stat, owner, write_hint, locks, kind, shared: 0 }))
}

/// What only a copy of the descriptor tells: the owner, and the hint for writes.
fn told_inside(pidfd: Option<&OwnedFd>, fd: i32, flags: u32) -> ((i32, i32, i32), u64) {
    // Through O_PATH nothing can be asked, and nothing set.
    if flags & libc::O_PATH as u32 != 0 {
        return ((0, 0, 0), 0);
    }
    let copy = pidfd.and_then(|pidfd| fd::pidfd_getfd(pidfd.as_fd(), fd).ok());
    let told = copy.map(|copy| (file_owner::get(copy.as_fd()), file_owner::write_hint(copy.as_fd())));
    match told {
        Some((Ok(owner), hint)) => (owner, hint),
        // Not told: that nobody is, or whom, cannot be said.
        _ if flags & libc::O_ASYNC as u32 != 0 => ((1, 0, 0), 0),
        _ => ((0, 0, 0), 0),
    }
}

fn classify(
    (pid, fd): (i32, i32),
    family: &[i32],
    link: &[u8],
    info: &FdInfo,
    meta: &fs::Metadata,
) -> FileKind {
    if let Some(kind) = anon_inode((pid, fd), family, link, info) {
        return kind;
    }
    let name = || String::from_utf8_lossy(link);
    let unsupported = |what: String| FileKind::Unsupported { what };
    if let Some(kind) = of_special_file_system(pid, fd, link, meta) {
        return kind;
    }
    if info.flags & libc::O_PATH as u32 != 0 {
        return match link.first() {
            Some(b'/') => FileKind::Path { deleted: !names_file(pid, link, meta.dev(), meta.ino()) },
            _ => unsupported(format!("an O_PATH descriptor of {}", name())),
        };
    }
    match meta.mode() & libc::S_IFMT {
        libc::S_IFREG if link.starts_with(b"/memfd:") && has_huge_pages(pid, fd) => FileKind::HugeMemfd,
        libc::S_IFREG if link.starts_with(b"/memfd:") => FileKind::Memfd,
        libc::S_IFREG if link.starts_with(b"/secretmem") => {
            unsupported("secret memory (memfd_secret)".into())
        }
        libc::S_IFREG if link.first() != Some(&b'/') => namespace(link),
        libc::S_IFREG => match names_file(pid, link, meta.dev(), meta.ino()) {
            false if has_huge_pages(pid, fd) => {
                unsupported(format!("a deleted file of huge pages (hugetlbfs), {}", name()))
            }
            named => FileKind::Regular { deleted: !named },
        },
        libc::S_IFDIR => FileKind::Directory,
        libc::S_IFIFO => FileKind::Pipe { internal: false },
        libc::S_IFCHR => character_device(meta.rdev(), link, info),
        libc::S_IFSOCK => sockets::classify(pid, fd, meta.ino()),
        libc::S_IFBLK => unsupported(format!("a block device, {}", name())),
        _ => unsupported(format!("something unknown, {}", name())),
    }
}

fn anon_inode((pid, fd): (i32, i32), family: &[i32], link: &[u8], info: &FdInfo) -> Option<FileKind> {
    let name = link.strip_prefix(b"anon_inode:")?;
    Some(match name {
        b"[eventfd]" => FileKind::EventFd {
            count: info.number("eventfd-count", 16)?,
            semaphore: info.number("eventfd-semaphore", 10).unwrap_or(0) != 0,
        },
        b"[eventpoll]" => watches::epoll(pid, fd, family, info.epoll_targets()),
        b"[timerfd]" => timers::timerfd(pid, info)?,
        b"[signalfd]" => FileKind::SignalFd { mask: info.number("sigmask", 16)? },
        // The kernel writes this one without brackets.
        b"inotify" => watches::inotify(pid, fd, info.watches()),
        b"[pidfd]" => FileKind::Pidfd { pid: info.pid()?.max(0) },
        other => {
            let name = String::from_utf8_lossy(other).trim_matches(['[', ']']).to_string();
            FileKind::Unsupported { what: format!("a kernel object of type {name}") }
        }
    })
}

/// One of the namespaces that this program is in too can be opened again.
fn namespace(link: &[u8]) -> FileKind {
    let name = String::from_utf8_lossy(link);
    let ours = name.split_once(':').and_then(|(kind, _)| fs::read_link(format!("/proc/self/ns/{kind}")).ok());
    match ours.is_some_and(|ours| ours.as_os_str() == name.as_ref()) {
        true => FileKind::Namespace,
        false => FileKind::Unsupported { what: format!("a kernel file, {name}") },
    }
}

fn has_huge_pages(pid: i32, fd: i32) -> bool {
    let found = nix::sys::statfs::statfs(format!("/proc/{pid}/fd/{fd}").as_str());
    found.is_ok_and(|found| found.filesystem_type() == nix::sys::statfs::HUGETLBFS_MAGIC)
}

/// Files that are no data but the kernel's answers, by the file system's magic number.
fn of_special_file_system(pid: i32, fd: i32, link: &[u8], meta: &fs::Metadata) -> Option<FileKind> {
    /// linux/magic.h does not have it (ipc/mqueue.c).
    const MQUEUE_MAGIC: i64 = 0x1980_0202;
    if libc::major(meta.dev()) != 0 || link.first() != Some(&b'/') {
        return None;
    }
    let found = nix::sys::statfs::statfs(format!("/proc/{pid}/fd/{fd}").as_str()).ok()?;
    let name = String::from_utf8_lossy(link);
    match found.filesystem_type().0 {
        libc::PROC_SUPER_MAGIC => Some(match process_of(link) {
            Some(pid) => FileKind::Proc { pid },
            None => FileKind::Unsupported { what: format!("a file of the process file system, {name}") },
        }),
        MQUEUE_MAGIC => Some(FileKind::Unsupported { what: format!("a POSIX message queue, {name}") }),
        _ => None,
    }
}

/// Whose file of `/proc` it is; 0: the system's. `None`: it is mounted elsewhere, or of a process that
/// has ended.
fn process_of(link: &[u8]) -> Option<i32> {
    let path = link.strip_prefix(b"/proc")?;
    if path.ends_with(b" (deleted)") {
        return None;
    }
    let first = path.strip_prefix(b"/").unwrap_or_default().split(|&byte| byte == b'/').next()?;
    Some(std::str::from_utf8(first).ok().and_then(|text| text.parse().ok()).unwrap_or(0))
}

fn character_device(rdev: u64, link: &[u8], info: &FdInfo) -> FileKind {
    match (libc::major(rdev), libc::minor(rdev)) {
        // null, zero, full, random, urandom (Documentation/admin-guide/devices.txt).
        (1, 3 | 5 | 7 | 8 | 9) => FileKind::LocalDevice,
        // Consoles and serial lines, /dev/tty, pseudo-terminals.
        (4 | 5 | 136..=143, _) if rdev != libc::makedev(5, 2) => FileKind::Tty,
        (5, 2) => match super::terminals::master(info) {
            Some(index) => FileKind::PtyMaster { index },
            None => FileKind::Unsupported { what: "the master side of a pseudo-terminal".into() },
        },
        _ => FileKind::Unsupported { what: format!("the device {}", String::from_utf8_lossy(link)) },
    }
}
