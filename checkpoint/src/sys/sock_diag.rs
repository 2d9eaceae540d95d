//! What the kernel knows of all sockets of a network namespace: sock_diag(7).
//!
//! A small codec of its own: two requests and the attributes that are used.

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// `NLM_F_REQUEST | NLM_F_DUMP`.
const DUMP: u16 = 0x301;
/// `NLM_F_REQUEST | NLM_F_ACK`.
const ACKNOWLEDGE: u16 = 0x5;
/// Largest answer taken at once, bytes.
const ROOM: usize = 1 << 16;
/// Bound on the sockets looked at.
const MAX_SOCKETS: usize = 1 << 20;

/// One Unix socket (linux/unix_diag.h).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UnixSocket {
    /// Inode number; 0: it has no descriptor (a connection not accepted yet).
    pub ino: u32,
    /// `SOCK_STREAM`, `SOCK_DGRAM` or `SOCK_SEQPACKET`.
    pub kind: u8,
    /// `TCP_ESTABLISHED` (1), `TCP_CLOSE` (7) or `TCP_LISTEN` (10).
    pub state: u8,
    /// `sun_path` as it was bound, without a final NUL; an abstract name begins with NUL. Empty: none.
    pub name: Vec<u8>,
    /// Inode number and device of the file that it is bound to.
    pub file: Option<(u32, u32)>,
    /// Inode number of the peer; 0: it is gone, or has no descriptor (yet).
    pub peer: Option<u32>,
    /// Of a listening one: whose connections wait to be accepted, oldest first, as the clients' inode
    /// numbers.
    pub waiting: Vec<u32>,
    /// Of a listening one: the length of that queue, else the bytes that can be read.
    pub incoming: u32,
    /// Of a listening one: the backlog it asked for, else the bytes that were sent and not read.
    pub outgoing: u32,
    /// `RCV_SHUTDOWN` (1), `SEND_SHUTDOWN` (2).
    pub shutdown: u8,
}

/// One Internet socket (linux/inet_diag.h).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InetSocket {
    /// Inode number; 0: it has no descriptor.
    pub ino: u32,
    /// `AF_INET` or `AF_INET6`.
    pub family: u8,
    /// `TCP_*` (include/net/tcp_states.h).
    pub state: u8,
    /// Local address (16 bytes, of which IPv4 uses 4) and port.
    pub local: ([u8; 16], u16),
    /// The other end's.
    pub remote: ([u8; 16], u16),
    /// Bytes that can be read, or connections that wait.
    pub incoming: u32,
    /// Bytes sent and not acknowledged, or the backlog.
    pub outgoing: u32,
    /// `RCV_SHUTDOWN` (1), `SEND_SHUTDOWN` (2).
    pub shutdown: u8,
    /// It has a key for MD5 signatures.
    pub signed: bool,
    /// `struct inet_diag_sockid`: names it to the kernel.
    pub id: [u8; 48],
}

impl InetSocket {
    /// Its own address; an IPv4 address inside of IPv6 as such.
    pub fn local(&self) -> SocketAddr {
        address(self.family, self.local)
    }

    /// The other end's.
    pub fn remote(&self) -> SocketAddr {
        address(self.family, self.remote)
    }
}

fn address(family: u8, (bytes, port): ([u8; 16], u16)) -> SocketAddr {
    let ip = match i32::from(family) {
        libc::AF_INET => IpAddr::from([bytes[0], bytes[1], bytes[2], bytes[3]]),
        _ => IpAddr::from(bytes).to_canonical(),
    };
    SocketAddr::new(ip, port)
}

/// Sends a request to the kernel.
fn ask(kind: u16, flags: u16, request: &[u8]) -> Result<OwnedFd, Errno> {
    let netlink: OwnedFd =
        socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkSockDiag)?;
    let mut message = ((request.len() + 16) as u32).to_ne_bytes().to_vec();
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(&flags.to_ne_bytes());
    message.extend_from_slice(&[0; 8]);
    message.extend_from_slice(request);
    sendto(netlink.as_raw_fd(), &message, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    Ok(netlink)
}

