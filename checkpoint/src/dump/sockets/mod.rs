//! Sockets of frozen processes that are carried together, with what is in their queues, and what is in
//! flight inside of that.

mod internet;
mod options;
mod queue;

use super::DumpError;
use crate::image::sockets::{Ids, Listening, MAX_SOCKETS, Message, Peer, SocketFile, SocketImage};
use crate::image::{FdImage, FileKind, FilesImage, OpenFile, ProcessImage};
use crate::inventory::family::Family;
use crate::inventory::{files, pipes, sockets as inventory};
use crate::proc;
use crate::sys::fd::{pidfd_getfd, pidfd_open};
use crate::sys::sock_diag::UnixSocket;
use crate::sys::socket_message::Peeked;
use crate::sys::{kcmp, socket};
use inventory::Sockets;
use nix::errno::Errno;
use queue::Unreadable;
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;

/// What is in flight, as a table of this program's own: it holds copies while it reads.
#[derive(Default)]
pub struct InFlight {
    /// The numbers are this program's.
    pub files: FilesImage,
    /// Connected TCP sockets.
    pub connections: Connections,
    copies: Vec<OwnedFd>,
}

/// Copies of connected TCP sockets, which keep the connections when the processes have ended.
#[derive(Default)]
pub struct Connections(Vec<OwnedFd>);

impl Connections {
    /// Ends the connections of processes that have ended at once: closed one after the other, they would
    /// keep their addresses for a minute (`TIME_WAIT`), and the image could not be restored here.
    pub fn abort(self) {
        for copy in self.0 {
            // `struct linger`: on, 0 s (socket(7)).
            let linger: Vec<u8> = [1i32, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
            let _ = socket::set_option(copy.as_fd(), libc::SOL_SOCKET, libc::SO_LINGER, &linger);
        }
    }
}

impl InFlight {
    /// Says which pipes in flight have no end elsewhere, as those of the processes do.
    pub fn settle(&mut self, family: &[i32]) {
        let us = std::process::id() as i32;
        let with_us = Family::of(family.iter().copied().chain([us]).collect());
        pipes::mark_internal(us, &with_us, &mut self.files);
    }

    /// The place of what a message carries; the same description has one place.
    fn place(&mut self, copy: OwnedFd) -> Result<u32, &'static str> {
        let us = std::process::id() as i32;
        let number = copy.as_raw_fd();
        let same = |fd: &&FdImage| kcmp::same_file(us, fd.fd, us, number).unwrap_or(false);
        if let Some(known) = self.files.fds.iter().find(same) {
            return Ok(known.file);
        }
        let pidfd = pidfd_open(us).ok();
        let Some((_, file)) = files::read_one(us, number, &[], pidfd.as_ref()) else {
            return Err("a file that is not shown");
        };
        let place = self.files.files.len() as u32;
        self.files.files.push(file);
        self.files.fds.push(FdImage { fd: number, cloexec: true, file: place });
        self.copies.push(copy);
        Ok(place)
    }
}

/// Bound on what is in all queues together, bytes: it is a part of one state, whose size has a limit.
const MAX_QUEUED: usize = 48 << 20;

/// A socket to be read.
struct Known {
    copy: OwnedFd,
    /// Who has it, as this program knows the process; 0: it is in flight only.
    pid: i32,
}

