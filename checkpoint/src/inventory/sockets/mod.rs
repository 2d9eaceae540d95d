//! Sockets: what each is, and with whom it is connected (sock_diag(7)).
//!
//! An image that stands alone carries a connection when both of its ends are in the tree: of Unix sockets,
//! and of TCP and UDP over loopback ([`internet`]). Who has which socket is found in the tables of all
//! processes; an end that nobody has is in flight, in a message of another socket, and is found when the
//! tree stands still.

mod describe;
mod groups;
pub mod internet;

use super::Blocker;
use crate::image::{FileKind, FilesImage};
use crate::proc;
use crate::sys::fd::{pidfd_getfd, pidfd_open};
use crate::sys::sock_diag::{self, UnixSocket};
use crate::sys::socket;
use internet::{Holders, Internet};
use nix::errno::Errno;
use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::fd::{AsFd, BorrowedFd};

pub use describe::describe;

const TCP_ESTABLISHED: u8 = 1;
const TCP_LISTEN: u8 = 10;

/// What a descriptor of a socket is; everything but Unix sockets, TCP and UDP is refused.
pub fn classify(pid: i32, fd: i32, ino: u64) -> FileKind {
    let what = describe(pid, fd, ino);
    match describe::protocol(pid, fd).as_deref() {
        // Closed meanwhile: there is nothing in the way, unless a closer look finds it still there.
        None => FileKind::Socket { what },
        // Names of `struct proto` in net/.
        Some("UNIX" | "UNIX-STREAM" | "TCP" | "TCPv6" | "UDP" | "UDPv6") => FileKind::Socket { what },
        _ => FileKind::Unsupported { what },
    }
}

/// All sockets at one moment.
pub struct Sockets {
    unix: BTreeMap<u64, UnixSocket>,
    /// When one was asked for.
    internet: OnceCell<Internet>,
    /// Who has it that is not carried along.
    outside: BTreeMap<u64, i32>,
}

impl Sockets {
    /// Looks at all of them; whoever is not of the family is outside, but for this program itself.
    pub fn look(family: &[i32]) -> Result<Sockets, Errno> {
        let unix = sock_diag::unix_sockets()?;
        let unix = unix.into_iter().filter(|socket| socket.ino != 0);
        Ok(Sockets {
            unix: unix.map(|socket| (u64::from(socket.ino), socket)).collect(),
            internet: OnceCell::new(),
            outside: holders_outside(family),
        })
    }

    /// A Unix socket of this network namespace.
    pub fn unix(&self, ino: u64) -> Option<&UnixSocket> {
        self.unix.get(&ino)
    }

    /// TCP and UDP.
    pub fn internet(&self) -> Result<&Internet, Errno> {
        match self.internet.get() {
            Some(known) => Ok(known),
            None => Internet::look().map(|found| self.internet.get_or_init(|| found)),
        }
    }

    /// The listening socket in whose queue a connection waits.
    pub fn waits_at(&self, client: u64) -> Option<u64> {
        let waits = |socket: &UnixSocket| socket.waiting.iter().any(|&ino| u64::from(ino) == client);
        self.unix.iter().find(|(_, socket)| waits(socket)).map(|(&ino, _)| ino)
    }

    /// Why a socket, of which this is a copy, cannot be carried with those that are `ours`. `complete`:
    /// whatever is in flight is among them.
    pub fn why_not(
        &self,
        ino: u64,
        copy: BorrowedFd<'_>,
        ours: &BTreeSet<u64>,
        complete: bool,
    ) -> Option<String> {
        if let Some(&pid) = self.outside.get(&ino) {
            return Some(format!("which {} has too", process(pid)));
        }
        if is_internet(copy) {
            let holders = Holders { ours, outside: &self.outside, complete };
            return match self.internet() {
                Ok(internet) => internet.why_not(copy, ino, &holders),
                Err(errno) => Some(format!("which cannot be looked at (NETLINK_SOCK_DIAG): {errno}")),
            };
        }
        let Some(socket) = self.unix(ino) else {
            return Some("which belongs to another network namespace".into());
        };
        let is_ours = |other: u32| ours.contains(&u64::from(other));
        if let Some(stranger) = socket.waiting.iter().copied().find(|&other| !is_ours(other)) {
            return Some(format!("where a connection of {} waits to be accepted", self.holder(stranger)));
        }
        match socket.peer {
            Some(0) if socket.kind != libc::SOCK_DGRAM as u8 && socket.shutdown != 3 => {
                match self.waits_at(ino) {
                    Some(listener) if ours.contains(&listener) => None,
                    Some(listener) => {
                        Some(format!("which waits to be accepted by {}", self.holder(listener as u32)))
                    }
                    None if complete => Some("whose other end was not found".into()),
                    None => None,
                }
            }
            Some(peer) if peer != 0 && !is_ours(peer) && (complete || self.is_outside(peer)) => {
                Some(format!("connected to {}", self.holder(peer)))
            }
            _ => {
                let aims = |other: &&UnixSocket| {
                    other.kind == libc::SOCK_DGRAM as u8
                        && other.peer.is_some_and(|peer| u64::from(peer) == ino)
                };
                let strange =
                    |other: &&UnixSocket| !is_ours(other.ino) && (complete || self.is_outside(other.ino));
                self.unix
                    .values()
                    .find(|other| aims(other) && strange(other))
                    .map(|other| format!("to which {} is connected", self.holder(other.ino)))
            }
        }
    }

