//! The connection between a home shepherd and a host shepherd: frames on channels over mutual TLS.
//!
//! ```text
//! 0..4   b"mgL1"
//! 4      channel
//! 5..8   0
//! 8..12  length of the body, little-endian, at most MAX_FRAME
//! 12..16 CRC32C of the body
//! ```
//!
//! The shepherds are threads that block (ptrace, FUSE); TLS is asynchronous. So each link has one
//! thread with a small runtime that moves frames, and one thread that hands received frames to the
//! [`LinkSink`]. Frames of one channel arrive in the order in which they were sent. A peer that is
//! silent for longer than the limit given is lost: both sides send a frame every second.
//!
//! Image data is held back by credits ([`ImageWriter`], [`ImageReader`]): what the home view needs
//! must never wait behind a full image queue, because building the guest itself opens files there.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc as std_mpsc;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

/// Largest body of a frame, bytes.
pub const MAX_FRAME: usize = 2 << 20;
/// How often a frame is sent even if there is nothing to say.
const ALIVE_EVERY: Duration = Duration::from_secs(1);
/// How long connecting and the handshake may take.
pub const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
/// How long the peer's last words are waited for when nothing more can be sent.
const LAST_WORDS_LIMIT: Duration = Duration::from_secs(2);
/// Frames waiting to be sent before a sender has to wait.
const SEND_QUEUE: usize = 64;
/// Image bytes that may be on their way.
const IMAGE_WINDOW: usize = 16 << 20;
/// Size of an image frame's body.
const IMAGE_FRAME: usize = 256 << 10;
/// Bytes of a move's number at the beginning of each.
const EPOCH: usize = 8;
const MAGIC: &[u8; 4] = b"mgL1";
const HEADER: usize = 16;

/// What a frame is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Channel {
    /// Messages of `session`.
    Control,
    /// Requests and replies of the home view.
    Home,
    /// Bytes of an image stream.
    Image,
    /// How many image bytes were taken (u32): the sender may send as many more.
    Credit,
    /// Nothing: we are alive.
    Alive,
}

impl Channel {
    fn from_byte(byte: u8) -> Option<Channel> {
        [Channel::Control, Channel::Home, Channel::Image, Channel::Credit, Channel::Alive]
            .into_iter()
            .find(|channel| *channel as u8 == byte)
    }
}

/// Who gets what arrives. Called from one thread of the link's own, in order.
pub trait LinkSink: Send {
    /// A frame. May block for a short time only: everything behind it waits.
    fn frame(&mut self, channel: Channel, body: Vec<u8>);
    /// The link is gone; nothing comes after this.
    fn lost(&mut self, why: String);
}

/// The sending side of a link; clones send on the same link.
#[derive(Clone)]
pub struct Link {
    queue: mpsc::Sender<(Channel, Vec<u8>)>,
    closed: Arc<AtomicBool>,
    over: Arc<Over>,
}

/// Whether the connection is closed.
#[derive(Default)]
struct Over {
    is: Mutex<bool>,
    changed: Condvar,
}

