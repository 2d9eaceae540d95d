//! Waits until a time and for locks that the freeze interrupts.

use crate::calls::now;
use crate::restart::{UP, WAIT, errno, pause_while_all_wait, time, waits, watch_gaps};
use crate::{Meeting, fail, same};
use std::mem::zeroed;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;

/// The time on a clock when a wait that begins now is to end.
fn end_on(clock: i32) -> libc::timespec {
    let mut end = time(0);
    // SAFETY: the time outlives the call.
    unsafe { libc::clock_gettime(clock, &raw mut end) };
    let ns = end.tv_nsec + WAIT % 1000 * 1_000_000;
    end.tv_sec += WAIT / 1000 + ns / 1_000_000_000;
    end.tv_nsec = ns % 1_000_000_000;
    end
}

/// Like [`waits`], for a clock that goes on while nothing runs: it must not be early.
fn waits_by_day(
    clock: i32,
    name: &'static str,
    wanted: (i64, i32),
    call: impl FnOnce() -> i64 + Send + 'static,
) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let end = end_on(clock);
        UP.fetch_add(1, Ordering::SeqCst);
        let got = call();
        let errno = if got < 0 { errno() } else { 0 };
        same(name, (got, errno), wanted);
        let mut time = time(0);
        // SAFETY: the time outlives the call.
        unsafe { libc::clock_gettime(clock, &raw mut time) };
        if (time.tv_sec, time.tv_nsec) < (end.tv_sec, end.tv_nsec) {
            fail(&format!("{name} has ended early"));
        }
    })
}

/// Waits until a time, on clocks of every kind.
fn deadlines() -> Vec<JoinHandle<()>> {
    let sleep = |clock: i32| {
        move || {
            let end = end_on(clock);
            // SAFETY: the time outlives the call; a null remainder is allowed.
            unsafe { libc::clock_nanosleep(clock, libc::TIMER_ABSTIME, &raw const end, null_mut()) }.into()
        }
    };
    vec![
        waits_by_day(libc::CLOCK_REALTIME, "sleep until a time of day", (0, 0), sleep(libc::CLOCK_REALTIME)),
        waits("sleep until a time since boot", (0, 0), sleep(libc::CLOCK_BOOTTIME)),
        waits_by_day(libc::CLOCK_TAI, "sleep until an atomic time", (0, 0), sleep(libc::CLOCK_TAI)),
        waits("clock_nanosleep by day", (0, 0), || {
            // SAFETY: as above.
            unsafe { libc::clock_nanosleep(libc::CLOCK_REALTIME, 0, &time(WAIT), null_mut()) }.into()
        }),
        waits_by_day(libc::CLOCK_REALTIME, "futex until a time of day", (-1, libc::ETIMEDOUT), || {
            let word = AtomicU32::new(5);
            let wait = libc::FUTEX_WAIT_BITSET | libc::FUTEX_CLOCK_REALTIME;
            let end = end_on(libc::CLOCK_REALTIME);
            // SAFETY: word and time outlive the call.
            unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), wait, 5, &end, 0, u32::MAX) }
        }),
        waits("futex_waitv", (-1, libc::ETIMEDOUT), || {
            const SYS_FUTEX_WAITV: libc::c_long = 449;
            const FUTEX_32: u64 = 2;
            let word = AtomicU32::new(5);
            // struct futex_waitv: value, address, flags.
            let waiter = [5, word.as_ptr() as u64, FUTEX_32];
            let end = end_on(libc::CLOCK_MONOTONIC);
            // SAFETY: all outlive the call.
            unsafe { libc::syscall(SYS_FUTEX_WAITV, waiter.as_ptr(), 1, 0, &end, libc::CLOCK_MONOTONIC) }
        }),
        waits_by_day(libc::CLOCK_REALTIME, "a mutex until a time of day", (-1, libc::ETIMEDOUT), || {
            // SAFETY: the mutex is initialised, locked by this thread, and outlives the calls.
            unsafe {
                let mut mutex: libc::pthread_mutex_t = zeroed();
                libc::pthread_mutex_init(&raw mut mutex, null());
                libc::pthread_mutex_lock(&raw mut mutex);
                let got = libc::pthread_mutex_timedlock(&raw mut mutex, &end_on(libc::CLOCK_REALTIME));
                *libc::__errno_location() = got;
                -i64::from(got != 0)
            }
        }),
    ]
}

