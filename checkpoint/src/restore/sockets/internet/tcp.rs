//! TCP sockets: listening, connected with each other, with one that is gone, or waiting to be accepted.

use super::{address, bind, is_bound, is_tcp, new_one, taken};
use crate::image::sockets::{Peer, SocketImage, SocketOption};
use crate::inventory::sockets::internet::{state, tcp_state};
use crate::restore::RestoreError;
use crate::restore::sockets::{Sockets, failed, options};
use crate::sys::socket;
use crate::sys::socket_message::send;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// While the connections are made, so that none has to wait.
const LONG_BACKLOG: u32 = 4096;
/// What comes through a loopback device is there at once.
const LIMIT: Duration = Duration::from_secs(10);
/// A stream is sent in pieces of this size at most, bytes.
const PIECE: usize = 1 << 20;
/// linux/tcp.h.
const TCP_REPAIR: i32 = 19;

/// Makes and connects all of them. Who listens comes first: its address must be free, while one that
/// connects can have any.
pub fn make_all(sockets: &mut Sockets<'_>) -> Result<(), RestoreError> {
    let images = sockets.images;
    let all = || images.iter().enumerate().filter(|(_, image)| is_tcp(image));
    for (place, image) in all().filter(|(_, image)| image.listening.is_some()) {
        let made = new_one(image)?;
        bind(made.as_fd(), image)?;
        listen(made.as_fd(), image)?;
        sockets.made.insert(place, made);
    }
    let mut temporary = Vec::new();
    for (place, image) in all().filter(|(_, image)| matches!(image.peer, Peer::Gone { .. })) {
        let (made, other) = of_gone(sockets, &mut temporary, image)?;
        sockets.made.insert(place, made);
        sockets.gone.insert(place, other);
    }
    for (place, image) in all() {
        let Peer::Socket(peer) = image.peer else { continue };
        let other = sockets.by_ino[&peer];
        if !sockets.made.contains_key(&place) {
            let (made, made_other) = pair(sockets, &mut temporary, image, &images[other])?;
            sockets.made.insert(place, made);
            sockets.made.insert(other, made_other);
        }
    }
    for (place, image) in all() {
        let alone = matches!(image.peer, Peer::None | Peer::Waiting(_)) && image.listening.is_none();
        if alone {
            let made = new_one(image)?;
            match image.peer {
                Peer::None if is_bound(image) => bind(made.as_fd(), image)?,
                Peer::Waiting(_) => bind_anyway(made.as_fd(), image, &image.name)?,
                _ => {}
            }
            sockets.made.insert(place, made);
        }
    }
    Ok(())
}

/// Listens for a connection that is made here.
struct Temporary {
    family: i32,
    name: SocketAddr,
    made: OwnedFd,
}

fn listen(made: BorrowedFd<'_>, image: &SocketImage) -> Result<(), RestoreError> {
    match socket::listen(made, LONG_BACKLOG) {
        Err(Errno::EADDRINUSE) => Err(taken(image)),
        other => other.map_err(|errno| failed(image, "listening", errno)),
    }
}

/// The sockets of the image that listen where this one was accepted, if it was.
fn listeners<'a>(sockets: &'a Sockets<'_>, server: &SocketImage) -> Vec<BorrowedFd<'a>> {
    let Some(name) = address::read(&server.name) else { return Vec::new() };
    let fits = |other: &SocketImage| {
        other.listening.is_some()
            && is_tcp(other)
            && other.family == server.family
            && address::read(&other.name).is_some_and(|at| {
                at.port() == name.port() && (at.ip() == name.ip() || at.ip().is_unspecified())
            })
    };
    let places = sockets.images.iter().enumerate().filter(|(_, other)| fits(other));
    places.filter_map(|(place, _)| sockets.made.get(&place).map(AsFd::as_fd)).collect()
}

