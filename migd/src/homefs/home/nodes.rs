//! The table of nodes: what the host's kernel knows by number, and home by an `O_PATH` descriptor
//! (see `kept`).
//!
//! Nodes outlive a host: each connection has its own count of lookups, and a node goes when no
//! connection counts it any more.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use nix::errno::Errno;

use super::devices::{Device, Found};
use super::handles::Handle;
use super::kept::{Keeper, Kept};
use crate::homefs::abi::{Answer, ROOT_ID};

/// The directory of handles, `/.migd-<token>`.
pub const TOKEN_DIR_ID: u64 = 2;
/// Nodes at most; the limit of open descriptors is normally met first.
const MAX_NODES: usize = 1 << 20;

/// What makes two lookups the same node. The mount counts: the same directory reached by two bind
/// mounts has different mounts below it. So does the view: below a directory handle the tree is shown
/// a second time, since the kernel allows a directory only one place in its tree (`d_splice_alias`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    /// 0 for the tree itself, else the directory handle it was reached by.
    pub view: u64,
    /// Mount.
    pub mount: u64,
    /// File system.
    pub dev: u64,
    /// Inode.
    pub ino: u64,
}

/// What stands behind a node.
pub enum Body {
    /// A file of the tree.
    File(Kept),
    /// An open stream or directory of the deputy. The handle may end before the node does: the
    /// kernel may keep the name for a while, and a pipe's other end must not wait for that.
    Handle(Weak<Handle>, bool), // and whether it is a stream
    /// The directory of handles.
    TokenDir,
}

/// One file as the host's kernel knows it.
pub struct Node {
    /// Its number.
    pub id: u64,
    /// What it is.
    pub body: Body,
    /// View its subdirectories belong to; the handle's number for a handle's node.
    pub view: u64,
    /// Type at home (`S_IFMT` bits).
    pub kind: u32,
    /// Where it lies; absent for the directory of handles.
    pub device: Option<Device>,
}

impl Node {
    /// A descriptor for it; `EPERM` for the directory of handles, in which nothing can be made.
    pub fn fd(&self) -> Answer<NodeFd> {
        match &self.body {
            Body::File(kept) => kept.fd().map(NodeFd::File),
            Body::Handle(handle, _) => handle.upgrade().map(NodeFd::Handle).ok_or(Errno::ESTALE),
            Body::TokenDir => Err(Errno::EPERM),
        }
    }

    /// Whether the host's kernel is told that it is a regular file although it is a stream.
    pub fn is_stream(&self) -> bool {
        matches!(self.kind, libc::S_IFIFO | libc::S_IFCHR) || matches!(&self.body, Body::Handle(_, true))
    }
}

/// A node's descriptor, kept open meanwhile.
pub enum NodeFd {
    /// The node's own.
    File(Arc<OwnedFd>),
    /// Its handle's.
    Handle(Arc<Handle>),
}

impl AsFd for NodeFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            NodeFd::File(fd) => fd.as_fd(),
            NodeFd::Handle(handle) => handle.file.as_fd(),
        }
    }
}

struct Entry {
    node: Arc<Node>,
    key: Option<Key>,
    /// Lookups by connection; nearly always one.
    lookups: Vec<(u64, u64)>,
}

#[derive(Default)]
struct Table {
    nodes: HashMap<u64, Entry>,
    by_key: HashMap<Key, u64>,
    next: u64,
}

/// All nodes.
pub struct Nodes {
    table: Mutex<Table>,
    /// Of the nodes' descriptors.
    pub keeper: Arc<Keeper>,
    fixed: [Arc<Node>; 2],
}

