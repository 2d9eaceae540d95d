//! TCP and UDP sockets: with whom each is connected, and what of them cannot be carried (ip(7), tcp(7),
//! udp(7)).
//!
//! Carried are connections within the tree, over loopback. What a socket is its copy tells
//! (`pidfd_getfd`); who has the other end, sock_diag(7).

use super::{groups, process};
use crate::sys::sock_diag::{self, InetSocket};
use crate::sys::socket;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};

/// States of a TCP connection (include/net/tcp_states.h).
pub mod state {
    pub const ESTABLISHED: u8 = 1;
    pub const SYN_SENT: u8 = 2;
    pub const SYN_RECV: u8 = 3;
    pub const FIN_WAIT1: u8 = 4;
    pub const FIN_WAIT2: u8 = 5;
    pub const TIME_WAIT: u8 = 6;
    pub const CLOSE: u8 = 7;
    pub const CLOSE_WAIT: u8 = 8;
    pub const LAST_ACK: u8 = 9;
    pub const LISTEN: u8 = 10;
    pub const CLOSING: u8 = 11;
}

/// linux/tcp.h, linux/udp.h, asm-generic/socket.h.
const TCP_REPAIR: i32 = 19;
const TCP_ULP: i32 = 31;
const TCP_AO_INFO: i32 = 40;
const UDP_CORK: i32 = 1;
const UDP_ENCAP: i32 = 100;
const SO_NETNS_COOKIE: i32 = 71;

/// All Internet sockets of this network namespace.
pub struct Internet {
    tcp: Vec<InetSocket>,
    udp: Vec<InetSocket>,
    /// The namespace (`SO_NETNS_COOKIE`).
    namespace: Option<Vec<u8>>,
}

/// The other end of a TCP connection.
pub enum OtherEnd {
    /// It is this socket.
    Socket(u64),
    /// It waits to be accepted by this listening socket.
    Waiting(u64),
    /// It was closed.
    Gone,
}

/// Who has which socket.
pub struct Holders<'a> {
    /// Those that are carried.
    pub ours: &'a BTreeSet<u64>,
    /// Those of other processes.
    pub outside: &'a BTreeMap<u64, i32>,
    /// Whatever is in flight is among `ours`.
    pub complete: bool,
}

impl Holders<'_> {
    fn has(&self, ino: u32) -> bool {
        self.ours.contains(&u64::from(ino))
    }

    /// It is in no table that is carried, and not in flight there.
    fn is_strange(&self, ino: u32) -> bool {
        !self.has(ino) && (self.complete || self.outside.contains_key(&u64::from(ino)))
    }

    fn name(&self, ino: u32) -> String {
        match self.outside.get(&u64::from(ino)) {
            Some(&pid) => process(pid),
            None => "a socket that no process has".into(),
        }
    }
}

