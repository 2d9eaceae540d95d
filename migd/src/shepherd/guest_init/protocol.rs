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

use checkpoint::image::FilesImage;
use checkpoint::image::codec;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
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

/// The guest to start.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Spawn {
    /// The PID it has at home, and gets in the house.
    pub tid: i32,
    /// Its descriptors.
    pub files: FilesImage,
}

/// Shepherd to PID 1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Command {
    /// The first message.
    Setup(Setup),
    /// Once.
    Spawn(Spawn),
    /// kill(2) of the guest.
    Kill {
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
    /// The guest's leader exists and has its descriptors; it runs nothing yet.
    Spawned,
    /// What was asked for cannot be done, and why.
    Error(String),
    /// The guest has ended, with this raw wait status.
    Ended {
        /// As of waitpid(2).
        status: i32,
    },
    /// The guest has been stopped by this signal.
    Stopped {
        /// Signal number.
        signal: u8,
    },
    /// The guest goes on.
    Continued,
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
        let command = Command::Spawn(Spawn { tid: 77, files: FilesImage::default() });
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