/// Reads the sockets of all processes into the first image. One that cannot be carried becomes
/// [`FileKind::Unsupported`] and says why.
pub fn read(pids: &[i32], images: &mut [ProcessImage]) -> Result<InFlight, DumpError> {
    let mut flight = InFlight::default();
    let mut known = take_all(pids, images)?;
    if known.is_empty() {
        return Ok(flight);
    }
    let failed = |errno: Errno| DumpError::Proc { what: "sockets", pid: pids[0], source: errno.into() };
    let sockets = Sockets::look(pids).map_err(failed)?;
    let mut refused: BTreeMap<u64, String> = BTreeMap::new();
    let mut found: BTreeMap<u64, SocketImage> = BTreeMap::new();
    let ours: BTreeSet<u64> = known.keys().copied().collect();
    let mut next: Vec<u64> = ours.iter().copied().collect();
    while let Some(ino) = next.pop() {
        let copy = known[&ino].copy.as_fd();
        // Nothing is in flight in those of IP: they are read when it is known who has what.
        if inventory::is_internet(copy) {
            continue;
        }
        if let Some(why) = sockets.why_not(ino, copy, &ours, false) {
            refused.insert(ino, why);
            continue;
        }
        let Some(diag) = sockets.unix(ino) else { continue };
        let one = &known[&ino];
        let before = flight.files.files.len();
        match read_one(one, diag, &sockets, &mut flight) {
            Ok(image) => drop(found.insert(ino, image)),
            Err(Unreadable::What(why)) => drop(refused.insert(ino, why.into())),
            Err(Unreadable::Kernel(errno)) => return Err(failed(errno)),
        }
        for (file, fd) in flight.files.files[before..].iter().zip(&flight.files.fds[before..]) {
            let is_socket = matches!(file.kind, FileKind::Socket { .. });
            if is_socket && !known.contains_key(&file.stat.1) {
                let us = pidfd_open(std::process::id() as i32).map_err(failed)?;
                let copy = pidfd_getfd(us.as_fd(), fd.fd).map_err(failed)?;
                known.insert(file.stat.1, Known { copy, pid: 0 });
                next.push(file.stat.1);
            }
        }
        if known.len() > MAX_SOCKETS {
            return Err(failed(Errno::ENFILE));
        }
    }
    let ours: BTreeSet<u64> = known.keys().copied().collect();
    for &ino in &ours {
        let copy = known[&ino].copy.as_fd();
        if let (false, Some(why)) = (refused.contains_key(&ino), sockets.why_not(ino, copy, &ours, true)) {
            refused.insert(ino, why);
        }
    }
    read_internet(&known, &sockets, &mut refused, &mut found).map_err(failed)?;
    let queued = |image: &SocketImage| {
        image.queue.iter().map(|message| message.data.len()).sum::<usize>() + image.underway.len()
    };
    if found.values().map(queued).sum::<usize>() > MAX_QUEUED {
        let largest = found.values().max_by_key(|image| queued(image)).map_or(0, |image| image.ino);
        refused.insert(largest, "whose queue is the longest of too many with too much in them".into());
    }
    let tables = images.iter_mut().map(|image| &mut image.files).chain([&mut flight.files]);
    for file in tables.flat_map(|table| &mut table.files) {
        if let (FileKind::Socket { what }, Some(why)) = (&file.kind, refused.get(&file.stat.1)) {
            file.kind = FileKind::Unsupported { what: format!("{what}, {why}") };
        }
    }
    found.retain(|ino, _| !refused.contains_key(ino));
    let is_connection = |ino: &u64| {
        found.get(ino).is_some_and(|image| {
            image.family != libc::AF_UNIX && image.kind == libc::SOCK_STREAM && image.peer != Peer::None
        })
    };
    let connections = known.into_iter().filter(|(ino, _)| is_connection(ino));
    flight.connections = Connections(connections.map(|(_, one)| one.copy).collect());
    images[0].files.sockets = found.into_values().collect();
    Ok(flight)
}

/// Reads TCP and UDP sockets that are not refused.
fn read_internet(
    known: &BTreeMap<u64, Known>,
    sockets: &Sockets,
    refused: &mut BTreeMap<u64, String>,
    found: &mut BTreeMap<u64, SocketImage>,
) -> Result<(), Errno> {
    for (&ino, one) in known {
        let copy = one.copy.as_fd();
        if refused.contains_key(&ino) || !inventory::is_internet(copy) {
            continue;
        }
        let by_ino = |ino| known.get(&ino).map(|one| one.copy.as_fd());
        let all = internet::Known { internet: sockets.internet()?, copy: &by_ino };
        match internet::read(ino, copy, &all) {
            Ok(image) => drop(found.insert(ino, image)),
            Err(Unreadable::What(why)) => drop(refused.insert(ino, why.into())),
            Err(Unreadable::Kernel(errno)) => return Err(errno),
        }
    }
    Ok(())
}