impl Link {
    /// Sends one frame; waits while the queue is full. Must not be called from the runtime's thread.
    pub fn send(&self, channel: Channel, body: Vec<u8>) -> io::Result<()> {
        if body.len() > MAX_FRAME {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "frame over the limit"));
        }
        if self.closed.load(Ordering::Acquire) {
            return Err(io::ErrorKind::NotConnected.into());
        }
        self.queue.blocking_send((channel, body)).map_err(|_| io::ErrorKind::NotConnected.into())
    }

    /// Ends the link when all is sent that waits to be; nothing that still arrives is heard. The sink gets `lost`.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
        // Wakes the writer; a full queue does it as well.
        let _ = self.queue.try_send((Channel::Alive, Vec::new()));
    }

    /// Waits until a link that was closed here is closed by the peer too, as it is when it has read all: whoever
    /// ends before takes what the peer has not read away from it (a socket closed with data unread sends a
    /// reset, RFC 1122, 4.2.2.13).
    pub fn await_end(&self, limit: Duration) {
        let is = self.over.is.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.over.changed.wait_timeout_while(is, limit, |over| !*over));
    }

    /// Makes a link as the TLS client. Returns when the peer has proved to be of the cluster.
    pub fn connect(
        stream: TcpStream,
        config: Arc<rustls::ClientConfig>,
        name: rustls::pki_types::ServerName<'static>,
        silence_limit: Duration,
        sink: Box<dyn LinkSink>,
    ) -> io::Result<Link> {
        start(stream, silence_limit, sink, async move |stream| {
            tokio_rustls::TlsConnector::from(config).connect(name, stream).await
        })
    }

    /// Makes a link as the TLS server.
    pub fn accept(
        stream: TcpStream,
        config: Arc<rustls::ServerConfig>,
        silence_limit: Duration,
        sink: Box<dyn LinkSink>,
    ) -> io::Result<Link> {
        start(stream, silence_limit, sink, async move |stream| {
            tokio_rustls::TlsAcceptor::from(config).accept(stream).await
        })
    }
}

enum Arrival {
    Frame(Channel, Vec<u8>),
    Lost(String),
}

fn start<S, F>(
    stream: TcpStream,
    silence_limit: Duration,
    mut sink: Box<dyn LinkSink>,
    handshake: F,
) -> io::Result<Link>
where
    S: AsyncRead + AsyncWrite + Send + 'static,
    F: AsyncFnOnce(tokio::net::TcpStream) -> io::Result<S> + Send + 'static,
{
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)?;
    let (queue, outgoing) = mpsc::channel(SEND_QUEUE);
    let closed = Arc::new(AtomicBool::new(false));
    let (ready, is_ready) = std_mpsc::channel::<io::Result<()>>();
    let (arrivals, arrived) = std_mpsc::channel::<Arrival>();
    let flag = Arc::clone(&closed);
    let over = Arc::<Over>::default();
    let is_over = Arc::clone(&over);
    std::thread::Builder::new().name("link".into()).spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = match runtime {
            Ok(runtime) => runtime,
            Err(error) => return drop(ready.send(Err(error))),
        };
        runtime.block_on(async move {
            let shaken = tokio::time::timeout(HANDSHAKE_LIMIT, async {
                handshake(tokio::net::TcpStream::from_std(stream)?).await
            });
            let tls = match shaken.await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                Ok(tls) => tls,
                Err(error) => return drop(ready.send(Err(error))),
            };
            let _ = ready.send(Ok(()));
            let (reader, writer) = tokio::io::split(tls);
            let mut receiving = std::pin::pin!(receive(reader, silence_limit, &arrivals, &flag));
            let result = tokio::select! {
                result = &mut receiving => result,
                sent = transmit(writer, outgoing, &flag) => {
                    // A peer that has said all closes, and nothing can be sent to it any more: what it has said
                    // is still to be read. And if it was closed here, the peer's close is its word that it has
                    // read all.
                    let received = tokio::time::timeout(LAST_WORDS_LIMIT, receiving).await;
                    received.ok().and_then(Result::err).map_or(sent, Err)
                }
            };
            flag.store(true, Ordering::Release);
            *is_over.is.lock().unwrap_or_else(PoisonError::into_inner) = true;
            is_over.changed.notify_all();
            let why = result.err().map_or("closed".into(), |error| error.to_string());
            let _ = arrivals.send(Arrival::Lost(why));
        });
    })?;
    is_ready.recv().map_err(|_| io::Error::other("the link's thread ended"))??;
    std::thread::Builder::new().name("link-sink".into()).spawn(move || {
        for arrival in arrived {
            match arrival {
                Arrival::Frame(channel, body) => sink.frame(channel, body),
                Arrival::Lost(why) => return sink.lost(why),
            }
        }
    })?;
    Ok(Link { queue, closed, over })
}

