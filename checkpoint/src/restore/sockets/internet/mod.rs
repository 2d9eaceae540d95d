//! TCP and UDP sockets: with their addresses, listening, connected, and with what was not read (tcp(7),
//! udp(7)).
//!
//! A connection is made anew, between the same two addresses: from the one to a socket that listens at
//! the other's, of the image or for this moment only. What was on its way is sent again by the other end.
//! A datagram is sent again as a packet ([`packet`]), since its sender may be anybody. What ended
//! connections have left at these addresses (`TIME_WAIT`) is taken away first.

pub mod address;
pub mod packet;
pub mod tcp;
pub mod udp;

use super::{Sockets, failed};
use crate::image::sockets::{Peer, SocketImage};
use crate::inventory::sockets as inventory;
use crate::inventory::sockets::internet::state;
use crate::restore::RestoreError;
use crate::sys::{sock_diag, socket};
use nix::errno::Errno;
use nix::unistd::{Uid, fchown};
use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Options that say which addresses can be bound, and how: they come before that.
const BEFORE: [(i32, i32); 10] = [
    (libc::SOL_SOCKET, libc::SO_REUSEADDR),
    (libc::SOL_SOCKET, libc::SO_REUSEPORT),
    (libc::SOL_SOCKET, libc::SO_BINDTODEVICE),
    (libc::IPPROTO_IP, libc::IP_FREEBIND),
    (libc::IPPROTO_IP, libc::IP_TRANSPARENT),
    (libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT),
    (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY),
    // IPV6_FREEBIND, IPV6_TRANSPARENT.
    (libc::IPPROTO_IPV6, 78),
    (libc::IPPROTO_IPV6, 75),
    // The size of segments is told when a connection is made.
    (libc::IPPROTO_TCP, libc::TCP_MAXSEG),
];

/// Makes all of them, and connects them.
pub fn make_all(sockets: &mut Sockets<'_>) -> Result<(), RestoreError> {
    let images = sockets.images;
    if images.iter().any(is_tcp) {
        make_way(images);
    }
    for (place, image) in images.iter().enumerate().filter(|(_, image)| is_udp(image)) {
        let made = udp::make(image, images)?;
        sockets.made.insert(place, made);
    }
    tcp::make_all(sockets)
}

/// Whether it is one of TCP.
pub fn is_tcp(image: &SocketImage) -> bool {
    image.family != libc::AF_UNIX && image.kind == libc::SOCK_STREAM
}

/// Whether it is one of UDP.
pub fn is_udp(image: &SocketImage) -> bool {
    image.family != libc::AF_UNIX && image.kind == libc::SOCK_DGRAM
}

/// What must hold of one before anything is made.
pub fn is_consistent(image: &SocketImage) -> bool {
    let protocols = [(libc::SOCK_STREAM, libc::IPPROTO_TCP), (libc::SOCK_DGRAM, libc::IPPROTO_UDP)];
    let Some(name) = address::read(&image.name).filter(|_| is_of(image.family, &image.name)) else {
        return false;
    };
    let peer = address::read(&image.peer_name).filter(|_| is_of(image.family, &image.peer_name));
    if image.peer_name.is_empty() == peer.is_some() || !protocols.contains(&(image.kind, image.protocol)) {
        return false;
    }
    let connected = match &image.peer {
        Peer::None => peer.is_none() && image.queue.iter().all(|_| is_udp(image)),
        // One that has ended tells no peer any more.
        Peer::Gone { name, reset } => {
            let here = peer.is_none_or(|peer| peer.ip().is_loopback());
            name.is_empty() && !reset && here && (peer.is_some() || is_tcp(image))
        }
        Peer::Socket(_) | Peer::Waiting(_) => {
            is_tcp(image) && peer.is_some_and(|peer| peer.ip().is_loopback()) && name.ip().is_loopback()
        }
    };
    let whole = |message: &crate::image::sockets::Message| {
        message.descriptors.is_empty() && message.ids.is_none() && message.packet.is_some() == is_udp(image)
    };
    let alone = image.listening.is_none() || image.peer == Peer::None && is_tcp(image);
    let underway = image.underway.is_empty() || matches!(image.peer, Peer::Socket(_)) && is_tcp(image);
    connected && alone && underway && image.queue.iter().all(whole) && image.file.is_none()
}

