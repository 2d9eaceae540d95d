//! Pipes and FIFOs that the processes of an image have among themselves, filled with what was in them.

use super::RestoreError;
use super::table::lift;
use crate::image::{FileKind, OpenFile, PipeImage, ProcessImage};
use crate::inventory::pipes::identity;
use crate::sys::pipe;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::stat::{Mode, fstat, lstat};
use nix::unistd::{mkfifo, unlink};
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// Flags that an open file description of a pipe can have.
const PIPE_FLAGS: i32 = libc::O_ACCMODE | libc::O_NONBLOCK | libc::O_DIRECT;
/// Names tried for a FIFO whose own name is another file's now.
const NAMES: u32 = 1000;

/// The pipes of an image, by what identifies their ends.
pub(super) struct Pipes(BTreeMap<(u64, u64), Made>);

struct Made {
    /// A read and a write end; of a FIFO one for both.
    ends: [OwnedFd; 2],
    /// The first of each end is the pipe's own.
    fresh: [bool; 2],
}

impl Pipes {
    pub fn make(images: &[ProcessImage]) -> Result<Pipes, RestoreError> {
        let mut made = BTreeMap::new();
        for pipe in images.iter().flat_map(|image| &image.files.pipes) {
            let ends: Vec<&OpenFile> = images
                .iter()
                .flat_map(|image| image.files.files.iter().chain(&image.files.in_flight))
                .filter(|file| matches!(file.kind, FileKind::Pipe { .. }) && identity(file) == pipe.id)
                .collect();
            let named = ends.iter().find(|file| file.link.first() == Some(&b'/'));
            let fresh = match named {
                Some(file) => Made { ends: open_fifo(file, pipe, &ends)?, fresh: [false; 2] },
                None => Made { ends: make_pipe()?, fresh: [true; 2] },
            };
            fill(&fresh.ends[1], pipe)?;
            made.insert(pipe.id, fresh);
        }
        Ok(Pipes(made))
    }

    /// A descriptor, at a number of at least `base`, of an end like the recorded one.
    pub fn end(&mut self, file: &OpenFile, base: i32) -> Result<i32, RestoreError> {
        let failed = |errno| RestoreError::file("opening a pipe", errno);
        let lacks = || RestoreError::Unfit("the image lacks the contents of a pipe".into());
        let made = self.0.get_mut(&identity(file)).ok_or_else(lacks)?;
        let flags = file.flags as i32 & PIPE_FLAGS;
        let writes = flags & libc::O_ACCMODE == libc::O_WRONLY;
        let end = made.ends[usize::from(writes)].as_fd();
        let fresh = std::mem::replace(&mut made.fresh[usize::from(writes)], false);
        // Of packets the open call does not want to hear, and a FIFO's could wait for the other end.
        let later = OFlag::from_bits_retain(flags & !libc::O_ACCMODE);
        if fresh && flags & libc::O_ACCMODE != libc::O_RDWR {
            fcntl(end, FcntlArg::F_SETFL(later)).map_err(failed)?;
            return lift(end, base);
        }
        // Opened anew: an open file description of its own.
        let path = format!("/proc/self/fd/{}", end.as_raw_fd());
        let access = OFlag::from_bits_retain(flags & libc::O_ACCMODE);
        let opened = open(path.as_str(), access | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC, Mode::empty());
        let opened = opened.map_err(failed)?;
        fcntl(&opened, FcntlArg::F_SETFL(later)).map_err(failed)?;
        lift(opened.as_fd(), base)
    }
}

fn make_pipe() -> Result<[OwnedFd; 2], RestoreError> {
    let made = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK);
    made.map(<[OwnedFd; 2]>::from).map_err(|errno| RestoreError::file("making a pipe", errno))
}

