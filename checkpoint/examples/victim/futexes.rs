//! Locks in memory that processes share, with waiters in them: plain, with priority inheritance, robust.

use crate::calls::{map, ok};
use crate::{Meeting, same};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// In shared memory.
struct Shared {
    plain: libc::pthread_mutex_t,
    inheriting: libc::pthread_mutex_t,
    robust: libc::pthread_mutex_t,
    /// One process ends with this one locked.
    left: libc::pthread_mutex_t,
    condition: libc::pthread_cond_t,
    is_told: AtomicU32,
    waiting: AtomicU32,
    /// Changed under the two locks only.
    counts: [u32; 2],
}

/// What each of the others does.
const WAITERS: u32 = 6;

fn make(shared: *mut Shared) {
    // SAFETY: initialised as pthread_mutexattr_init(3) and its relatives show; nobody else has it yet.
    unsafe {
        let mut attributes = std::mem::zeroed();
        ok("pthread_mutexattr_init", libc::pthread_mutexattr_init(&raw mut attributes));
        libc::pthread_mutexattr_setpshared(&raw mut attributes, libc::PTHREAD_PROCESS_SHARED);
        ok("a plain one", libc::pthread_mutex_init(&raw mut (*shared).plain, &raw const attributes));
        libc::pthread_mutexattr_setrobust(&raw mut attributes, libc::PTHREAD_MUTEX_ROBUST);
        for robust in [&raw mut (*shared).robust, &raw mut (*shared).left] {
            ok("a robust one", libc::pthread_mutex_init(robust, &raw const attributes));
        }
        libc::pthread_mutexattr_setprotocol(&raw mut attributes, libc::PTHREAD_PRIO_INHERIT);
        ok(
            "an inheriting one",
            libc::pthread_mutex_init(&raw mut (*shared).inheriting, &raw const attributes),
        );
        let mut attributes = std::mem::zeroed();
        libc::pthread_condattr_init(&raw mut attributes);
        libc::pthread_condattr_setpshared(&raw mut attributes, libc::PTHREAD_PROCESS_SHARED);
        ok("a condition", libc::pthread_cond_init(&raw mut (*shared).condition, &raw const attributes));
    }
}

/// Takes a lock that is held, counts, and gives it back.
unsafe fn wait_for(shared: *mut Shared, lock: *mut libc::pthread_mutex_t, count: usize) -> bool {
    // SAFETY: the lock is one of those in the shared memory; counts are changed under their locks.
    unsafe {
        (*shared).waiting.fetch_add(1, Ordering::SeqCst);
        if libc::pthread_mutex_lock(lock) != 0 {
            return false;
        }
        (*shared).counts[count] += 1;
        libc::pthread_mutex_unlock(lock) == 0
    }
}

unsafe fn wait_for_condition(shared: *mut Shared) -> bool {
    // SAFETY: as above.
    unsafe {
        (*shared).waiting.fetch_add(1, Ordering::SeqCst);
        if libc::pthread_mutex_lock(&raw mut (*shared).robust) != 0 {
            return false;
        }
        while (*shared).is_told.load(Ordering::SeqCst) == 0 {
            if libc::pthread_cond_wait(&raw mut (*shared).condition, &raw mut (*shared).robust) != 0 {
                return false;
            }
        }
        libc::pthread_mutex_unlock(&raw mut (*shared).robust) == 0
    }
}

/// The n-th child: two wait for each thing.
fn child(shared: *mut Shared, n: u32) -> ! {
    // SAFETY: the memory is shared with the parent, which waits for this process.
    let is_right = unsafe {
        match n % 3 {
            0 => wait_for(shared, &raw mut (*shared).plain, 0),
            1 => wait_for(shared, &raw mut (*shared).inheriting, 1),
            _ => wait_for_condition(shared),
        }
    };
    if n == WAITERS - 1 {
        // SAFETY: as above.
        unsafe { libc::pthread_mutex_lock(&raw mut (*shared).left) };
    }
    // SAFETY: ends this process, without what the parent has registered.
    unsafe { libc::_exit(if is_right { 40 + n as i32 } else { 1 }) }
}

pub fn run(meeting: &Meeting) {
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    let shared: *mut Shared = map(0, 1, libc::PROT_READ | libc::PROT_WRITE, flags, -1).cast();
    make(shared);
    // SAFETY: the memory stays mapped, and is used by atomics or under its locks.
    let this = unsafe {
        ok("locking", libc::pthread_mutex_lock(&raw mut (*shared).plain));
        ok("locking", libc::pthread_mutex_lock(&raw mut (*shared).inheriting));
        &mut *shared
    };
    let mut children = Vec::new();
    for n in 0..WAITERS {
        // SAFETY: this process has one thread.
        match ok("fork", unsafe { libc::fork() }) {
            0 => child(shared, n),
            pid => children.push(pid),
        }
    }
    while this.waiting.load(Ordering::SeqCst) < WAITERS {
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(Duration::from_millis(50));
    meeting.pause();
    same("a lock is held", this.counts, [0, 0]);
    let mut ends = Vec::new();
    // SAFETY: as above.
    unsafe {
        same("giving back", libc::pthread_mutex_unlock(&raw mut this.plain), 0);
        same("giving back, inheriting", libc::pthread_mutex_unlock(&raw mut this.inheriting), 0);
        ok("the robust one", libc::pthread_mutex_lock(&raw mut this.robust));
        this.is_told.store(1, Ordering::SeqCst);
        libc::pthread_cond_broadcast(&raw mut this.condition);
        ok("the robust one", libc::pthread_mutex_unlock(&raw mut this.robust));
        for pid in children {
            let mut status = 0;
            ok("waitpid", libc::waitpid(pid, &raw mut status, 0));
            ends.push(if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { -status });
        }
        same("whose owner has died", libc::pthread_mutex_lock(&raw mut this.left), libc::EOWNERDEAD);
    }
    same("the ends of all", ends, (40..40 + WAITERS as i32).collect());
    same("what was counted", this.counts, [2, 2]);
}
