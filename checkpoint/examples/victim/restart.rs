//! System calls that the freeze interrupts: each must end as if nothing had been.

use crate::calls::now;
use crate::{Meeting, fail, same};
use std::mem::zeroed;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};
use std::thread::JoinHandle;

/// How long each waits, ms.
const WAIT: i64 = 2_500;
/// A time-out that is relative may begin anew.
const MOST: f64 = 2.0 * WAIT as f64 / 1000.0 + 3.0;

static UP: AtomicI32 = AtomicI32::new(0);

fn time(ms: i64) -> libc::timespec {
    libc::timespec { tv_sec: ms / 1000, tv_nsec: ms % 1000 * 1_000_000 }
}

fn errno() -> i32 {
    // SAFETY: the thread's own errno.
    unsafe { *libc::__errno_location() }
}

/// Runs a call in a thread, and checks how long it took and what it gave.
fn waits(
    name: &'static str,
    wanted: (i64, i32),
    call: impl FnOnce() -> i64 + Send + 'static,
) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let begun = now();
        UP.fetch_add(1, Ordering::SeqCst);
        let got = call();
        let errno = if got < 0 { errno() } else { 0 };
        let took = now() - begun;
        same(name, (got, errno), wanted);
        if !(WAIT as f64 / 1000.0 - 0.01..MOST).contains(&took) {
            fail(&format!("{name} has taken {took:.3} s"));
        }
    })
}

fn timeouts() -> Vec<JoinHandle<()>> {
    // SAFETY, for all: the structures outlive the calls, and nothing else is written.
    vec![
        waits("nanosleep", (0, 0), || {
            // SAFETY: the time outlives the call; a null remainder is allowed.
            unsafe { libc::nanosleep(&time(WAIT), null_mut()) }.into()
        }),
        waits("nanosleep with remainder", (0, 0), || {
            let mut left = time(0);
            // SAFETY: as above.
            unsafe { libc::nanosleep(&time(WAIT), &raw mut left) }.into()
        }),
        waits("clock_nanosleep to a time", (0, 0), || {
            let mut end = time(0);
            // SAFETY: as above.
            unsafe {
                libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut end);
                end.tv_sec += WAIT / 1000;
                end.tv_nsec += WAIT % 1000 * 1_000_000;
                if end.tv_nsec >= 1_000_000_000 {
                    end.tv_sec += 1;
                    end.tv_nsec -= 1_000_000_000;
                }
                libc::clock_nanosleep(libc::CLOCK_MONOTONIC, libc::TIMER_ABSTIME, &raw const end, null_mut())
                    .into()
            }
        }),
        // SAFETY: as above.
        waits("poll", (0, 0), || unsafe { libc::poll(null_mut(), 0, WAIT as i32) }.into()),
        waits("select", (0, 0), || {
            let mut limit = libc::timeval { tv_sec: WAIT / 1000, tv_usec: WAIT % 1000 * 1000 };
            // SAFETY: as above.
            unsafe { libc::select(0, null_mut(), null_mut(), null_mut(), &raw mut limit) }.into()
        }),
        waits("futex", (-1, libc::ETIMEDOUT), || {
            let word = AtomicU32::new(5);
            // SAFETY: as above.
            unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, 5, &time(WAIT)) }
        }),
        waits("epoll_wait", (0, 0), || {
            let mut event = libc::epoll_event { events: 0, u64: 0 };
            // SAFETY: as above.
            unsafe {
                let epoll = libc::epoll_create1(0);
                i64::from(libc::epoll_wait(epoll, &raw mut event, 1, WAIT as i32))
            }
        }),
        waits("sigtimedwait", (-1, libc::EAGAIN), || {
            // SAFETY: as above.
            unsafe {
                let mut set: libc::sigset_t = zeroed();
                libc::sigemptyset(&raw mut set);
                libc::sigaddset(&raw mut set, libc::SIGUSR1);
                libc::sigtimedwait(&raw const set, null_mut(), &time(WAIT)).into()
            }
        }),
    ]
}

pub fn run(meeting: &Meeting) {
    let mut threads = timeouts();
    let mut ends = [0; 2];
    // SAFETY: room for two.
    unsafe { libc::pipe2(ends.as_mut_ptr(), 0) };
    let [reading, writing] = ends;
    threads.push(waits("read", (5, 0), move || {
        let mut bytes = [0u8; 5];
        // SAFETY: the buffer has the length given.
        let got = unsafe { libc::read(reading, bytes.as_mut_ptr().cast(), 5) };
        same("what was read", &bytes, b"hello");
        got as i64
    }));
    let count = threads.len() as i32;
    while UP.load(Ordering::SeqCst) != count {
        std::thread::yield_now();
    }
    let begun = now();
    std::thread::sleep(std::time::Duration::from_millis(200));
    meeting.pause();
    while now() - begun < WAIT as f64 / 1000.0 {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    // SAFETY: the buffer has the length given.
    unsafe { libc::write(writing, b"hello".as_ptr().cast(), 5) };
    for thread in threads {
        if thread.join().is_err() {
            fail("a thread has panicked");
        }
    }
}