/// Copies of the sockets in all tables.
fn take_all(pids: &[i32], images: &[ProcessImage]) -> Result<BTreeMap<u64, Known>, DumpError> {
    let mut known = BTreeMap::new();
    for (image, &pid) in images.iter().zip(pids) {
        let failed = |errno: Errno| DumpError::Proc { what: "sockets", pid, source: errno.into() };
        let mut pidfd = None;
        for (ino, fd, _) in inventory::of_table(&image.files) {
            if known.contains_key(&ino) {
                continue;
            }
            if pidfd.is_none() {
                pidfd = Some(pidfd_open(pid).map_err(failed)?);
            }
            let Some(open) = &pidfd else { continue };
            let copy = pidfd_getfd(open.as_fd(), fd).map_err(failed)?;
            known.insert(ino, Known { copy, pid });
        }
    }
    Ok(known)
}

fn read_one(
    one: &Known,
    diag: &UnixSocket,
    sockets: &Sockets,
    flight: &mut InFlight,
) -> Result<SocketImage, Unreadable> {
    let copy = one.copy.as_fd();
    let (ino, kind) = (u64::from(diag.ino), i32::from(diag.kind));
    let number = |name| socket::number(copy, libc::SOL_SOCKET, name);
    let name = socket::name(copy)?;
    let listening = inventory::listens(diag);
    let queue = match listening {
        true => queue::Queue::default(),
        false => queue::read(copy, kind)?,
    };
    let peer = peer(copy, diag, sockets, queue.reset)?;
    if let Peer::Waiting(_) = peer {
        // Who connects can know what it has sent; who has not accepted cannot be looked at.
        if socket::queued(copy, true)? > 0 {
            return Err(Unreadable::What("whose connection is not accepted yet and has data in it"));
        }
    }
    let mut messages = Vec::with_capacity(queue.messages.len());
    for peeked in queue.messages {
        messages.push(message(peeked, flight)?);
    }
    Ok(SocketImage {
        ino,
        family: libc::AF_UNIX,
        kind,
        protocol: number(libc::SO_PROTOCOL)?,
        file: file_of(one.pid, &name, diag)?,
        name,
        peer,
        listening: listening.then(|| Listening {
            backlog: diag.outgoing,
            waiting: diag.waiting.iter().map(|&ino| ino.into()).collect(),
        }),
        shutdown: diag.shutdown & 3,
        peer_ids: ids(&socket::option(copy, libc::SOL_SOCKET, libc::SO_PEERCRED, 12)?),
        queue: messages,
        options: options::read(copy),
        filter: filter(copy)?,
        underway: Vec::new(),
        peer_name: Vec::new(),
        owner: 0,
    })
}

fn ids(value: &[u8]) -> Option<Ids> {
    let word =
        |at: usize| value.get(at..at + 4).map(|word| u32::from_ne_bytes(word.try_into().expect("four")));
    let ids = Ids { pid: word(0)? as i32, uid: word(4)?, gid: word(8)? };
    // Nobody's (init_ucred in net/core/sock.c).
    (ids.uid != u32::MAX).then_some(ids)
}

fn filter(copy: BorrowedFd<'_>) -> Result<Vec<u8>, Unreadable> {
    match socket::filter(copy) {
        // EACCES: an extended one, which has no classic code.
        Err(Errno::EACCES) => Err(Unreadable::What("which has a BPF program as its filter")),
        other => Ok(other?),
    }
}