async fn receive<R: AsyncRead>(
    reader: R,
    silence_limit: Duration,
    arrivals: &std_mpsc::Sender<Arrival>,
    closed: &AtomicBool,
) -> io::Result<()> {
    let mut reader = Box::pin(tokio::io::BufReader::with_capacity(512 << 10, reader));
    let silent = |_| io::Error::new(io::ErrorKind::TimedOut, "the peer is silent");
    loop {
        let mut header = [0; HEADER];
        tokio::time::timeout(silence_limit, reader.read_exact(&mut header)).await.map_err(silent)??;
        let (channel, length, crc) = parse_header(&header)?;
        let mut body = vec![0; length];
        tokio::time::timeout(silence_limit, reader.read_exact(&mut body)).await.map_err(silent)??;
        if crc32c::crc32c(&body) != crc {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a frame's checksum is wrong"));
        }
        // Who was shut out is not heard any more.
        let heard = channel != Channel::Alive && !closed.load(Ordering::Acquire);
        if heard && arrivals.send(Arrival::Frame(channel, body)).is_err() {
            return Ok(());
        }
    }
}

fn parse_header(header: &[u8; HEADER]) -> io::Result<(Channel, usize, u32)> {
    let bad = |what: &'static str| io::Error::new(io::ErrorKind::InvalidData, what);
    if &header[..4] != MAGIC || header[5..8] != [0; 3] {
        return Err(bad("not a frame"));
    }
    let channel = Channel::from_byte(header[4]).ok_or(bad("a frame of an unknown channel"))?;
    let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"));
    let length = word(8) as usize;
    if length > MAX_FRAME {
        return Err(bad("a frame over the limit"));
    }
    Ok((channel, length, word(12)))
}

async fn transmit<W: AsyncWrite>(
    writer: W,
    mut outgoing: mpsc::Receiver<(Channel, Vec<u8>)>,
    closed: &AtomicBool,
) -> io::Result<()> {
    let mut writer = Box::pin(tokio::io::BufWriter::with_capacity(512 << 10, writer));
    loop {
        // Asked before the queue is emptied: what was sent before the close is in it by then.
        let mut last = closed.load(Ordering::Acquire);
        let mut frame = (Channel::Alive, Vec::new());
        if !last {
            match tokio::time::timeout(ALIVE_EVERY, outgoing.recv()).await {
                Ok(Some(next)) => frame = next,
                Ok(None) => return Ok(()),
                Err(_) => {}
            }
            last = closed.load(Ordering::Acquire);
        }
        write_frame(&mut writer, &frame).await?;
        while let Ok(frame) = outgoing.try_recv() {
            write_frame(&mut writer, &frame).await?;
        }
        writer.flush().await?;
        if last {
            let _ = writer.shutdown().await;
            return Ok(());
        }
    }
}

async fn write_frame<W: AsyncWrite + Unpin>(writer: &mut W, frame: &(Channel, Vec<u8>)) -> io::Result<()> {
    let (channel, body) = frame;
    let mut header = [0; HEADER];
    header[..4].copy_from_slice(MAGIC);
    header[4] = *channel as u8;
    header[8..12].copy_from_slice(&(body.len() as u32).to_le_bytes());
    header[12..].copy_from_slice(&crc32c::crc32c(body).to_le_bytes());
    writer.write_all(&header).await?;
    writer.write_all(body).await
}

/// How many image bytes may still be sent.
#[derive(Default)]
pub struct Credits {
    state: Mutex<CreditState>,
    changed: Condvar,
}

#[derive(Default)]
struct CreditState {
    under_way: usize,
    ended: bool,
}

