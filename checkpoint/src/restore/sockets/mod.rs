//! Sockets, made before the processes that have them: names and connections ([`unix`]), what was sent
//! and not read ([`queues`]), those of TCP and UDP ([`internet`]), options ([`options`]).
//!
//! The order is the kernel's: who listens must do so before others connect; a datagram is sent before
//! its receiver accepts only its peer; what is shut or closed has been written to before; and who made
//! a connection is noted at that moment, so that it is made by a child with that PID.

mod internet;
mod options;
mod queues;
mod unix;

use super::traces::Traces;
use super::{RestoreError, shell};
use crate::image::sockets::{Ids, MAX_SOCKETS, Peer, SocketImage};
use crate::image::{FileKind, FilesImage, ProcessImage};
use crate::sys::act_as::{As, act};
use nix::errno::Errno;
use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

/// The sockets of an image.
pub struct Sockets<'a> {
    images: &'a [SocketImage],
    by_ino: BTreeMap<u64, usize>,
    /// By their places in the image.
    made: BTreeMap<usize, OwnedFd>,
    /// Ends that were closed, by the places of those that have had them as peers.
    gone: BTreeMap<usize, OwnedFd>,
    /// Whoever has a socket first: his ids are those of a connection that is not accepted yet.
    owners: BTreeMap<u64, Ids>,
    hidden: OnceCell<HiddenRoot>,
    /// Names that were not there before.
    names: Traces,
}

/// A root for names that nobody finds; removed with it.
struct HiddenRoot(PathBuf);

impl Drop for HiddenRoot {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl<'a> Sockets<'a> {
    /// Makes them, and connects them.
    pub fn make(processes: &'a [ProcessImage]) -> Result<Sockets<'a>, RestoreError> {
        let images: &[SocketImage] = processes.first().map_or(&[], |root| &root.files.sockets);
        let by_ino = images.iter().enumerate().map(|(place, image)| (image.ino, place)).collect();
        let mut owners = BTreeMap::new();
        for process in processes {
            for ino in of_table(&process.files) {
                let ids = Ids { pid: process.pid, uid: process.creds.uids[1], gid: process.creds.gids[1] };
                owners.entry(ino).or_insert(ids);
            }
        }
        let (made, gone) = (BTreeMap::new(), BTreeMap::new());
        let (hidden, names) = (OnceCell::new(), Traces::default());
        let mut sockets = Sockets { images, by_ino, made, gone, owners, hidden, names };
        sockets.check()?;
        unix::connect_all(&mut sockets)?;
        internet::make_all(&mut sockets)?;
        Ok(sockets)
    }

    /// The socket with this inode number.
    pub fn get(&self, ino: u64) -> Option<BorrowedFd<'_>> {
        self.by_ino.get(&ino).and_then(|place| self.made.get(place)).map(AsFd::as_fd)
    }

    /// Fills the queues and sets what is left; `in_flight` are the numbers of what messages carry. Gives the
    /// names that were made.
    pub fn finish(mut self, in_flight: &[Option<i32>]) -> Result<Traces, RestoreError> {
        queues::fill(&mut self, in_flight)?;
        for (place, image) in self.images.iter().enumerate() {
            let Some(made) = self.made.get(&place) else { continue };
            let done_by_peer = matches!(image.peer, Peer::Gone { .. }) && image.kind != libc::SOCK_DGRAM;
            let done_by_peer = done_by_peer || internet::is_tcp(image);
            if image.shutdown != 0 && !done_by_peer {
                // 1: receiving, 2: sending; shutdown(2) counts from 0.
                let done = crate::sys::socket::shutdown(made.as_fd(), i32::from(image.shutdown & 3) - 1);
                match done {
                    Ok(()) | Err(Errno::ENOTCONN) => {}
                    Err(errno) => return Err(failed(image, "shutting it down", errno)),
                }
            }
        }
        internet::tcp::finish(&mut self)?;
        self.gone.clear();
        unix::settle(&self)?;
        for (place, image) in self.images.iter().enumerate() {
            if let Some(made) = self.made.get(&place) {
                options::set(made.as_fd(), image)?;
            }
        }
        Ok(self.names)
    }

