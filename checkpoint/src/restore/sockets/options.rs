//! Options of a socket, set where they differ from those of a new one.

use super::failed;
use crate::image::sockets::{Peer, SocketImage, SocketOption};
use crate::restore::RestoreError;
use crate::sys::socket;
use nix::errno::Errno;
use std::os::fd::BorrowedFd;

/// More options than there are.
const MAX_OPTIONS: usize = 256;
/// `SO_SNDBUFFORCE`, `SO_RCVBUFFORCE`: beyond the limit of users (asm-generic/socket.h).
const FORCE: [(i32, i32); 2] = [(libc::SO_SNDBUF, 32), (libc::SO_RCVBUF, 33)];

/// What cannot be set any more when there is a connection, or is told otherwise than it is set (tcp(7),
/// ipv6(7)): the size of segments, TCP_FASTOPEN_CONNECT, and IPV6_V6ONLY, which bind(2) sets too.
const BEFORE_CONNECTING: [(i32, i32); 3] =
    [(libc::IPPROTO_TCP, libc::TCP_MAXSEG), (libc::IPPROTO_TCP, 30), (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY)];

/// Sets filter and options.
pub fn set(made: BorrowedFd<'_>, image: &SocketImage) -> Result<(), RestoreError> {
    if !image.filter.is_empty() {
        socket::attach_filter(made, &image.filter).map_err(|errno| failed(image, "its filter", errno))?;
    }
    set_values(made, image)
}

/// Sets options alone.
pub fn set_values(made: BorrowedFd<'_>, image: &SocketImage) -> Result<(), RestoreError> {
    for option in image.options.iter().take(MAX_OPTIONS) {
        let (level, name) = (option.level, option.name);
        if BEFORE_CONNECTING.contains(&(level, name)) && image.peer != Peer::None {
            continue;
        }
        let now = socket::option(made, level, name, option.value.len());
        if now.as_ref() == Ok(&option.value) {
            continue;
        }
        let force = FORCE.iter().find(|&&(plain, _)| level == libc::SOL_SOCKET && name == plain);
        let done = match (force, <[u8; 4]>::try_from(option.value.as_slice())) {
            // The kernel tells twice what was asked for (socket(7)).
            (Some(&(_, force)), Ok(value)) => buffer(made, name, force, i32::from_ne_bytes(value) / 2),
            _ => socket::set_option(made, level, name, &option.value),
        };
        done.map_err(|errno| failed(image, &format!("its option {name} of level {level}"), errno))?;
    }
    Ok(())
}

/// Sets only the sizes of its buffers.
pub fn set_buffers(made: BorrowedFd<'_>, image: &SocketImage) -> Result<(), RestoreError> {
    for (plain, force) in FORCE {
        let of_it = |option: &&SocketOption| (option.level, option.name) == (libc::SOL_SOCKET, plain);
        let value = image.options.iter().find(of_it).map(|option| option.value.as_slice());
        let Some(Ok(value)) = value.map(<[u8; 4]>::try_from) else { continue };
        buffer(made, plain, force, i32::from_ne_bytes(value) / 2)
            .map_err(|errno| failed(image, "the size of its buffers", errno))?;
    }
    Ok(())
}

/// Sets the size of a buffer, as the superuser beyond the limit.
pub fn buffer(made: BorrowedFd<'_>, plain: i32, force: i32, size: i32) -> Result<(), Errno> {
    let value = size.to_ne_bytes();
    socket::set_option(made, libc::SOL_SOCKET, force, &value)
        .or_else(|_| socket::set_option(made, libc::SOL_SOCKET, plain, &value))
}

/// Makes room for sending so many bytes in so many messages; the options say later what it was.
pub fn make_room(made: BorrowedFd<'_>, bytes: usize, messages: usize) -> Result<(), Errno> {
    /// What the kernel needs beside the data of a message, and for a page begun (generously).
    const BESIDE: usize = 8 << 10;
    let wanted =
        bytes.saturating_mul(2).saturating_add(messages.saturating_mul(BESIDE)).saturating_add(BESIDE);
    let has = socket::number(made, libc::SOL_SOCKET, libc::SO_SNDBUF)?;
    if has as usize >= wanted {
        return Ok(());
    }
    buffer(made, libc::SO_SNDBUF, FORCE[0].1, i32::try_from(wanted).unwrap_or(i32::MAX / 2))
}

/// Makes room for receiving so much; the options say later what it was.
pub fn make_room_to_receive(made: BorrowedFd<'_>, bytes: usize, messages: usize) -> Result<(), Errno> {
    /// What the kernel counts beside the data of a message (generously).
    const BESIDE: usize = 4 << 10;
    let wanted = bytes.saturating_mul(2).saturating_add(messages.saturating_mul(BESIDE));
    let has = socket::number(made, libc::SOL_SOCKET, libc::SO_RCVBUF)?;
    if has as usize >= wanted {
        return Ok(());
    }
    buffer(made, libc::SO_RCVBUF, FORCE[1].1, i32::try_from(wanted).unwrap_or(i32::MAX / 2))
}
