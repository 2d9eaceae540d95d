//! What a host shepherd and its guest house's PID 1 say to each other, over a Unix stream socket:
//! a length (u32, little-endian), then the message in [`checkpoint::image::codec`].
//!
//! ```mermaid
//! sequenceDiagram
//!     participant S as host shepherd
//!     participant I as guest-init (PID 1 of the house)
//!     S->>I: Setup
//!     I->>S: Ready or Error
//!     S->>I: Spawn
//!     I->>S: Spawned or Error
//!     I-->>S: Stopped, Continued, Ended (at any time after Spawned)
//!     S-->>I: Kill
//!     S->>I: Quit (or the socket closes): everything in the house ends
//! ```

use checkpoint::image::codec;
use checkpoint::image::objects::ObjectKey;
use checkpoint::image::{FilesImage, ProcessImage, ZombieImage};
use checkpoint::sys::fd;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Longest message, bytes: a table of about 100,000 descriptors.
pub const MAX_MESSAGE: usize = 16 << 20;
/// How long the rest of a message may take once its first byte is there.
const REST_LIMIT: Duration = Duration::from_secs(10);

/// How the house is to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setup {
    /// Host name of the home node.
    pub hostname: Vec<u8>,
    /// NIS domain name there; empty: none.
    pub domainname: Vec<u8>,
    /// `CLOCK_MONOTONIC` of home minus that of this host, ns.
    pub monotonic_offset_ns: i64,
    /// The same of `CLOCK_BOOTTIME`.
    pub boottime_offset_ns: i64,
    /// Names the hidden directory of home's open files.
    pub token: [u8; 16],
    /// The guest's controlling terminal: its path at home, its handle in the home view.
    pub terminal: Option<(Vec<u8>, u64)>,
    /// The first of the TIDs that the guest's own new threads get: home must not use them.
    pub tid_base: i32,
    /// TIDs must stay below this.
    pub pid_max: i32,
}

impl Setup {
    /// Where, in home's tree, an open file of home's is found.
    pub fn handle_path(&self, handle: u64) -> PathBuf {
        let name: String = self.token.iter().map(|byte| format!("{byte:02x}")).collect();
        PathBuf::from(format!("/.migd-{name}/{handle}"))
    }
}

/// The guests to start, parents before their children.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Spawn {
    /// Each of them.
    pub members: Vec<Member>,
}

/// One of the guests.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Member {
    /// The PID it has at home, and gets in the house.
    pub pid: i32,
    /// Its parent's; 0: PID 1 is to be its parent.
    pub ppid: i32,
    /// Its process group at home.
    pub pgid: i32,
    /// Its session at home.
    pub sid: i32,
    /// Children that have ended, which it has not waited for.
    pub zombies: Vec<ZombieImage>,
    /// Its descriptors.
    pub files: FilesImage,
}

impl Member {
    /// Of an image.
    pub fn of(image: &ProcessImage) -> Member {
        Member {
            pid: image.pid,
            ppid: image.ppid,
            pgid: image.pgid,
            sid: image.sid,
            zombies: image.zombies.clone(),
            files: image.files.clone(),
        }
    }
}

/// Shepherd to PID 1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Command {
    /// The first message.
    Setup(Setup),
    /// Files for [`Command::Spawn`], whose descriptors follow: for each the object that it is. They are kept until
    /// [`Command::LetGo`].
    Objects(Vec<ObjectKey>),
    /// Once.
    Spawn(Spawn),
    /// The guests have what they need of the objects.
    LetGo,
    /// They are built, and write into mapped files.
    WriteBack,
    /// kill(2) of a guest.
    Kill {
        /// Its PID in the house.
        pid: i32,
        /// Signal number.
        signal: i32,
    },
    /// End everything.
    Quit,
}

/// PID 1 to shepherd.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Report {
    /// The house stands.
    Ready,
    /// PID 1 has the objects open under these numbers.
    Objects(Vec<i32>),
    /// The guests' leaders exist and have their descriptors; they run nothing yet.
    Spawned,
    /// What was asked for cannot be done, and why.
    Error(String),
    /// A guest whose parent PID 1 is has ended, with this raw wait status.
    Ended {
        /// Its PID in the house.
        pid: i32,
        /// As of waitpid(2).
        status: i32,
    },
    /// It has been stopped by this signal.
    Stopped {
        /// Its PID in the house.
        pid: i32,
        /// Signal number.
        signal: u8,
    },
    /// It goes on.
    Continued {
        /// Its PID in the house.
        pid: i32,
    },
}

