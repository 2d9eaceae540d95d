//! The shepherd's side of its control socket: it listens at a path, the daemon connects.
//!
//! That way round a daemon that was restarted finds its shepherds again by looking through a folder.
//! One daemon is served at a time and the newest wins. Every new connection first hears the latest of
//! each kind of lasting event (where the process is, how it does), then what nobody has heard yet.
//!
//! It blocks and has two threads of its own; it knows nothing of what orders mean.

use super::control::{HomeEvent, HostEvent};
use crate::api::MAX_LINE;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Events that wait for a daemon; the oldest are dropped.
const BACKLOG: usize = 64;
/// A daemon that takes nothing for so long is given up.
const WRITE_LIMIT: Duration = Duration::from_secs(2);

/// What becomes of an event when no daemon listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// Of the moment only: dropped.
    Drop,
    /// The latest under this name is told first to every new daemon.
    Latest(&'static str),
    /// Told once, to the next daemon.
    Queue,
}

/// An event of a shepherd.
pub trait ControlEvent: Serialize {
    /// What becomes of it when no daemon listens.
    fn keep(&self) -> Keep;
}

impl ControlEvent for HomeEvent {
    fn keep(&self) -> Keep {
        match self {
            HomeEvent::Ready => Keep::Latest("0 ready"),
            HomeEvent::Moved { .. } => Keep::Latest("1 moved"),
            // The next one comes soon.
            HomeEvent::GuestStat { .. } | HomeEvent::Progress { .. } => Keep::Drop,
            HomeEvent::MoveFailed { .. } | HomeEvent::Retreat { .. } | HomeEvent::Gone { .. } => Keep::Queue,
        }
    }
}

impl ControlEvent for HostEvent {
    fn keep(&self) -> Keep {
        match self {
            HostEvent::Guest { .. } => Keep::Latest("0 guest"),
            HostEvent::Gone { .. } => Keep::Queue,
        }
    }
}

struct State {
    daemon: Option<UnixStream>,
    connections: u64,
    latest: BTreeMap<&'static str, String>,
    backlog: VecDeque<String>,
}

/// The listening control socket of a shepherd.
pub struct ControlServer<E> {
    state: Arc<Mutex<State>>,
    event: std::marker::PhantomData<fn(E)>,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<E: ControlEvent> ControlServer<E> {
    /// Listens at `path` (whatever lies there is replaced); every order that comes is handed to `order`,
    /// from a thread of this server's own.
    pub fn start<O: DeserializeOwned + 'static>(
        path: &Path,
        order: impl FnMut(O) + Send + 'static,
    ) -> io::Result<ControlServer<E>> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        let state = Arc::new(Mutex::new(State {
            daemon: None,
            connections: 0,
            latest: BTreeMap::new(),
            backlog: VecDeque::new(),
        }));
        let shared = Arc::clone(&state);
        let order = Arc::new(Mutex::new(order));
        std::thread::Builder::new().name("control".into()).spawn(move || {
            for stream in listener.incoming() {
                let Ok(stream) = stream else {
                    // Out of descriptors, say: the next attempt may do.
                    std::thread::sleep(Duration::from_millis(100));
                    continue;
                };
                let Some((reader, number)) = welcome(&shared, stream) else { continue };
                let (shared, order) = (Arc::clone(&shared), Arc::clone(&order));
                let served = std::thread::Builder::new().name("control-daemon".into()).spawn(move || {
                    read_orders(reader, &order);
                    let mut state = lock(&shared);
                    if state.connections == number {
                        state.daemon = None;
                    }
                });
                if let Err(error) = served {
                    tracing::error!(%error, "no thread for the daemon's connection");
                }
            }
        })?;
        Ok(ControlServer { state, event: std::marker::PhantomData })
    }

    /// Tells the daemon, or keeps it for the next one.
    pub fn send(&self, event: &E) {
        let line = match serde_json::to_string(event) {
            Ok(line) => line,
            Err(error) => return tracing::error!(%error, "an event could not be encoded"),
        };
        let mut state = lock(&self.state);
        if let Keep::Latest(name) = event.keep() {
            state.latest.insert(name, line.clone());
        }
        let told = state.tell(&line);
        if !told && event.keep() == Keep::Queue {
            if state.backlog.len() == BACKLOG {
                state.backlog.pop_front();
            }
            state.backlog.push_back(line);
        }
    }

    /// Ends the sending side: the daemon reads what was sent, then the end.
    pub fn flush(&self) {
        if let Some(daemon) = &lock(&self.state).daemon {
            let _ = daemon.shutdown(Shutdown::Write);
        }
    }
}

