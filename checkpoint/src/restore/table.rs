//! The descriptor table of an image that stands alone, built by the process that will be filled.
//!
//! Everything is first opened at numbers above the table's, then put where it belongs; what is left
//! over is closed. What has its other end elsewhere (a terminal, a pipe to another process) is taken
//! from the standard streams of the program that restores, as its own child would have them.

use super::files::{flags_to_open, set_position};
use super::objects::Objects;
use super::pipes::Pipes;
use super::sockets::Sockets;
use super::terminals::Terminals;
use super::traces::Traces;
use super::{RestoreError, make_local};
use crate::image::{FdImage, FileKind, FilesImage, OpenFile, ProcessImage};
use crate::inventory::objects::is_object;
use crate::inventory::owners::referred;
use crate::sys::close_range::{close_range, place};
use crate::sys::fd;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::Mode;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Highest descriptor number of an image.
const MAX_FD: i32 = 1 << 20;

/// A number above all of the table's, or why the table cannot be.
pub fn above(files: &FilesImage) -> Result<i32, RestoreError> {
    let rising = files.fds.windows(2).all(|pair| pair[0].fd < pair[1].fd);
    let there = |fd: &FdImage| (0..=MAX_FD).contains(&fd.fd) && (fd.file as usize) < files.files.len();
    if !rising || !files.fds.iter().all(there) {
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
pub fn is_stream(file: &OpenFile) -> bool {
    matches!(file.kind, FileKind::Tty | FileKind::Pipe { internal: false })
}

/// What is about another process, and is given to it when that is there ([`super::together`]).
pub(super) fn is_late(file: &OpenFile) -> bool {
    referred(file) != 0
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
        FileKind::Pipe { internal: true }
        | FileKind::Socket { .. }
        | FileKind::PtyMaster { .. }
        | FileKind::PtySlave { .. } => return Ok(None),
        _ if is_late(file) => return Ok(None),
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
    /// Pseudo-terminals, which control sessions.
    pub terminals: Terminals,
    /// Names of sockets that were not there before.
    pub names: Traces,
    /// Closes them here.
    _own: Vec<OwnedFd>,
}

/// Makes, at numbers of at least `base`, what several processes of the image have (open file
/// descriptions, the two ends of pipes), and all other pipes and sockets within it, filled with what
/// was in them.
pub fn make_shared(
    images: &[ProcessImage],
    base: i32,
    objects: &Objects,
) -> Result<SharedFiles, RestoreError> {
    let terminals = Terminals::make(images)?;
    let (sockets, pipes) = (Sockets::make(images)?, Pipes::make(images)?);
    let mut makers = Makers { sockets, terminals: &terminals, pipes, objects, base };
    let mut given = vec![BTreeMap::new(); images.len()];
    let mut known: BTreeMap<u32, i32> = BTreeMap::new();
    let mut own = Vec::new();
    let mut make = |file: &OpenFile, also_alone: bool| -> Result<Option<i32>, RestoreError> {
        if let Some(&number) = known.get(&file.shared).filter(|_| file.shared != 0) {
            return Ok(Some(number));
        }
        let Some(number) = makers.make(file, also_alone)? else { return Ok(None) };
        own.push(fd::own(number));
        if file.shared != 0 {
            known.insert(file.shared, number);
        }
        Ok(Some(number))
    };
    for (who, image) in images.iter().enumerate() {
        for (index, file) in image.files.files.iter().enumerate() {
            if let Some(number) = make(file, false)? {
                given[who].insert(index, number);
            }
        }
    }
    let in_flight = images.first().map_or(&[][..], |root| &root.files.in_flight);
    let in_flight: Result<Vec<Option<i32>>, RestoreError> =
        in_flight.iter().map(|file| make(file, true)).collect();
    let names = makers.sockets.finish(&in_flight?)?;
    terminals.finish(images)?;
    Ok(SharedFiles { given, terminals, names, _own: own })
}

/// What open file descriptions are made from.
struct Makers<'a> {
    sockets: Sockets<'a>,
    terminals: &'a Terminals,
    pipes: Pipes,
    objects: &'a Objects,
    base: i32,
}

impl Makers<'_> {
    /// `None`: it is made by the process that has it, unless it must be made here.
    fn make(&mut self, file: &OpenFile, must: bool) -> Result<Option<i32>, RestoreError> {
        let lacks = |what: &str| RestoreError::Unfit(format!("the image lacks {what}"));
        let base = self.base;
        Ok(Some(match &file.kind {
            FileKind::Pipe { internal: true } => self.pipes.end(file, base)?,
            FileKind::PtyMaster { index } => {
                let made = self.terminals.master(*index).ok_or_else(|| lacks("a terminal"))?;
                let flags = OFlag::from_bits_retain(file.flags as i32 & libc::O_NONBLOCK);
                fcntl(made, FcntlArg::F_SETFL(flags))
                    .map_err(|errno| RestoreError::file("setting a terminal's flags", errno))?;
                lift(made, base)?
            }
            FileKind::PtySlave { index } => {
                lift(self.terminals.slave(*index, file.flags as i32, &file.link)?.as_fd(), base)?
            }
            FileKind::Socket { .. } => {
                let made = self.sockets.get(file.stat.1).ok_or_else(|| lacks("a socket"))?;
                let flags = OFlag::from_bits_retain(file.flags as i32 & libc::O_NONBLOCK);
                fcntl(made, FcntlArg::F_SETFL(flags))
                    .map_err(|errno| RestoreError::file("setting a socket's flags", errno))?;
                lift(made, base)?
            }
            _ if is_late(file) => return Ok(None),
            _ if is_object(file) => {
                let opened = self.objects.open(file, flags_to_open(file))?;
                set_position(file, &opened)
                    .map_err(|errno| RestoreError::file("setting a position", errno))?;
                lift(opened.as_fd(), base)?
            }
            _ if (must || file.shared != 0) && !is_stream(file) => lift(make_local(file)?.as_fd(), base)?,
            _ => return Ok(None),
        }))
    }
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