/// Where a connection that is to come out as `server` can be made: its listeners, or a new one.
/// `None`: somebody else has that address.
fn where_to<'a>(
    sockets: &'a Sockets<'_>,
    temporary: &'a mut Vec<Temporary>,
    server: &SocketImage,
) -> Result<Option<Vec<BorrowedFd<'a>>>, RestoreError> {
    let known = listeners(sockets, server);
    if !known.is_empty() {
        return Ok(Some(known));
    }
    let Some(name) = address::read(&server.name) else { return Ok(None) };
    let is_it = |other: &Temporary| other.family == server.family && other.name == name;
    if let Some(known) = temporary.iter().position(is_it) {
        return Ok(Some(vec![temporary[known].made.as_fd()]));
    }
    let made = new_one(server)?;
    let reuse = 1i32.to_ne_bytes();
    let tried = socket::set_option(made.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR, &reuse)
        .and_then(|()| socket::bind(made.as_fd(), &server.name))
        .and_then(|()| socket::listen(made.as_fd(), LONG_BACKLOG));
    match tried {
        Ok(()) => {}
        Err(Errno::EADDRINUSE) => return Ok(None),
        Err(errno) => return Err(failed(server, "listening for a connection", errno)),
    }
    temporary.push(Temporary { family: server.family, name, made });
    Ok(temporary.last().map(|last| vec![last.made.as_fd()]))
}

/// Both ends of a connection. Either can have been the one that listened; if the image does not tell,
/// it is the one whose address nobody else has.
fn pair(
    sockets: &Sockets<'_>,
    temporary: &mut Vec<Temporary>,
    image: &SocketImage,
    other: &SocketImage,
) -> Result<(OwnedFd, OwnedFd), RestoreError> {
    let swap = listeners(sockets, image).is_empty() && !listeners(sockets, other).is_empty();
    let swap = swap || listeners(sockets, image).is_empty() && other.ino > image.ino;
    let order = [(image, other), (other, image)];
    for (server, client) in if swap { [order[1], order[0]] } else { order } {
        let Some(at) = where_to(sockets, temporary, server)? else { continue };
        let connecting = new_one(client)?;
        bind_anyway(connecting.as_fd(), client, &client.name)?;
        let accepted = connect(&at, connecting.as_fd(), client, &client.peer_name, server)?;
        let is_server = std::ptr::eq(server, image);
        return Ok(if is_server { (accepted, connecting) } else { (connecting, accepted) });
    }
    Err(taken(image))
}

/// A socket whose peer was closed, and an end that is closed when it has sent what was not read. Which of
/// the two listened does not show.
fn of_gone(
    sockets: &Sockets<'_>,
    temporary: &mut Vec<Temporary>,
    image: &SocketImage,
) -> Result<(OwnedFd, OwnedFd), RestoreError> {
    let unfit = || RestoreError::Unfit("the image is not consistent: the address of a TCP socket".into());
    let name = address::read(&image.name).ok_or_else(unfit)?;
    let peer = address::read(&image.peer_name);
    if let Some(at) = where_to(sockets, temporary, image)? {
        let family = address::family(name);
        let other =
            socket::make(family, libc::SOCK_STREAM, 0).map_err(|errno| failed(image, "socket", errno))?;
        if let Some(peer) = peer {
            bind_anyway(other.as_fd(), image, &address::write(family, peer).ok_or_else(unfit)?)?;
        }
        let to = address::write(family, name).ok_or_else(unfit)?;
        let made = connect(&at, other.as_fd(), image, &to, image)?;
        return Ok((made, other));
    }
    // Somebody else has its address to listen at; to connect from, it can have it too.
    let far = SocketAddr::new(name.ip(), 0);
    let far = address::write(image.family, peer.unwrap_or(far)).ok_or_else(unfit)?;
    let server = SocketImage { name: far, options: Vec::new(), ..image.clone() };
    let Some(at) = where_to(sockets, temporary, &server)? else { return Err(taken(image)) };
    let to = socket::name(at[0]).map_err(|errno| failed(image, "the address of its peer", errno))?;
    let made = new_one(image)?;
    bind_anyway(made.as_fd(), image, &image.name)?;
    let other = connect(&at, made.as_fd(), image, &to, &server)?;
    Ok((made, other))
}

/// Gives one that is to connect its address, which others may have too: the kernel asks only whether
/// there is such a connection already.
fn bind_anyway(made: BorrowedFd<'_>, image: &SocketImage, name: &[u8]) -> Result<(), RestoreError> {
    let set = |level, option, value: i32| socket::set_option(made, level, option, &value.to_ne_bytes());
    let reuse = socket::number(made, libc::SOL_SOCKET, libc::SO_REUSEADDR).unwrap_or(0);
    let by_force = || {
        // A socket that is being repaired can have any address (inet_csk_get_port).
        let repaired = set(libc::IPPROTO_TCP, TCP_REPAIR, 1).is_ok();
        let done = match repaired {
            true => socket::bind(made, name),
            false => set(libc::SOL_SOCKET, libc::SO_REUSEADDR, 1).and_then(|()| socket::bind(made, name)),
        };
        if repaired {
            set(libc::IPPROTO_TCP, TCP_REPAIR, 0)?;
            set(libc::SOL_SOCKET, libc::SO_REUSEADDR, reuse)?;
        }
        done
    };
    let done = match socket::bind(made, name) {
        Err(Errno::EADDRINUSE) => by_force(),
        other => other,
    };
    match done {
        Err(Errno::EADDRINUSE) => Err(taken(image)),
        other => other.map_err(|errno| failed(image, "binding it", errno)),
    }
}

