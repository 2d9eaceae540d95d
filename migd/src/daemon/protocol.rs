//! What daemons say to each other: frames of one message each, over mutual TLS.
//!
//! ```text
//! 0..4   b"mgP1"
//! 4..8   length of the body, little-endian, at most MAX_FRAME
//! 8..12  CRC32C of the body
//! ```
//!
//! The dialling side says [`PeerMessage::Hello`] first. It sends gossip, load and questions; the other
//! side only answers. So two daemons that both have something to say have two connections.

use crate::api::NodeInfo;
use checkpoint::image::codec;
use serde::{Deserialize, Serialize};
use std::io;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Largest body of a frame, bytes.
pub const MAX_FRAME: usize = 256 << 10;
/// This version of the protocol, told in the hello.
pub const VERSION: u32 = 1;
const MAGIC: &[u8; 4] = b"mgP1";
const HEADER: usize = 12;

/// One message.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum PeerMessage {
    /// Who dials.
    Hello {
        /// [`VERSION`].
        version: u32,
        /// Its node's name.
        name: String,
        /// Where its daemon listens.
        address: String,
    },
    /// A packet of the membership protocol.
    Gossip(Vec<u8>),
    /// The sender's load.
    Load(Box<NodeInfo>),
    /// Wants an answer.
    Ask {
        /// Comes back in the answer.
        id: u64,
        /// What.
        question: Question,
    },
    /// To a question.
    Answer {
        /// The question's.
        id: u64,
        /// What.
        answer: Answer,
    },
}

/// What one daemon may ask of another.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Question {
    /// Will you take this guest? If so, a session with this token may come in the next seconds.
    PrepareGuest {
        /// The session's token.
        token: [u8; 16],
        /// Home node.
        home: String,
        /// PID at home.
        pid: i32,
        /// Its owner.
        uid: u32,
        /// Its memory, bytes.
        bytes: u64,
        /// What its CPU offers that a program may have come to rely on.
        cpu: Vec<String>,
        /// Asked by hand, which goes before the node's own caution about its load.
        by_hand: bool,
    },
}

/// What it may be told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Answer {
    /// Yes.
    Ok,
    /// No, for this reason.
    Refused {
        /// `cpu`, `memory`, `policy`, `kernel`.
        kind: String,
        /// In words.
        reason: String,
    },
}

/// Writes one frame; does not flush.
pub async fn write<W: AsyncWrite + Unpin>(writer: &mut W, message: &PeerMessage) -> io::Result<()> {
    let body = codec::encode(message).map_err(io::Error::other)?;
    if body.len() > MAX_FRAME {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "message over the limit"));
    }
    let mut header = [0; HEADER];
    header[..4].copy_from_slice(MAGIC);
    header[4..8].copy_from_slice(&(body.len() as u32).to_le_bytes());
    header[8..].copy_from_slice(&crc32c::crc32c(&body).to_le_bytes());
    writer.write_all(&header).await?;
    writer.write_all(&body).await
}

/// Reads one frame.
pub async fn read<R: AsyncRead + Unpin>(reader: &mut R) -> io::Result<PeerMessage> {
    let bad = |what: &'static str| io::Error::new(io::ErrorKind::InvalidData, what);
    let mut header = [0; HEADER];
    reader.read_exact(&mut header).await?;
    if &header[..4] != MAGIC {
        return Err(bad("not a frame"));
    }
    let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let length = word(4) as usize;
    if length > MAX_FRAME {
        return Err(bad("a frame over the limit"));
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).await?;
    if crc32c::crc32c(&body) != word(8) {
        return Err(bad("a frame's checksum is wrong"));
    }
    codec::decode(&body).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().build().expect("a runtime")
    }

    #[test]
    fn a_message_comes_back_and_a_bent_one_does_not() {
        runtime().block_on(async {
            let message = PeerMessage::Load(Box::new(NodeInfo { name: "a".into(), ..NodeInfo::default() }));
            let mut bytes = Vec::new();
            write(&mut bytes, &message).await.expect("writes");
            let PeerMessage::Load(info) = read(&mut bytes.as_slice()).await.expect("reads") else {
                panic!("another message");
            };
            assert_eq!(info.name, "a");
            for at in 0..bytes.len() {
                let mut bent = bytes.clone();
                bent[at] ^= 0x20;
                assert!(read(&mut bent.as_slice()).await.is_err(), "byte {at}");
            }
            assert!(read(&mut &bytes[..bytes.len() - 1]).await.is_err());
        });
    }

    proptest! {
        #[test]
        fn nothing_that_arrives_panics(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
            let body = bytes;
            let mut frame = MAGIC.to_vec();
            frame.extend((body.len() as u32).to_le_bytes());
            frame.extend(crc32c::crc32c(&body).to_le_bytes());
            frame.extend(&body);
            let _ = runtime().block_on(read(&mut frame.as_slice()));
        }
    }
}
