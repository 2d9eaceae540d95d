//! A host node as the home shepherd sees it: its link, and what arrives on it.

use super::super::control::{Preamble, PreambleKind, TargetNode};
use super::super::inbox::Sender;
use super::super::link::{Channel, Credits, ImageQueue, Link, LinkSink};
use super::super::session::{Reply, Step, StepKind, ToHome, ToHost, Welcome};
use super::{Event, MoveError, SILENCE_LIMIT};
use crate::cluster_key::ClusterKey;
use crate::homefs::{HomeView, Wire};
use checkpoint::image::codec;
use std::io::{self, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

const CONNECT_LIMIT: Duration = Duration::from_secs(3);

/// A connected host shepherd.
pub struct Host {
    /// The node's name.
    pub name: String,
    /// Number of the connection, in events.
    pub number: u64,
    /// Number of the connection in the home view.
    pub view_connection: u64,
    pub link: Link,
    pub queue: Arc<ImageQueue>,
    pub credits: Arc<Credits>,
    relay: Arc<Relay>,
}

/// Where image frames and credits of this link go, when they are not for us.
#[derive(Default)]
struct Relay {
    image_to: Mutex<Option<Link>>,
    credit_to: Mutex<Option<Link>>,
}

struct Sink {
    number: u64,
    sender: Sender<Event>,
    view: Arc<HomeView>,
    view_connection: Arc<OnceLock<u64>>,
    queue: Arc<ImageQueue>,
    credits: Arc<Credits>,
    relay: Arc<Relay>,
}

impl LinkSink for Sink {
    fn frame(&mut self, channel: Channel, body: Vec<u8>) {
        match channel {
            Channel::Home => {
                if let Some(&connection) = self.view_connection.get() {
                    self.view.deliver(connection, &body);
                }
            }
            Channel::Image => match &*lock(&self.relay.image_to) {
                Some(link) => drop(link.send(Channel::Image, body)),
                None => self.queue.push(body),
            },
            Channel::Credit => match &*lock(&self.relay.credit_to) {
                Some(link) => drop(link.send(Channel::Credit, body)),
                None => self.credits.taken(&body),
            },
            Channel::Control => match codec::decode::<ToHome>(&body) {
                Ok(message) => self.control(message),
                Err(error) => tracing::warn!(%error, "a host's message is not understood"),
            },
            Channel::Alive => {}
        }
    }

    fn lost(&mut self, why: String) {
        self.queue.end(&why);
        self.credits.end();
        self.sender.push(Event::Lost(self.number, why));
    }
}

impl Sink {
    fn control(&mut self, message: ToHome) {
        if let ToHome::Move(Step { kind: StepKind::Failed { why, .. }, .. }) = &message {
            // Whoever writes or reads image data must not wait for a peer that has given up.
            self.queue.end(why);
            self.credits.end();
        }
        self.sender.push(Event::Message(self.number, message));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct LinkWire(Link);

impl Wire for LinkWire {
    fn send(&self, frame: &[u8]) -> io::Result<()> {
        self.0.send(Channel::Home, frame.to_vec())
    }
}

impl Host {
    /// Dials the node's daemon, names the session and proves to be of the cluster.
    pub fn connect(
        node: &TargetNode,
        number: u64,
        key: &ClusterKey,
        view: &Arc<HomeView>,
        sender: Sender<Event>,
    ) -> Result<Host, MoveError> {
        let down = |error: &dyn std::fmt::Display| {
            MoveError::Node(format!("no session with {} at {}: {error}", node.name, node.address))
        };
        let address: SocketAddr = node.address.parse().map_err(|e| down(&e))?;
        let mut stream = TcpStream::connect_timeout(&address, CONNECT_LIMIT).map_err(|e| down(&e))?;
        let token = parse_token(&node.token).ok_or_else(|| down(&"the session's token is malformed"))?;
        let preamble = Preamble { kind: PreambleKind::Session, token };
        stream.write_all(&preamble.to_bytes()).map_err(|e| down(&e))?;

        let (queue, credits, relay) =
            (Arc::<ImageQueue>::default(), Arc::<Credits>::default(), Arc::<Relay>::default());
        let view_connection = Arc::new(OnceLock::new());
        let sink = Sink {
            number,
            sender,
            view: Arc::clone(view),
            view_connection: Arc::clone(&view_connection),
            queue: Arc::clone(&queue),
            credits: Arc::clone(&credits),
            relay: Arc::clone(&relay),
        };
        let config = key.client_config().map_err(|e| down(&e))?;
        let name = crate::cluster_key::server_name();
        let link =
            Link::connect(stream, config, name, SILENCE_LIMIT, Box::new(sink)).map_err(|e| down(&e))?;
        let connection = view.connect(Arc::new(LinkWire(link.clone())));
        let _ = view_connection.set(connection);
        Ok(Host { name: node.name.clone(), number, view_connection: connection, link, queue, credits, relay })
    }

    /// Sends one message.
    pub fn tell(&self, message: &ToHost) -> Result<(), MoveError> {
        let body = codec::encode(message).map_err(MoveError::failed)?;
        self.link
            .send(Channel::Control, body)
            .map_err(|error| MoveError::Node(format!("{} cannot be reached: {error}", self.name)))
    }

    pub fn welcome(&self, welcome: Welcome) -> Result<(), MoveError> {
        self.tell(&ToHost::Welcome(Box::new(welcome)))
    }

    /// Sends a step of a move.
    pub fn step(&self, epoch: u64, kind: StepKind) -> Result<(), MoveError> {
        self.tell(&ToHost::Move(Step { epoch, kind }))
    }

    /// Kills one guest, or all of them.
    pub fn kill_guest(&self, pid: Option<i32>) {
        let _ = self.tell(&ToHost::Kill { pid, signal: libc::SIGKILL });
    }

    pub fn answer(&self, id: u64, reply: Reply) {
        let _ = self.tell(&ToHost::Answer { id, reply });
    }

    /// Image frames of `self` go to `target`, and its credits back.
    pub fn relay_image_to(&self, target: &Host) {
        *lock(&self.relay.image_to) = Some(target.link.clone());
        *lock(&target.relay.credit_to) = Some(self.link.clone());
    }

    /// Ends the relaying.
    pub fn end_relay(&self, target: &Host) {
        *lock(&self.relay.image_to) = None;
        *lock(&target.relay.credit_to) = None;
    }
}

fn parse_token(text: &str) -> Option<[u8; 16]> {
    let mut token = [0; 16];
    if text.len() != 32 || !text.is_ascii() {
        return None;
    }
    for (byte, at) in token.iter_mut().zip((0..32).step_by(2)) {
        *byte = u8::from_str_radix(&text[at..at + 2], 16).ok()?;
    }
    Some(token)
}
