//! Where a shepherd's one ptrace thread hears of everything: what other threads push, and changes of
//! state of its tracees and children.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Events that may wait before the oldest is refused: far more than the protocol can have under way.
const LIMIT: usize = 65_536;

struct Shared<T> {
    queue: Mutex<VecDeque<T>>,
    wake: EventFd,
}

/// The pushing side.
pub struct Sender<T>(Arc<Shared<T>>);

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Sender(Arc::clone(&self.0))
    }
}

impl<T> Sender<T> {
    /// Adds an event; `false` if far too many wait.
    pub fn push(&self, event: T) -> bool {
        let mut queue = self.0.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.len() >= LIMIT {
            return false;
        }
        queue.push_back(event);
        // Only fails when the counter is full, and then the reader is awake anyway.
        let _ = self.0.wake.write(1);
        true
    }
}

/// The ptrace thread's side. Made once, before any other thread: it blocks SIGCHLD for all of them.
pub struct Inbox<T> {
    shared: Arc<Shared<T>>,
    children: SignalFd,
}

impl<T> Inbox<T> {
    /// Blocks SIGCHLD in this thread and those it will start.
    pub fn new() -> io::Result<Inbox<T>> {
        let mut set = SigSet::empty();
        set.add(Signal::SIGCHLD);
        set.thread_block()?;
        let children = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Inbox { shared: Arc::new(Shared { queue: Mutex::default(), wake }), children })
    }

    /// A pushing side.
    pub fn sender(&self) -> Sender<T> {
        Sender(Arc::clone(&self.shared))
    }

    /// The next event, without waiting.
    pub fn pop(&self) -> Option<T> {
        self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    /// Puts an event back to the front.
    pub fn unpop(&self, event: T) {
        self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner).push_front(event);
    }

    /// Waits until there is something: an event, a SIGCHLD, something readable on `more`, or time out.
    pub fn wait(&self, until: Instant, more: &[BorrowedFd<'_>]) -> io::Result<()> {
        if !self.shared.queue.lock().unwrap_or_else(PoisonError::into_inner).is_empty() {
            return Ok(());
        }
        let left = until.saturating_duration_since(Instant::now()) + Duration::from_micros(999);
        let timeout = PollTimeout::try_from(left.as_millis().min(60_000) as i32).unwrap_or(PollTimeout::ZERO);
        let mut fds = vec![
            PollFd::new(self.shared.wake.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.children.as_fd(), PollFlags::POLLIN),
        ];
        fds.extend(more.iter().map(|&fd| PollFd::new(fd, PollFlags::POLLIN)));
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let _ = self.shared.wake.read();
        // Several SIGCHLD may have become one: the caller asks each of its tracees.
        while let Ok(Some(_)) = self.children.read_signal() {}
        Ok(())
    }
}
