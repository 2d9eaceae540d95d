//! Options of sockets that are carried as the kernel tells them (socket(7)).

use crate::image::sockets::SocketOption;
use crate::sys::socket;
use std::os::fd::BorrowedFd;

/// Options of every socket that are set with the value that is read: number and size, bytes
/// (asm-generic/socket.h). Buffers come first: what they allow has an effect on the rest.
const OF_ALL: [(i32, usize); 31] = [
    (libc::SO_SNDBUF, 4),
    (libc::SO_RCVBUF, 4),
    (SO_BUF_LOCK, 4),
    (libc::SO_DEBUG, 4),
    (libc::SO_REUSEADDR, 4),
    (libc::SO_REUSEPORT, 4),
    (libc::SO_DONTROUTE, 4),
    (libc::SO_BROADCAST, 4),
    (libc::SO_KEEPALIVE, 4),
    (libc::SO_OOBINLINE, 4),
    (libc::SO_NO_CHECK, 4),
    (libc::SO_PRIORITY, 4),
    (libc::SO_LINGER, 8),
    (libc::SO_PASSCRED, 4),
    (libc::SO_RCVLOWAT, 4),
    (libc::SO_RCVTIMEO, 16),
    (libc::SO_SNDTIMEO, 16),
    (libc::SO_TIMESTAMP, 4),
    (libc::SO_PASSSEC, 4),
    (libc::SO_TIMESTAMPNS, 4),
    (libc::SO_MARK, 4),
    (libc::SO_TIMESTAMPING, 4),
    (libc::SO_RXQ_OVFL, 4),
    (libc::SO_PEEK_OFF, 4),
    (libc::SO_BUSY_POLL, 4),
    (libc::SO_MAX_PACING_RATE, 8),
    (libc::SO_ZEROCOPY, 4),
    // Linux 5.15 and later: receive mark, pidfds, priority, rights.
    (75, 4),
    (76, 4),
    (82, 4),
    (83, 4),
];

/// linux/socket.h: which of the two buffers was set by hand.
pub const SO_BUF_LOCK: i32 = 72;

/// Those of TCP and UDP sockets at the same level: device, pacing and polling, hashes.
const OF_INTERNET: [(i32, usize); 6] =
    [(libc::SO_BINDTODEVICE, 16), (61, 8), (69, 4), (70, 4), (73, 4), (74, 4)];

/// ip(7): linux/in.h.
const OF_IP: [i32; 20] = [
    libc::IP_TOS,
    libc::IP_TTL,
    libc::IP_RECVOPTS,
    libc::IP_RETOPTS,
    libc::IP_PKTINFO,
    libc::IP_MTU_DISCOVER,
    libc::IP_RECVERR,
    libc::IP_RECVTTL,
    libc::IP_RECVTOS,
    libc::IP_FREEBIND,
    libc::IP_PASSSEC,
    libc::IP_TRANSPARENT,
    libc::IP_RECVORIGDSTADDR,
    libc::IP_MINTTL,
    libc::IP_CHECKSUM,
    libc::IP_BIND_ADDRESS_NO_PORT,
    libc::IP_RECVFRAGSIZE,
    libc::IP_UNICAST_IF,
    // IP_RECVERR_RFC4884, IP_LOCAL_PORT_RANGE.
    26,
    51,
];

/// ipv6(7): linux/in6.h.
const OF_IPV6: [i32; 27] = [
    libc::IPV6_V6ONLY,
    libc::IPV6_UNICAST_HOPS,
    libc::IPV6_MTU_DISCOVER,
    libc::IPV6_RECVERR,
    // IPV6_RECVERR_RFC4884, IPV6_FLOWINFO_SEND.
    31,
    33,
    // Those of RFC 2292: what is received with each datagram.
    2,
    3,
    4,
    5,
    8,
    libc::IPV6_RECVPKTINFO,
    libc::IPV6_RECVHOPLIMIT,
    libc::IPV6_RECVHOPOPTS,
    libc::IPV6_RECVRTHDR,
    libc::IPV6_RECVDSTOPTS,
    libc::IPV6_RECVPATHMTU,
    libc::IPV6_DONTFRAG,
    libc::IPV6_RECVTCLASS,
    libc::IPV6_TCLASS,
    // IPV6_AUTOFLOWLABEL, IPV6_ADDR_PREFERENCES, IPV6_MINHOPCOUNT, IPV6_ORIGDSTADDR,
    // IPV6_TRANSPARENT, IPV6_UNICAST_IF, IPV6_FREEBIND.
    70,
    72,
    73,
    74,
    75,
    76,
    78,
];

