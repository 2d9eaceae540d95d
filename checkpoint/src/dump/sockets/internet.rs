//! TCP and UDP sockets of frozen processes, with what is in their queues, which is left where it is.
//!
//! What a TCP socket has received is looked at (`MSG_PEEK`). What its peer has sent beyond that is in the
//! peer's queue, behind what is only not acknowledged yet: how much is told by the numbers of the two
//! sequences, which are shown, as that queue is, while a socket is repaired (`TCP_REPAIR`,
//! CAP_NET_ADMIN). The kernel takes SO_REUSEADDR away with that (do_tcp_setsockopt in net/ipv4/tcp.c);
//! it is put back.

use super::queue::{Meanwhile, Unreadable, messages, without_offset};
use super::{filter, options};
use crate::image::sockets::{Listening, Message, Packet, Peer, SocketImage};
use crate::inventory::sockets::internet::{Internet, OtherEnd, events, state, tcp_state};
use crate::sys::sock_diag::InetSocket;
use crate::sys::socket;
use crate::sys::socket_message::{Peeked, peek};
use nix::errno::Errno;
use nix::poll::PollFlags;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;

/// linux/tcp.h.
const TCP_REPAIR: i32 = 19;
const TCP_REPAIR_QUEUE: i32 = 20;
const TCP_QUEUE_SEQ: i32 = 21;
const TCP_RECV_QUEUE: i32 = 1;
const TCP_SEND_QUEUE: i32 = 2;
/// `TCP_REPAIR_OFF_NO_WP`: without a probe to the peer.
const OFF_QUIETLY: i32 = -1;
/// linux/udp.h: a message that was put together from several.
const UDP_GRO: i32 = 104;
/// Longest datagram of IPv6 that can be sent again through a loopback device (its MTU is 65536), bytes.
const LONGEST_OF_IPV6: usize = 65_535 - 40 - 8;
/// How often a queue is read that changes meanwhile.
const TRIES: usize = 100;

/// Where sockets are looked for: all of the namespace, and the copies of those that are carried.
pub struct Known<'a> {
    pub internet: &'a Internet,
    pub copy: &'a dyn Fn(u64) -> Option<BorrowedFd<'a>>,
}

/// Reads one.
pub fn read(ino: u64, copy: BorrowedFd<'_>, known: &Known<'_>) -> Result<SocketImage, Unreadable> {
    let number = |name| socket::number(copy, libc::SOL_SOCKET, name);
    let (family, kind) = (number(libc::SO_DOMAIN)?, number(libc::SO_TYPE)?);
    let found = known.internet.get(ino);
    let owner = nix::sys::stat::fstat(copy)?.st_uid;
    let mut image = SocketImage {
        ino,
        family,
        kind,
        protocol: number(libc::SO_PROTOCOL)?,
        name: socket::name(copy)?,
        file: None,
        peer: Peer::None,
        listening: None,
        shutdown: found.map_or(0, |socket| socket.shutdown & 3),
        peer_ids: None,
        queue: Vec::new(),
        options: options::of_internet(copy, family, kind),
        filter: filter(copy)?,
        underway: Vec::new(),
        peer_name: socket::peer_name(copy).unwrap_or_default(),
        owner,
    };
    let gone = Peer::Gone { name: Vec::new(), reset: false };
    if kind == libc::SOCK_DGRAM {
        if !image.peer_name.is_empty() {
            image.peer = gone;
        }
        image.queue = datagrams(copy, family)?;
        return Ok(image);
    }
    match (tcp_state(copy), found) {
        (state::LISTEN, Some(found)) => image.listening = Some(listening(found, known)),
        (state::CLOSE, _) => {
            // One that was never connected has no end to be read.
            if events(copy).contains(PollFlags::POLLIN) {
                image.peer = gone;
                image.shutdown = 3;
                image.queue = message(received(copy)?);
            }
        }
        (_, Some(found)) => connected(copy, found, known, &mut image)?,
        (_, None) => return Err(Unreadable::What("whose other end was not found")),
    }
    Ok(image)
}

/// A listening socket with those that wait, the longest first.
fn listening(found: &InetSocket, known: &Known<'_>) -> Listening {
    let clients = known.internet.waiting_at(found);
    let clients = clients.into_iter().filter_map(|child| known.internet.client_of(child));
    let mut waiting: Vec<(u32, u64)> =
        clients.map(|ino| ((known.copy)(ino).map_or(0, connected_for), ino)).collect();
    waiting.sort_unstable_by_key(|&(time, ino)| (std::cmp::Reverse(time), ino));
    Listening { backlog: found.outgoing, waiting: waiting.into_iter().map(|(_, ino)| ino).collect() }
}

