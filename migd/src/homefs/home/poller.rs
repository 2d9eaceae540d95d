//! Tells hosts when a stream may have become ready, and keeps kicking what was cancelled.
//!
//! Each stream that was ever polled is in one epoll, edge-triggered: an edge at home is what an
//! edge-triggered epoll on the host is to see. An edge is passed on only if a host has polled since
//! the last (FUSE_POLL_SCHEDULE_NOTIFY), as its next poll will ask for the state anyway.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::handles::Handle;
use super::thread::Wait;
use crate::homefs::abi::Answer;

/// Events taken at once.
const BATCH: usize = 64;
/// How often a cancelled wait is kicked until it has ended.
const KICK_EVERY: Duration = Duration::from_millis(20);
/// Polls of one stream that can wait for its next edge; more share those (all are woken).
const MAX_ARMED: usize = 1024;
/// Epoll's word for "something for the poller itself".
const OWN: u64 = u64::MAX;

/// The poller's shared part.
pub struct Poller {
    epoll: Epoll,
    own: EventFd,
    cancelled: Mutex<Vec<Arc<Wait>>>,
    closed: AtomicBool,
}

impl Poller {
    /// One without a thread yet.
    pub fn new() -> io::Result<Arc<Poller>> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let own = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        epoll.add(own.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, OWN))?;
        Ok(Arc::new(Poller { epoll, own, cancelled: Mutex::default(), closed: AtomicBool::new(false) }))
    }

    /// Wakes (`connection`, `kernel`) at the next edge of `handle`.
    pub fn arm(self: &Arc<Self>, handle: &Handle, connection: u64, kernel: u64) -> Answer<()> {
        let Some(stream) = handle.stream() else { return Ok(()) };
        let mut watch = stream.watch.lock().unwrap_or_else(PoisonError::into_inner);
        if watch.poller.is_none() {
            let all = EpollFlags::EPOLLIN
                | EpollFlags::EPOLLOUT
                | EpollFlags::EPOLLPRI
                | EpollFlags::EPOLLRDHUP
                | EpollFlags::EPOLLET;
            match self.epoll.add(handle.file.as_fd(), EpollEvent::new(all, handle.id)) {
                // EPERM: it is always ready, as /dev/null is. EEXIST: the same description has a
                // handle of the same descriptor number behind it; cannot be, but does no harm.
                Ok(()) | Err(Errno::EPERM | Errno::EEXIST) => watch.poller = Some(Arc::clone(self)),
                Err(errno) => return Err(errno),
            }
        }
        let who = (connection, kernel);
        if !watch.armed.contains(&who) && watch.armed.len() < MAX_ARMED {
            watch.armed.push(who);
        }
        Ok(())
    }

    /// Forgets a file. Closing alone would not do it, while others at home share the description.
    pub fn forget(&self, file: impl AsFd) {
        let _ = self.epoll.delete(file);
    }

    /// Kicks `wait` until its thread has noticed.
    pub fn keep_kicking(&self, wait: Arc<Wait>) {
        self.cancelled.lock().unwrap_or_else(PoisonError::into_inner).push(wait);
        let _ = self.own.write(1);
    }

    /// Ends [`Poller::run`].
    pub fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        let _ = self.own.write(1);
    }

    /// The thread: calls `edge` with each handle that had one.
    pub fn run(&self, edge: impl Fn(u64)) {
        let mut events = [EpollEvent::empty(); BATCH];
        while !self.closed.load(Ordering::SeqCst) {
            let timeout = if self.kick() { EpollTimeout::try_from(KICK_EVERY).ok() } else { None };
            let n = match self.epoll.wait(&mut events, timeout.unwrap_or(EpollTimeout::NONE)) {
                Ok(n) => n,
                Err(Errno::EINTR) => continue,
                Err(errno) => {
                    tracing::error!(%errno, "polling for guests failed; their poll calls will not wake");
                    return;
                }
            };
            for event in events.iter().take(n) {
                match event.data() {
                    OWN => drop(self.own.read()),
                    id => edge(id),
                }
            }
        }
    }

    /// True while something is left to kick.
    fn kick(&self) -> bool {
        let mut list = self.cancelled.lock().unwrap_or_else(PoisonError::into_inner);
        list.retain(|wait| wait.cancel());
        !list.is_empty()
    }
}
