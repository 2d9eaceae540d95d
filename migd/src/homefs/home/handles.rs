//! Open files at home: those of the deputy that were handed over, and those the guest has opened.
//!
//! A handle's number is the `fh` of FUSE, so it names the same open file description on every host
//! the guest visits. A handle ends when its last open ends, wherever that is; while the owner holds
//! the table ([`Handles::hold`], during a move) none ends.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU8};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use nix::errno::Errno;

use super::poller::Poller;
use crate::homefs::abi::{Answer, fopen};

/// Open handles at most.
const MAX_HANDLES: usize = 1 << 20;

/// What an open file of the deputy is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HandleKind {
    /// A regular file.
    Regular {
        /// Other processes at home share the open file description, and so its position.
        shared_position: bool,
    },
    /// A directory.
    Directory,
    /// A pipe, FIFO, terminal, socket or other character device.
    Stream,
}

/// Where a regular file's reads and writes go.
pub enum Position {
    /// To the offset in the request.
    Given,
    /// To the description's own position; the value is what the host thinks it is. A request
    /// elsewhere means that the guest has moved it.
    Shared(Mutex<i64>),
}

/// Who waits to hear that a stream's readiness has changed.
#[derive(Default)]
pub struct Watch {
    /// The poller whose epoll the file is in.
    pub poller: Option<Arc<Poller>>,
    /// Connection and kernel handle of the polls to wake, once.
    pub armed: Vec<(u64, u64)>,
}

/// The kinds of a handle, with what each needs.
pub enum Kind {
    /// A regular file.
    Regular(Position),
    /// A directory; reading moves the description's position, so one at a time.
    Directory(Mutex<()>),
    /// A stream.
    Stream(Stream),
}

/// A stream's state.
#[derive(Default)]
pub struct Stream {
    /// See [`Watch`].
    pub watch: Mutex<Watch>,
    /// Whether calls with `RWF_NOWAIT` work: 0 not tried, 1 yes, 2 no.
    pub nowait: AtomicU8,
    /// An open file description of our own that never waits, where `RWF_NOWAIT` does not work.
    pub own: OnceLock<Option<OwnedFd>>,
    /// The terminal's device number, if it is one.
    pub terminal: Option<u64>,
    /// A terminal's other end, which must not be opened a second time.
    pub master: bool,
}

/// An open file at home.
pub struct Handle {
    /// Its number.
    pub id: u64,
    /// The open file description.
    pub file: OwnedFd,
    /// What it is.
    pub kind: Kind,
    /// `FOPEN_*` of its opens.
    pub open_flags: u32,
    /// It was the deputy's.
    pub handed_over: bool,
    /// The description has O_APPEND.
    pub append: AtomicBool,
    /// A request of the guest had O_APPEND; one without it then means it was taken off.
    pub append_seen: AtomicBool,
}

impl Handle {
    /// Whether it is a stream.
    pub fn is_stream(&self) -> bool {
        matches!(self.kind, Kind::Stream(_))
    }

    /// The stream's state, if it is one.
    pub fn stream(&self) -> Option<&Stream> {
        match &self.kind {
            Kind::Stream(stream) => Some(stream),
            _ => None,
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if let Kind::Stream(stream) = &mut self.kind {
            let watch = stream.watch.get_mut().unwrap_or_else(PoisonError::into_inner);
            if let Some(poller) = watch.poller.take() {
                poller.forget(&self.file);
            }
        }
    }
}

/// `FOPEN_*` for a stream.
pub const STREAM_FLAGS: u32 =
    fopen::DIRECT_IO | fopen::NONSEEKABLE | fopen::STREAM | fopen::NOFLUSH | fopen::PARALLEL_DIRECT_WRITES;

struct Entry {
    handle: Arc<Handle>,
    /// Opens by connection.
    opens: Vec<(u64, u64)>,
    /// It has been opened from a host, so it ends with its last open.
    opened: bool,
}

type Closed = Arc<dyn Fn(u64) + Send + Sync>;

#[derive(Default)]
struct Table {
    handles: HashMap<u64, Entry>,
    next: u64,
    holds: usize,
    on_closed: Option<Closed>,
}

/// All open files.
#[derive(Default)]
pub struct Handles {
    table: Mutex<Table>,
}

impl Handles {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The handle `id`; `EBADF` if there is none.
    pub fn get(&self, id: u64) -> Answer<Arc<Handle>> {
        self.lock().handles.get(&id).map(|e| Arc::clone(&e.handle)).ok_or(Errno::EBADF)
    }

