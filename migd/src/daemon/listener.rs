//! The daemon's one TCP port. A preamble says which of two services is meant:
//!
//! * another daemon: TLS with certificates on both sides, then [`super::protocol`];
//! * a session between shepherds: only with a token that was announced over such a connection; the raw
//!   connection goes to a new host shepherd, which does TLS with certificates on both sides.
//!
//! Whatever else comes is closed without an answer. Nothing is served to anyone unauthenticated.

use super::protocol::{self, PeerMessage};
use super::{Daemon, membership, moves, peers};
use crate::shepherd::control::{PREAMBLE_LEN, Preamble, PreambleKind};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader, BufWriter};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;

/// Connections that have not proved anything yet.
const MAX_HALF_OPEN: usize = 64;
/// How long a connection may take for its preamble and handshake.
const PROOF_LIMIT: Duration = Duration::from_secs(5);
/// A peer that says nothing for so long has its connection closed; it dials again when it has something.
const SILENCE_LIMIT: Duration = Duration::from_secs(60);
/// Questions of one peer answered at the same time.
const MAX_QUESTIONS: usize = 16;

/// Accepts for ever.
pub async fn run(daemon: Arc<Daemon>, listener: TcpListener, acceptor: tokio_rustls::TlsAcceptor) {
    let half_open = Arc::new(Semaphore::new(MAX_HALF_OPEN));
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, say: the next attempt may do.
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        // Over the limit, it is closed: whoever means it dials again.
        let Ok(permit) = Arc::clone(&half_open).try_acquire_owned() else { continue };
        let (daemon, acceptor) = (Arc::clone(&daemon), acceptor.clone());
        tokio::spawn(async move {
            let from = stream.peer_addr();
            let proved = timeout(PROOF_LIMIT, prove(&daemon, stream, acceptor)).await;
            drop(permit);
            match proved {
                Ok(Ok(Some(peer))) => {
                    let result = serve_peer(&daemon, peer).await;
                    tracing::debug!(?from, ?result, "peer connection ended");
                }
                Ok(Ok(None)) => {}
                Ok(Err(error)) => tracing::info!(?from, %error, "connection refused"),
                Err(_) => tracing::info!(?from, "connection refused: it took too long"),
            }
        });
    }
}

type PeerStream = tokio_rustls::server::TlsStream<TcpStream>;

/// Reads the preamble; a peer is returned when its certificate was found good.
async fn prove(
    daemon: &Arc<Daemon>,
    mut stream: TcpStream,
    acceptor: tokio_rustls::TlsAcceptor,
) -> io::Result<Option<PeerStream>> {
    let mut bytes = [0; PREAMBLE_LEN];
    stream.read_exact(&mut bytes).await?;
    let preamble = Preamble::from_bytes(&bytes).ok_or(io::Error::other("it does not speak our protocol"))?;
    peers::tune(&stream)?;
    match preamble.kind {
        PreambleKind::Peer => Ok(Some(acceptor.accept(stream).await?)),
        PreambleKind::Session => {
            moves::session_arrived(daemon, preamble.token, stream)?;
            Ok(None)
        }
    }
}

/// Serves one peer until it goes or misbehaves.
async fn serve_peer(daemon: &Arc<Daemon>, stream: PeerStream) -> io::Result<()> {
    let (reader, writer) = tokio::io::split(stream);
    let mut reader = BufReader::new(reader);
    let hello = timeout(PROOF_LIMIT, protocol::read(&mut reader)).await;
    let hello = hello.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    let PeerMessage::Hello { version, name, .. } = hello else {
        return Err(io::Error::other("it did not say who it is"));
    };
    if version != protocol::VERSION {
        tracing::warn!(node = name, version, ours = protocol::VERSION, "speaks another version");
        return Err(io::Error::other("another version of the protocol"));
    }
    let (answers, to_write) = mpsc::channel(MAX_QUESTIONS);
    let mut writing = tokio::spawn(write_answers(BufWriter::new(writer), to_write));
    let questions = Arc::new(Semaphore::new(MAX_QUESTIONS));
    loop {
        let message = tokio::select! {
            message = timeout(SILENCE_LIMIT, protocol::read(&mut reader)) => message,
            _ = &mut writing => return Ok(()),
        };
        match message.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?? {
            PeerMessage::Gossip(packet) => {
                // A full queue loses a packet, as a network would.
                let _ = daemon.membership.try_send(membership::Input::Packet(packet));
            }
            PeerMessage::Load(info) if info.name == name => daemon.load_heard(*info),
            PeerMessage::Ask { id, question } => {
                let permit = Arc::clone(&questions).acquire_owned().await.map_err(io::Error::other)?;
                let (daemon, answers, from) = (Arc::clone(daemon), answers.clone(), name.clone());
                tokio::spawn(async move {
                    let answer = moves::answer(&daemon, &from, question).await;
                    let _ = answers.send(PeerMessage::Answer { id, answer }).await;
                    drop(permit);
                });
            }
            _ => return Err(io::Error::other("a message that makes no sense here")),
        }
    }
}

async fn write_answers<W: tokio::io::AsyncWrite + Unpin>(
    mut writer: BufWriter<W>,
    mut answers: mpsc::Receiver<PeerMessage>,
) -> io::Result<()> {
    while let Some(answer) = answers.recv().await {
        let written = timeout(PROOF_LIMIT, async {
            protocol::write(&mut writer, &answer).await?;
            writer.flush().await
        });
        written.await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    }
    Ok(())
}
