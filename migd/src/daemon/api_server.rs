//! The tools' Unix socket: one JSON document a line, both ways. Who asks is what the kernel says
//! (`SO_PEERCRED`, unix(7)), nothing else.

use super::names::{Caller, error};
use super::{Daemon, verbs};
use crate::api::{ErrorKind, MAX_LINE, Request, Response};
use anyhow::Context;
use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

/// Connections of one user; root has no limit but [`MAX_ALL`].
const MAX_PER_USER: usize = 256;
/// Connections of everybody.
const MAX_ALL: usize = 2048;
/// A client that does not read for so long is hung up on.
const WRITE_LIMIT: Duration = Duration::from_secs(30);
/// Answer lines that wait for a slow client.
const ANSWERS: usize = 16;

/// Makes the socket. What lies there is replaced: the lock in the runtime directory tells that no other
/// daemon of this node lives.
pub fn bind(path: &Path) -> anyhow::Result<UnixListener> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(|| format!("cannot use {}", folder.display()))?;
    }
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        anyhow::bail!("another migd answers at {}; stop it first, or use --socket", path.display());
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot replace {}", path.display()));
        }
        _ => {}
    }
    let listener =
        UnixListener::bind(path).with_context(|| format!("cannot listen at {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o666))?;
    Ok(listener)
}

/// Counts connections by user.
#[derive(Default)]
struct Guests(Mutex<HashMap<u32, usize>>);

struct Seat(Arc<Guests>, u32);

impl Guests {
    fn seat(self: &Arc<Self>, uid: u32) -> Option<Seat> {
        let mut seats = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let all: usize = seats.values().sum();
        let own = seats.entry(uid).or_default();
        if all >= MAX_ALL || (uid != 0 && *own >= MAX_PER_USER) {
            return None;
        }
        *own += 1;
        Some(Seat(Arc::clone(self), uid))
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut seats = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = seats.get_mut(&self.1) {
            *own -= 1;
            if *own == 0 {
                seats.remove(&self.1);
            }
        }
    }
}

/// Accepts for ever.
pub async fn run(daemon: Arc<Daemon>, listener: UnixListener) {
    let guests = Arc::<Guests>::default();
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "a client could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(credentials) = stream.peer_cred() else { continue };
        // No PID: the client lives in a namespace from which it cannot be seen here.
        let caller = Caller { uid: credentials.uid(), pid: credentials.pid().unwrap_or(0) };
        let Some(seat) = guests.seat(caller.uid) else { continue };
        let daemon = Arc::clone(&daemon);
        tokio::spawn(async move {
            let result = serve(&daemon, caller, stream).await;
            tracing::trace!(?caller, ?result, "client gone");
            drop(seat);
        });
    }
}

/// Where answers go.
#[derive(Clone)]
pub struct Answers(mpsc::Sender<Response>);

impl Answers {
    /// `false`: the client has hung up.
    pub async fn send(&self, response: Response) -> bool {
        self.0.send(response).await.is_ok()
    }
}

async fn serve(daemon: &Arc<Daemon>, caller: Caller, stream: UnixStream) -> io::Result<()> {
    let (reader, writer) = stream.into_split();
    let (answers, to_write) = mpsc::channel(ANSWERS);
    let writing = tokio::spawn(write(writer, to_write));
    let answers = Answers(answers);
    let mut reader = BufReader::new(reader);
    let mut registered = None;
    while let Some(line) = next_line(&mut reader).await? {
        let request = match serde_json::from_slice::<Request>(&line) {
            Ok(request) => request,
            Err(why) => {
                let next = "are the tool and the daemon of the same version?";
                let kind = ErrorKind::Usage;
                let error = error(kind, "the daemon does not understand the request", why.to_string(), next);
                if !answers.send(Response::Error(error)).await {
                    break;
                }
                continue;
            }
        };
        if let Request::Register(spec) = request {
            let response = match verbs::register(daemon, caller, spec) {
                Ok(job) => {
                    registered = Some(caller.pid);
                    Response::Registered { job }
                }
                Err(error) => Response::Error(error),
            };
            answers.send(response).await;
            continue;
        }
        // A client that hangs up ends its question, except for moves, which are tasks of their own.
        let gone = tokio::select! {
            answered = verbs::answer(daemon, caller, request, &answers) => !answered,
            _ = hung_up(&mut reader) => true,
        };
        if gone {
            break;
        }
    }
    drop(answers);
    if let Some(pid) = registered {
        verbs::program_runs(daemon, pid);
    }
    let _ = writing.await;
    Ok(())
}

/// Waits for the client's end while it is being answered; a client that says more is not listened to yet.
async fn hung_up(reader: &mut BufReader<OwnedReadHalf>) {
    match reader.fill_buf().await {
        Ok(bytes) if !bytes.is_empty() => std::future::pending().await,
        _ => {}
    }
}

async fn next_line(reader: &mut BufReader<OwnedReadHalf>) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    (&mut *reader).take(MAX_LINE as u64).read_until(b'\n', &mut line).await?;
    Ok((line.last() == Some(&b'\n')).then_some(line))
}

async fn write(mut writer: OwnedWriteHalf, mut answers: mpsc::Receiver<Response>) -> io::Result<()> {
    while let Some(answer) = answers.recv().await {
        let mut line = serde_json::to_vec(&answer)?;
        line.push(b'\n');
        let written = tokio::time::timeout(WRITE_LIMIT, writer.write_all(&line)).await;
        written.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    }
    Ok(())
}
