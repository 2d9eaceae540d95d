//! Home's side: takes FUSE requests apart and does them on home's files.
//!
//! | file | what |
//! |---|---|
//! | `exec` | from a request's number to the operation, and the answer's way back |
//! | `names` | lookup, create, link, rename, unlink … |
//! | `attributes` | getattr, setattr, statx, statfs, access, extended attributes |
//! | `files`, `directories`, `streams` | open files of the three kinds |
//! | `nodes`, `kept`, `handles`, `devices` | the tables |
//! | `thread`, `identity` | who does it, and as whom |
//! | `poller`, `terminal` | readiness and job control of streams |
//!
//! Threads: a small pool does the ordinary requests; what may wait for long (a pipe, a terminal, the
//! other end of a FIFO) has a thread of its own while it waits; one thread watches for readiness.

mod attributes;
mod devices;
mod directories;
mod exec;
mod files;
mod handles;
mod identity;
mod kept;
mod names;
mod nodes;
mod poller;
mod streams;
mod terminal;
mod thread;

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use checkpoint::sys::thread_kick;
use nix::fcntl::OFlag;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::Mode;

use self::devices::Devices;
pub use self::handles::HandleKind;
use self::handles::Handles;
use self::identity::Identity;
use self::kept::Keeper;
use self::nodes::Nodes;
use self::poller::Poller;
use self::thread::{Pool, Thread, Wait};
use super::Wire;
use super::abi::{Answer, InHeader, op};

/// Threads for ordinary requests.
const WORKERS: usize = 8;
/// Ordinary requests that wait for a worker; then the connection's reader has to wait.
const BACKLOG: usize = 256;
/// Threads for requests that wait long.
const WAITERS: usize = 4096;

/// The path, in the guest's file system, of the handle `handle` of the view with this token.
pub fn token_path(token: &[u8; 16], handle: u64) -> PathBuf {
    let mut path = PathBuf::from("/");
    path.push(token_name(token));
    path.push(handle.to_string());
    path
}

/// The path, in the guest's file system, of whatever handle there is of the regular file with this inode number, as
/// hosts are told it: for a mapping, which has its file open and no descriptor of it.
pub fn inode_path(token: &[u8; 16], inode: u64) -> PathBuf {
    let mut path = PathBuf::from("/");
    path.push(token_name(token));
    path.push(format!("{}{inode}", names::BY_INODE));
    path
}

fn token_name(token: &[u8; 16]) -> String {
    token.iter().fold(String::from(".migd-"), |mut name, byte| {
        let _ = write!(name, "{byte:02x}");
        name
    })
}

/// A host's connection.
struct Connection {
    id: u64,
    wire: Arc<dyn Wire>,
    alive: AtomicBool,
}

impl Connection {
    fn send(&self, frame: &[u8]) {
        if self.alive.load(Ordering::SeqCst)
            && let Err(error) = self.wire.send(frame)
        {
            tracing::debug!(%error, "an answer to a host was lost");
        }
    }
}

/// What all threads share.
struct Shared {
    /// `/proc/self/fd`, by which an `O_PATH` descriptor is opened again.
    descriptors: OwnedFd,
    token: [u8; 16],
    token_name: String,
    devices: Devices,
    nodes: Nodes,
    handles: Handles,
    identity: Identity,
    connections: RwLock<HashMap<u64, Arc<Connection>>>,
    next_connection: AtomicU64,
    workers: Arc<Pool>,
    waiters: Arc<Pool>,
    poller: Arc<Poller>,
    /// Requests on streams that have not been answered, by connection and number.
    waits: Mutex<HashMap<(u64, u64), Arc<Wait>>>,
    /// The handle a thread of a host has looked up and is about to open.
    intents: Mutex<HashMap<(u64, u32), Intent>>,
    intents_count: AtomicUsize,
}

/// See [`Shared::intents`].
#[derive(Clone, Copy)]
struct Intent {
    node: u64,
    handle: u64,
}

/// Home's end of one guest's file system, whichever host it is on.
pub struct HomeView {
    shared: Arc<Shared>,
}

/// While it lives, no handle ends; see [`HomeView::hold`].
#[must_use = "handles are held only as long as this lives"]
pub struct HandleHold {
    shared: Arc<Shared>,
}

impl Drop for HandleHold {
    fn drop(&mut self) {
        self.shared.handles.unhold();
    }
}

