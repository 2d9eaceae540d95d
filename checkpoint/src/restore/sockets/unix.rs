//! Unix sockets: pairs, names, listening, connections (unix(7)).

use super::{HiddenRoot, Sockets, failed, label};
use crate::image::sockets::{Ids, Peer, SocketFile, SocketImage};
use crate::restore::RestoreError;
use crate::restore::shell::{act_under, taken};
use crate::restore::traces::Trace;
use crate::sys::act_as::{As, act};
use crate::sys::fd::own;
use crate::sys::{sock_diag, socket};
use nix::errno::Errno;
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

/// While the connections are made, so that none has to wait.
const LONG_BACKLOG: u32 = 4096;

/// Makes all of them.
pub fn connect_all(sockets: &mut Sockets<'_>) -> Result<(), RestoreError> {
    let (images, mut listeners) = (sockets.images, BTreeSet::new());
    for image in images {
        listeners.extend(image.listening.iter().map(|_| image.name.as_slice()));
    }
    let all = || images.iter().enumerate().filter(|(_, image)| image.family == libc::AF_UNIX);
    for (place, image) in all() {
        if !sockets.made.contains_key(&place) {
            match how(sockets, image, &listeners) {
                How::Pair(other) => pair(sockets, place, other)?,
                How::Alone => alone(sockets, place)?,
                // When those are there that it needs.
                How::Accepted(_) | How::AcceptedOfGone => {}
            }
        }
    }
    for (place, image) in all() {
        match how(sockets, image, &listeners) {
            How::Accepted(client) if !sockets.made.contains_key(&place) => {
                let client_image = &images[client];
                let made = duplicate(sockets, client)?;
                let server = connect(sockets, made.as_fd(), client_image, image)?;
                sockets.made.insert(place, server);
            }
            How::AcceptedOfGone => {
                let client = new_one(image)?;
                // The client's connection shows who listened; that is lost with it.
                let by_us = SocketImage { peer_ids: None, ..image.clone() };
                let server = connect(sockets, client.as_fd(), &by_us, image)?;
                sockets.made.insert(place, server);
                sockets.gone.insert(place, client);
            }
            How::Alone if image.kind != libc::SOCK_DGRAM => of_gone(sockets, place)?,
            _ => {}
        }
    }
    Ok(())
}

/// How a socket comes to be what it is.
enum How {
    /// By socketpair(2), with this one, or with one that is gone.
    Pair(Option<usize>),
    /// By accept(2), of the connection that this one has made.
    Accepted(usize),
    /// By accept(2), of a connection whose other end is gone.
    AcceptedOfGone,
    /// By socket(2).
    Alone,
}

fn how(sockets: &Sockets<'_>, image: &SocketImage, listeners: &BTreeSet<&[u8]>) -> How {
    let named = |name: &[u8]| name.len() > 2;
    let datagrams = image.kind == libc::SOCK_DGRAM;
    match &image.peer {
        // Only a pair of these knows who made it.
        Peer::Socket(_) | Peer::Gone { .. } if datagrams && image.peer_ids.is_none() => How::Alone,
        Peer::Socket(peer) => {
            let other = sockets.by_ino[peer];
            let other_image = &sockets.images[other];
            match (named(&image.name), named(&other_image.name)) {
                _ if datagrams => How::Pair(Some(other)),
                (false, false) => How::Pair(Some(other)),
                (true, false) => How::Accepted(other),
                (false, true) => How::Alone,
                // Both have names: who listened has given his own to the connection.
                (true, true) => {
                    let (this, that) = (
                        listeners.contains(image.name.as_slice()),
                        listeners.contains(other_image.name.as_slice()),
                    );
                    if (this && !that) || (this == that && image.ino > other_image.ino) {
                        How::Accepted(other)
                    } else {
                        How::Alone
                    }
                }
            }
        }
        Peer::Gone { name, .. } => match (named(&image.name), named(name)) {
            _ if datagrams => How::Pair(None),
            (_, true) => How::Alone,
            (true, false) => How::AcceptedOfGone,
            (false, false) => How::Pair(None),
        },
        Peer::None | Peer::Waiting(_) => How::Alone,
    }
}