impl Internet {
    /// Looks at all of them.
    pub fn look() -> Result<Internet, Errno> {
        let both = |protocol: i32| -> Result<Vec<InetSocket>, Errno> {
            let mut all = sock_diag::inet_sockets(libc::AF_INET as u8, protocol as u8)?;
            all.extend(sock_diag::inet_sockets(libc::AF_INET6 as u8, protocol as u8)?);
            Ok(all)
        };
        let probe = socket::make(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
        let namespace = namespace_of(probe.as_fd());
        Ok(Internet { tcp: both(libc::IPPROTO_TCP)?, udp: both(libc::IPPROTO_UDP)?, namespace })
    }

    /// A bound socket.
    pub fn get(&self, ino: u64) -> Option<&InetSocket> {
        self.tcp.iter().chain(&self.udp).find(|socket| u64::from(socket.ino) == ino)
    }

    /// The other end of a TCP connection, as the kernel lists it; the inode number of one that nobody
    /// has (yet, or any more) is 0.
    fn opposite(&self, socket: &InetSocket) -> Option<&InetSocket> {
        let (local, remote) = (socket.local(), socket.remote());
        self.tcp.iter().find(|other| other.local() == remote && other.remote() == local)
    }

    /// What a connected TCP socket is connected with. `None`: nothing is there.
    pub fn other_end(&self, socket: &InetSocket) -> Option<OtherEnd> {
        let other = self.opposite(socket)?;
        Some(match (other.ino, other.state) {
            (0, state::ESTABLISHED | state::SYN_RECV | state::CLOSE_WAIT) => {
                OtherEnd::Waiting(self.listener_of(other)?.ino.into())
            }
            (0, _) => OtherEnd::Gone,
            (ino, _) => OtherEnd::Socket(ino.into()),
        })
    }

    /// The listening socket that a connection, which nobody has accepted, has come through.
    fn listener_of(&self, child: &InetSocket) -> Option<&InetSocket> {
        let fits = |at: &&InetSocket| {
            at.state == state::LISTEN
                && at.family == child.family
                && at.local().port() == child.local().port()
        };
        let exact = self.tcp.iter().filter(fits).find(|at| at.local().ip() == child.local().ip());
        exact.or_else(|| self.tcp.iter().filter(fits).find(|at| at.local().ip().is_unspecified()))
    }

    /// Connections that wait to be accepted at a listening socket.
    pub fn waiting_at(&self, listener: &InetSocket) -> Vec<&InetSocket> {
        let waits = |child: &&InetSocket| {
            child.ino == 0
                && matches!(child.state, state::ESTABLISHED | state::SYN_RECV | state::CLOSE_WAIT)
                && self.listener_of(child).is_some_and(|at| at.ino == listener.ino)
        };
        self.tcp.iter().filter(waits).collect()
    }

    /// The client of a connection that waits to be accepted.
    pub fn client_of(&self, child: &InetSocket) -> Option<u64> {
        self.opposite(child).map(|client| client.ino.into()).filter(|&ino| ino != 0)
    }

    /// Why a socket cannot be carried with those that are ours.
    pub fn why_not(&self, copy: BorrowedFd<'_>, ino: u64, holders: &Holders<'_>) -> Option<String> {
        if let (Some(ours), Some(its)) = (&self.namespace, namespace_of(copy))
            && *ours != its
        {
            return Some("which belongs to another network namespace".into());
        }
        let number = |level, name| socket::number(copy, level, name).unwrap_or(0);
        let device = socket::option(copy, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, 16).unwrap_or_default();
        let device = String::from_utf8_lossy(&device).trim_end_matches('\0').to_string();
        if !device.is_empty() && device != "lo" {
            return Some(format!("which is bound to the device {device}"));
        }
        let protocol = number(libc::SOL_SOCKET, libc::SO_PROTOCOL);
        match (protocol, number(libc::SOL_SOCKET, libc::SO_TYPE)) {
            (libc::IPPROTO_TCP, libc::SOCK_STREAM) => self.why_not_tcp(copy, ino, holders),
            (libc::IPPROTO_UDP, libc::SOCK_DGRAM) => self.why_not_udp(copy, ino, holders),
            _ => Some(format!("of the protocol {protocol}")),
        }
    }

    fn why_not_tcp(&self, copy: BorrowedFd<'_>, ino: u64, holders: &Holders<'_>) -> Option<String> {
        if socket::option(copy, libc::IPPROTO_TCP, TCP_ULP, 16).is_ok_and(|name| !name.is_empty()) {
            return Some("which has a protocol of the kernel's on top of it (TLS)".into());
        }
        if socket::number(copy, libc::IPPROTO_TCP, TCP_REPAIR).unwrap_or(0) != 0 {
            return Some("which is being repaired (TCP_REPAIR)".into());
        }
        if socket::option(copy, libc::IPPROTO_TCP, TCP_AO_INFO, 64).is_ok() {
            return Some("whose segments are signed (TCP_AO)".into());
        }
        let events = events(copy);
        if events.contains(PollFlags::POLLERR) {
            return Some("which has an error to tell".into());
        }
        let known = self.get(ino);
        if known.is_some_and(|socket| socket.signed) {
            return Some("whose segments are signed (TCP_MD5SIG)".into());
        }
        match tcp_state(copy) {
            // Not connected (any more).
            state::CLOSE => None,
            state::SYN_SENT | state::SYN_RECV => {
                let to = known.map(|socket| format!(" to {}", socket.remote())).unwrap_or_default();
                Some(format!("which is being connected{to}"))
            }
            state::LISTEN => known.and_then(|socket| self.why_not_listening(socket, holders)),
            // It was connected or closed since all were looked at.
            _ if known.is_none() && !holders.complete => None,
            _ if events.contains(PollFlags::POLLPRI) => Some("which has out-of-band data to be read".into()),
            _ => match known {
                Some(socket) => self.why_not_connected(socket, holders),
                None => Some("whose other end was not found".into()),
            },
        }
    }

    fn why_not_listening(&self, socket: &InetSocket, holders: &Holders<'_>) -> Option<String> {
        self.waiting_at(socket).into_iter().find_map(|child| {
            let from = child.remote();
            match self.opposite(child) {
                Some(client) if holders.has(client.ino) => None,
                Some(client) if client.ino != 0 && !holders.is_strange(client.ino) => None,
                Some(client) if client.ino != 0 => {
                    let name = holders.name(client.ino);
                    Some(format!("where a connection of {name} from {from} waits to be accepted"))
                }
                _ => Some(format!("where a connection from {from} waits to be accepted")),
            }
        })
    }

    fn why_not_connected(&self, socket: &InetSocket, holders: &Holders<'_>) -> Option<String> {
        let (local, remote) = (socket.local(), socket.remote());
        if local == remote {
            return Some("which is connected to itself".into());
        }
        let Some(other) = self.opposite(socket) else {
            return match (remote.ip().is_loopback(), socket.state) {
                (false, _) => Some(format!("connected to {remote}")),
                // The other end was closed long ago.
                (true, state::CLOSE_WAIT) => None,
                (true, _) => Some(format!("whose other end {remote} was not found")),
            };
        };
        if !remote.ip().is_loopback() {
            let name = if other.ino == 0 { String::new() } else { format!(" ({})", holders.name(other.ino)) };
            return Some(format!("connected to {remote}{name}, not over loopback"));
        }
        match self.other_end(socket) {
            Some(OtherEnd::Socket(ino)) if holders.is_strange(ino as u32) => {
                Some(format!("connected to {} ({remote})", holders.name(ino as u32)))
            }
            Some(OtherEnd::Socket(_)) => None,
            Some(OtherEnd::Waiting(listener)) if holders.is_strange(listener as u32) => {
                Some(format!("which waits to be accepted by {} ({remote})", holders.name(listener as u32)))
            }
            Some(OtherEnd::Waiting(_)) if other.incoming > u32::from(other.state == state::CLOSE_WAIT) => {
                Some("whose connection is not accepted yet and has data in it".into())
            }
            Some(OtherEnd::Waiting(_)) => None,
            // The end of what it has sent has not come yet.
            Some(OtherEnd::Gone) if can_receive(socket.state) => {
                Some(format!("whose other end {remote} was closed and has data yet to send"))
            }
            Some(OtherEnd::Gone) => None,
            None => Some(format!("whose other end {remote} was not found")),
        }
    }

    fn why_not_udp(&self, copy: BorrowedFd<'_>, ino: u64, holders: &Holders<'_>) -> Option<String> {
        let number = |name| socket::number(copy, libc::IPPROTO_UDP, name).unwrap_or(0);
        if number(UDP_ENCAP) != 0 {
            return Some("which unpacks what others have packed (UDP_ENCAP)".into());
        }
        if number(UDP_CORK) != 0 {
            return Some("which holds back what is sent (UDP_CORK)".into());
        }
        if events(copy).contains(PollFlags::POLLERR) {
            return Some("which has an error to tell".into());
        }
        if let Some((group, device)) = groups::membership(copy) {
            return Some(format!("which is a member of the group {group} on {device}"));
        }
        let socket = self.get(ino)?;
        let (local, remote) = (socket.local(), socket.remote());
        let stranger = |fits: &dyn Fn(&InetSocket) -> bool| {
            self.udp.iter().find(|other| other.ino != 0 && fits(other) && holders.is_strange(other.ino))
        };
        if remote.port() != 0 {
            if !remote.ip().is_loopback() {
                return Some(format!("connected to {remote}"));
            }
            let other = stranger(&|other| is_at(other.local(), remote))?;
            return Some(format!("connected to {} ({remote})", holders.name(other.ino)));
        }
        let aims = |other: &InetSocket| other.remote().port() != 0 && is_at(local, other.remote());
        let other = stranger(&aims)?;
        Some(format!("to which {} is connected", holders.name(other.ino)))
    }
}

/// States of a connection that can still receive.
fn can_receive(state: u8) -> bool {
    matches!(state, state::ESTABLISHED | state::FIN_WAIT1 | state::FIN_WAIT2)
}

/// Whether a socket that is bound to `local` is the one that is meant by `address`.
fn is_at(local: SocketAddr, address: SocketAddr) -> bool {
    let anywhere = match local.ip() {
        // Of IPv6 it takes IPv4 too, mostly.
        IpAddr::V6(ip) => ip.is_unspecified(),
        IpAddr::V4(ip) => ip.is_unspecified() && address.is_ipv4(),
    };
    local.port() == address.port() && (anywhere || local.ip() == address.ip())
}

/// `tcpi_state`, the first byte of `TCP_INFO`.
pub fn tcp_state(copy: BorrowedFd<'_>) -> u8 {
    let info = socket::option(copy, libc::IPPROTO_TCP, libc::TCP_INFO, 8).unwrap_or_default();
    info.first().copied().unwrap_or(state::CLOSE)
}

/// What poll(2) tells of a socket.
pub fn events(copy: BorrowedFd<'_>) -> PollFlags {
    let mut asked = [PollFd::new(copy, PollFlags::POLLIN | PollFlags::POLLPRI)];
    match poll(&mut asked, PollTimeout::ZERO) {
        Ok(_) => asked[0].revents().unwrap_or(PollFlags::empty()),
        Err(_) => PollFlags::empty(),
    }
}

fn namespace_of(copy: BorrowedFd<'_>) -> Option<Vec<u8>> {
    socket::option(copy, libc::SOL_SOCKET, SO_NETNS_COOKIE, 8).ok()
}