fn peer(copy: BorrowedFd<'_>, diag: &UnixSocket, sockets: &Sockets, reset: bool) -> Result<Peer, Unreadable> {
    let ino = u64::from(diag.ino);
    Ok(match diag.peer {
        None => Peer::None,
        Some(0) => match sockets.waits_at(ino) {
            Some(listener) => Peer::Waiting(listener),
            None => Peer::Gone { name: socket::peer_name(copy).unwrap_or_default(), reset },
        },
        Some(_) if reset => return Err(Unreadable::What("which has an error to tell")),
        Some(peer) => Peer::Socket(peer.into()),
    })
}

fn message(peeked: Peeked, flight: &mut InFlight) -> Result<Message, Unreadable> {
    let mut descriptors = Vec::with_capacity(peeked.descriptors.len());
    for copy in peeked.descriptors {
        descriptors.push(flight.place(copy).map_err(Unreadable::What)?);
    }
    let ids = peeked.credentials.map(|[pid, uid, gid]| Ids { pid: pid as i32, uid, gid });
    Ok(Message {
        data: peeked.data,
        from: if peeked.from.len() > 2 { peeked.from } else { Vec::new() },
        descriptors,
        // 0: they were not sent along.
        ids: ids.filter(|ids| ids.pid != 0),
        packet: None,
    })
}

/// Where the name of a Unix socket stands in the file system, and whether it still stands for it.
fn file_of(pid: i32, name: &[u8], diag: &UnixSocket) -> Result<Option<SocketFile>, Unreadable> {
    let Some(path) = path_of(name) else { return Ok(None) };
    let Some((ino, _)) = diag.file else { return Ok(None) };
    let directory = match (path.first(), pid) {
        (Some(b'/'), _) => Vec::new(),
        (_, 0) => return Err(Unreadable::What("whose name is relative to an unknown directory")),
        _ => proc::link(pid, "cwd").map_err(|_| Errno::ESRCH)?,
    };
    let at =
        std::path::Path::new(std::ffi::OsStr::from_bytes(&directory)).join(std::ffi::OsStr::from_bytes(path));
    let is_it =
        |meta: &std::fs::Metadata| meta.mode() & libc::S_IFMT == libc::S_IFSOCK && meta.ino() as u32 == ino;
    if let Ok(meta) = std::fs::symlink_metadata(&at)
        && is_it(&meta)
    {
        let mode = (meta.mode(), meta.uid(), meta.gid());
        return Ok(Some(SocketFile { hidden: false, directory, mode }));
    }
    if !directory.is_empty() {
        return Err(Unreadable::What("whose relative name is not found from its working directory"));
    }
    let siblings = at.parent().and_then(|parent| std::fs::read_dir(parent).ok());
    let renamed = |entry: std::fs::DirEntry| entry.metadata().is_ok_and(|meta| is_it(&meta));
    if siblings.is_some_and(|list| list.flatten().any(renamed)) {
        return Err(Unreadable::What("whose name was changed after it was bound"));
    }
    Ok(Some(SocketFile { hidden: true, directory, mode: (libc::S_IFSOCK | 0o755, 0, 0) }))
}

/// The path that a Unix socket is bound to; `None`: an abstract name, or none.
pub fn path_of(name: &[u8]) -> Option<&[u8]> {
    let path = name.get(2..)?;
    let end = path.iter().position(|&byte| byte == 0).unwrap_or(path.len());
    (end > 0).then(|| &path[..end])
}

/// Why what is in flight cannot be carried, for the first image to say.
pub fn refuse_in_flight(flight: &[OpenFile]) -> Option<String> {
    flight.iter().find_map(|file| match &file.kind {
        FileKind::Unsupported { what } => Some(what.clone()),
        FileKind::Epoll { .. } => Some("an epoll".into()),
        FileKind::Inotify { .. } => Some("an inotify".into()),
        FileKind::Pidfd { .. } => Some("a pidfd".into()),
        FileKind::Proc { .. } => Some("a file of the process file system".into()),
        FileKind::Tty => Some("a terminal".into()),
        FileKind::Pipe { internal: false } => Some("a pipe to another process".into()),
        FileKind::Foreign { .. } => Some("something that stays elsewhere".into()),
        _ => None,
    })
}