impl Nodes {
    /// A table with the root in it.
    pub fn new(root: OwnedFd, found: &Found, keeper: Arc<Keeper>) -> Nodes {
        let kind = libc::S_IFDIR;
        let body = Body::File(Kept::new(&keeper, found.mount(), root));
        let root = Node { id: ROOT_ID, body, view: 0, kind, device: Some(found.device) };
        let token = Node { id: TOKEN_DIR_ID, body: Body::TokenDir, view: 0, kind, device: None };
        let table = Table { next: TOKEN_DIR_ID + 1, ..Table::default() };
        Nodes { table: Mutex::new(table), keeper, fixed: [Arc::new(root), Arc::new(token)] }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The node `id`; `ESTALE` if it is not, or no longer, known.
    pub fn get(&self, id: u64) -> Answer<Arc<Node>> {
        match id {
            ROOT_ID => Ok(Arc::clone(&self.fixed[0])),
            TOKEN_DIR_ID => Ok(Arc::clone(&self.fixed[1])),
            _ => self.lock().nodes.get(&id).map(|e| Arc::clone(&e.node)).ok_or(Errno::ESTALE),
        }
    }

    /// The number for the file `fd` with this `key`, counted as looked up once by `connection`.
    /// Without a key it gets a node of its own.
    pub fn enter_file(
        &self,
        connection: u64,
        key: Option<Key>,
        mount: u64,
        fd: OwnedFd,
        make: impl FnOnce(u64, Kept) -> Node,
    ) -> Answer<u64> {
        let mut guard = self.lock();
        let table = &mut *guard;
        let known = key.and_then(|k| table.by_key.get(&k).copied());
        let mut fd = fd;
        if let Some(entry) = known.and_then(|id| table.nodes.get_mut(&id))
            && let Body::File(kept) = &entry.node.body
        {
            match kept.is(fd) {
                Ok(()) => {
                    entry.count(connection);
                    let id = entry.node.id;
                    self.keep_few(table);
                    return Ok(id);
                }
                // Another file in a removed one's place: the old node has no name any more.
                Err(other) => fd = other,
            }
            entry.key = None;
        }
        let kept = Kept::new(&self.keeper, mount, fd);
        let id = table.insert(connection, key, |id| make(id, kept))?;
        self.keep_few(table);
        Ok(id)
    }

    fn keep_few(&self, table: &Table) {
        if self.keeper.is_full() {
            self.keeper.close_some(table.nodes.values().filter_map(|e| match &e.node.body {
                Body::File(kept) => Some(kept),
                _ => None,
            }));
        }
    }

    /// The number for a node without a file of its own.
    pub fn enter(&self, connection: u64, key: Key, make: impl FnOnce(u64) -> Node) -> Answer<u64> {
        let mut guard = self.lock();
        let table = &mut *guard;
        if let Some(id) = table.by_key.get(&key).copied()
            && let Some(entry) = table.nodes.get_mut(&id)
        {
            entry.count(connection);
            return Ok(id);
        }
        table.insert(connection, Some(key), make)
    }

    /// The kernel behind `connection` has forgotten `count` lookups of `id`.
    pub fn forget(&self, connection: u64, id: u64, count: u64) {
        let mut guard = self.lock();
        let table = &mut *guard;
        let Some(entry) = table.nodes.get_mut(&id) else { return };
        if let Some(own) = entry.lookups.iter_mut().find(|(c, _)| *c == connection) {
            own.1 = own.1.saturating_sub(count);
        }
        entry.lookups.retain(|(_, n)| *n > 0);
        let gone = if entry.lookups.is_empty() { table.remove(id) } else { None };
        drop(guard); // closing a file may take time
        drop(gone);
    }

    /// The kernel behind `connection` is gone with all it knew.
    pub fn forget_connection(&self, connection: u64) {
        let mut table = self.lock();
        for entry in table.nodes.values_mut() {
            entry.lookups.retain(|(c, _)| *c != connection);
        }
        let unused: Vec<u64> =
            table.nodes.iter().filter(|(_, e)| e.lookups.is_empty()).map(|(id, _)| *id).collect();
        let gone: Vec<_> = unused.into_iter().filter_map(|id| table.remove(id)).collect();
        drop(table);
        drop(gone);
    }

    /// How many there are, besides the two fixed ones.
    pub fn len(&self) -> usize {
        self.lock().nodes.len()
    }
}

impl Entry {
    fn count(&mut self, connection: u64) {
        match self.lookups.iter_mut().find(|(c, _)| *c == connection) {
            Some((_, count)) => *count = count.saturating_add(1),
            None => self.lookups.push((connection, 1)),
        }
    }
}

impl Table {
    fn insert(&mut self, connection: u64, key: Option<Key>, make: impl FnOnce(u64) -> Node) -> Answer<u64> {
        if self.nodes.len() >= MAX_NODES {
            return Err(Errno::ENFILE);
        }
        let id = self.next;
        self.next += 1;
        if let Some(key) = key {
            self.by_key.insert(key, id);
        }
        let node = Arc::new(make(id));
        self.nodes.insert(id, Entry { node, key, lookups: vec![(connection, 1)] });
        Ok(id)
    }

    fn remove(&mut self, id: u64) -> Option<Entry> {
        let entry = self.nodes.remove(&id)?;
        if let Some(key) = &entry.key {
            self.by_key.remove(key);
        }
        Some(entry)
    }
}
