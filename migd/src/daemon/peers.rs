//! Connections to the other daemons: dialled when there is something to say, kept while they hold.
//!
//! One link (a task with a bounded queue) per address. What cannot be sent is dropped: gossip and load
//! are repeated anyway, and a question has its own limit and one repetition.

use super::protocol::{self, Answer, PeerMessage, Question};
use crate::shepherd::control::{Preamble, PreambleKind};
use nix::sys::socket::{setsockopt, sockopt::TcpUserTimeout};
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncWriteExt, BufReader, BufWriter};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;

/// Dialling, preamble and handshake together.
const DIAL_LIMIT: Duration = Duration::from_secs(3);
/// After a failure to dial, nothing is tried for so long.
const DIAL_PAUSE: Duration = Duration::from_millis(700);
/// Bytes that are not acknowledged for so long end a connection: after a cut, waiting for TCP's own
/// growing retransmission times would keep nodes apart long after it has healed (tcp(7)).
const UNACKNOWLEDGED_LIMIT: Duration = Duration::from_secs(4);
/// Messages that wait for a link.
const QUEUE: usize = 128;
/// Questions under way on one link.
const MAX_WAITING: usize = 256;
const WRITE_LIMIT: Duration = Duration::from_secs(5);

/// Why a peer did not answer.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// It cannot be reached, or the connection broke.
    #[error("{0} cannot be reached")]
    Unreachable(SocketAddr),
    /// It did not answer in time.
    #[error("{0} did not answer in time")]
    Late(SocketAddr),
}

type Waiting = Arc<Mutex<HashMap<u64, oneshot::Sender<Answer>>>>;

struct Link {
    queue: mpsc::Sender<PeerMessage>,
    waiting: Waiting,
    number: u64,
}

/// All links.
pub struct Peers {
    connector: TlsConnector,
    hello: PeerMessage,
    links: Mutex<HashMap<SocketAddr, Link>>,
    failed: Mutex<HashMap<SocketAddr, Instant>>,
    numbers: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What every connection between daemons is set to, on either side.
pub fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    setsockopt(stream, TcpUserTimeout, &(UNACKNOWLEDGED_LIMIT.as_millis() as u32))?;
    Ok(())
}

impl Peers {
    /// `name` and `address` are this node's.
    pub fn new(config: Arc<rustls::ClientConfig>, name: &str, address: SocketAddr) -> Peers {
        Peers {
            connector: TlsConnector::from(config),
            hello: PeerMessage::Hello {
                version: protocol::VERSION,
                name: name.to_string(),
                address: address.to_string(),
            },
            links: Mutex::default(),
            failed: Mutex::default(),
            numbers: AtomicU64::new(1),
        }
    }

    /// Sends if that is possible soon. `false`: it is not.
    pub fn send(self: &Arc<Self>, address: SocketAddr, message: PeerMessage) -> bool {
        self.link(address).is_some_and(|(queue, _)| queue.try_send(message).is_ok())
    }

    /// Asks and waits for the answer. A link that breaks meanwhile is dialled once more.
    pub async fn ask(
        self: &Arc<Self>,
        address: SocketAddr,
        question: Question,
        limit: Duration,
    ) -> Result<Answer, PeerError> {
        let deadline = Instant::now() + limit;
        for attempt in 0..2 {
            if attempt > 0 {
                tokio::time::sleep(DIAL_PAUSE).await;
            }
            let Some((queue, waiting)) = self.link(address) else { continue };
            let id = self.numbers.fetch_add(1, Ordering::Relaxed);
            let (tell, told) = oneshot::channel();
            {
                let mut waiting = lock(&waiting);
                if waiting.len() >= MAX_WAITING {
                    return Err(PeerError::Late(address));
                }
                waiting.insert(id, tell);
            }
            let message = PeerMessage::Ask { id, question: question.clone() };
            let asked = tokio::time::timeout_at(deadline, async {
                queue.send(message).await.ok()?;
                told.await.ok()
            });
            let answer = asked.await;
            lock(&waiting).remove(&id);
            match answer {
                Ok(Some(answer)) => return Ok(answer),
                Ok(None) => continue,
                Err(_) => return Err(PeerError::Late(address)),
            }
        }
        Err(PeerError::Unreachable(address))
    }

    /// The link to `address`, begun if there is none; `None`: dialling failed a moment ago.
    fn link(self: &Arc<Self>, address: SocketAddr) -> Option<(mpsc::Sender<PeerMessage>, Waiting)> {
        let mut links = lock(&self.links);
        if let Some(link) = links.get(&address).filter(|link| !link.queue.is_closed()) {
            return Some((link.queue.clone(), Arc::clone(&link.waiting)));
        }
        if lock(&self.failed).get(&address).is_some_and(|at| at.elapsed() < DIAL_PAUSE) {
            return None;
        }
        let (queue, outgoing) = mpsc::channel(QUEUE);
        let waiting = Waiting::default();
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        links.insert(address, Link { queue: queue.clone(), waiting: Arc::clone(&waiting), number });
        let (peers, answers) = (Arc::clone(self), Arc::clone(&waiting));
        tokio::spawn(async move {
            let result = peers.run(address, outgoing, &answers).await;
            tracing::debug!(%address, ?result, "link ended");
            // Everyone who waits for an answer hears that there is none.
            lock(&answers).clear();
            let mut links = lock(&peers.links);
            if links.get(&address).is_some_and(|link| link.number == number) {
                links.remove(&address);
            }
        });
        Some((queue, waiting))
    }

    async fn dial(&self, address: SocketAddr) -> io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
        let mut stream = TcpStream::connect(address).await?;
        tune(&stream)?;
        stream.write_all(&Preamble { kind: PreambleKind::Peer, token: [0; 16] }.to_bytes()).await?;
        self.connector.connect(crate::cluster_key::server_name(), stream).await
    }

    async fn run(
        &self,
        address: SocketAddr,
        mut outgoing: mpsc::Receiver<PeerMessage>,
        waiting: &Waiting,
    ) -> io::Result<()> {
        let dialled = timeout(DIAL_LIMIT, self.dial(address))
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        let stream = match dialled {
            Ok(stream) => stream,
            Err(error) => {
                let mut failed = lock(&self.failed);
                failed.retain(|_, at| at.elapsed() < DIAL_PAUSE);
                failed.insert(address, Instant::now());
                return Err(error);
            }
        };
        let (reader, writer) = tokio::io::split(stream);
        tokio::select! {
            result = transmit(BufWriter::new(writer), &self.hello, &mut outgoing) => result,
            result = receive(BufReader::new(reader), waiting) => result,
        }
    }
}

async fn transmit<W: tokio::io::AsyncWrite + Unpin>(
    mut writer: BufWriter<W>,
    hello: &PeerMessage,
    outgoing: &mut mpsc::Receiver<PeerMessage>,
) -> io::Result<()> {
    protocol::write(&mut writer, hello).await?;
    while let Some(message) = outgoing.recv().await {
        let written = timeout(WRITE_LIMIT, async {
            protocol::write(&mut writer, &message).await?;
            while let Ok(message) = outgoing.try_recv() {
                protocol::write(&mut writer, &message).await?;
            }
            writer.flush().await
        });
        written.await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    }
    Ok(())
}

async fn receive<R: tokio::io::AsyncRead + Unpin>(
    mut reader: BufReader<R>,
    waiting: &Waiting,
) -> io::Result<()> {
    loop {
        if let PeerMessage::Answer { id, answer } = protocol::read(&mut reader).await?
            && let Some(waiter) = lock(waiting).remove(&id)
        {
            let _ = waiter.send(answer);
        }
    }
}
