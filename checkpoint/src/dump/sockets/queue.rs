//! What was sent to a Unix socket and not read: looked at, and left where it is.
//!
//! `MSG_PEEK` shows the first message, and with `SO_PEEK_OFF` those behind it (socket(7)). Credentials
//! are shown with `SO_PASSCRED` only; both are put back. An error that waits to be told would be taken
//! by a look at an empty queue (`sock_error` in net/unix/af_unix.c), so that is not done.

use crate::image::sockets::MAX_MESSAGES;
use crate::sys::socket;
use crate::sys::socket_message::{Peeked, peek, peek_before_last};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::BorrowedFd;

/// Room for one message.
const ROOM: usize = 1 << 18;

/// What was found.
#[derive(Debug, Default)]
pub struct Queue {
    pub messages: Vec<Peeked>,
    /// The peer closed without having read everything: an error waits to be told.
    pub reset: bool,
}

/// Why it cannot be carried.
#[derive(Debug)]
pub enum Unreadable {
    What(&'static str),
    Kernel(Errno),
}

impl From<Errno> for Unreadable {
    fn from(errno: Errno) -> Unreadable {
        Unreadable::Kernel(errno)
    }
}

/// An option that is set for as long as this lives.
pub struct Meanwhile<'a> {
    socket: BorrowedFd<'a>,
    level: i32,
    name: i32,
    before: i32,
}

impl<'a> Meanwhile<'a> {
    fn set(socket: BorrowedFd<'a>, name: i32, value: i32) -> Result<Meanwhile<'a>, Errno> {
        Meanwhile::set_at(socket, (libc::SOL_SOCKET, name), value)
    }

    /// The same at any level.
    pub fn set_at(
        socket: BorrowedFd<'a>,
        (level, name): (i32, i32),
        value: i32,
    ) -> Result<Meanwhile<'a>, Errno> {
        let before = socket::number(socket, level, name)?;
        if before != value {
            socket::set_option(socket, level, name, &value.to_ne_bytes())?;
        }
        Ok(Meanwhile { socket, level, name, before })
    }
}

impl Drop for Meanwhile<'_> {
    fn drop(&mut self) {
        // Written back even if it looks the same: peeking has moved the offset.
        let _ = socket::set_option(self.socket, self.level, self.name, &self.before.to_ne_bytes());
    }
}

/// Reads the queue of a frozen process' socket.
pub fn read(copy: BorrowedFd<'_>, kind: i32) -> Result<Queue, Unreadable> {
    let mut asked = [PollFd::new(copy, PollFlags::POLLIN)];
    poll(&mut asked, PollTimeout::ZERO)?;
    let told = asked[0].revents().unwrap_or(PollFlags::empty());
    let reset = told.contains(PollFlags::POLLERR);
    let length = socket::queued(copy, false)?;
    let mut queue = Queue { reset, ..Queue::default() };
    if !told.contains(PollFlags::POLLIN) || (kind == libc::SOCK_STREAM && length == 0) {
        return Ok(queue);
    }
    if kind != libc::SOCK_STREAM && reset {
        if length > 0 || kind == libc::SOCK_DGRAM {
            return Err(Unreadable::What("which has an error to tell before its messages"));
        }
        return Ok(queue);
    }
    let _credentials = Meanwhile::set(copy, libc::SO_PASSCRED, 1)?;
    // The offset is set where there is more than one message; what was set before comes back in any case.
    let _offset = without_offset(copy)?;
    queue.messages = match kind {
        libc::SOCK_STREAM => stream(copy, length)?,
        _ => messages(copy, kind, length)?,
    };
    Ok(queue)
}

/// A stream: its parts, each with the same sender, and the descriptors that came with it.
fn stream(copy: BorrowedFd<'_>, length: usize) -> Result<Vec<Peeked>, Unreadable> {
    if peek(copy, 1, libc::MSG_OOB).is_ok() {
        return Err(Unreadable::What("which has out-of-band data to be read"));
    }
    let first = peek(copy, length, 0)?;
    if first.data.len() == length && first.descriptors.is_empty() {
        return Ok(vec![first]);
    }
    drop(first);
    let _offset = Meanwhile::set(copy, libc::SO_PEEK_OFF, 0)?;
    let seek = |at: usize| {
        let at = i32::try_from(at).map_err(|_| Errno::EOVERFLOW)?;
        socket::set_option(copy, libc::SOL_SOCKET, libc::SO_PEEK_OFF, &at.to_ne_bytes())
    };
    let mut out = Vec::new();
    let mut at = 0;
    while at < length {
        if out.len() >= MAX_MESSAGES {
            return Err(Unreadable::What("which has too many messages queued"));
        }
        seek(at)?;
        let part = peek(copy, length - at, 0)?;
        if part.data.is_empty() {
            return Err(Unreadable::Kernel(Errno::EIO));
        }
        if !part.descriptors.is_empty() {
            // They come with the last of what was sent: the rest was sent without them.
            seek(at)?;
            let before = peek_before_last(copy, part.data.len())?;
            if before > 0 {
                at += before;
                let data = part.data[..before].to_vec();
                out.push(Peeked { data, credentials: part.credentials, ..Peeked::default() });
                continue;
            }
        }
        at += part.data.len();
        out.push(part);
    }
    Ok(out)
}