fn new_one(image: &SocketImage) -> Result<OwnedFd, RestoreError> {
    socket::make(libc::AF_UNIX, image.kind, 0).map_err(|errno| failed(image, "socket", errno))
}

fn duplicate(sockets: &Sockets<'_>, place: usize) -> Result<OwnedFd, RestoreError> {
    let image = &sockets.images[place];
    let missing = || RestoreError::Unfit(format!("the client of a socket{} is missing", label(&image.name)));
    let made = sockets.made.get(&place).ok_or_else(missing)?;
    made.try_clone().map_err(|source| RestoreError::File { what: "copying a descriptor".into(), source })
}

/// Both ends of a pair, made by whom `SO_PEERCRED` names.
fn pair(sockets: &mut Sockets<'_>, place: usize, other: Option<usize>) -> Result<(), RestoreError> {
    let image = &sockets.images[place];
    let make = || {
        let (a, b) = socket::pair(libc::AF_UNIX, image.kind, 0)?;
        Ok([a.into_raw_fd(), b.into_raw_fd()])
    };
    let [a, b] = sockets.act_as(image.peer_ids, image, "socketpair", make)?;
    let (a, b) = (own(a), own(b));
    if image.name.len() > 2 {
        bind(sockets, a.as_fd(), image)?;
    }
    sockets.made.insert(place, a);
    match other {
        Some(other) => {
            let other_image = &sockets.images[other];
            if other_image.name.len() > 2 {
                bind(sockets, b.as_fd(), other_image)?;
            }
            sockets.made.insert(other, b);
        }
        None => drop(sockets.gone.insert(place, b)),
    }
    Ok(())
}

/// One that stands alone until it connects: with its name, and listening.
fn alone(sockets: &mut Sockets<'_>, place: usize) -> Result<(), RestoreError> {
    let image = &sockets.images[place];
    let made = new_one(image)?;
    if image.name.len() > 2 {
        bind(sockets, made.as_fd(), image)?;
    }
    if image.listening.is_some() {
        listen(sockets, made.as_fd(), image, LONG_BACKLOG, image.peer_ids)?;
    }
    sockets.made.insert(place, made);
    Ok(())
}

fn listen(
    sockets: &Sockets<'_>,
    made: BorrowedFd<'_>,
    image: &SocketImage,
    backlog: u32,
    ids: Option<Ids>,
) -> Result<(), RestoreError> {
    sockets.act_as(ids, image, "listening", || socket::listen(made, backlog).map(|()| [0; 2])).map(drop)
}

/// A client whose server has closed.
fn of_gone(sockets: &mut Sockets<'_>, place: usize) -> Result<(), RestoreError> {
    let image = &sockets.images[place];
    let Peer::Gone { name, .. } = &image.peer else { return Ok(()) };
    let client = duplicate(sockets, place)?;
    let file = path(name).map(|_| SocketFile { hidden: true, directory: Vec::new(), mode: (0, 0, 0) });
    let server = SocketImage { name: name.clone(), file, peer_ids: None, ..image.clone() };
    let end = connect(sockets, client.as_fd(), image, &server)?;
    sockets.gone.insert(place, end);
    Ok(())
}

/// Connects a client to where the server's name is, and accepts it: gives the server's end.
fn connect(
    sockets: &Sockets<'_>,
    client: BorrowedFd<'_>,
    client_image: &SocketImage,
    server: &SocketImage,
) -> Result<OwnedFd, RestoreError> {
    let listens = |other: &&SocketImage| {
        other.listening.is_some() && other.name == server.name && other.kind == server.kind
    };
    let known = sockets.images.iter().find(listens).and_then(|other| {
        let made = sockets.made.get(&sockets.by_ino[&other.ino])?;
        Some((made.try_clone().ok()?, other))
    });
    let (listener, listener_image, hidden) = match known {
        Some((made, image)) => (made, image.clone(), image.file.as_ref().is_some_and(|file| file.hidden)),
        None => {
            // It was closed: one for this connection.
            let image = SocketImage {
                file: server.file.clone().map(|file| SocketFile { hidden: true, ..file }),
                ..server.clone()
            };
            let made = new_one(&image)?;
            bind(sockets, made.as_fd(), &image)?;
            let hidden = path(&image.name).is_some();
            (made, image, hidden)
        }
    };
    // Who listened is what the client sees; who connects, what the server sees.
    if client_image.peer_ids != listener_image.peer_ids || listener_image.listening.is_none() {
        listen(sockets, listener.as_fd(), &listener_image, LONG_BACKLOG, client_image.peer_ids)?;
    }
    connect_to(sockets, client, client_image, &listener_image, hidden, server.peer_ids)?;
    let accepted = socket::accept(listener.as_fd()).map_err(|errno| failed(server, "accepting", errno))?;
    if client_image.peer_ids != listener_image.peer_ids && listener_image.listening.is_some() {
        listen(sockets, listener.as_fd(), &listener_image, LONG_BACKLOG, listener_image.peer_ids)?;
    }
    Ok(accepted)
}

