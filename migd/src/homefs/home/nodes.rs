//! The table of nodes: what the host's kernel knows by number, and home by an `O_PATH` descriptor.
//!
//! With time-outs of 0 the kernel forgets a node as soon as no open file, mapping, working directory
//! or path walk uses it, so the table holds little more than what the guest has in use. A node pins
//! its inode, so its number at home is not used for another file as long as the node lives.
//!
//! Nodes outlive a host: each connection has its own count of lookups, and a node goes when no
//! connection counts it any more.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;

use super::devices::Device;
use super::handles::Handle;
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
    /// A file of the tree (`O_PATH`).
    File(OwnedFd),
    /// An open stream or directory of the deputy.
    Handle(Arc<Handle>),
    /// The directory of handles.
    TokenDir,
}

/// One file as the host's kernel knows it.
pub struct Node {
    /// Its number.
    pub id: u64,
    /// What it is.
    pub body: Body,
    /// View its subdirectories belong to.
    pub view: u64,
    /// Type at home (`S_IFMT` bits).
    pub kind: u32,
    /// Where it lies; absent for the directory of handles.
    pub device: Option<Device>,
}

impl Node {
    /// A descriptor for it; `EPERM` for the directory of handles, in which nothing can be made.
    pub fn fd(&self) -> Answer<BorrowedFd<'_>> {
        match &self.body {
            Body::File(fd) => Ok(fd.as_fd()),
            Body::Handle(handle) => Ok(handle.file.as_fd()),
            Body::TokenDir => Err(Errno::EPERM),
        }
    }

    /// Whether the host's kernel is told that it is a regular file although it is a stream.
    pub fn is_stream(&self) -> bool {
        matches!(self.kind, libc::S_IFIFO | libc::S_IFCHR)
            || matches!(&self.body, Body::Handle(h) if h.is_stream())
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
    fixed: [Arc<Node>; 2],
}

impl Nodes {
    /// A table with the root in it.
    pub fn new(root: OwnedFd, device: Device) -> Nodes {
        let kind = libc::S_IFDIR;
        let root = Node { id: ROOT_ID, body: Body::File(root), view: 0, kind, device: Some(device) };
        let token = Node { id: TOKEN_DIR_ID, body: Body::TokenDir, view: 0, kind, device: None };
        let table = Table { next: TOKEN_DIR_ID + 1, ..Table::default() };
        Nodes { table: Mutex::new(table), fixed: [Arc::new(root), Arc::new(token)] }
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

    /// The number for the file `key`, counted as looked up once by `connection`. A key of `None`
    /// makes a node of its own.
    pub fn enter(&self, connection: u64, key: Option<Key>, make: impl FnOnce(u64) -> Node) -> Answer<u64> {
        let mut guard = self.lock();
        let table = &mut *guard;
        if let Some(id) = key.and_then(|k| table.by_key.get(&k).copied())
            && let Some(entry) = table.nodes.get_mut(&id)
        {
            match entry.lookups.iter_mut().find(|(c, _)| *c == connection) {
                Some((_, count)) => *count = count.saturating_add(1),
                None => entry.lookups.push((connection, 1)),
            }
            return Ok(id);
        }
        if table.nodes.len() >= MAX_NODES {
            return Err(Errno::ENFILE);
        }
        let id = table.next;
        table.next += 1;
        if let Some(key) = key {
            table.by_key.insert(key, id);
        }
        let node = Arc::new(make(id));
        table.nodes.insert(id, Entry { node, key, lookups: vec![(connection, 1)] });
        Ok(id)
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

impl Table {
    fn remove(&mut self, id: u64) -> Option<Entry> {
        let entry = self.nodes.remove(&id)?;
        if let Some(key) = &entry.key {
            self.by_key.remove(key);
        }
        Some(entry)
    }
}