/// Connects, and gives what was accepted for that.
fn connect(
    listeners: &[BorrowedFd<'_>],
    client: BorrowedFd<'_>,
    image: &SocketImage,
    to: &[u8],
    server: &SocketImage,
) -> Result<OwnedFd, RestoreError> {
    begin(client, image, to)?;
    let name = socket::name(client).map_err(|errno| failed(image, "its address", errno))?;
    let ours = address::read(&name);
    let deadline = Instant::now() + LIMIT;
    loop {
        let mut asked: Vec<PollFd<'_>> =
            listeners.iter().map(|&at| PollFd::new(at, PollFlags::POLLIN)).collect();
        let timeout = PollTimeout::from(100u8);
        poll(&mut asked, timeout).map_err(|errno| failed(server, "accepting", errno))?;
        let ready = asked.iter().position(|one| one.any() == Some(true));
        if let Some(ready) = ready {
            let made =
                socket::accept(listeners[ready]).map_err(|errno| failed(server, "accepting", errno))?;
            let from = socket::peer_name(made.as_fd()).ok();
            if from.as_deref().and_then(address::read) == ours {
                return Ok(made);
            }
            // Somebody else's, who has come too early.
        }
        if Instant::now() > deadline {
            return Err(failed(server, "accepting", Errno::ETIMEDOUT));
        }
    }
}

/// connect(2), also of a socket that does not wait.
fn begin(client: BorrowedFd<'_>, image: &SocketImage, to: &[u8]) -> Result<(), RestoreError> {
    let at = |errno| {
        let to = address::read(to).map_or(String::new(), |to| format!(" to {to}"));
        failed(image, &format!("connecting{to}"), errno)
    };
    match socket::connect(client, to) {
        Err(Errno::EINPROGRESS) => {
            await_event(client, PollFlags::POLLOUT, Instant::now() + LIMIT).map_err(at)?;
            match tcp_state(client) {
                state::ESTABLISHED => Ok(()),
                _ => Err(at(Errno::ECONNREFUSED)),
            }
        }
        other => other.map_err(at),
    }
}

fn await_event(made: BorrowedFd<'_>, wanted: PollFlags, deadline: Instant) -> Result<(), Errno> {
    let left = deadline.saturating_duration_since(Instant::now());
    let left = PollTimeout::try_from(left.as_millis().min(60_000) as i32).unwrap_or(PollTimeout::ZERO);
    match poll(&mut [PollFd::new(made, wanted)], left)? {
        0 => Err(Errno::ETIMEDOUT),
        _ => Ok(()),
    }
}

/// The largest segment, as the kernel tells it of a connection: without the room for time stamps.
pub fn set_segments(made: BorrowedFd<'_>, option: &SocketOption) {
    const TIME_STAMP: i32 = 12;
    /// `MAX_TCP_WINDOW`: beyond that it was not set by hand.
    const LARGEST: i32 = 32_767;
    let Ok(value) = <[u8; 4]>::try_from(option.value.as_slice()).map(i32::from_ne_bytes) else { return };
    // What it cannot be is nothing that anybody has asked for.
    if value > 0
        && value + TIME_STAMP <= LARGEST
        && socket::option(made, option.level, option.name, 4).is_ok()
    {
        let value = value + TIME_STAMP;
        let _ = socket::set_option(made, option.level, option.name, &value.to_ne_bytes());
    }
}

/// What was sent and not read; what is shut or closed; those that wait to be accepted.
pub fn finish(sockets: &mut Sockets<'_>) -> Result<(), RestoreError> {
    let images = sockets.images;
    let all = || images.iter().enumerate().filter(|(_, image)| is_tcp(image));
    for (place, image) in all() {
        if !image.queue.is_empty() || !image.underway.is_empty() {
            fill(sockets, place, image)?;
        }
    }
    for (place, image) in all() {
        shut(sockets, place, image)?;
    }
    let deadline = Instant::now() + LIMIT;
    for (place, image) in all().filter(|(_, image)| image.underway.is_empty()) {
        let ends = match image.peer {
            Peer::Socket(peer) => images[sockets.by_ino[&peer]].shutdown & 2 != 0,
            Peer::Gone { .. } => true,
            _ => false,
        };
        if let (true, Some(made)) = (ends, sockets.made.get(&place)) {
            let not_yet = || {
                matches!(tcp_state(made.as_fd()), state::ESTABLISHED | state::FIN_WAIT1 | state::FIN_WAIT2)
            };
            while not_yet() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_micros(200));
            }
        }
    }
    for (place, image) in all() {
        let (Some(listening), Some(made)) = (&image.listening, sockets.made.get(&place)) else { continue };
        // TCP_DEFER_ACCEPT counts for those that come.
        options::set(made.as_fd(), image)?;
        for ino in &listening.waiting {
            let client = sockets.by_ino[ino];
            let Some(made) = sockets.made.get(&client) else { continue };
            begin(made.as_fd(), &images[client], &images[client].peer_name)?;
            shut_down(made.as_fd(), &images[client], images[client].shutdown)?;
        }
        socket::listen(made.as_fd(), listening.backlog).map_err(|errno| failed(image, "listening", errno))?;
    }
    Ok(())
}

