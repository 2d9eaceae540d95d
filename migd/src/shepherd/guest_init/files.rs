//! The guests' descriptors, each table made by the process that becomes the guest's leader, in the
//! house's root.
//!
//! What stays open at home is opened by its handle's name, everything else is made anew. All are
//! first made at numbers above the table's, then put where they belong.

use super::protocol::{Member, Setup};
use anyhow::{Context, Result, bail};
use checkpoint::image::objects::ObjectKey;
use checkpoint::image::{FileKind, FilesImage, OpenFile};
use checkpoint::restore::make_local;
use checkpoint::sys::close_range::{close_range, place};
use checkpoint::sys::fd;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::Mode;
use nix::unistd::{Whence, lseek};
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};

/// Highest descriptor number of a guest.
const MAX_FD: i32 = 1 << 20;
/// Flags of open(2) that `fdinfo` may show and that must not be repeated: the file exists.
const ONCE: i32 = libc::O_CREAT
    | libc::O_EXCL
    | libc::O_TRUNC
    | libc::O_NOCTTY
    | libc::O_CLOEXEC
    | libc::O_NOFOLLOW
    | libc::O_TMPFILE
    | libc::O_ASYNC
    | FMODE_EXEC;
/// `__FMODE_EXEC` (`<linux/fs.h>`), seen in the flags of files opened for execution.
const FMODE_EXEC: i32 = 0x20;

/// Contents without a name that were made for the guests: memfds, and deleted files that they map.
pub type Objects = BTreeMap<ObjectKey, OwnedFd>;

/// What files are made from.
#[derive(Clone, Copy)]
pub struct Sources<'a> {
    pub setup: &'a Setup,
    pub objects: &'a Objects,
}

/// Files that were opened before the processes that inherit them.
pub struct Given {
    /// For each process: by the file's place in its table, the number.
    pub of: Vec<BTreeMap<usize, i32>>,
    own: Vec<OwnedFd>,
}

/// Opens, at numbers of at least `base`, what several of the processes have.
pub fn open_shared(members: &[Member], sources: Sources<'_>, base: i32) -> Result<Given> {
    let mut given = Given { of: vec![BTreeMap::new(); members.len()], own: Vec::new() };
    let mut known: BTreeMap<u32, i32> = BTreeMap::new();
    for (who, member) in members.iter().enumerate() {
        for (index, file) in member.files.files.iter().enumerate() {
            if file.shared == 0 || matches!(file.kind, FileKind::Epoll { .. }) {
                continue;
            }
            let number = match known.get(&file.shared) {
                Some(&number) => number,
                None => {
                    let number = lift(open_named(file, sources)?, base)?;
                    given.own.push(fd::own(number));
                    known.insert(file.shared, number);
                    number
                }
            };
            given.of[who].insert(index, number);
        }
    }
    Ok(given)
}

/// Lets go of them in the process that has opened them.
pub fn close_shared(given: Given) {
    drop(given.own);
}

/// Builds the table of this process; nothing else stays open but `keep`, which must be above every
/// number of the table (see [`above`]). `given` are files that were opened before; all others are
/// opened at numbers of at least `base`.
pub fn build(
    files: &FilesImage,
    given: &BTreeMap<usize, i32>,
    sources: Sources<'_>,
    base: i32,
    keep: i32,
) -> Result<()> {
    let mut made: Vec<Option<i32>> = Vec::with_capacity(files.files.len());
    for (index, file) in files.files.iter().enumerate() {
        if let Some(&number) = given.get(&index) {
            made.push(Some(number));
            continue;
        }
        if matches!(file.kind, FileKind::Epoll { .. })
            || !files.fds.iter().any(|fd| fd.file as usize == index)
        {
            made.push(None);
            continue;
        }
        made.push(Some(lift(open_named(file, sources)?, base)?));
    }
    for fd in &files.fds {
        let from = made.get(fd.file as usize).context("a descriptor stands for no file")?;
        if let Some(from) = from {
            place(*from, fd.fd, fd.cloexec).with_context(|| format!("cannot place descriptor {}", fd.fd))?;
        }
    }
    close_gaps(files, keep).context("cannot close what the guest does not have")
}

/// A number above all of the table's.
pub fn above(files: &FilesImage) -> Result<i32> {
    let highest = files.fds.iter().map(|fd| fd.fd).max().unwrap_or(2);
    if files.fds.iter().any(|fd| fd.fd < 0 || fd.fd > MAX_FD) {
        bail!("a descriptor number is out of range");
    }
    Ok(highest.max(2) + 1)
}