fn dump(request: &[u8], mut each: impl FnMut(&[u8])) -> Result<(), Errno> {
    let netlink = ask(SOCK_DIAG_BY_FAMILY, DUMP, request)?;
    let mut buffer = vec![0; ROOM];
    let mut count = 0;
    loop {
        let got = recv(netlink.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let mut rest = &buffer[..got];
        while let Some((kind, payload, next)) = message_of(rest) {
            match kind {
                NLMSG_DONE => return Ok(()),
                NLMSG_ERROR => return Err(error(payload)),
                SOCK_DIAG_BY_FAMILY if count < MAX_SOCKETS => {
                    count += 1;
                    each(payload);
                }
                _ => {}
            }
            rest = next;
        }
        if got == 0 {
            return Err(Errno::EPROTO);
        }
    }
}

/// `struct nlmsgerr`.
fn error(payload: &[u8]) -> Errno {
    Errno::from_raw(word(payload, 0).map_or(0, |code| (code as i32).wrapping_neg()))
}

/// `struct nlmsghdr`: type, payload, what follows.
fn message_of(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let len = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    let payload = bytes.get(16..len)?;
    Some((kind, payload, bytes.get(len.next_multiple_of(4)..).unwrap_or_default()))
}

/// `struct nlattr`s: type and value of each.
fn attributes(mut bytes: &[u8]) -> Vec<(u16, &[u8])> {
    let mut out = Vec::new();
    while let Some(head) = bytes.get(..4) {
        let len = usize::from(u16::from_ne_bytes([head[0], head[1]]));
        let kind = u16::from_ne_bytes([head[2], head[3]]);
        let Some(value) = bytes.get(4..len) else { break };
        out.push((kind, value));
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    out
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// All Unix sockets of this network namespace.
pub fn unix_sockets() -> Result<Vec<UnixSocket>, Errno> {
    // UDIAG_SHOW_NAME, VFS, PEER, ICONS, RQLEN.
    const SHOW: u32 = 0x1f;
    let mut request = vec![libc::AF_UNIX as u8, 0, 0, 0];
    request.extend_from_slice(&u32::MAX.to_ne_bytes());
    request.extend_from_slice(&[0; 4]);
    request.extend_from_slice(&SHOW.to_ne_bytes());
    request.extend_from_slice(&[0; 8]);
    let mut out = Vec::new();
    dump(&request, |payload| out.extend(unix_socket(payload)))?;
    Ok(out)
}

fn unix_socket(payload: &[u8]) -> Option<UnixSocket> {
    let mut socket = UnixSocket {
        kind: *payload.get(1)?,
        state: *payload.get(2)?,
        ino: word(payload, 4)?,
        ..UnixSocket::default()
    };
    for (kind, value) in attributes(payload.get(16..)?) {
        match kind {
            0 => socket.name = value.to_vec(),
            1 => socket.file = word(value, 0).zip(word(value, 4)),
            2 => socket.peer = word(value, 0),
            3 => socket.waiting = (0..value.len() / 4).filter_map(|n| word(value, n * 4)).collect(),
            4 => (socket.incoming, socket.outgoing) = word(value, 0).zip(word(value, 4)).unwrap_or_default(),
            6 => socket.shutdown = value.first().copied().unwrap_or(0),
            _ => {}
        }
    }
    Some(socket)
}

/// All sockets of this network namespace of a family (`AF_INET`, `AF_INET6`) and protocol
/// (`IPPROTO_TCP`, `IPPROTO_UDP`) that are bound.
pub fn inet_sockets(family: u8, protocol: u8) -> Result<Vec<InetSocket>, Errno> {
    let mut request = vec![family, protocol, 0, 0];
    request.extend_from_slice(&u32::MAX.to_ne_bytes());
    request.extend_from_slice(&[0; 48]);
    let mut out = Vec::new();
    dump(&request, |payload| out.extend(inet_socket(payload)))?;
    Ok(out)
}

/// Ends a TCP socket (`SOCK_DESTROY`), as one that stands in the way for a minute only because it was
/// closed first (`TIME_WAIT`). Needs CAP_NET_ADMIN and a kernel with `CONFIG_INET_DIAG_DESTROY`.
pub fn destroy_tcp(socket: &InetSocket) -> Result<(), Errno> {
    let mut request = vec![socket.family, libc::IPPROTO_TCP as u8, 0, 0];
    request.extend_from_slice(&u32::MAX.to_ne_bytes());
    request.extend_from_slice(&socket.id);
    let netlink = ask(SOCK_DESTROY, ACKNOWLEDGE, &request)?;
    let mut buffer = vec![0; ROOM];
    let got = recv(netlink.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
    match message_of(&buffer[..got]) {
        Some((NLMSG_ERROR, payload, _)) if word(payload, 0) == Some(0) => Ok(()),
        Some((NLMSG_ERROR, payload, _)) => Err(error(payload)),
        _ => Err(Errno::EPROTO),
    }
}

/// `struct inet_diag_msg`, and the attributes `INET_DIAG_SHUTDOWN` and `INET_DIAG_MD5SIG`.
fn inet_socket(payload: &[u8]) -> Option<InetSocket> {
    let port = |at: usize| Some(u16::from_be_bytes(payload.get(at..at + 2)?.try_into().ok()?));
    let address = |at: usize| <[u8; 16]>::try_from(payload.get(at..at + 16)?).ok();
    let extra = attributes(payload.get(72..).unwrap_or_default());
    let shutdown = extra.iter().find(|(kind, _)| *kind == 8).and_then(|(_, value)| value.first().copied());
    Some(InetSocket {
        family: *payload.first()?,
        state: *payload.get(1)?,
        local: (address(8)?, port(4)?),
        remote: (address(24)?, port(6)?),
        incoming: word(payload, 56)?,
        outgoing: word(payload, 60)?,
        ino: word(payload, 68)?,
        shutdown: shutdown.unwrap_or(0),
        signed: extra.iter().any(|(kind, value)| *kind == 18 && !value.is_empty()),
        id: payload.get(4..52)?.try_into().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::fd::AsFd;
    use std::os::linux::fs::MetadataExt;

    fn ino(socket: &impl AsRawFd) -> u32 {
        let path = format!("/proc/self/fd/{}", socket.as_raw_fd());
        std::fs::metadata(path).expect("there").st_ino() as u32
    }

    proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = (message_of(&bytes), attributes(&bytes), unix_socket(&bytes), inet_socket(&bytes));
        }
    }

    #[test]
    fn who_is_connected_with_whom() {
        let (a, b) = crate::sys::socket::pair(libc::AF_UNIX, libc::SOCK_STREAM, 0).expect("a pair");
        nix::unistd::write(&a, b"123").expect("writes");
        let find = |wanted: u32| {
            unix_sockets().expect("told").into_iter().find(|socket| socket.ino == wanted).expect("is there")
        };
        let found = find(ino(&b));
        assert_eq!((found.peer, found.incoming, found.state), (Some(ino(&a)), 3, 1));
        drop(a);
        let found = find(ino(&b));
        assert_eq!((found.peer, found.shutdown), (Some(0), 3));
        let listener = std::os::unix::net::UnixListener::bind_addr(
            &<std::os::unix::net::SocketAddr as std::os::linux::net::SocketAddrExt>::from_abstract_name(
                format!("sock_diag {}", std::process::id()),
            )
            .expect("a name"),
        )
        .expect("binds");
        let name = crate::sys::socket::name(listener.as_fd()).expect("its name");
        let client = crate::sys::socket::make(libc::AF_UNIX, libc::SOCK_STREAM, 0).expect("a socket");
        crate::sys::socket::connect(client.as_fd(), &name).expect("connects");
        let found = find(ino(&listener));
        assert_eq!((found.waiting, found.name, found.state), (vec![ino(&client)], name[2..].to_vec(), 10));
        assert_eq!(find(ino(&client)).peer, Some(0));
    }

    #[test]
    fn an_internet_socket() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("binds");
        let found = inet_sockets(libc::AF_INET as u8, libc::IPPROTO_TCP as u8).expect("told");
        let found = found.iter().find(|socket| socket.ino == ino(&listener)).expect("is there");
        assert_eq!((found.local(), found.state), (listener.local_addr().expect("its address"), 10));
    }
}