/// connect(2) to a name as it is seen in the root or directory where it stands.
pub fn connect_to(
    sockets: &Sockets<'_>,
    client: BorrowedFd<'_>,
    client_image: &SocketImage,
    server: &SocketImage,
    hidden: bool,
    ids: Option<Ids>,
) -> Result<(), RestoreError> {
    let directory = server.file.as_ref().map(|file| file.directory.as_slice()).unwrap_or_default();
    let root = sockets.hidden.get().filter(|_| hidden).map(|root| root.0.as_path());
    let what = "connecting";
    if ids.is_none() && root.is_none() && directory.is_empty() {
        return socket::connect(client, &server.name).map_err(|errno| failed(client_image, what, errno));
    }
    if ids.is_some_and(|ids| ids.pid <= 0) {
        return Err(RestoreError::Unfit(
            "a socket was connected by a process of another PID namespace".into(),
        ));
    }
    let groups = [ids.map_or(0, |ids| ids.gid)];
    let who = As { pid: ids.map(|ids| ids.pid), ids: ids.map(|ids| (ids.uid, ids.gid, &groups[..])), root };
    let work = || {
        if root.is_none() && !directory.is_empty() {
            nix::unistd::chdir(OsStr::from_bytes(directory))?;
        }
        socket::connect(client, &server.name).map(|()| [0; 2])
    };
    match (act_under(ids.map_or(0, |ids| ids.pid), || act(&who, work)), ids) {
        (Err(Errno::EEXIST), Some(ids)) => Err(taken(ids.pid)),
        (other, _) => other.map(drop).map_err(|errno| failed(client_image, what, errno)),
    }
}

/// The path in an address.
fn path(name: &[u8]) -> Option<&[u8]> {
    crate::dump::sockets::path_of(name)
}

/// Gives a socket its name; a hidden one in a root of its own.
fn bind(sockets: &Sockets<'_>, made: BorrowedFd<'_>, image: &SocketImage) -> Result<(), RestoreError> {
    let Some(path) = path(&image.name) else {
        return socket::bind(made, &image.name).map_err(|errno| failed(image, "binding it", errno));
    };
    let file = image.file.as_ref();
    let hidden = file.is_none_or(|file| file.hidden);
    if hidden {
        return bind_hidden(sockets, made, image, path);
    }
    let directory = file.map(|file| file.directory.as_slice()).unwrap_or_default();
    let at = Path::new(OsStr::from_bytes(directory)).join(OsStr::from_bytes(path));
    let was_there = make_way(&at).map_err(|error| match error {
        Some(source) => {
            RestoreError::File { what: format!("replacing the dead socket {}", at.display()), source }
        }
        None => RestoreError::Unfit(format!("there is something else named {} now", at.display())),
    })?;
    let done = match directory.is_empty() {
        true => socket::bind(made, &image.name),
        false => act(&As::default(), || {
            // The working directory of the child alone.
            nix::unistd::chdir(OsStr::from_bytes(directory))?;
            socket::bind(made, &image.name).map(|()| [0; 2])
        })
        .map(drop),
    };
    done.map_err(|errno| failed(image, "binding it", errno))?;
    if !was_there {
        sockets.names.add(Trace::Name(at));
    }
    Ok(())
}

/// In a root of its own, under the name that it had, where nobody finds it.
fn bind_hidden(
    sockets: &Sockets<'_>,
    made: BorrowedFd<'_>,
    image: &SocketImage,
    path: &[u8],
) -> Result<(), RestoreError> {
    bind_in_hidden_root(sockets, made, &image.name, path).map_err(|source| RestoreError::File {
        what: format!("making a hidden socket{}", label(&image.name)),
        source,
    })
}