/// For how long a client is connected that has sent nothing since (`tcpi_last_data_sent`), ms.
fn connected_for(copy: BorrowedFd<'_>) -> u32 {
    const AT: usize = 44;
    let info = socket::option(copy, libc::IPPROTO_TCP, libc::TCP_INFO, AT + 4).unwrap_or_default();
    info.get(AT..AT + 4).map_or(0, |word| u32::from_ne_bytes(word.try_into().expect("four")))
}

fn connected(
    copy: BorrowedFd<'_>,
    found: &InetSocket,
    known: &Known<'_>,
    image: &mut SocketImage,
) -> Result<(), Unreadable> {
    match known.internet.other_end(found) {
        Some(OtherEnd::Socket(ino)) => {
            let Some(peer) = (known.copy)(ino) else {
                return Err(Unreadable::What("whose other end was not found"));
            };
            image.peer = Peer::Socket(ino);
            let (received, underway) = both(copy, peer)?;
            image.queue = message(received);
            image.underway = underway;
        }
        Some(OtherEnd::Waiting(listener)) => image.peer = Peer::Waiting(listener),
        Some(OtherEnd::Gone) | None => {
            image.peer = Peer::Gone { name: Vec::new(), reset: false };
            image.queue = message(received(copy)?);
        }
    }
    Ok(())
}

/// A stream is one message.
fn message(data: Vec<u8>) -> Vec<Message> {
    match data.is_empty() {
        true => Vec::new(),
        false => vec![Message { data, ..Message::default() }],
    }
}

/// What can be read.
fn received(copy: BorrowedFd<'_>) -> Result<Vec<u8>, Unreadable> {
    let _offset = without_offset(copy)?;
    let length = socket::queued(copy, false)?;
    if length == 0 {
        // A look would take an error, or the end.
        return Ok(Vec::new());
    }
    let data = peek(copy, length, 0)?.data;
    match data.len() == length {
        true => Ok(data),
        false => Err(Unreadable::What("whose data cannot be looked at as a whole")),
    }
}

/// What can be read, and what the peer has sent beyond that.
fn both(copy: BorrowedFd<'_>, peer: BorrowedFd<'_>) -> Result<(Vec<u8>, Vec<u8>), Unreadable> {
    if socket::queued(peer, true)? == 0 {
        return Ok((received(copy)?, Vec::new()));
    }
    let (ours, theirs) = (Repair::begin(copy)?, Repair::begin(peer)?);
    for _ in 0..TRIES {
        let before = ours.sequence(TCP_RECV_QUEUE)?;
        let data = received_in_repair(copy, &ours)?;
        let sent = theirs.sequence(TCP_SEND_QUEUE)?;
        // The end of what is sent has a number too.
        let end = matches!(tcp_state(peer), state::FIN_WAIT1 | state::LAST_ACK | state::CLOSING);
        let missing = sent.wrapping_sub(before).wrapping_sub(u32::from(end)) as i32;
        let outgoing = socket::queued(peer, true)?;
        let queue = match outgoing {
            0 => Vec::new(),
            // The first segment may be acknowledged in part, and is there as a whole.
            _ => peek(peer, outgoing + (1 << 20), 0)?.data,
        };
        if ours.sequence(TCP_RECV_QUEUE)? != before {
            continue;
        }
        let missing = usize::try_from(missing).unwrap_or(0);
        return match queue.len().checked_sub(missing) {
            Some(from) => Ok((data, queue[from..].to_vec())),
            None => Err(Unreadable::What("whose data on the way cannot be looked at as a whole")),
        };
    }
    Err(Unreadable::What("whose data does not stand still"))
}

/// What can be read of a socket that is being repaired.
fn received_in_repair(copy: BorrowedFd<'_>, repair: &Repair<'_>) -> Result<Vec<u8>, Unreadable> {
    repair.choose(TCP_RECV_QUEUE)?;
    received(copy)
}

/// A socket that is being repaired for as long as this lives.
struct Repair<'a> {
    socket: BorrowedFd<'a>,
    reuse: i32,
}