impl HomeView {
    /// Serves the tree below `root` (an `O_PATH` directory: the process' root). `groups` are the
    /// job's supplementary groups. `token` is 16 random bytes; they name the directory of handles, so
    /// that a program that looks through its root does not trip over it.
    ///
    /// Raises this process' limit of open descriptors, since a node is one. Needs to be root to act
    /// for others.
    pub fn new(root: OwnedFd, groups: Vec<u32>, token: [u8; 16]) -> io::Result<Arc<HomeView>> {
        thread_kick::prepare()?;
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
        let raised = soft < hard && setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok();
        let descriptors_allowed = if raised { hard } else { soft };
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let descriptors = nix::fcntl::open("/proc/self/fd", flags, Mode::empty())?;
        let devices = Devices::default();
        let found = devices.find(root.as_fd())?;
        let poller = Poller::new()?;
        let shared = Arc::new(Shared {
            descriptors,
            token,
            token_name: token_name(&token),
            nodes: Nodes::new(root, &found, Keeper::new(descriptors_allowed)),
            devices,
            handles: Handles::default(),
            identity: Identity::new(groups),
            connections: RwLock::default(),
            next_connection: AtomicU64::new(1),
            workers: Pool::new("home-fs", WORKERS, BACKLOG),
            waiters: Pool::new("home-stream", WAITERS, 0),
            poller: Arc::clone(&poller),
            waits: Mutex::default(),
            intents: Mutex::default(),
            intents_count: AtomicUsize::new(0),
        });
        let view = Arc::new(HomeView { shared: Arc::clone(&shared) });
        std::thread::Builder::new()
            .name("home-poll".into())
            .spawn(move || poller.run(|handle| streams::notify(&shared, handle)))?;
        Ok(view)
    }

    /// The deputy's process id: requests are then limited to its ids and made with its groups, and
    /// its place in its session decides about reading from a terminal. Call it again when the
    /// process has been home, where it may have changed.
    pub fn set_deputy(&self, pid: i32) -> io::Result<()> {
        self.shared.identity.set_deputy(pid)
    }

    /// The process ids of the deputies of a subtree: whoever of them is in the foreground of a terminal
    /// may use it.
    pub fn set_family(&self, pids: Vec<i32>) {
        self.shared.identity.set_family(pids);
    }

    /// Lets requests name these ids as well: those of another process of the same subtree.
    pub fn allow(&self, uids: &[u32], gids: &[u32]) {
        self.shared.identity.allow(uids, gids);
    }

    /// Adds a host, whose frames come by [`HomeView::deliver`] with the number returned.
    pub fn connect(&self, wire: Arc<dyn Wire>) -> u64 {
        let id = self.shared.next_connection.fetch_add(1, Ordering::SeqCst);
        let connection = Arc::new(Connection { id, wire, alive: AtomicBool::new(true) });
        self.shared.connections.write().unwrap_or_else(PoisonError::into_inner).insert(id, connection);
        id
    }

    /// A frame from a host: one FUSE request. It is done on another thread; when too many are
    /// waiting, this waits too. Frames that are no request, or of a host that is not connected, are
    /// dropped.
    pub fn deliver(&self, connection: u64, frame: &[u8]) {
        let Some((header, body)) = InHeader::parse(frame) else {
            tracing::warn!(len = frame.len(), "a host sent a frame that is no FUSE request");
            return;
        };
        let Some(connection) = self.shared.connection(connection) else { return };
        match header.opcode {
            op::FORGET | op::BATCH_FORGET => {
                // A forget without a count forgets nothing.
                let _ = names::forget(&self.shared, &connection, &header, body);
            }
            op::INTERRUPT => streams::interrupt(&self.shared, &connection, body),
            _ => exec::submit(&self.shared, connection, header, frame),
        }
    }

    /// The host is gone: its requests get no answer, its waits end, and handles that only it had
    /// open end (unless they are held).
    pub fn disconnect(&self, connection: u64) {
        let removed = {
            let mut all = self.shared.connections.write().unwrap_or_else(PoisonError::into_inner);
            all.remove(&connection)
        };
        let Some(removed) = removed else { return };
        removed.alive.store(false, Ordering::SeqCst);
        self.shared.cancel_waits(|c| c == connection);
        let mut intents = self.shared.intents.lock().unwrap_or_else(PoisonError::into_inner);
        intents.retain(|(c, _), _| *c != connection);
        self.shared.intents_count.store(intents.len(), Ordering::SeqCst);
        drop(intents);
        self.shared.nodes.forget_connection(connection);
        self.shared.handles.release_connection(connection);
    }

    /// Hands an open file of the deputy over: opening [`HomeView::handle_path`] on the host then
    /// opens this very description. Open it there as root, since the guest's user may own a
    /// descriptor of a file he could not open, and with the description's own flags.
    ///
    /// The handle ends, and with it this descriptor, when its last open on a host has ended.
    pub fn add_handle(&self, file: OwnedFd, kind: HandleKind) -> io::Result<u64> {
        let handle = self.shared.hand_over(file, kind)?;
        Ok(handle)
    }

    /// The path of a handle in the guest's file system.
    pub fn handle_path(&self, handle: u64) -> PathBuf {
        token_path(&self.shared.token, handle)
    }

    /// A descriptor of a handle's open file description, also of one the guest has opened itself.
    pub fn handle_file(&self, handle: u64) -> Option<OwnedFd> {
        self.shared.handles.get(handle).ok()?.file.try_clone().ok()
    }