impl Credits {
    /// For the start of a transfer: nothing is under way.
    pub fn reset(&self) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = CreditState::default();
    }

    /// The peer has taken so many bytes (the body of a [`Channel::Credit`] frame).
    pub fn taken(&self, body: &[u8]) {
        let Ok(bytes) = body.try_into().map(u32::from_le_bytes) else { return };
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.under_way = state.under_way.saturating_sub(bytes as usize);
        self.changed.notify_all();
    }

    /// Lets every waiter fail: the transfer is over.
    pub fn end(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).ended = true;
        self.changed.notify_all();
    }

    fn take(&self, bytes: usize, limit: Duration) -> io::Result<()> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let full = |state: &mut CreditState| !state.ended && state.under_way + bytes > IMAGE_WINDOW;
        let (mut state, timeout) =
            self.changed.wait_timeout_while(state, limit, full).unwrap_or_else(PoisonError::into_inner);
        if state.ended {
            return Err(io::Error::new(io::ErrorKind::BrokenPipe, "the transfer was given up"));
        }
        if timeout.timed_out() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the other node takes no data"));
        }
        state.under_way += bytes;
        Ok(())
    }
}

/// Writes an image stream into a link. Each frame begins with the number of its move: what is still under way of
/// one that was given up is not taken for the next.
pub struct ImageWriter {
    link: Link,
    credits: Arc<Credits>,
    stall_limit: Duration,
    epoch: u64,
    buffer: Vec<u8>,
    /// Bytes sent.
    pub sent: u64,
}

impl ImageWriter {
    /// Gives up when the peer takes nothing for `stall_limit`.
    pub fn new(link: Link, credits: Arc<Credits>, epoch: u64, stall_limit: Duration) -> ImageWriter {
        credits.reset();
        ImageWriter { link, credits, stall_limit, epoch, buffer: frame_of(epoch), sent: 0 }
    }
}

/// An empty frame.
fn frame_of(epoch: u64) -> Vec<u8> {
    let mut frame = Vec::with_capacity(IMAGE_FRAME);
    frame.extend_from_slice(&epoch.to_le_bytes());
    frame
}

impl Write for ImageWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = IMAGE_FRAME - self.buffer.len();
        let n = bytes.len().min(room);
        self.buffer.extend_from_slice(&bytes[..n]);
        if self.buffer.len() == IMAGE_FRAME {
            self.flush()?;
        }
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.len() == EPOCH {
            return Ok(());
        }
        let body = std::mem::replace(&mut self.buffer, frame_of(self.epoch));
        self.credits.take(body.len(), self.stall_limit)?;
        self.sent += body.len() as u64;
        self.link.send(Channel::Image, body)
    }
}

/// Where received image frames wait. Bounded by the sender's credits.
#[derive(Default)]
pub struct ImageQueue {
    state: Mutex<QueueState>,
    changed: Condvar,
}

#[derive(Default)]
struct QueueState {
    frames: VecDeque<Vec<u8>>,
    ended: Option<String>,
}

impl ImageQueue {
    /// For the start of a transfer.
    pub fn reset(&self) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = QueueState::default();
    }

    /// A frame has arrived. One over the window is dropped, which the stream's checksums find.
    pub fn push(&self, frame: Vec<u8>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.frames.len() < 4 * IMAGE_WINDOW / IMAGE_FRAME {
            state.frames.push_back(frame);
        }
        self.changed.notify_all();
    }

    /// Lets the reader fail with this reason.
    pub fn end(&self, why: &str) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.ended.get_or_insert_with(|| why.to_string());
        self.changed.notify_all();
    }

    fn pop(&self, limit: Duration) -> io::Result<Vec<u8>> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let empty = |state: &mut QueueState| state.frames.is_empty() && state.ended.is_none();
        let (mut state, _) =
            self.changed.wait_timeout_while(state, limit, empty).unwrap_or_else(PoisonError::into_inner);
        if let Some(frame) = state.frames.pop_front() {
            return Ok(frame);
        }
        match &state.ended {
            Some(why) => Err(io::Error::new(io::ErrorKind::ConnectionAborted, why.clone())),
            None => Err(io::Error::new(io::ErrorKind::TimedOut, "the other node sends no data")),
        }
    }
}

