//! The threads that do the work at home, each under the identity of the caller it works for.
//!
//! Linux keeps the file system ids, the supplementary groups and the umask per thread (the umask
//! once it is unshared), so one process can act for a user without giving up its own rights:
//! with `setfsuid` to a user the kernel drops the file-related capabilities of the thread
//! (capabilities(7), "Effect of user ID changes").

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use checkpoint::sys::{fscred, thread_kick};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::CloneFlags;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid};

use super::identity::Identity;
use crate::homefs::abi::{Answer, Reply};

/// One worker.
pub struct Thread {
    /// The reply it is making.
    pub reply: Reply,
    /// Room for directory entries.
    pub scratch: Vec<u8>,
    uid: Option<u32>,
    gid: Option<u32>,
    groups: u64,
    umask: Option<u32>,
    wake: Arc<Wake>,
}

impl Thread {
    /// For the calling thread, which is changed for good: use it on threads of one's own only.
    pub fn new() -> std::io::Result<Thread> {
        nix::sched::unshare(CloneFlags::CLONE_FS)?;
        let mut blocked = SigSet::empty();
        for signal in [Signal::SIGPIPE, Signal::SIGTTIN, Signal::SIGTTOU, Signal::SIGXFSZ] {
            blocked.add(signal);
        }
        blocked.thread_block()?;
        thread_kick::accept()?;
        let wake = Wake {
            tid: nix::unistd::gettid().as_raw(),
            event: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
        };
        Ok(Thread {
            reply: Reply::default(),
            scratch: Vec::new(),
            uid: None,
            gid: None,
            groups: 0,
            umask: None,
            wake: Arc::new(wake),
        })
    }

    /// Acts for `uid` and `gid` (as far as `identity` allows) from here on.
    pub fn assume(&mut self, identity: &Identity, uid: u32, gid: u32) {
        let (uid, gid) = identity.squash(uid, gid);
        identity.refresh_groups(&mut self.groups, |groups| {
            if let Err(error) = fscred::set_thread_groups(groups) {
                tracing::warn!(%error, "the job's supplementary groups cannot be taken on");
            }
        });
        self.set_ids(uid, gid);
    }

    /// Acts as the process itself (root) from here on.
    pub fn assume_self(&mut self) {
        self.set_ids(0, 0);
    }

    fn set_ids(&mut self, uid: u32, gid: u32) {
        if self.gid != Some(gid) {
            nix::unistd::setfsgid(Gid::from_raw(gid));
            self.gid = Some(gid);
        }
        if self.uid != Some(uid) {
            nix::unistd::setfsuid(Uid::from_raw(uid));
            self.uid = Some(uid);
        }
    }

    /// Makes files with this umask from here on.
    pub fn umask(&mut self, umask: u32) {
        let umask = umask & 0o777;
        if self.umask != Some(umask) {
            nix::sys::stat::umask(Mode::from_bits_truncate(umask));
            self.umask = Some(umask);
        }
    }

    /// This thread's way to be woken.
    pub fn wake(&self) -> Arc<Wake> {
        Arc::clone(&self.wake)
    }

    /// Waits for one of `events` on `fd` (or an error there), for at most `timeout`. `EINTR` if the
    /// thread was woken instead.
    pub fn wait_for(&self, fd: impl AsFd, events: PollFlags, timeout: Option<Duration>) -> Answer<PollFlags> {
        let timeout = match timeout {
            Some(t) => PollTimeout::try_from(t).unwrap_or(PollTimeout::MAX),
            None => PollTimeout::NONE,
        };
        let event = self.wake.event.as_fd();
        let mut set = [PollFd::new(fd.as_fd(), events), PollFd::new(event, PollFlags::POLLIN)];
        match poll(&mut set, timeout) {
            Err(Errno::EINTR) => return Err(Errno::EINTR),
            Err(errno) => return Err(errno),
            Ok(_) => {}
        }
        if set[1].revents().is_some_and(|e| !e.is_empty()) {
            let _ = self.wake.event.read();
            return Err(Errno::EINTR);
        }
        Ok(set[0].revents().unwrap_or(PollFlags::empty()))
    }
}

/// How to bring a thread out of its wait.
pub struct Wake {
    tid: i32,
    event: EventFd,
}