/// Sends one message.
pub fn send<T: Serialize>(mut socket: &UnixStream, message: &T) -> io::Result<()> {
    let body = codec::encode(message).map_err(io::Error::other)?;
    if body.len() > MAX_MESSAGE {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a message over the limit"));
    }
    let mut frame = Vec::with_capacity(4 + body.len());
    frame.extend_from_slice(&(body.len() as u32).to_le_bytes());
    frame.extend_from_slice(&body);
    socket.write_all(&frame)
}

/// Receives one message; `None` when the other side has closed. `TimedOut` when nothing comes within
/// `limit`: nothing is lost then.
pub fn receive<T: DeserializeOwned>(
    mut socket: &UnixStream,
    limit: Option<Duration>,
) -> io::Result<Option<T>> {
    if !wait_readable(socket, limit)? {
        return Err(io::ErrorKind::TimedOut.into());
    }
    socket.set_read_timeout(Some(REST_LIMIT))?;
    let mut length = [0; 4];
    match socket.read_exact(&mut length) {
        Ok(()) => {}
        Err(error)
            if matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset) =>
        {
            return Ok(None);
        }
        Err(error) => return Err(error),
    }
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_MESSAGE {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a message over the limit"));
    }
    let mut body = vec![0; length];
    socket.read_exact(&mut body)?;
    codec::decode(&body).map(Some).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// Descriptors in one message: fewer than the kernel's limit (`SCM_MAX_FD`, unix(7)).
const DESCRIPTORS: usize = 200;

/// Sends descriptors, each part of them with one byte.
pub fn send_files(socket: &UnixStream, files: &[BorrowedFd<'_>]) -> io::Result<()> {
    for part in files.chunks(DESCRIPTORS) {
        let numbers: Vec<RawFd> = part.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&numbers)];
        sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(b"f")], &rights, MsgFlags::empty(), None)?;
    }
    Ok(())
}

/// Receives as many as were sent.
pub fn receive_files(socket: &UnixStream, count: usize) -> io::Result<Vec<OwnedFd>> {
    let mut files = Vec::new();
    while files.len() < count {
        if !wait_readable(socket, Some(REST_LIMIT))? {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let (mut byte, mut space) = ([0], nix::cmsg_space!([RawFd; DESCRIPTORS]));
        let mut part = [IoSliceMut::new(&mut byte)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let got = recvmsg::<()>(socket.as_raw_fd(), &mut part, Some(&mut space), flags)?;
        let before = files.len();
        for message in got.cmsgs()? {
            if let ControlMessageOwned::ScmRights(numbers) = message {
                files.extend(numbers.into_iter().map(fd::own));
            }
        }
        if files.len() == before {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a message without descriptors"));
        }
    }
    Ok(files)
}

/// Waits until there is something to read (or an end); `false`: not within `limit`.
pub fn wait_readable(socket: &UnixStream, limit: Option<Duration>) -> io::Result<bool> {
    let deadline = limit.map(|limit| Instant::now() + limit);
    loop {
        let timeout = match deadline {
            None => PollTimeout::NONE,
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now()).as_millis();
                PollTimeout::from(u16::try_from(left).unwrap_or(u16::MAX))
            }
        };
        match poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) if deadline.is_none_or(|deadline| Instant::now() >= deadline) => return Ok(false),
            Ok(0) | Err(nix::errno::Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_arrive_and_an_end_is_told() {
        let (a, b) = UnixStream::pair().expect("a pair");
        let files = FilesImage::default();
        let member = Member { pid: 77, ppid: 0, pgid: 77, sid: 1, zombies: Vec::new(), files };
        let command = Command::Spawn(Spawn { members: vec![member] });
        send(&a, &command).expect("sends");
        assert_eq!(receive(&b, None).expect("receives"), Some(command));
        let nothing = receive::<Command>(&b, Some(Duration::from_millis(1)));
        assert_eq!(nothing.expect_err("nothing there").kind(), io::ErrorKind::TimedOut);
        drop(a);
        assert_eq!(receive::<Command>(&b, None).expect("an end"), None);
    }

    #[test]
    fn a_lying_length_is_refused() {
        let (mut a, b) = UnixStream::pair().expect("a pair");
        a.write_all(&u32::MAX.to_le_bytes()).expect("writes");
        let error = receive::<Command>(&b, None).expect_err("refused");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
