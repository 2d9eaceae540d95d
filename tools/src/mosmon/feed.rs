//! The monitor's talk with the daemon, on threads of its own: a stream of snapshots that is taken up
//! again when it breaks, and wishes, one at a time.

use crate::arguments::Socket;
use migd::api::{ApiError, Request, Response, Snapshot};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

/// How often the daemon is asked to tell.
const PERIOD: Duration = Duration::from_secs(1);
/// Between two attempts to reach it.
const AGAIN_AFTER: Duration = Duration::from_secs(1);
/// What waits to be shown; a slow terminal holds the daemon's stream up instead of filling memory.
const NEWS: usize = 4;
/// Wishes that wait.
const WISHES: usize = 4;

/// What the daemon has told.
#[derive(Debug)]
pub enum News {
    /// The whole picture.
    Snapshot(Box<Snapshot>),
    /// The stream broke; it is being taken up again.
    Lost(ApiError),
    /// The answer to a wish, and what was being done.
    Answer(String, Result<Response, ApiError>),
}

/// See the module. The threads end when this is dropped, or with the program.
#[derive(Debug)]
pub struct Feed {
    /// What comes.
    pub news: Receiver<News>,
    wishes: SyncSender<(Request, String)>,
}

impl Feed {
    /// Starts listening.
    pub fn start(socket: &Socket) -> std::io::Result<Feed> {
        let (tell, news) = sync_channel(NEWS);
        let (wishes, to_do) = sync_channel(WISHES);
        let (own, answers) = (socket.clone(), tell.clone());
        std::thread::Builder::new().name("wishes".into()).spawn(move || fulfil(&own, &to_do, &answers))?;
        let own = socket.clone();
        std::thread::Builder::new().name("watch".into()).spawn(move || watch(&own, &tell))?;
        Ok(Feed { news, wishes })
    }

    /// Asks the daemon; `false`: too much is being asked already.
    pub fn ask(&self, request: Request, doing: String) -> bool {
        !matches!(self.wishes.try_send((request, doing)), Err(TrySendError::Full(_)))
    }
}

fn fulfil(socket: &Socket, wishes: &Receiver<(Request, String)>, answers: &SyncSender<News>) {
    while let Ok((request, doing)) = wishes.recv() {
        let answer = socket.connect().and_then(|mut client| client.call(&request));
        if answers.send(News::Answer(doing, answer)).is_err() {
            return;
        }
    }
}

fn watch(socket: &Socket, tell: &SyncSender<News>) {
    let request = Request::Watch { interval_ms: PERIOD.as_millis() as u64 };
    loop {
        let mut listening = true;
        let ended = socket.connect().and_then(|mut client| {
            client.stream(&request, |answer| {
                if let Response::Snapshot(snapshot) = answer {
                    listening = tell.send(News::Snapshot(Box::new(snapshot.clone()))).is_ok();
                }
                listening
            })
        });
        let error = match ended {
            Ok(Some(other)) => crate::output::unexpected(&other),
            Ok(None) => return,
            Err(error) => error,
        };
        if !listening || tell.send(News::Lost(error)).is_err() {
            return;
        }
        std::thread::sleep(AGAIN_AFTER);
    }
}
