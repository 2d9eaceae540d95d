//! System calls that the freeze interrupts: each must end as if nothing had been.

use crate::calls::now;
use crate::{Meeting, fail, same};
use std::mem::zeroed;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};
use std::thread::JoinHandle;

/// How long each waits, ms.
pub const WAIT: i64 = 4_000;
/// A busy machine lets a thread wait for its turn, s; what is not due to the freeze is below that.
const LATE: f64 = 0.3;

pub static UP: AtomicI32 = AtomicI32::new(0);
/// How long nothing has run, ms: no time-out may take longer than that.
static FROZEN: AtomicI32 = AtomicI32::new(0);

/// Adds up the gaps in which nothing has run.
pub fn watch_gaps() {
    std::thread::spawn(|| {
        let mut last = now();
        loop {
            std::thread::sleep(std::time::Duration::from_millis(2));
            let time = now();
            let gap = (time - last) * 1000.0;
            if gap > 20.0 {
                FROZEN.fetch_add(gap as i32, Ordering::SeqCst);
            }
            last = time;
        }
    });
}

pub fn time(ms: i64) -> libc::timespec {
    libc::timespec { tv_sec: ms / 1000, tv_nsec: ms % 1000 * 1_000_000 }
}

pub fn errno() -> i32 {
    // SAFETY: the thread's own errno.
    unsafe { *libc::__errno_location() }
}