/// How datagrams are sent to many; a connection of TCP notes its packets there. IPV6_MULTICAST_ALL has no
/// name yet.
const OF_MANY: [(i32, i32); 8] = [
    (libc::IPPROTO_IP, libc::IP_MULTICAST_IF),
    (libc::IPPROTO_IP, libc::IP_MULTICAST_TTL),
    (libc::IPPROTO_IP, libc::IP_MULTICAST_LOOP),
    (libc::IPPROTO_IP, libc::IP_MULTICAST_ALL),
    (libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_IF),
    (libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_HOPS),
    (libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_LOOP),
    (libc::IPPROTO_IPV6, 29),
];

/// tcp(7): linux/tcp.h.
const OF_TCP: [(i32, usize); 21] = [
    (libc::TCP_NODELAY, 4),
    (libc::TCP_MAXSEG, 4),
    (libc::TCP_CORK, 4),
    (libc::TCP_KEEPIDLE, 4),
    (libc::TCP_KEEPINTVL, 4),
    (libc::TCP_KEEPCNT, 4),
    (libc::TCP_SYNCNT, 4),
    (libc::TCP_LINGER2, 4),
    (libc::TCP_DEFER_ACCEPT, 4),
    (libc::TCP_QUICKACK, 4),
    (libc::TCP_CONGESTION, 16),
    (libc::TCP_USER_TIMEOUT, 4),
    (libc::TCP_FASTOPEN, 4),
    (libc::TCP_NOTSENT_LOWAT, 4),
    // TCP_SAVE_SYN, TCP_FASTOPEN_CONNECT, TCP_FASTOPEN_NO_COOKIE, TCP_INQ, TCP_TX_DELAY.
    (27, 4),
    (30, 4),
    (34, 4),
    (36, 4),
    (37, 4),
    // TCP_RTO_MAX_MS; TCP_THIN_LINEAR_TIMEOUTS.
    (44, 4),
    (16, 4),
];

/// udp(7): UDP_NO_CHECK6_TX, UDP_NO_CHECK6_RX, UDP_SEGMENT, UDP_GRO (linux/udp.h).
const OF_UDP: [i32; 4] = [101, 102, 103, 104];

/// Reads those that this kernel and this socket have.
pub fn read(copy: BorrowedFd<'_>) -> Vec<SocketOption> {
    OF_ALL.iter().filter_map(|&(name, room)| one(copy, libc::SOL_SOCKET, name, room)).collect()
}

fn one(copy: BorrowedFd<'_>, level: i32, name: i32, room: usize) -> Option<SocketOption> {
    let value = socket::option(copy, level, name, room).ok()?;
    Some(SocketOption { level, name, value })
}

/// The same of a TCP or UDP socket, with those of its protocols.
pub fn of_internet(copy: BorrowedFd<'_>, family: i32, kind: i32) -> Vec<SocketOption> {
    let mut out = read(copy);
    let priority = one(copy, libc::SOL_SOCKET, libc::SO_PRIORITY, 4);
    let mut all = |level: i32, list: &mut dyn Iterator<Item = (i32, usize)>| {
        out.extend(list.filter_map(|(name, room)| one(copy, level, name, room)));
    };
    all(libc::SOL_SOCKET, &mut OF_INTERNET.into_iter());
    all(libc::IPPROTO_IP, &mut OF_IP.into_iter().map(|name| (name, 4)));
    if family == libc::AF_INET6 {
        all(libc::IPPROTO_IPV6, &mut OF_IPV6.into_iter().map(|name| (name, 4)));
    }
    match kind {
        libc::SOCK_STREAM => all(libc::IPPROTO_TCP, &mut OF_TCP.into_iter()),
        _ => {
            all(libc::IPPROTO_UDP, &mut OF_UDP.into_iter().map(|name| (name, 4)));
            let of_family =
                |&&(level, _): &&(i32, i32)| level == libc::IPPROTO_IP || family == libc::AF_INET6;
            for &(level, name) in OF_MANY.iter().filter(of_family) {
                all(level, &mut [(name, 4)].into_iter());
            }
        }
    }
    // IP_TOS has changed it (ip(7)).
    out.extend(priority);
    out
}