    /// What must hold before anything is made.
    fn check(&self) -> Result<(), RestoreError> {
        let unfit = |what: &str| Err(RestoreError::Unfit(format!("the image is not consistent: {what}")));
        if self.images.len() > MAX_SOCKETS || self.by_ino.len() != self.images.len() {
            return unfit("two sockets are the same");
        }
        for image in self.images {
            let known = |ino: &u64| self.by_ino.get(ino).map(|&place| &self.images[place]);
            let kinds = [libc::SOCK_STREAM, libc::SOCK_DGRAM, libc::SOCK_SEQPACKET];
            let of_internet = matches!(image.family, libc::AF_INET | libc::AF_INET6);
            if image.family != libc::AF_UNIX && !of_internet || !kinds.contains(&image.kind) {
                return unfit("a socket of an unknown kind");
            }
            if of_internet && !internet::is_consistent(image) {
                return unfit("a TCP or UDP socket");
            }
            let connected = image.kind != libc::SOCK_DGRAM;
            let fits = match &image.peer {
                Peer::None | Peer::Gone { .. } => true,
                Peer::Socket(peer) => known(peer).is_some_and(|other| {
                    let alike = other.kind == image.kind && of_internet == (other.family != libc::AF_UNIX);
                    alike && (!connected || other.peer == Peer::Socket(image.ino))
                }),
                Peer::Waiting(at) => known(at).is_some_and(|other| {
                    let waits =
                        |listening: &crate::image::sockets::Listening| listening.waiting.contains(&image.ino);
                    let alike = other.kind == image.kind && of_internet == (other.family != libc::AF_UNIX);
                    alike && connected && other.listening.as_ref().is_some_and(waits)
                }),
            };
            let mut waiting = image.listening.iter().flat_map(|listening| &listening.waiting);
            let waits = |ino: &u64| known(ino).is_some_and(|other| other.peer == Peer::Waiting(image.ino));
            if !fits || !waiting.all(waits) || image.listening.is_some() && !connected {
                return unfit("a socket whose peer is missing");
            }
            if image.name.len() < 2
                || image.name.len() > 110
                || image.queue.iter().any(|m| m.from.len() > 110)
            {
                return unfit("the address of a socket");
            }
        }
        Ok(())
    }

    /// Does something as the process with these ids.
    fn act_as(
        &self,
        ids: Option<Ids>,
        image: &SocketImage,
        what: &'static str,
        work: impl Fn() -> Result<[i32; 2], Errno>,
    ) -> Result<[i32; 2], RestoreError> {
        let Some(ids) = ids else { return work().map_err(|errno| failed(image, what, errno)) };
        if ids.pid <= 0 {
            return Err(RestoreError::Unfit(
                "a socket was connected by a process of another PID namespace".into(),
            ));
        }
        let groups = [ids.gid];
        let who = As { pid: Some(ids.pid), ids: Some((ids.uid, ids.gid, &groups)), root: None };
        match shell::act_under(ids.pid, || act(&who, &work)) {
            Err(Errno::EEXIST) => Err(shell::taken(ids.pid)),
            other => other.map_err(|errno| failed(image, what, errno)),
        }
    }
}

/// Inode numbers of the sockets in a table.
fn of_table(files: &FilesImage) -> impl Iterator<Item = u64> {
    let sockets = files.files.iter().filter(|file| matches!(file.kind, FileKind::Socket { .. }));
    sockets.map(|file| file.stat.1)
}

fn failed(image: &SocketImage, what: &str, errno: Errno) -> RestoreError {
    RestoreError::file(format!("making a socket{}: {what}", label(&image.name)), errno)
}

/// ` named …`, of those that have a name; ` at …`, of those that have an address.
fn label(name: &[u8]) -> String {
    if let Some(address) = internet::address::read(name) {
        return format!(" at {address}");
    }
    let path = name.get(2..).unwrap_or_default();
    let end = match path.first() {
        Some(0) => path.len(),
        _ => path.iter().position(|&byte| byte == 0).unwrap_or(path.len()),
    };
    match &path[..end] {
        [] => String::new(),
        path => format!(" named {}", String::from_utf8_lossy(path).replace('\0', "@")),
    }
}