/// The same for the time of sending, of whoever is gone.
pub fn bind_sender(sockets: &Sockets<'_>, made: BorrowedFd<'_>, name: &[u8]) -> Result<(), Errno> {
    match path(name) {
        None => socket::bind(made, name),
        Some(path) => bind_in_hidden_root(sockets, made, name, path)
            .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))),
    }
}

/// Connects to a name made by [`bind_sender`].
pub fn connect_to_sender(sockets: &Sockets<'_>, made: BorrowedFd<'_>, name: &[u8]) -> Result<(), Errno> {
    let root = sockets.hidden.get().filter(|_| path(name).is_some()).map(|root| root.0.as_path());
    act(&As { root, ..As::default() }, || socket::connect(made, name).map(|()| [0; 2])).map(drop)
}

fn bind_in_hidden_root(
    sockets: &Sockets<'_>,
    made: BorrowedFd<'_>,
    name: &[u8],
    path: &[u8],
) -> std::io::Result<()> {
    if sockets.hidden.get().is_none() {
        let template = std::env::temp_dir().join("migckpt-names-XXXXXX");
        let _ = sockets.hidden.set(HiddenRoot(nix::unistd::mkdtemp(&template)?));
    }
    let Some(HiddenRoot(root)) = sockets.hidden.get() else { return Ok(()) };
    let parts = Path::new(OsStr::from_bytes(path)).components();
    let within: PathBuf = parts.filter(|part| matches!(part, Component::Normal(_))).collect();
    let at = root.join(within);
    if let Some(parent) = at.parent() {
        fs::create_dir_all(parent)?;
    }
    // One of the same name before it.
    let _ = fs::remove_file(&at);
    act(&As { root: Some(root), ..As::default() }, || socket::bind(made, name).map(|()| [0; 2]))?;
    Ok(())
}

/// Takes away what a socket that nobody has any more has left, and tells whether there was such a thing.
/// `None`: it is something else.
fn make_way(at: &Path) -> Result<bool, Option<std::io::Error>> {
    let Ok(meta) = fs::symlink_metadata(at) else { return Ok(false) };
    if !meta.file_type().is_socket() {
        return Err(None);
    }
    let living = sock_diag::unix_sockets().map_err(|errno| Some(errno.into()))?;
    if living.iter().any(|socket| socket.file.is_some_and(|(ino, _)| ino == meta.ino() as u32)) {
        return Err(None);
    }
    fs::remove_file(at).map(|()| true).map_err(Some)
}

/// What comes last: connections that nobody has accepted, the backlog, and the files' owners.
pub fn settle(sockets: &Sockets<'_>) -> Result<(), RestoreError> {
    let images = || sockets.images.iter().enumerate().filter(|(_, image)| image.family == libc::AF_UNIX);
    for (place, image) in images() {
        let (Some(listening), Some(made)) = (&image.listening, sockets.made.get(&place)) else { continue };
        let hidden = image.file.as_ref().is_some_and(|file| file.hidden);
        for ino in &listening.waiting {
            let client = sockets.by_ino[ino];
            let Some(made) = sockets.made.get(&client) else { continue };
            let ids = sockets.owners.get(ino).copied();
            connect_to(sockets, made.as_fd(), &sockets.images[client], image, hidden, ids)?;
        }
        listen(sockets, made.as_fd(), image, listening.backlog, image.peer_ids)?;
    }
    for (_, image) in images() {
        let (Some(path), Some(file)) = (path(&image.name), &image.file) else { continue };
        let accepted =
            image.listening.is_none() && image.kind != libc::SOCK_DGRAM && image.peer != Peer::None;
        if file.hidden || accepted {
            continue;
        }
        let at = Path::new(OsStr::from_bytes(&file.directory)).join(OsStr::from_bytes(path));
        let (mode, uid, gid) = file.mode;
        let io = |source| RestoreError::File { what: format!("the owner of {}", at.display()), source };
        std::os::unix::fs::lchown(&at, Some(uid), Some(gid)).map_err(io)?;
        fs::set_permissions(&at, fs::Permissions::from_mode(mode & 0o7777)).map_err(io)?;
    }
    Ok(())
}