impl State {
    fn tell(&mut self, line: &str) -> bool {
        let Some(daemon) = &mut self.daemon else { return false };
        let told = daemon.write_all(line.as_bytes()).and_then(|()| daemon.write_all(b"\n"));
        if told.is_err() {
            let _ = daemon.shutdown(Shutdown::Both);
            self.daemon = None;
        }
        told.is_ok()
    }
}

/// Makes this connection the one that is served.
fn welcome(shared: &Mutex<State>, stream: UnixStream) -> Option<(UnixStream, u64)> {
    let reader = stream.try_clone().ok()?;
    stream.set_write_timeout(Some(WRITE_LIMIT)).ok()?;
    let mut state = lock(shared);
    if let Some(old) = state.daemon.replace(stream) {
        let _ = old.shutdown(Shutdown::Both);
    }
    state.connections += 1;
    let first: Vec<String> = state.latest.values().cloned().collect();
    for line in first {
        state.tell(&line);
    }
    while let Some(line) = state.backlog.pop_front() {
        if !state.tell(&line) {
            state.backlog.push_front(line);
            break;
        }
    }
    Some((reader, state.connections))
}

fn read_orders<O: DeserializeOwned>(stream: UnixStream, order: &Mutex<impl FnMut(O)>) {
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        match (&mut reader).take(MAX_LINE as u64).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) if line.last() != Some(&b'\n') => return,
            Ok(_) => {}
        }
        match serde_json::from_slice(&line) {
            Ok(parsed) => (order.lock().unwrap_or_else(PoisonError::into_inner))(parsed),
            Err(error) => tracing::warn!(%error, "an order is not understood"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shepherd::control::{HomeOrder, MoveFigures};

    fn lines(stream: &UnixStream, count: usize) -> Vec<String> {
        stream.set_read_timeout(Some(Duration::from_secs(5))).expect("set");
        let mut reader = BufReader::new(stream);
        (0..count)
            .map(|_| {
                let mut line = String::new();
                reader.read_line(&mut line).expect("a line");
                line
            })
            .collect()
    }

    #[test]
    fn a_daemon_that_comes_back_hears_where_things_are() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("home-1.sock");
        let (tell, told) = std::sync::mpsc::channel();
        let server = ControlServer::<HomeEvent>::start(&path, move |order: HomeOrder| {
            tell.send(order).expect("the test listens");
        })
        .expect("starts");
        server.send(&HomeEvent::Ready);
        server.send(&HomeEvent::Moved {
            id: 1,
            node: "a".into(),
            figures: MoveFigures::default(),
            pids: vec![],
        });
        server.send(&HomeEvent::Moved {
            id: 2,
            node: "b".into(),
            figures: MoveFigures::default(),
            pids: vec![],
        });
        server.send(&HomeEvent::Retreat { reason: "fork".into() });

        let mut first = UnixStream::connect(&path).expect("connects");
        let heard = lines(&first, 3);
        assert!(heard[0].contains("ready") && heard[1].contains("\"b\"") && heard[2].contains("retreat"));
        first.write_all(b"nonsense\n{\"order\":\"cancel\",\"id\":7}\n").expect("written");
        let order = told.recv_timeout(Duration::from_secs(5)).expect("an order");
        assert!(matches!(order, HomeOrder::Cancel { id: 7 }));

        // The newest daemon wins, and is not told again what was heard.
        let second = UnixStream::connect(&path).expect("connects");
        assert_eq!(lines(&second, 2).len(), 2);
        assert_eq!(first.read(&mut [0; 64]).expect("the end"), 0);
        server.send(&HomeEvent::Gone { how: "home".into(), detail: String::new() });
        server.flush();
        assert!(lines(&second, 1)[0].contains("gone"));
    }
}