/// Reads an image stream from a queue, and tells the sender what was taken.
pub struct ImageReader {
    link: Link,
    queue: Arc<ImageQueue>,
    stall_limit: Duration,
    epoch: u64,
    frame: Vec<u8>,
    at: usize,
}

impl ImageReader {
    /// Gives up when nothing arrives for `stall_limit`.
    pub fn new(link: Link, queue: Arc<ImageQueue>, epoch: u64, stall_limit: Duration) -> ImageReader {
        ImageReader { link, queue, stall_limit, epoch, frame: Vec::new(), at: 0 }
    }
}

impl Read for ImageReader {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.at == self.frame.len() {
            self.frame = loop {
                let frame = self.queue.pop(self.stall_limit)?;
                match frame.first_chunk() {
                    Some(&epoch) if u64::from_le_bytes(epoch) == self.epoch => break frame,
                    // Of a move that was given up: its sender counts on no credit for it any more.
                    _ => {}
                }
            };
            self.at = EPOCH;
            self.link.send(Channel::Credit, (self.frame.len() as u32).to_le_bytes().to_vec())?;
        }
        let n = out.len().min(self.frame.len() - self.at);
        out[..n].copy_from_slice(&self.frame[self.at..self.at + n]);
        self.at += n;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    /// Tells what has come when the link is lost.
    struct Collector {
        numbers: Vec<u32>,
        lost: std_mpsc::Sender<Vec<u32>>,
    }

    impl LinkSink for Collector {
        fn frame(&mut self, channel: Channel, body: Vec<u8>) {
            if channel == Channel::Control {
                self.numbers.push(u32::from_le_bytes(body.try_into().expect("four bytes")));
            }
        }

        fn lost(&mut self, _: String) {
            // The test may have ended.
            let _ = self.lost.send(std::mem::take(&mut self.numbers));
        }
    }

    fn end_of(stream: TcpStream) -> (Link, std_mpsc::Receiver<Vec<u32>>) {
        let (lost, is_lost) = std_mpsc::channel();
        let sink = Box::new(Collector { numbers: Vec::new(), lost });
        let plain = async |stream| Ok::<tokio::net::TcpStream, io::Error>(stream);
        (start(stream, Duration::from_secs(10), sink, plain).expect("a link"), is_lost)
    }

    #[test]
    fn last_words_arrive_although_the_other_is_still_speaking() {
        for _ in 0..20 {
            let listener = TcpListener::bind("127.0.0.1:0").expect("listens");
            let dialled = TcpStream::connect(listener.local_addr().expect("an address")).expect("connects");
            let (host, _) = end_of(listener.accept().expect("a connection").0);
            let (home, heard) = end_of(dialled);
            let speaker =
                std::thread::spawn(move || while home.send(Channel::Home, vec![7; 64 << 10]).is_ok() {});
            for number in 0..500u32 {
                host.send(Channel::Control, number.to_le_bytes().to_vec()).expect("is sent");
            }
            host.close();
            let waited = std::time::Instant::now();
            host.await_end(Duration::from_secs(30));
            assert!(waited.elapsed() < Duration::from_secs(25), "the other end has not closed");
            assert_eq!(heard.recv().expect("is told"), (0..500).collect::<Vec<u32>>());
            speaker.join().expect("ends when the link does");
        }
    }

    #[test]
    fn who_was_shut_out_is_not_heard() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("listens");
        let dialled = TcpStream::connect(listener.local_addr().expect("an address")).expect("connects");
        let (host, _) = end_of(listener.accept().expect("a connection").0);
        let (home, heard) = end_of(dialled);
        home.close();
        // Whether it can still be sent or not.
        let _ = host.send(Channel::Control, 1u32.to_le_bytes().to_vec());
        assert!(heard.recv().expect("is told").is_empty());
    }
}