fn is_of(family: i32, name: &[u8]) -> bool {
    name.get(..2) == Some(&(family as u16).to_ne_bytes())
}

/// socket(2), with its owner, and what must be set before it has an address.
fn new_one(image: &SocketImage) -> Result<OwnedFd, RestoreError> {
    let made = socket::make(image.family, image.kind, 0).map_err(|errno| failed(image, "socket", errno))?;
    if image.owner != 0 || !nix::unistd::geteuid().is_root() {
        fchown(&made, Some(Uid::from_raw(image.owner)), None)
            .map_err(|errno| failed(image, "its owner", errno))?;
    }
    for (level, name) in BEFORE {
        let wanted = image.options.iter().find(|option| (option.level, option.name) == (level, name));
        let Some(option) = wanted else { continue };
        if (level, name) == (libc::IPPROTO_TCP, libc::TCP_MAXSEG) && image.peer != Peer::None {
            tcp::set_segments(made.as_fd(), option);
        } else if socket::option(made.as_fd(), level, name, option.value.len()).as_ref() != Ok(&option.value)
        {
            socket::set_option(made.as_fd(), level, name, &option.value)
                .map_err(|errno| failed(image, &format!("its option {name} of level {level}"), errno))?;
        }
    }
    Ok(made)
}

/// Whether it has an address to be bound to.
fn is_bound(image: &SocketImage) -> bool {
    address::read(&image.name).is_some_and(|name| name.port() != 0 || !name.ip().is_unspecified())
}

/// Gives it its address, which must be free.
fn bind(made: BorrowedFd<'_>, image: &SocketImage) -> Result<(), RestoreError> {
    match socket::bind(made, &image.name) {
        Err(Errno::EADDRINUSE) => Err(taken(image)),
        other => other.map_err(|errno| failed(image, "binding it", errno)),
    }
}

/// That its address is taken, and by whom.
fn taken(image: &SocketImage) -> RestoreError {
    let Some(wanted) = address::read(&image.name) else { return failed(image, "binding it", Errno::EINVAL) };
    let all = [libc::AF_INET, libc::AF_INET6]
        .into_iter()
        .flat_map(|family| sock_diag::inet_sockets(family as u8, image.protocol as u8).unwrap_or_default());
    let has_port = |socket: &sock_diag::InetSocket| socket.ino != 0 && socket.local().port() == wanted.port();
    let holder = all.into_iter().filter(has_port).find_map(|socket| inventory::holder(socket.ino.into()));
    let who = holder.map_or(String::new(), |name| format!(" by {name}"));
    let kind = if is_tcp(image) { "TCP" } else { "UDP" };
    RestoreError::Unfit(format!("the {kind} address {wanted} of one of its sockets is taken{who}"))
}

/// Takes away what ended connections have left at the addresses of the image, as far as that is allowed.
fn make_way(images: &[SocketImage]) {
    let ports: BTreeSet<u16> = images
        .iter()
        .filter(|image| is_tcp(image))
        .flat_map(|image| [&image.name, &image.peer_name])
        .filter_map(|name| address::read(name).map(|address| address.port()))
        .filter(|&port| port != 0)
        .collect();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let all = sock_diag::inet_sockets(family as u8, libc::IPPROTO_TCP as u8).unwrap_or_default();
        for socket in all {
            // Both ends have been closed, or all that was sent has come: nobody misses it.
            let ended = socket.ino == 0 && matches!(socket.state, state::TIME_WAIT | state::FIN_WAIT2);
            if ended && ports.contains(&socket.local().port()) {
                let _ = sock_diag::destroy_tcp(&socket);
            }
        }
    }
}