/// Takes the offset for looking away, as long as the result lives; `None`: there is none.
pub fn without_offset(copy: BorrowedFd<'_>) -> Result<Option<Meanwhile<'_>>, Errno> {
    // TCP has none before Linux 6.9.
    let before = socket::number(copy, libc::SOL_SOCKET, libc::SO_PEEK_OFF).unwrap_or(-1);
    (before >= 0).then(|| Meanwhile::set(copy, libc::SO_PEEK_OFF, -1)).transpose()
}

/// Datagrams, or the records of a connection.
pub fn messages(copy: BorrowedFd<'_>, kind: i32, length: usize) -> Result<Vec<Peeked>, Unreadable> {
    let mut out: Vec<Peeked> = Vec::new();
    let mut total = 0;
    let mut offset = None;
    let mut cut = false;
    loop {
        if out.len() >= MAX_MESSAGES {
            return Err(Unreadable::What("which has too many messages queued"));
        }
        let next = match peek(copy, ROOM, 0) {
            Ok(next) => next,
            Err(Errno::EAGAIN) => return Ok(out),
            Err(errno) => return Err(errno.into()),
        };
        // The end of a connection, not a message without data.
        if kind == libc::SOCK_SEQPACKET && next.data.is_empty() && total >= length && !out.is_empty() {
            return Ok(out);
        }
        if kind == libc::SOCK_SEQPACKET && next.data.is_empty() && length == 0 && next.credentials.is_none() {
            return Ok(out);
        }
        total += next.data.len();
        let goes_on = std::mem::replace(&mut cut, next.cut);
        match out.last_mut() {
            Some(last) if goes_on => last.data.extend_from_slice(&next.data),
            _ => out.push(next),
        }
        if offset.is_none() {
            offset = Some(Meanwhile::set(copy, libc::SO_PEEK_OFF, total as i32)?);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::socket_message::send;
    use std::os::fd::{AsFd, AsRawFd};

    fn texts(queue: &Queue) -> Vec<(String, usize)> {
        let one = |m: &Peeked| (String::from_utf8_lossy(&m.data).into_owned(), m.descriptors.len());
        queue.messages.iter().map(one).collect()
    }

    fn wanted(list: &[(&str, usize)]) -> Vec<(String, usize)> {
        list.iter().map(|&(text, n)| (text.to_string(), n)).collect()
    }

    #[test]
    fn a_stream_with_descriptors_in_it() {
        let (a, b) = socket::pair(libc::AF_UNIX, libc::SOCK_STREAM, 0).expect("a pair");
        let null = std::fs::File::open("/dev/null").expect("opens");
        let fds = [null.as_raw_fd(); 2];
        for (text, n) in [("plain", 0), ("two", 2), ("more", 0), ("again", 0), ("x", 1), ("last", 0)] {
            send(a.as_fd(), text.as_bytes(), &[], &fds[..n], None).expect("sends");
        }
        let parts = wanted(&[("plain", 0), ("two", 2), ("moreagain", 0), ("x", 1), ("last", 0)]);
        for _ in 0..3 {
            assert_eq!(texts(&read(b.as_fd(), libc::SOCK_STREAM).expect("reads")), parts);
        }
        assert_eq!(socket::number(b.as_fd(), libc::SOL_SOCKET, libc::SO_PEEK_OFF), Ok(-1));
        assert_eq!(socket::number(b.as_fd(), libc::SOL_SOCKET, libc::SO_PASSCRED), Ok(0));
        assert_eq!(socket::queued(b.as_fd(), false), Ok(22));
    }

    #[test]
    fn messages_keep_their_bounds() {
        for kind in [libc::SOCK_DGRAM, libc::SOCK_SEQPACKET] {
            let (a, b) = socket::pair(libc::AF_UNIX, kind, 0).expect("a pair");
            assert!(read(b.as_fd(), kind).expect("reads").messages.is_empty());
            let null = std::fs::File::open("/dev/null").expect("opens");
            socket::set_option(a.as_fd(), libc::SOL_SOCKET, libc::SO_SNDBUF, &(1i32 << 20).to_ne_bytes())
                .expect("set");
            let long = "l".repeat(ROOM / 2 + 1);
            for (text, n) in [("one", 0), ("", 0), ("three", 1), (long.as_str(), 0), ("five", 0)] {
                send(a.as_fd(), text.as_bytes(), &[], &[null.as_raw_fd()][..n], None).expect("sends");
            }
            let list = wanted(&[("one", 0), ("", 0), ("three", 1), (&long, 0), ("five", 0)]);
            assert_eq!(texts(&read(b.as_fd(), kind).expect("reads")), list);
        }
    }

    #[test]
    fn an_error_stays_to_be_told() {
        let (a, b) = socket::pair(libc::AF_UNIX, libc::SOCK_STREAM, 0).expect("a pair");
        send(a.as_fd(), b"data", &[], &[], None).expect("sends");
        send(b.as_fd(), b"unread", &[], &[], None).expect("sends");
        drop(a);
        for _ in 0..2 {
            let queue = read(b.as_fd(), libc::SOCK_STREAM).expect("reads");
            assert_eq!((texts(&queue), queue.reset), (wanted(&[("data", 0)]), true));
        }
        let mut buffer = [0; 9];
        assert_eq!(nix::unistd::read(&b, &mut buffer), Ok(4));
        assert_eq!(nix::unistd::read(&b, &mut buffer), Err(Errno::ECONNRESET));
        assert_eq!(nix::unistd::read(&b, &mut buffer), Ok(0));
    }
}