/// Runs a call in a thread, and checks how long it took and what it gave.
pub fn waits(
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
        let frozen = f64::from(FROZEN.load(Ordering::SeqCst)) / 1000.0;
        let wait = WAIT as f64 / 1000.0;
        if !(wait - 0.003..wait + frozen + LATE).contains(&took) {
            fail(&format!("{name} has taken {took:.3} s, of which {frozen:.3} s were a freeze"));
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
        waits("epoll_pwait2", (0, 0), || {
            let mut event = libc::epoll_event { events: 0, u64: 0 };
            // SAFETY: as above.
            unsafe {
                let epoll = libc::epoll_create1(0);
                libc::syscall(libc::SYS_epoll_pwait2, epoll, &raw mut event, 1, &time(WAIT), 0, 8)
            }
        }),
        // SAFETY: as above.
        waits("ppoll", (0, 0), || unsafe { libc::ppoll(null_mut(), 0, &time(WAIT), null()) }.into()),
        waits("pselect", (0, 0), || {
            // SAFETY: as above.
            unsafe { libc::pselect(0, null_mut(), null_mut(), null_mut(), &time(WAIT), null()) }.into()
        }),
        waits("clock_nanosleep on another clock", (0, 0), || {
            // SAFETY: as above.
            unsafe { libc::clock_nanosleep(libc::CLOCK_BOOTTIME, 0, &time(WAIT), null_mut()) }.into()
        }),
        waits("futex until a time", (-1, libc::ETIMEDOUT), || {
            let word = AtomicU32::new(5);
            let mut end = time(0);
            // SAFETY: as above.
            unsafe {
                libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut end);
                end.tv_sec += WAIT / 1000;
                libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT_BITSET, 5, &end, 0, u32::MAX)
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

/// When all threads are in their calls, pauses for the dump and the restore, and waits until the time of the calls is
/// over.
pub fn pause_while_all_wait(threads: usize, meeting: &Meeting) {
    while UP.load(Ordering::SeqCst) != threads as i32 {
        std::thread::yield_now();
    }
    let begun = now();
    std::thread::sleep(std::time::Duration::from_millis(200));
    meeting.pause();
    while now() - begun < WAIT as f64 / 1000.0 {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

pub fn run(meeting: &Meeting) {
    watch_gaps();
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
    pause_while_all_wait(threads.len(), meeting);
    // SAFETY: the buffer has the length given.
    unsafe { libc::write(writing, b"hello".as_ptr().cast(), 5) };
    for thread in threads {
        if thread.join().is_err() {
            fail("a thread has panicked");
        }
    }
}

/// Result and errno.
type Found = (i64, i32);
/// Name, signal, what is wanted, the call.
type Interrupted = (&'static str, i32, Found, Box<dyn FnOnce() -> Found + Send>);

static HANDLED: AtomicI32 = AtomicI32::new(0);

extern "C" fn handled(_: i32) {
    HANDLED.fetch_add(1, Ordering::SeqCst);
}

/// Is stopped in calls with signals pending that have handlers: the kernel repeats or ends each call as
/// the action says, when it goes on.
pub fn with_handlers(meeting: &Meeting) {
    let mut ends = [0; 2];
    // SAFETY: room for two; the actions outlive the calls, and the handler only counts.
    unsafe {
        libc::pipe2(ends.as_mut_ptr(), 0);
        for (signal, flags) in [(libc::SIGUSR1, 0), (libc::SIGUSR2, libc::SA_RESTART)] {
            let mut action: libc::sigaction = zeroed();
            action.sa_sigaction = handled as extern "C" fn(i32) as usize;
            action.sa_flags = flags;
            libc::sigaction(signal, &raw const action, null_mut());
        }
    }
    let [reading, writing] = ends;
    let read_one = move || {
        let mut byte = 0u8;
        // SAFETY: room for one.
        let got = unsafe { libc::read(reading, (&raw mut byte).cast(), 1) };
        (got as i64, if got < 0 { errno() } else { 0 })
    };
    let call = |call: fn() -> i64| move || (call(), errno());
    let calls: Vec<Interrupted> = vec![
        ("read", libc::SIGUSR1, (-1, libc::EINTR), Box::new(read_one)),
        ("read, SA_RESTART", libc::SIGUSR2, (1, 0), Box::new(read_one)),
        // SAFETY: no pointers, or null ones that are allowed, or structures that outlive the calls.
        ("pause", libc::SIGUSR1, (-1, libc::EINTR), Box::new(call(|| unsafe { libc::pause() }.into()))),
        (
            "nanosleep, SA_RESTART",
            libc::SIGUSR2,
            (-1, libc::EINTR),
            // SAFETY: as above.
            Box::new(call(|| unsafe { libc::nanosleep(&time(100_000), null_mut()) }.into())),
        ),
        (
            "poll, SA_RESTART",
            libc::SIGUSR2,
            (-1, libc::EINTR),
            // SAFETY: as above.
            Box::new(call(|| unsafe { libc::poll(null_mut(), 0, 100_000) }.into())),
        ),
        (
            "epoll_wait, SA_RESTART",
            libc::SIGUSR2,
            (-1, libc::EINTR),
            Box::new(call(|| {
                let mut event = libc::epoll_event { events: 0, u64: 0 };
                // SAFETY: as above.
                unsafe { libc::epoll_wait(libc::epoll_create1(0), &raw mut event, 1, 100_000) }.into()
            })),
        ),
        (
            "sigsuspend",
            libc::SIGUSR1,
            (-1, libc::EINTR),
            Box::new(call(|| {
                // SAFETY: as above.
                unsafe {
                    let mut set: libc::sigset_t = zeroed();
                    libc::sigfillset(&raw mut set);
                    libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, null_mut());
                    libc::sigdelset(&raw mut set, libc::SIGUSR1);
                    let got = libc::sigsuspend(&raw const set);
                    let code = errno();
                    let mut after: libc::sigset_t = zeroed();
                    libc::pthread_sigmask(libc::SIG_SETMASK, null(), &raw mut after);
                    same("blocked after sigsuspend", libc::sigismember(&raw const after, libc::SIGUSR1), 1);
                    *libc::__errno_location() = code;
                    got.into()
                }
            })),
        ),
    ];
    let count = calls.len() as i32;
    let threads: Vec<_> = calls
        .into_iter()
        .map(|(name, signal, wanted, call)| {
            let (tell, hear) = std::sync::mpsc::channel();
            let thread = std::thread::spawn(move || {
                // SAFETY: no preconditions.
                tell.send(unsafe { libc::gettid() }).expect("told");
                UP.fetch_add(1, Ordering::SeqCst);
                same(name, call(), wanted);
            });
            (hear.recv().expect("a TID"), signal, thread)
        })
        .collect();
    while UP.load(Ordering::SeqCst) != count {
        std::thread::yield_now();
    }
    std::thread::sleep(std::time::Duration::from_millis(200));
    let list: Vec<String> = threads.iter().map(|(tid, signal, _)| format!("{tid} {signal}")).collect();
    std::fs::write(meeting.dir.join("threads"), list.join("\n")).expect("written");
    meeting.pause();
    let deadline = now() + 30.0;
    while HANDLED.load(Ordering::SeqCst) < count && now() < deadline {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    std::thread::sleep(std::time::Duration::from_millis(200));
    // SAFETY: one byte.
    unsafe { libc::write(writing, b"x".as_ptr().cast(), 1) };
    for (_, _, thread) in threads {
        if thread.join().is_err() {
            fail("a thread has panicked");
        }
    }
    same("signals handled", HANDLED.load(Ordering::SeqCst), count);
}