fn fill(sockets: &Sockets<'_>, place: usize, image: &SocketImage) -> Result<(), RestoreError> {
    let at = |errno| failed(image, "filling its queue", errno);
    let missing = || RestoreError::Unfit("a socket without peer has been sent something".into());
    let sender = match image.peer {
        Peer::Socket(peer) => sockets.get(peer),
        _ => sockets.gone.get(&place).map(AsFd::as_fd),
    };
    let (sender, receiver) = (sender.ok_or_else(missing)?, sockets.made.get(&place).ok_or_else(missing)?);
    let receiver = receiver.as_fd();
    let queued: usize = image.queue.iter().map(|message| message.data.len()).sum();
    let deadline = Instant::now() + LIMIT;
    options::make_room(sender, queued + image.underway.len(), 1).map_err(at)?;
    options::make_room_to_receive(receiver, queued, 16).map_err(at)?;
    for message in &image.queue {
        send_all(sender, &message.data, deadline).map_err(at)?;
    }
    while socket::queued(receiver, false).map_err(at)? < queued {
        if Instant::now() > deadline {
            return Err(at(Errno::ETIMEDOUT));
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    if !image.underway.is_empty() {
        // It takes no more than it had taken.
        options::set_buffers(receiver, image)?;
        send_all(sender, &image.underway, deadline).map_err(at)?;
    }
    Ok(())
}

fn send_all(sender: BorrowedFd<'_>, data: &[u8], deadline: Instant) -> Result<(), Errno> {
    let mut at = 0;
    while at < data.len() {
        match send(sender, &data[at..data.len().min(at + PIECE)], &[], &[], None) {
            Ok(n) => at += n,
            Err(Errno::EAGAIN) => await_event(sender, PollFlags::POLLOUT, deadline)?,
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Shuts what was shut, closes what was closed.
fn shut(sockets: &mut Sockets<'_>, place: usize, image: &SocketImage) -> Result<(), RestoreError> {
    let closed = sockets.gone.remove(&place);
    let Some(made) = sockets.made.get(&place) else { return Ok(()) };
    match image.peer {
        Peer::Socket(peer) => {
            // That it receives no more is either its own doing or its peer's.
            let by_peer = sockets.images[sockets.by_ino[&peer]].shutdown & 2 != 0;
            let how = if by_peer { image.shutdown & 2 } else { image.shutdown };
            shut_down(made.as_fd(), image, how)
        }
        Peer::Gone { .. } => {
            drop(closed);
            shut_down(made.as_fd(), image, image.shutdown & 2)
        }
        Peer::None | Peer::Waiting(_) => Ok(()),
    }
}

/// shutdown(2), of what the kernel calls 1 (receiving) and 2 (sending).
fn shut_down(made: BorrowedFd<'_>, image: &SocketImage, how: u8) -> Result<(), RestoreError> {
    if how & 3 == 0 {
        return Ok(());
    }
    match socket::shutdown(made, i32::from(how & 3) - 1) {
        Ok(()) | Err(Errno::ENOTCONN) => Ok(()),
        Err(errno) => Err(failed(image, "shutting it down", errno)),
    }
}
