//! The `O_PATH` descriptors of nodes, of which only so many are kept open.
//!
//! The host's kernel remembers nodes as long as it has memory for them, which can be far more than
//! the descriptors a process may have. Those unused for longest are closed and found again by their
//! file handle, which includes the inode's generation, so another file in a removed one's place is
//! not mistaken for it. File systems without handles keep their descriptors.
//!
//! A mount one of whose files was closed so is held by a descriptor, as it would be by the node.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use checkpoint::sys::file_handle::{self, FileHandle};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use nix::unistd::Uid;

use crate::homefs::abi::Answer;

/// Descriptors kept at most, however many the process may have.
const MOST: usize = 16384;

/// What the descriptors of a view have in common.
#[derive(Debug)]
pub struct Keeper {
    /// A descriptor in each mount, for opening by handle; absent where that does not work.
    mounts: Mutex<HashMap<u64, Option<Arc<OwnedFd>>>>,
    open: AtomicUsize,
    clock: AtomicU64,
    limit: AtomicUsize,
    /// Number of open descriptors at which closing some is worth the next try.
    next_try: AtomicUsize,
}

impl Keeper {
    /// One for a process that may have `descriptors`.
    pub fn new(descriptors: u64) -> Arc<Keeper> {
        let limit = usize::try_from(descriptors / 2).unwrap_or(MOST).min(MOST);
        Arc::new(Keeper {
            mounts: Mutex::default(),
            open: AtomicUsize::new(0),
            clock: AtomicU64::new(0),
            limit: AtomicUsize::new(limit),
            next_try: AtomicUsize::new(limit),
        })
    }

    /// Keeps `limit` descriptors from now on.
    pub fn set_limit(&self, limit: usize) {
        self.limit.store(limit, Ordering::Relaxed);
        self.next_try.store(limit, Ordering::Relaxed);
    }

    /// Whether it is time to close some.
    pub fn is_full(&self) -> bool {
        self.open.load(Ordering::Relaxed) > self.next_try.load(Ordering::Relaxed)
    }

    /// How many are open.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// Closes the eighth of `all` that is unused for longest, as far as they can be found again.
    pub fn close_some<'a>(&self, all: impl Iterator<Item = &'a Kept>) {
        let mut all: Vec<&Kept> = all.filter(|k| k.lock().is_some()).collect();
        let limit = self.limit.load(Ordering::Relaxed);
        let many = (limit / 8 + self.open().saturating_sub(limit)).min(all.len());
        if many == 0 {
            return;
        }
        all.select_nth_unstable_by_key(many - 1, |k| k.used.load(Ordering::Relaxed));
        let closed = all[..many].iter().filter(|k| k.close()).count();
        // Where nothing can be closed, it is not tried again with every lookup.
        let pause = if closed == 0 { self.open() + limit / 8 } else { limit };
        self.next_try.store(pause.max(limit), Ordering::Relaxed);
    }

    /// The descriptor for `mount`, made from the directory `file` in it if there is none yet.
    fn anchor(&self, mount: u64, file: &OwnedFd, handle: &FileHandle) -> Option<Arc<OwnedFd>> {
        let mut mounts = self.mounts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = mounts.get(&mount) {
            return known.clone();
        }
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        // Fails for all but directories, one of which will come along.
        let anchor = as_root(|| nix::fcntl::openat(file, ".", flags, Mode::empty())).ok()?;
        let works = as_root(|| file_handle::open(anchor.as_fd(), handle, libc::O_PATH)).is_ok();
        let anchor = works.then(|| Arc::new(anchor));
        mounts.insert(mount, anchor.clone());
        anchor
    }
}

/// Runs `call` with the process' own rights on a thread that may be acting for a user.
fn as_root<T>(call: impl FnOnce() -> T) -> T {
    let user = nix::unistd::setfsuid(Uid::from_raw(0));
    let result = call();
    nix::unistd::setfsuid(user);
    result
}

/// The descriptor of one node, open or not.
#[derive(Debug)]
pub struct Kept {
    keeper: Arc<Keeper>,
    mount: u64,
    file: Mutex<Option<Arc<OwnedFd>>>,
    handle: OnceLock<Option<FileHandle>>,
    used: AtomicU64,
}

impl Kept {
    /// Keeps `file`, which was reached by `mount`.
    pub fn new(keeper: &Arc<Keeper>, mount: u64, file: OwnedFd) -> Kept {
        keeper.open.fetch_add(1, Ordering::Relaxed);
        Kept {
            keeper: Arc::clone(keeper),
            mount,
            file: Mutex::new(Some(Arc::new(file))),
            handle: OnceLock::new(),
            used: AtomicU64::new(keeper.clock.fetch_add(1, Ordering::Relaxed)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<OwnedFd>>> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The descriptor, opened again if need be; `ESTALE` if the file is no more.
    pub fn fd(&self) -> Answer<Arc<OwnedFd>> {
        self.used.store(self.keeper.clock.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
        let mut file = self.lock();
        if let Some(open) = &*file {
            return Ok(Arc::clone(open));
        }
        let handle = self.handle.get().and_then(Option::as_ref).ok_or(Errno::ESTALE)?;
        let anchor = {
            let mounts = self.keeper.mounts.lock().unwrap_or_else(PoisonError::into_inner);
            mounts.get(&self.mount).cloned().flatten().ok_or(Errno::ESTALE)?
        };
        let flags = libc::O_PATH | libc::O_NOFOLLOW;
        let opened = as_root(|| file_handle::open(anchor.as_fd(), handle, flags))
            .map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))?;
        let opened = Arc::new(opened);
        self.keeper.open.fetch_add(1, Ordering::Relaxed);
        *file = Some(Arc::clone(&opened));
        Ok(opened)
    }

    /// Whether `other`, which has the same number on the same mount, is the same file. If it is, and
    /// this one is closed, this takes it over; if it is not, it comes back.
    pub fn is(&self, other: OwnedFd) -> Result<(), OwnedFd> {
        let mut file = self.lock();
        if file.is_some() {
            return Ok(()); // an open descriptor keeps the number from being used again
        }
        match self.handle.get() {
            Some(Some(handle)) if file_handle::of(other.as_fd()).is_ok_and(|h| h == *handle) => {
                self.keeper.open.fetch_add(1, Ordering::Relaxed);
                *file = Some(Arc::new(other));
                Ok(())
            }
            _ => Err(other),
        }
    }

    /// Closes the descriptor if nobody uses it and it can be found again.
    fn close(&self) -> bool {
        let mut file = self.lock();
        let Some(open) = file.as_ref().filter(|f| Arc::strong_count(f) == 1) else { return false };
        let handle = self.handle.get_or_init(|| file_handle::of(open.as_fd()).ok());
        let Some(handle) = handle else { return false };
        if self.keeper.anchor(self.mount, open, handle).is_none() {
            return false;
        }
        *file = None;
        self.keeper.open.fetch_sub(1, Ordering::Relaxed);
        true
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        if self.lock().is_some() {
            self.keeper.open.fetch_sub(1, Ordering::Relaxed);
        }
    }
}