/// Lets this process have as many descriptors as it may.
pub fn raise_limit() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("cannot read the limit of open files")?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("cannot raise the limit of open files")
}

/// Moves a descriptor to a number of at least `base`. From here on it is a number, as its owner will
/// be the guest.
pub fn lift(file: OwnedFd, base: i32) -> Result<i32> {
    let lifted = fcntl(&file, FcntlArg::F_DUPFD_CLOEXEC(base))
        .with_context(|| format!("cannot have descriptor {base} (limit of open files?)"))?;
    drop(file);
    Ok(lifted)
}

fn open_named(file: &OpenFile, sources: Sources<'_>) -> Result<OwnedFd> {
    open_file(file, sources).with_context(|| format!("cannot open {}", String::from_utf8_lossy(&file.link)))
}

fn open_file(file: &OpenFile, sources: Sources<'_>) -> Result<OwnedFd> {
    match &file.kind {
        FileKind::Foreign { handle } => open_foreign(file, *handle, sources.setup),
        FileKind::LocalDevice
        | FileKind::EventFd { .. }
        | FileKind::TimerFd { .. }
        | FileKind::SignalFd { .. } => Ok(make_local(file)?),
        FileKind::Memfd | FileKind::Regular { .. } => open_object(file, sources.objects),
        _ => bail!("this kind of file cannot be made on another node"),
    }
}

/// A file that stays open at home.
fn open_foreign(file: &OpenFile, handle: u64, setup: &Setup) -> Result<OwnedFd> {
    let path = setup.handle_path(handle);
    let opened = open(&path, flags_of(file), Mode::empty())?;
    let kind = file.stat.2 & libc::S_IFMT;
    let seekable = kind == libc::S_IFREG || kind == libc::S_IFDIR;
    if seekable && file.pos != 0 && file.flags & libc::O_PATH as u32 == 0 {
        let pos = i64::try_from(file.pos).context("a position out of range")?;
        lseek(&opened, pos, Whence::SeekSet).context("cannot set its position")?;
    }
    Ok(opened)
}

/// A description of its own of an object.
fn open_object(file: &OpenFile, objects: &Objects) -> Result<OwnedFd> {
    let object = objects.get(&(file.stat.0, file.stat.1)).context("its contents have not come")?;
    let path = format!("/proc/self/fd/{}", object.as_raw_fd());
    let opened = open(path.as_str(), flags_of(file), Mode::empty())?;
    if file.pos != 0 {
        let pos = i64::try_from(file.pos).context("a position out of range")?;
        lseek(&opened, pos, Whence::SeekSet).context("cannot set its position")?;
    }
    Ok(opened)
}

fn flags_of(file: &OpenFile) -> OFlag {
    let mut flags = file.flags as i32 & !ONCE;
    if file.stat.2 & libc::S_IFMT == libc::S_IFDIR {
        flags |= libc::O_DIRECTORY;
    }
    OFlag::from_bits_retain(flags | libc::O_CLOEXEC | libc::O_NOCTTY)
}

/// Closes every number that is not the table's.
fn close_gaps(files: &FilesImage, keep: i32) -> Result<()> {
    let mut from = 0u32;
    let mut wanted: Vec<u32> = files.fds.iter().map(|fd| fd.fd as u32).chain([keep as u32]).collect();
    wanted.sort_unstable();
    for fd in wanted {
        if fd > from {
            close_range(from, fd - 1)?;
        }
        from = fd + 1;
    }
    Ok(close_range(from, u32::MAX)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_that_would_change_the_file_are_left_out() {
        let file = OpenFile {
            flags: (libc::O_WRONLY | libc::O_CREAT | libc::O_TRUNC | libc::O_APPEND) as u32,
            pos: 0,
            link: b"/tmp/x".to_vec(),
            stat: (1, 2, libc::S_IFREG | 0o600, 0),
            owner: (0, 0, 0),
            write_hint: 0,
            locks: Vec::new(),
            kind: FileKind::Foreign { handle: 1 },
            shared: 0,
        };
        let flags = flags_of(&file);
        assert!(flags.contains(OFlag::O_WRONLY | OFlag::O_APPEND));
        assert!(!flags.intersects(OFlag::O_CREAT | OFlag::O_TRUNC));
    }

    #[test]
    fn a_hostile_number_is_refused() {
        let fd = checkpoint::image::FdImage { fd: -5, cloexec: false, file: 0 };
        assert!(above(&FilesImage { fds: vec![fd], ..FilesImage::default() }).is_err());
    }
}
