//! The descriptor table of an image that stands alone, built by the process that will be filled.
//!
//! Everything is first opened at numbers above the table's, then put where it belongs; what is left
//! over is closed. What has its other end elsewhere (a terminal, a pipe to another process) is taken
//! from the standard streams of the program that restores, as its own child would have them.

use super::{RestoreError, make_local};
use crate::image::{FileKind, FilesImage, OpenFile, PipeImage, ProcessImage};
use crate::sys::close_range::{close_range, place};
use crate::sys::{fd, pipe};
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::Mode;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// Highest descriptor number of an image.
const MAX_FD: i32 = 1 << 20;

/// A number above all of the table's, or why the table cannot be.
pub fn above(files: &FilesImage) -> Result<i32, RestoreError> {
    if files.fds.iter().any(|fd| fd.fd < 0 || fd.fd > MAX_FD || fd.file as usize >= files.files.len()) {
        return Err(RestoreError::Unfit("the image is not consistent: its table of descriptors".into()));
    }
    Ok(files.fds.iter().map(|fd| fd.fd).max().unwrap_or(2).max(2) + 1)
}

/// Moves a descriptor to a number of at least `base`; from here on it is a number, as its owner will
/// be another program.
pub fn lift(file: BorrowedFd<'_>, base: i32) -> Result<i32, RestoreError> {
    fcntl(file, FcntlArg::F_DUPFD_CLOEXEC(base)).map_err(|errno| {
        RestoreError::file(format!("having descriptor {base} (limit of open files?)"), errno)
    })
}

/// Lets this process have as many descriptors as it may.
pub fn raise_limit() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// Makes this process' table that of the image; only `keep`, which must be above it, stays open too.
/// `given` are files that were made before, by their place in the image ([`make_shared`]). With
/// `no_input` the standard input is `/dev/null` where it would be our own.
pub fn build(
    files: &FilesImage,
    given: &BTreeMap<usize, i32>,
    no_input: bool,
    keep: i32,
) -> Result<(), RestoreError> {
    // Above what was given as well: those numbers are in use here.
    let base = above(files)?;
    let own = own_streams(base, no_input)?;
    let mut made = Vec::with_capacity(files.files.len());
    for (index, file) in files.files.iter().enumerate() {
        if let Some(&given) = given.get(&index) {
            made.push(Some(given));
            continue;
        }
        let numbers = || files.fds.iter().filter(|fd| fd.file as usize == index).map(|fd| fd.fd);
        // A copy of a standard stream is the same as that stream.
        let stream = numbers().filter(|&number| number <= 2).max();
        made.push(match stream.or(numbers().max()) {
            Some(number) => open_one(file, number, base, &own)?,
            None => None,
        });
    }
    for fd in &files.fds {
        let from = match (is_stream(&files.files[fd.file as usize]), own.get(fd.fd as usize)) {
            (true, Some(&own)) => Some(own),
            _ => made[fd.file as usize],
        };
        if let Some(from) = from {
            place(from, fd.fd, fd.cloexec)
                .map_err(|errno| RestoreError::file(format!("placing descriptor {}", fd.fd), errno))?;
        }
    }
    close_gaps(files, keep)
}

/// What takes the place of a stream whose other end is not in the image.
fn is_stream(file: &OpenFile) -> bool {
    matches!(file.kind, FileKind::Tty | FileKind::Pipe { internal: false })
}

fn own_streams(base: i32, no_input: bool) -> Result<[i32; 3], RestoreError> {
    let null = open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(|errno| RestoreError::file("opening /dev/null", errno))?;
    let (input, output, errors) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    // One that was closed is nothing to write to, and nothing to read from.
    let lift_or_null = |fd: BorrowedFd<'_>| lift(fd, base).or_else(|_| lift(null.as_fd(), base));
    let input = if no_input { lift(null.as_fd(), base)? } else { lift_or_null(input.as_fd())? };
    Ok([input, lift_or_null(output.as_fd())?, lift_or_null(errors.as_fd())?])
}

/// `None`: it is made later, or elsewhere.
fn open_one(file: &OpenFile, number: i32, base: i32, own: &[i32; 3]) -> Result<Option<i32>, RestoreError> {
    let opened = match &file.kind {
        FileKind::Epoll { .. } | FileKind::Pipe { internal: true } => return Ok(None),
        kind if is_stream(file) => match (own.get(number as usize), kind) {
            (Some(&own), _) => return Ok(Some(own)),
            (None, FileKind::Tty) => terminal(file, number)?,
            (None, _) => return Err(RestoreError::Unfit(format!("fd {number} is a pipe to a process"))),
        },
        _ => make_local(file)?,
    };
    lift(opened.as_fd(), base).map(Some)
}