/// A request that may wait for long, and can be cancelled: by the host for a signal, or because the
/// host is gone.
#[derive(Default)]
pub struct Wait {
    cancelled: AtomicBool,
    waiter: Mutex<Option<Arc<Wake>>>,
}

impl Wait {
    /// Whether it has been cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
    }

    /// Cancels it. True if a thread waits for it and may have to be kicked again, as it may have
    /// been about to enter a blocking call.
    pub fn cancel(&self) -> bool {
        self.cancelled.store(true, Ordering::SeqCst);
        let waiter = self.waiter.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(wake) = waiter.as_ref() else { return false };
        let _ = wake.event.write(1);
        let _ = thread_kick::kick(wake.tid);
        true
    }

    /// `thread` waits for it from here until [`Wait::leave`].
    pub fn enter(&self, thread: &Thread) {
        *self.waiter.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread.wake());
    }

    /// The wait is over.
    pub fn leave(&self, thread: &Thread) {
        *self.waiter.lock().unwrap_or_else(PoisonError::into_inner) = None;
        let _ = thread.wake.event.read();
    }
}

/// Work for a [`Pool`].
pub type Work = Box<dyn FnOnce(&mut Thread) + Send>;

/// Threads that come and go with the work: a thread for each piece, kept for a while after.
pub struct Pool {
    name: &'static str,
    limit: usize,
    /// Pieces that may wait for a thread when all are busy.
    backlog: usize,
    state: Mutex<PoolState>,
    work: Condvar,
    room: Condvar,
}

#[derive(Default)]
struct PoolState {
    queue: VecDeque<Work>,
    threads: usize,
    idle: usize,
    closed: bool,
}

/// An idle thread ends after so long.
const IDLE: Duration = Duration::from_secs(10);
/// Stack of a worker, bytes: nothing here is deep.
const STACK: usize = 256 << 10;

impl Pool {
    /// At most `limit` threads; `backlog` pieces of work may wait for one.
    pub fn new(name: &'static str, limit: usize, backlog: usize) -> Arc<Pool> {
        Arc::new(Pool {
            name,
            limit,
            backlog,
            state: Mutex::default(),
            work: Condvar::new(),
            room: Condvar::new(),
        })
    }

    /// Does `work` on one of the threads. With a full backlog it waits, or without one refuses and
    /// gives the work back.
    pub fn run(self: &Arc<Self>, work: Work) -> Result<(), Work> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while !state.closed && state.threads >= self.limit && state.queue.len() >= self.backlog + state.idle {
            if self.backlog == 0 {
                return Err(work);
            }
            state = self.room.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.closed {
            return Err(work);
        }
        state.queue.push_back(work);
        if state.queue.len() > state.idle && state.threads < self.limit {
            state.threads += 1;
            let pool = Arc::clone(self);
            let spawned = std::thread::Builder::new()
                .name(self.name.into())
                .stack_size(STACK)
                .spawn(move || pool.serve());
            if let Err(error) = spawned {
                state.threads -= 1;
                tracing::warn!(%error, "no further thread for the home file system");
                if state.threads == 0 {
                    return state.queue.pop_back().map_or(Ok(()), Err);
                }
            }
        }
        drop(state);
        self.work.notify_one();
        Ok(())
    }

    /// Ends the threads once they have done what is queued.
    pub fn close(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).closed = true;
        self.work.notify_all();
        self.room.notify_all();
    }

    fn serve(self: Arc<Self>) {
        let mut thread = match Thread::new() {
            Ok(thread) => thread,
            Err(error) => {
                tracing::error!(%error, "a worker of the home file system cannot start");
                self.state.lock().unwrap_or_else(PoisonError::into_inner).threads -= 1;
                return;
            }
        };
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(work) = state.queue.pop_front() {
                drop(state);
                self.room.notify_one();
                work(&mut thread);
                state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            if state.closed {
                break;
            }
            state.idle += 1;
            let (back, timed_out) =
                self.work.wait_timeout(state, IDLE).unwrap_or_else(PoisonError::into_inner);
            state = back;
            state.idle -= 1;
            if timed_out.timed_out() && state.queue.is_empty() {
                break;
            }
        }
        state.threads -= 1;
    }
}