impl<'a> Repair<'a> {
    fn begin(socket: BorrowedFd<'a>) -> Result<Repair<'a>, Unreadable> {
        let reuse = socket::number(socket, libc::SOL_SOCKET, libc::SO_REUSEADDR)?;
        match socket::set_option(socket, libc::IPPROTO_TCP, TCP_REPAIR, &1i32.to_ne_bytes()) {
            Ok(()) => Ok(Repair { socket, reuse }),
            Err(Errno::EPERM) => {
                Err(Unreadable::What("which has data on its way: to look at that needs CAP_NET_ADMIN"))
            }
            Err(errno) => Err(errno.into()),
        }
    }

    fn choose(&self, queue: i32) -> Result<(), Errno> {
        socket::set_option(self.socket, libc::IPPROTO_TCP, TCP_REPAIR_QUEUE, &queue.to_ne_bytes())
    }

    /// The number of the next byte in this queue; the queue stays chosen.
    fn sequence(&self, queue: i32) -> Result<u32, Errno> {
        self.choose(queue)?;
        socket::number(self.socket, libc::IPPROTO_TCP, TCP_QUEUE_SEQ).map(|number| number as u32)
    }
}

impl Drop for Repair<'_> {
    fn drop(&mut self) {
        let set =
            |level, name, value: i32| socket::set_option(self.socket, level, name, &value.to_ne_bytes());
        if set(libc::IPPROTO_TCP, TCP_REPAIR, OFF_QUIETLY).is_err() {
            // Before Linux 5.0 it is not known.
            let _ = set(libc::IPPROTO_TCP, TCP_REPAIR, 0);
        }
        let _ = set(libc::SOL_SOCKET, libc::SO_REUSEADDR, self.reuse);
    }
}

/// Datagrams that can be read, each with what it has come with.
fn datagrams(copy: BorrowedFd<'_>, family: i32) -> Result<Vec<Message>, Unreadable> {
    /// `IP_PKTINFO`, `IP_RECVTTL`, `IP_RECVTOS`; `IPV6_RECVPKTINFO`, `IPV6_RECVHOPLIMIT`, `IPV6_RECVTCLASS`.
    const OF_IPV4: [i32; 3] = [libc::IP_PKTINFO, libc::IP_RECVTTL, libc::IP_RECVTOS];
    const OF_IPV6: [i32; 3] = [libc::IPV6_RECVPKTINFO, libc::IPV6_RECVHOPLIMIT, libc::IPV6_RECVTCLASS];
    if !events(copy).contains(PollFlags::POLLIN) {
        return Ok(Vec::new());
    }
    let mut told = Vec::new();
    for name in OF_IPV4 {
        told.push(Meanwhile::set_at(copy, (libc::IPPROTO_IP, name), 1)?);
    }
    for name in OF_IPV6.into_iter().filter(|_| family == libc::AF_INET6) {
        told.push(Meanwhile::set_at(copy, (libc::IPPROTO_IPV6, name), 1)?);
    }
    let _offset = without_offset(copy)?;
    messages(copy, libc::SOCK_DGRAM, 0)?.into_iter().map(datagram).collect()
}

fn datagram(peeked: Peeked) -> Result<Message, Unreadable> {
    let mut packet = Packet { to: Vec::new(), hops: 64, class: 0 };
    let of_ipv6 = peeked.from.len() == size_of::<libc::sockaddr_in6>();
    for (level, kind, value) in &peeked.other {
        let first = || value.first().copied().unwrap_or(0);
        match (*level, *kind) {
            // `struct in_pktinfo`: the index, our address, where it was sent to.
            (libc::IPPROTO_IP, libc::IP_PKTINFO) if !of_ipv6 => {
                packet.to = value.get(8..12).unwrap_or_default().to_vec();
            }
            (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                packet.to = value.get(..16).unwrap_or_default().to_vec()
            }
            (libc::IPPROTO_IP, libc::IP_TTL) | (libc::IPPROTO_IPV6, libc::IPV6_HOPLIMIT) => {
                packet.hops = first()
            }
            (libc::IPPROTO_IP, libc::IP_TOS) | (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
                packet.class = first()
            }
            (libc::IPPROTO_UDP, UDP_GRO) => {
                return Err(Unreadable::What("where several datagrams were made one (UDP_GRO)"));
            }
            (0, 0) => return Err(Unreadable::What("with a datagram that has come with too much")),
            _ => {}
        }
    }
    let to = match <[u8; 16]>::try_from(packet.to.as_slice()) {
        Ok(bytes) => Some(IpAddr::from(bytes).to_canonical()),
        Err(_) => <[u8; 4]>::try_from(packet.to.as_slice()).ok().map(IpAddr::from),
    };
    match to {
        None => return Err(Unreadable::What("with a datagram that does not tell where it was sent to")),
        Some(IpAddr::V4(to)) if to.is_broadcast() || to.is_multicast() => {
            return Err(Unreadable::What("with a datagram that was sent to many"));
        }
        Some(IpAddr::V6(to)) if to.is_multicast() => {
            return Err(Unreadable::What("with a datagram that was sent to many"));
        }
        Some(IpAddr::V6(to)) if to.is_unicast_link_local() => {
            return Err(Unreadable::What("with a datagram from the link"));
        }
        Some(IpAddr::V6(_)) if peeked.data.len() > LONGEST_OF_IPV6 => {
            return Err(Unreadable::What("with a datagram that is too long to be sent again"));
        }
        _ => {}
    }
    Ok(Message { data: peeked.data, from: peeked.from, packet: Some(packet), ..Message::default() })
}