/// A terminal beside the standard streams: ours.
fn terminal(file: &OpenFile, number: i32) -> Result<OwnedFd, RestoreError> {
    let flags = file.flags as i32 & (libc::O_ACCMODE | libc::O_NONBLOCK);
    let flags = OFlag::from_bits_retain(flags) | OFlag::O_CLOEXEC | OFlag::O_NOCTTY;
    open("/dev/tty", flags, Mode::empty()).map_err(|errno| {
        RestoreError::file(format!("fd {number} is a terminal, and there is none to give it"), errno)
    })
}

/// Files that were made before the processes that inherit them.
pub struct SharedFiles {
    /// For each process of the image: by the file's place in its table, the number.
    pub given: Vec<BTreeMap<usize, i32>>,
    /// Closes them here.
    _own: Vec<OwnedFd>,
}

/// Makes, at numbers of at least `base`, what several processes of the image have (open file
/// descriptions, the two ends of pipes), and all other pipes within it, filled with what was in them.
pub fn make_shared(images: &[ProcessImage], base: i32) -> Result<SharedFiles, RestoreError> {
    let mut shared = SharedFiles { given: vec![BTreeMap::new(); images.len()], _own: Vec::new() };
    let mut pipes = BTreeMap::new();
    for pipe in images.iter().flat_map(|image| &image.files.pipes) {
        // The first of each end is the pipe itself.
        pipes.insert(pipe.ino, (filled(pipe)?, [true; 2]));
    }
    let mut known: BTreeMap<u32, i32> = BTreeMap::new();
    for (who, image) in images.iter().enumerate() {
        for (index, file) in image.files.files.iter().enumerate() {
            let number = match &file.kind {
                _ if file.shared != 0 && known.contains_key(&file.shared) => known[&file.shared],
                FileKind::Pipe { internal: true } => {
                    let lacks = || RestoreError::Unfit("the image lacks the contents of a pipe".into());
                    let ((reading, writing), fresh) = pipes.get_mut(&file.stat.1).ok_or_else(lacks)?;
                    let writes = file.flags as i32 & libc::O_ACCMODE == libc::O_WRONLY;
                    let end = if writes { writing } else { reading };
                    let fresh = std::mem::replace(&mut fresh[usize::from(writes)], false);
                    pipe_end(end.as_fd(), file.flags as i32, fresh, base)?
                }
                // Made by each: the kernel knows its targets by their numbers in one table.
                FileKind::Epoll { .. } => continue,
                _ if file.shared != 0 && !is_stream(file) => lift(make_local(file)?.as_fd(), base)?,
                _ => continue,
            };
            if file.shared == 0 || known.insert(file.shared, number).is_none() {
                shared._own.push(fd::own(number));
            }
            shared.given[who].insert(index, number);
        }
    }
    Ok(shared)
}

/// A descriptor of a pipe's end, with the flags that it had.
fn pipe_end(end: BorrowedFd<'_>, flags: i32, fresh: bool, base: i32) -> Result<i32, RestoreError> {
    let failed = |errno| RestoreError::file("opening a pipe", errno);
    if fresh && flags & libc::O_ACCMODE != libc::O_RDWR {
        let flags = OFlag::from_bits_retain(flags & PIPE_FLAGS & !libc::O_ACCMODE);
        fcntl(end, FcntlArg::F_SETFL(flags)).map_err(failed)?;
        return lift(end, base);
    }
    // Opened anew: an open file description of its own.
    let path = format!("/proc/self/fd/{}", end.as_raw_fd());
    let flags = OFlag::from_bits_retain(flags & PIPE_FLAGS) | OFlag::O_CLOEXEC;
    let opened = open(path.as_str(), flags, Mode::empty()).map_err(failed)?;
    lift(opened.as_fd(), base)
}

const PIPE_FLAGS: i32 = libc::O_ACCMODE | libc::O_NONBLOCK | libc::O_DIRECT;

fn filled(image: &PipeImage) -> Result<(OwnedFd, OwnedFd), RestoreError> {
    let failed = |errno| RestoreError::file("making a pipe", errno);
    let (reading, writing) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).map_err(failed)?;
    // Refused to users beyond their limits: then it has the usual size.
    let _ = pipe::set_capacity(writing.as_fd(), image.capacity);
    let mut rest = image.data.as_slice();
    while !rest.is_empty() {
        let n = nix::unistd::write(&writing, rest).map_err(failed)?;
        rest = &rest[n..];
    }
    Ok((reading, writing))
}

/// Closes every number that is not the table's.
fn close_gaps(files: &FilesImage, keep: i32) -> Result<(), RestoreError> {
    let failed = |errno| RestoreError::file("closing what the process does not have", errno);
    let mut from = 0u32;
    let mut wanted: Vec<u32> = files.fds.iter().map(|fd| fd.fd as u32).chain([keep as u32]).collect();
    wanted.sort_unstable();
    wanted.dedup();
    for fd in wanted {
        if fd > from {
            close_range(from, fd - 1).map_err(failed)?;
        }
        from = fd + 1;
    }
    close_range(from, u32::MAX).map_err(failed)
}
