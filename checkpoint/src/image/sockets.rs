//! Sockets that a process, or a tree of processes, has within itself: both ends of each connection are
//! in the image (unix(7), tcp(7), udp(7)).
//!
//! They are known by their inode numbers, as [`OpenFile::stat`](super::OpenFile) has them. Addresses
//! and values of options are the kernel's own bytes.

use serde::{Deserialize, Serialize};

/// Bound on the sockets of one image.
pub const MAX_SOCKETS: usize = 1 << 16;
/// Bound on the messages in one socket's queue.
pub const MAX_MESSAGES: usize = 1 << 16;

/// One socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketImage {
    /// Inode number.
    pub ino: u64,
    /// `AF_*`.
    pub family: i32,
    /// `SOCK_STREAM`, `SOCK_DGRAM`, `SOCK_SEQPACKET`.
    pub kind: i32,
    /// `SO_PROTOCOL`.
    pub protocol: i32,
    /// getsockname(2): `struct sockaddr`; of a Unix socket without a name the family alone.
    pub name: Vec<u8>,
    /// Where the name of a Unix socket stands in the file system.
    pub file: Option<SocketFile>,
    /// The other end.
    pub peer: Peer,
    /// It listens.
    pub listening: Option<Listening>,
    /// What shutdown(2) has closed: 1 receiving, 2 sending.
    pub shutdown: u8,
    /// `SO_PEERCRED`: who made the connection, the pair, or listens.
    pub peer_ids: Option<Ids>,
    /// What was sent to it and not read.
    pub queue: Vec<Message>,
    /// Options.
    pub options: Vec<SocketOption>,
    /// `SO_ATTACH_FILTER`: the classic filter's code, 8 bytes an instruction.
    pub filter: Vec<u8>,
    /// Of TCP: what the other end has sent and this one has not received.
    pub underway: Vec<u8>,
    /// Of TCP and UDP: getpeername(2); empty: it is not connected.
    pub peer_name: Vec<u8>,
    /// Of TCP and UDP: whose it is (`st_uid`), which counts when an address is shared (`SO_REUSEPORT`).
    pub owner: u32,
}

/// The file of a Unix socket's name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketFile {
    /// The name does not stand for it (any more): nobody finds it.
    pub hidden: bool,
    /// The directory that a relative name is relative to.
    pub directory: Vec<u8>,
    /// `st_mode`, `st_uid`, `st_gid`.
    pub mode: (u32, u32, u32),
}

/// The other end of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Peer {
    /// There is none.
    None,
    /// This socket of the image.
    Socket(u64),
    /// This listening socket of the image, which has not accepted the connection yet.
    Waiting(u64),
    /// It was closed. Of UDP: whoever has the address.
    Gone {
        /// Its address (getpeername(2)), if it is still told; of Unix sockets.
        name: Vec<u8>,
        /// It had not read everything: the next call here says so (`ECONNRESET`).
        reset: bool,
    },
}

/// A listening socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listening {
    /// listen(2)'s argument, as the kernel has limited it.
    pub backlog: u32,
    /// Sockets of the image whose connections wait to be accepted, oldest first.
    pub waiting: Vec<u64>,
}

/// Whom a process acted as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Ids {
    /// PID.
    pub pid: i32,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// One message in a queue, or a part of a stream that came with something beside the data.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// The data.
    #[serde(with = "serde_bytes")]
    pub data: Vec<u8>,
    /// The sender's address; empty: it has none.
    pub from: Vec<u8>,
    /// Descriptors in flight, as indices into [`FilesImage::in_flight`](super::FilesImage).
    pub descriptors: Vec<u32>,
    /// `SCM_CREDENTIALS`.
    pub ids: Option<Ids>,
    /// Of a datagram of UDP.
    pub packet: Option<Packet>,
}

/// What a datagram of UDP has come with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Packet {
    /// Where it was sent to: `in_addr`, `in6_addr`.
    pub to: Vec<u8>,
    /// TTL, or hop limit.
    pub hops: u8,
    /// TOS, or traffic class.
    pub class: u8,
}

/// An option (getsockopt(2)).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketOption {
    /// `SOL_*`, `IPPROTO_*`.
    pub level: i32,
    /// Which.
    pub name: i32,
    /// As the kernel tells it.
    pub value: Vec<u8>,
}