/// Waits for a lock that is held until the end: by another description, for the whole file or a part.
fn locks(dir: &std::path::Path) -> (Vec<JoinHandle<()>>, Vec<std::fs::File>) {
    use std::os::fd::AsRawFd;
    let path = dir.join("locked");
    let open = || {
        let mut options = std::fs::File::options();
        options.read(true).write(true).create(true).truncate(false).open(&path).expect("a file")
    };
    let (whole, part) = (open(), open());
    let lock = libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 10,
        l_len: 5,
        l_pid: 0,
    };
    // SAFETY: the lock outlives the call.
    unsafe {
        libc::flock(whole.as_raw_fd(), libc::LOCK_EX);
        libc::fcntl(part.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock);
    }
    let (for_whole, for_part) = (open(), open());
    let threads = vec![
        waits("flock", (0, 0), move || {
            // SAFETY: no pointers.
            unsafe { libc::flock(for_whole.as_raw_fd(), libc::LOCK_EX) }.into()
        }),
        waits("F_OFD_SETLKW", (0, 0), move || {
            // SAFETY: the lock outlives the call.
            unsafe { libc::fcntl(for_part.as_raw_fd(), libc::F_OFD_SETLKW, &raw const lock) }.into()
        }),
    ];
    (threads, vec![whole, part])
}

/// A time-out of the socket's own begins anew: it is as long as it was, and ends as it should.
fn sockets() -> Vec<JoinHandle<()>> {
    let mut ends = [0; 2];
    let limit = libc::timeval { tv_sec: WAIT / 1000, tv_usec: 0 };
    // SAFETY: room for two; the limit outlives the call.
    unsafe {
        libc::socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0, ends.as_mut_ptr());
        let length = size_of::<libc::timeval>() as u32;
        libc::setsockopt(ends[0], libc::SOL_SOCKET, libc::SO_RCVTIMEO, (&raw const limit).cast(), length);
    }
    let begun = now();
    vec![std::thread::spawn(move || {
        UP.fetch_add(1, Ordering::SeqCst);
        let mut byte = 0u8;
        // SAFETY: room for one byte.
        let got = unsafe { libc::recv(ends[0], (&raw mut byte).cast(), 1, 0) };
        same("recv with a time-out", (got, errno()), (-1, libc::EAGAIN));
        if now() - begun < WAIT as f64 / 1000.0 {
            fail("recv has ended early");
        }
    })]
}

/// The same calls, with other things to wait for.
pub fn run(meeting: &Meeting) {
    watch_gaps();
    let mut threads = deadlines();
    let (waiting, held) = locks(&meeting.dir);
    threads.extend(waiting);
    threads.extend(sockets());
    pause_while_all_wait(threads.len(), meeting);
    // They get them now.
    drop(held);
    for thread in threads {
        if thread.join().is_err() {
            fail("a thread has panicked");
        }
    }
}

/// Sleeps until the process has used so much CPU time: what it had used before counts.
pub fn on_cpu_time(meeting: &Meeting) {
    use std::sync::atomic::AtomicBool;
    static AWAKE: AtomicBool = AtomicBool::new(false);
    const WHOLE: i64 = 1_500;
    let burn = |ms: i64| {
        let used = || {
            let mut used = time(0);
            // SAFETY: the time outlives the call.
            unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut used) };
            used.tv_sec * 1000 + used.tv_nsec / 1_000_000
        };
        let end = used() + ms;
        while used() < end {}
    };
    let sleeper = std::thread::spawn(|| {
        let mut left = time(0);
        UP.fetch_add(1, Ordering::SeqCst);
        // SAFETY: both times outlive the call.
        let got =
            unsafe { libc::clock_nanosleep(libc::CLOCK_PROCESS_CPUTIME_ID, 0, &time(WHOLE), &raw mut left) };
        same("clock_nanosleep on CPU time", got, 0);
        AWAKE.store(true, Ordering::SeqCst);
    });
    while UP.load(Ordering::SeqCst) != 1 {
        std::thread::yield_now();
    }
    std::thread::sleep(std::time::Duration::from_millis(100));
    burn(900);
    meeting.pause();
    same("awake before its time", AWAKE.load(Ordering::SeqCst), false);
    // The restorer has used some too, perhaps.
    burn(700);
    let deadline = now() + 20.0;
    while !AWAKE.load(Ordering::SeqCst) && now() < deadline {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    same("awake in time", AWAKE.load(Ordering::SeqCst), true);
    if AWAKE.load(Ordering::SeqCst) && sleeper.join().is_err() {
        fail("a thread has panicked");
    }
}