    /// The same by the handle's path in the guest's file system, as mappings have it; `None` if it is no handle's.
    pub fn file_at(&self, path: &[u8]) -> Option<OwnedFd> {
        let directory = path.strip_prefix(b"/")?.strip_prefix(self.shared.token_name.as_bytes())?;
        let handle = names::named_handle(&self.shared, directory.strip_prefix(b"/")?).ok()?;
        handle.file.try_clone().ok()
    }

    /// A text for people, in which paths of handles become the names that their files have at home.
    pub fn with_names(&self, text: &str) -> String {
        let directory = format!("/{}/", self.shared.token_name);
        let mut parts = text.split(directory.as_str());
        let mut out = parts.next().unwrap_or_default().to_string();
        for part in parts {
            let (name, rest) =
                part.split_at(part.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(part.len()));
            match self.name_at_home(name) {
                Some(known) => out.push_str(&known),
                None => out.extend([directory.as_str(), name]),
            }
            out.push_str(rest);
        }
        out
    }

    fn name_at_home(&self, name: &str) -> Option<String> {
        let handle = names::named_handle(&self.shared, name.as_bytes()).ok()?;
        let link =
            nix::fcntl::readlinkat(self.shared.descriptors.as_fd(), number(&handle.file).as_str()).ok()?;
        Some(link.to_string_lossy().into_owned())
    }

    /// Keeps all handles as long as the guard lives: during a move from host to host or home, in
    /// which the old place closes what the new one is still to open.
    pub fn hold(&self) -> HandleHold {
        self.shared.handles.hold();
        HandleHold { shared: Arc::clone(&self.shared) }
    }

    /// Calls `call` with the number of each handed-over handle that has ended: the deputy's own
    /// descriptor may have to be closed too, or the other end of a pipe sees no end.
    pub fn set_on_closed(&self, call: impl Fn(u64) + Send + Sync + 'static) {
        self.shared.handles.set_on_closed(Arc::new(call));
    }

    /// Ends all handles at once.
    pub fn release_all(&self) {
        self.shared.cancel_waits(|_| true);
        self.shared.handles.clear();
    }

    /// Keeps about so many nodes' descriptors open, instead of half of what the process may have.
    pub fn set_descriptor_limit(&self, limit: usize) {
        self.shared.nodes.keeper.set_limit(limit);
    }

    /// How many nodes' descriptors are open.
    pub fn descriptors(&self) -> usize {
        self.shared.nodes.keeper.open()
    }

    /// Numbers of nodes and of handles held, for tests and for whoever wonders about memory.
    pub fn counts(&self) -> (usize, usize) {
        (self.shared.nodes.len(), self.shared.handles.len())
    }
}

impl Drop for HomeView {
    fn drop(&mut self) {
        self.shared.connections.write().unwrap_or_else(PoisonError::into_inner).clear();
        self.release_all();
        self.shared.workers.close();
        self.shared.waiters.close();
        self.shared.poller.close();
    }
}

impl Shared {
    fn connection(&self, id: u64) -> Option<Arc<Connection>> {
        self.connections.read().unwrap_or_else(PoisonError::into_inner).get(&id).map(Arc::clone)
    }

    fn cancel_waits(&self, of: impl Fn(u64) -> bool) {
        let waits: Vec<Arc<Wait>> = {
            let all = self.waits.lock().unwrap_or_else(PoisonError::into_inner);
            all.iter().filter(|((c, _), _)| of(*c)).map(|(_, w)| Arc::clone(w)).collect()
        };
        for wait in waits {
            self.cancel(wait);
        }
    }

    fn cancel(&self, wait: Arc<Wait>) {
        if wait.cancel() {
            self.poller.keep_kicking(wait);
        }
    }

    /// Opens what `fd` (often `O_PATH`) stands for anew, with `flags`.
    fn reopen(&self, fd: impl AsFd, flags: OFlag) -> Answer<OwnedFd> {
        let flags = flags | OFlag::O_CLOEXEC | OFlag::O_NOCTTY;
        nix::fcntl::openat(self.descriptors.as_fd(), number(fd).as_str(), flags, Mode::empty())
    }
}

/// The descriptor's name in `/proc/self/fd`.
fn number(fd: impl AsFd) -> String {
    use std::os::fd::AsRawFd;
    fd.as_fd().as_raw_fd().to_string()
}

/// One request being done.
struct Call<'a> {
    shared: &'a Arc<Shared>,
    connection: &'a Arc<Connection>,
    thread: &'a mut Thread,
    header: InHeader,
    wait: Option<Arc<Wait>>,
}

impl Call<'_> {
    /// Acts for the caller from here on.
    fn assume(&mut self) {
        self.thread.assume(&self.shared.identity, self.header.uid, self.header.gid);
    }
}

/// How an operation ended that did not fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Done {
    /// The reply is complete.
    Reply,
    /// A thread of its own goes on with it and will answer.
    Later,
}