    fn is_outside(&self, ino: u32) -> bool {
        self.outside.contains_key(&u64::from(ino))
    }

    /// The owner of an end that is not carried, with its name.
    fn holder(&self, ino: u32) -> String {
        let name = self.unix(ino.into()).filter(|socket| !socket.name.is_empty()).map(|socket| {
            let name = String::from_utf8_lossy(&socket.name).replace('\0', "@");
            format!(" ({name})")
        });
        let name = name.unwrap_or_default();
        match self.outside.get(&u64::from(ino)) {
            Some(&pid) => format!("{}{name}", process(pid)),
            None => format!("a socket{name} that no process has"),
        }
    }
}

/// `process 12 (dbus-daemon)`.
fn process(pid: i32) -> String {
    let comm = proc::read(pid, "comm").unwrap_or_default();
    format!("process {pid} ({})", String::from_utf8_lossy(&comm).trim())
}

/// A process that has the socket with this inode number, with its name.
pub fn holder(ino: u64) -> Option<String> {
    holders_outside(&[]).get(&ino).map(|&pid| process(pid))
}

fn holders_outside(family: &[i32]) -> BTreeMap<u64, i32> {
    let inside: BTreeSet<i32> = family.iter().copied().chain([std::process::id() as i32]).collect();
    let mut out = BTreeMap::new();
    for pid in proc::pids().into_iter().filter(|pid| !inside.contains(pid)) {
        let Ok(dir) = fs::read_dir(format!("/proc/{pid}/fd")) else { continue };
        for entry in dir.flatten() {
            let Ok(link) = fs::read_link(entry.path()) else { continue };
            let text = link.to_string_lossy();
            let number = text.strip_prefix("socket:[").and_then(|rest| rest.strip_suffix(']'));
            if let Some(ino) = number.and_then(|number| number.parse().ok()) {
                out.insert(ino, pid);
            }
        }
    }
    out
}

/// Inode numbers and descriptions of the sockets of a table, each with its first descriptor.
pub fn of_table(files: &FilesImage) -> Vec<(u64, i32, &str)> {
    let of_file = |(index, file): (usize, &'_ crate::image::OpenFile)| {
        let fd = files.fds.iter().find(|fd| fd.file as usize == index)?;
        Some((file.stat.1, fd.fd, index))
    };
    let found = files.files.iter().enumerate().filter_map(of_file);
    found
        .filter_map(|(ino, fd, index)| match &files.files.get(index)?.kind {
            FileKind::Socket { what } => Some((ino, fd, what.as_str())),
            _ => None,
        })
        .collect()
}

/// What cannot be carried, of the tables of processes that are carried together and run on meanwhile.
pub fn blockers(tables: &[(i32, &FilesImage)], family: &[i32]) -> Vec<(i32, Blocker)> {
    let found: Vec<(i32, u64, i32, &str)> = tables
        .iter()
        .flat_map(|&(pid, files)| {
            of_table(files).into_iter().map(move |(ino, fd, what)| (pid, ino, fd, what))
        })
        .collect();
    if found.is_empty() {
        // The usual case: nobody else's table has to be looked at.
        return Vec::new();
    }
    let blocker = |what| Blocker { kind: "fd", what };
    let sockets = match Sockets::look(family) {
        Ok(sockets) => sockets,
        Err(errno) => {
            let what = format!("its sockets cannot be looked at (NETLINK_SOCK_DIAG): {errno}");
            return vec![(found[0].0, blocker(what))];
        }
    };
    let ours: BTreeSet<u64> = found.iter().map(|&(_, ino, ..)| ino).collect();
    let mut out = Vec::new();
    let mut open = None;
    for (pid, ino, fd, what) in found {
        if open.as_ref().is_none_or(|&(of, _)| of != pid) {
            open = pidfd_open(pid).ok().map(|pidfd| (pid, pidfd));
        }
        let Some((_, pidfd)) = &open else { continue };
        let why = match pidfd_getfd(pidfd.as_fd(), fd) {
            Ok(copy) => sockets.why_not(ino, copy.as_fd(), &ours, false),
            // It, or its process, is gone.
            Err(Errno::EBADF | Errno::ESRCH) => None,
            Err(errno) => Some(format!("which cannot be looked at: {errno}")),
        };
        out.extend(why.map(|why| (pid, blocker(format!("fd {fd}: {what}, {why}")))));
    }
    out
}

/// Whether it is one of IP's.
pub fn is_internet(copy: BorrowedFd<'_>) -> bool {
    let family = socket::number(copy, libc::SOL_SOCKET, libc::SO_DOMAIN);
    matches!(family, Ok(libc::AF_INET | libc::AF_INET6))
}

/// Whether it is an end of a connection.
pub fn is_connected(socket: &UnixSocket) -> bool {
    socket.kind != libc::SOCK_DGRAM as u8 && socket.state == TCP_ESTABLISHED
}

/// Whether it listens.
pub fn listens(socket: &UnixSocket) -> bool {
    socket.state == TCP_LISTEN
}