    /// Those of regular files.
    pub fn regular(&self) -> Vec<Arc<Handle>> {
        let table = self.lock();
        let all = table.handles.values().map(|entry| &entry.handle);
        all.filter(|handle| matches!(handle.kind, Kind::Regular(_))).cloned().collect()
    }

    /// Adds a handle: opened once by `connection`, or handed over and not yet opened.
    pub fn add(&self, connection: Option<u64>, make: impl FnOnce(u64) -> Handle) -> Answer<Arc<Handle>> {
        let mut table = self.lock();
        if table.handles.len() >= MAX_HANDLES {
            return Err(Errno::ENFILE);
        }
        table.next += 1;
        let id = table.next;
        let handle = Arc::new(make(id));
        let opens = connection.map(|c| (c, 1)).into_iter().collect();
        let opened = connection.is_some();
        table.handles.insert(id, Entry { handle: Arc::clone(&handle), opens, opened });
        Ok(handle)
    }

    /// One more open of the handle `id`.
    pub fn open(&self, connection: u64, id: u64) -> Answer<Arc<Handle>> {
        let mut table = self.lock();
        let entry = table.handles.get_mut(&id).ok_or(Errno::EBADF)?;
        entry.opened = true;
        match entry.opens.iter_mut().find(|(c, _)| *c == connection) {
            Some((_, n)) => *n += 1,
            None => entry.opens.push((connection, 1)),
        }
        Ok(Arc::clone(&entry.handle))
    }

    /// One open less.
    pub fn release(&self, connection: u64, id: u64) {
        let mut table = self.lock();
        let Some(entry) = table.handles.get_mut(&id) else { return };
        if let Some(own) = entry.opens.iter_mut().find(|(c, _)| *c == connection) {
            own.1 -= 1;
        }
        entry.opens.retain(|(_, n)| *n > 0);
        if entry.opens.is_empty() {
            finish(table, Which::One(id));
        }
    }

    /// The host behind `connection` is gone with all its opens.
    pub fn release_connection(&self, connection: u64) {
        let mut table = self.lock();
        for entry in table.handles.values_mut() {
            entry.opens.retain(|(c, _)| *c != connection);
        }
        finish(table, Which::All);
    }

    /// Keeps every handle until the matching [`Handles::unhold`].
    pub fn hold(&self) {
        self.lock().holds += 1;
    }

    /// Ends a hold; with the last one, handles without an open end.
    pub fn unhold(&self) {
        let mut table = self.lock();
        table.holds = table.holds.saturating_sub(1);
        finish(table, Which::All);
    }

    /// Ends all handles.
    pub fn clear(&self) {
        let gone = std::mem::take(&mut self.lock().handles);
        drop(gone);
    }

    /// Called with the number of each handed-over handle whose last open has ended.
    pub fn set_on_closed(&self, call: Closed) {
        self.lock().on_closed = Some(call);
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.lock().handles.len()
    }
}

enum Which {
    One(u64),
    All,
}

/// Ends those of `which` that have no open left, with the lock given up first: a close may wait for
/// a server.
fn finish(mut table: MutexGuard<'_, Table>, which: Which) {
    if table.holds > 0 {
        return;
    }
    let ended = |e: &Entry| e.opened && e.opens.is_empty();
    let gone: Vec<Entry> = match which {
        Which::One(id) if table.handles.get(&id).is_some_and(ended) => {
            table.handles.remove(&id).into_iter().collect()
        }
        Which::One(_) => Vec::new(),
        Which::All => table.handles.extract_if(|_, e| ended(e)).map(|(_, e)| e).collect(),
    };
    let call = table.on_closed.clone();
    drop(table);
    for entry in gone {
        let (id, tell) = (entry.handle.id, entry.handle.handed_over);
        drop(entry);
        if let (true, Some(call)) = (tell, &call) {
            call(id);
        }
    }
}