/// The FIFO by its name, or a new one that loses it again.
fn open_fifo(file: &OpenFile, image: &PipeImage, ends: &[&OpenFile]) -> Result<[OwnedFd; 2], RestoreError> {
    let name = String::from_utf8_lossy(&file.link);
    let failed = |errno| RestoreError::file(format!("opening the FIFO {name}"), errno);
    let writers = ends.iter().any(|end| end.flags as i32 & libc::O_ACCMODE != libc::O_RDONLY);
    // Who waits for its first writer must not be told that one has gone.
    let waits = !writers && !image.hangup && image.data.is_empty();
    let access = if waits { OFlag::O_RDONLY } else { OFlag::O_RDWR };
    let open_it = |path: &OsStr| {
        open(path, access | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW, Mode::empty())
    };
    let path = OsStr::from_bytes(&file.link);
    let is_it = |errno: Result<libc::stat, Errno>| {
        errno.is_ok_and(|found| found.st_mode & libc::S_IFMT == libc::S_IFIFO && found.st_ino == file.stat.1)
    };
    let opened = if is_it(lstat(path)) {
        let opened = open_it(path).map_err(failed)?;
        if !is_it(fstat(&opened)) {
            return Err(RestoreError::Unfit(format!("the FIFO {name} has been replaced")));
        }
        if pipe::filled(opened.as_fd()).map_err(failed)? > 0 {
            return Err(RestoreError::Unfit(format!("somebody else has written to the FIFO {name}")));
        }
        opened
    } else {
        let Some(base) = file.link.strip_suffix(b" (deleted)") else {
            return Err(RestoreError::Unfit(format!("the FIFO {name} is not there any more")));
        };
        let path = new_fifo(base, file.stat.2).map_err(failed)?;
        let opened = open_it(&path);
        unlink(path.as_os_str()).map_err(failed)?;
        opened.map_err(failed)?
    };
    let other =
        opened.try_clone().map_err(|source| RestoreError::File { what: name.into_owned(), source })?;
    Ok([opened, other])
}

/// Makes a FIFO under this name, or one like it if that is in use.
fn new_fifo(path: &[u8], mode: u32) -> Result<OsString, Errno> {
    let mode = Mode::from_bits_truncate(mode);
    for n in 0..NAMES {
        let mut name = path.to_vec();
        if n > 0 {
            name.extend_from_slice(format!(".{n}").as_bytes());
        }
        let name = OsString::from_vec(name);
        match mkfifo(name.as_os_str(), mode) {
            Err(Errno::EEXIST) => {}
            made => return made.map(|()| name),
        }
    }
    Err(Errno::EEXIST)
}

fn fill(writing: &OwnedFd, image: &PipeImage) -> Result<(), RestoreError> {
    let failed = |errno| RestoreError::file("filling a pipe", errno);
    // Refused to users beyond their limits: then it has the usual size.
    let _ = pipe::set_capacity(writing.as_fd(), image.capacity);
    let whole = [(image.data.len() as u32, false)];
    let pieces = if image.pieces.is_empty() { &whole[..] } else { &image.pieces[..] };
    let mut rest = image.data.as_slice();
    for &(length, packet) in pieces {
        let Some((piece, after)) = rest.split_at_checked(length as usize) else {
            return Err(RestoreError::Unfit("the image is not consistent: contents of a pipe".into()));
        };
        rest = after;
        if image.pieces.is_empty() {
            write_all(writing, piece).map_err(failed)?;
        } else if packet {
            let flags = OFlag::O_NONBLOCK | OFlag::O_DIRECT;
            fcntl(writing, FcntlArg::F_SETFL(flags)).map_err(failed)?;
            write_all(writing, piece).map_err(failed)?;
        } else {
            // By way of another pipe: a packet written behind it would be merged with it.
            let [out, aside] = make_pipe()?;
            write_all(&aside, piece).map_err(failed)?;
            let mut left = piece.len();
            while left > 0 {
                left -= pipe::splice(out.as_fd(), writing.as_fd(), left).map_err(failed)?.max(1).min(left);
            }
        }
    }
    if !image.pieces.is_empty() {
        fcntl(writing, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(failed)?;
    }
    Ok(())
}

fn write_all(to: &OwnedFd, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        let n = nix::unistd::write(to, bytes)?;
        bytes = bytes.get(n..).unwrap_or_default();
    }
    Ok(())
}
