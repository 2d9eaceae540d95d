//! What was sent and not read, sent again: from the peer, or from whoever has the sender's name.

use super::unix::{bind_sender, connect_to, connect_to_sender};
use super::{Sockets, failed, options};
use crate::image::sockets::{Ids, Message, Peer, SocketImage};
use crate::restore::RestoreError;
use crate::restore::shell::{act_under, taken};
use crate::sys::act_as::{As, act};
use crate::sys::socket;
use crate::sys::socket_message::send;
use nix::errno::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};

/// A stream is sent in pieces of this size at most, bytes.
const PIECE: usize = 1 << 20;

/// Fills all queues; then connects those that send datagrams.
pub fn fill(sockets: &mut Sockets<'_>, in_flight: &[Option<i32>]) -> Result<(), RestoreError> {
    let of_unix = |(_, image): &(usize, &SocketImage)| image.family == libc::AF_UNIX;
    for (place, image) in sockets.images.iter().enumerate().filter(of_unix) {
        if !image.queue.is_empty() {
            fill_one(sockets, place, image, in_flight)?;
        }
    }
    for (place, image) in sockets.images.iter().enumerate().filter(of_unix) {
        let Some(made) = sockets.made.get(&place) else { continue };
        if image.kind == libc::SOCK_DGRAM && image.peer_ids.is_none() {
            connect_datagrams(sockets, made.as_fd(), image)?;
        }
        if let (Peer::Gone { reset: true, .. }, true) = (&image.peer, sockets.gone.contains_key(&place)) {
            // It closes without having read this.
            send(made.as_fd(), b"x", &[], &[], None).map_err(|errno| failed(image, "its error", errno))?;
        }
    }
    Ok(())
}

/// Who sends what a socket is to have in its queue.
enum Sender<'a> {
    Known(BorrowedFd<'a>),
    Temporary(OwnedFd),
}

impl AsFd for Sender<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Sender::Known(made) => *made,
            Sender::Temporary(made) => made.as_fd(),
        }
    }
}

fn fill_one(
    sockets: &Sockets<'_>,
    place: usize,
    image: &SocketImage,
    in_flight: &[Option<i32>],
) -> Result<(), RestoreError> {
    let at = |errno| failed(image, "filling its queue", errno);
    let peer = match &image.peer {
        Peer::Socket(peer) => sockets.get(*peer),
        _ => sockets.gone.get(&place).map(AsFd::as_fd),
    };
    // Of datagrams only a pair's ends take none but each other's.
    let connected = image.kind != libc::SOCK_DGRAM || image.peer_ids.is_some();
    let bytes: usize = image.queue.iter().map(|message| message.data.len()).sum();
    for message in &image.queue {
        let (sender, to) = match (connected, peer) {
            (true, Some(peer)) => (Sender::Known(peer), &[][..]),
            (true, None) => {
                return Err(RestoreError::Unfit("a socket without peer has been sent something".into()));
            }
            (false, _) => (sender_of(sockets, image, message).map_err(at)?, &image.name[..]),
        };
        options::make_room(sender.as_fd(), bytes, image.queue.len()).map_err(at)?;
        let numbers: Option<Vec<RawFd>> = message
            .descriptors
            .iter()
            .map(|&index| in_flight.get(index as usize).copied().flatten())
            .collect();
        let Some(numbers) = numbers else {
            return Err(RestoreError::Unfit("the image lacks a file that is in flight".into()));
        };
        send_one(sender.as_fd(), image, message, to, &numbers)?;
    }
    Ok(())
}

fn send_one(
    sender: BorrowedFd<'_>,
    image: &SocketImage,
    message: &Message,
    to: &[u8],
    descriptors: &[RawFd],
) -> Result<(), RestoreError> {
    let all = || -> Result<[i32; 2], Errno> {
        let ids = message.ids.map(|Ids { pid, uid, gid }| [pid as u32, uid, gid]);
        if image.kind != libc::SOCK_STREAM {
            send(sender, &message.data, to, descriptors, ids)?;
            return Ok([0; 2]);
        }
        let mut at = 0;
        while at < message.data.len() {
            let end = message.data.len().min(at + PIECE);
            let with = if at == 0 { descriptors } else { &[] };
            at += send(sender, &message.data[at..end], to, with, ids)?;
        }
        Ok([0; 2])
    };
    let done = match message.ids {
        // A process with that PID must be there (unix(7), SCM_CREDENTIALS).
        Some(ids) => match act_under(ids.pid, || act(&As { pid: Some(ids.pid), ..As::default() }, all)) {
            Err(Errno::EEXIST) => return Err(taken(ids.pid)),
            other => other,
        },
        None => all(),
    };
    match done {
        Ok(_) => Ok(()),
        Err(Errno::EAGAIN) => {
            let what = "filling its queue (net.unix.max_dgram_qlen?)";
            Err(failed(image, what, Errno::EAGAIN))
        }
        Err(errno) => Err(failed(image, "filling its queue", errno)),
    }
}

/// A socket with the sender's name: one of the image, or one that is closed when it has sent.
fn sender_of<'a>(
    sockets: &'a Sockets<'_>,
    image: &SocketImage,
    message: &Message,
) -> Result<Sender<'a>, Errno> {
    let is_it = |other: &&SocketImage| {
        other.family == libc::AF_UNIX
            && other.kind == libc::SOCK_DGRAM
            && match message.from.is_empty() {
                false => other.name == message.from,
                true => other.name.len() <= 2 && other.peer == Peer::Socket(image.ino),
            }
    };
    let known = sockets.images.iter().find(is_it).and_then(|other| sockets.get(other.ino));
    if let Some(known) = known {
        return Ok(Sender::Known(known));
    }
    let made = socket::make(libc::AF_UNIX, libc::SOCK_DGRAM, 0)?;
    if !message.from.is_empty() {
        bind_sender(sockets, made.as_fd(), &message.from)?;
    }
    Ok(Sender::Temporary(made))
}

fn connect_datagrams(
    sockets: &Sockets<'_>,
    made: BorrowedFd<'_>,
    image: &SocketImage,
) -> Result<(), RestoreError> {
    let at = |errno| failed(image, "connecting", errno);
    match &image.peer {
        Peer::Socket(peer) => {
            let other = &sockets.images[sockets.by_ino[peer]];
            if other.name.len() <= 2 {
                return Err(RestoreError::Unfit("a socket is connected to one without a name".into()));
            }
            let hidden = other.file.as_ref().is_some_and(|file| file.hidden);
            connect_to(sockets, made, image, other, hidden, None)
        }
        Peer::Gone { name, .. } if name.len() > 2 => {
            let other = socket::make(libc::AF_UNIX, libc::SOCK_DGRAM, 0).map_err(at)?;
            bind_sender(sockets, other.as_fd(), name).map_err(at)?;
            connect_to_sender(sockets, made, name).map_err(at)
        }
        Peer::Gone { .. } => {
            Err(RestoreError::Unfit("a socket was connected to one without a name, which is gone".into()))
        }
        Peer::None | Peer::Waiting(_) => Ok(()),
    }
}
