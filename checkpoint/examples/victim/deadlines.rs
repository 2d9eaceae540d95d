//! Timers of every kind: that what is left of them and their clocks agree, whatever time a dump takes.

use crate::calls::ok;
use crate::{Meeting, fail, same};
use std::mem::zeroed;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

const SECOND: i64 = 1_000_000_000;
/// What a busy machine may add between two system calls, at each of the dumps, ns.
const SLACK: i64 = 150_000_000;

fn spec(ns: i64) -> libc::timespec {
    libc::timespec { tv_sec: ns / SECOND, tv_nsec: ns % SECOND }
}

fn ns(time: libc::timespec) -> i64 {
    time.tv_sec * SECOND + time.tv_nsec
}

fn now(clock: i32) -> i64 {
    let mut time = spec(0);
    // SAFETY: `time` outlives the call.
    unsafe { libc::clock_gettime(clock, &raw mut time) };
    ns(time)
}

fn create(clock: i32, notify: i32, signal: i32, tid: i32) -> libc::timer_t {
    // SAFETY: both structures outlive the call.
    unsafe {
        let mut event: libc::sigevent = zeroed();
        event.sigev_notify = notify;
        event.sigev_signo = signal;
        event.sigev_notify_thread_id = tid;
        let mut timer: libc::timer_t = null_mut();
        ok("timer_create", libc::timer_create(clock, &raw mut event, &raw mut timer));
        timer
    }
}

fn set(timer: libc::timer_t, flags: i32, value: i64, interval: i64) {
    let times = libc::itimerspec { it_interval: spec(interval), it_value: spec(value) };
    // SAFETY: `times` outlives the call.
    ok("timer_settime", unsafe { libc::timer_settime(timer, flags, &raw const times, null_mut()) });
}

fn left(timer: libc::timer_t) -> i64 {
    // SAFETY: the structure outlives the call.
    unsafe {
        let mut times: libc::itimerspec = zeroed();
        ok("timer_gettime", libc::timer_gettime(timer, &raw mut times));
        ns(times.it_value)
    }
}

fn fd_left(fd: i32) -> (i64, i64) {
    // SAFETY: the structure outlives the call.
    unsafe {
        let mut times: libc::itimerspec = zeroed();
        ok("timerfd_gettime", libc::timerfd_gettime(fd, &raw mut times));
        (ns(times.it_value), ns(times.it_interval))
    }
}

/// Clock and what is left must say that it is due then.
fn is_due(what: &str, clock: i32, due: i64, left: impl Fn() -> i64) {
    let before = now(clock);
    let rest = left();
    let after = now(clock);
    if rest <= 0 || due < before + rest - SLACK || due > after + rest + 1_000_000 {
        fail(&format!("{what} is due at {due}, not at {} to {}", before + rest, after + rest));
    }
}

fn set_of(signals: &[i32]) -> libc::sigset_t {
    // SAFETY: plain data, then filled.
    unsafe {
        let mut set: libc::sigset_t = zeroed();
        libc::sigemptyset(&raw mut set);
        for &signal in signals {
            libc::sigaddset(&raw mut set, signal);
        }
        set
    }
}

/// Takes a signal that is pending or comes in time; gives its overrun.
fn take(signal: i32, limit: i64) -> Option<i32> {
    let set = set_of(&[signal]);
    // SAFETY: all outlive the call; of a timer's signal the overrun is at this place (sigaction(2)).
    unsafe {
        let mut info: libc::siginfo_t = zeroed();
        let got = libc::sigtimedwait(&raw const set, &raw mut info, &spec(limit));
        (got == signal).then(|| (&raw const info).cast::<i32>().add(5).read())
    }
}

fn timerfd(clock: i32, flags: i32, value: i64, interval: i64) -> i32 {
    let times = libc::itimerspec { it_interval: spec(interval), it_value: spec(value) };
    // SAFETY: `times` outlives the call.
    unsafe {
        let fd = ok("timerfd_create", libc::timerfd_create(clock, libc::TFD_NONBLOCK));
        ok("timerfd_settime", libc::timerfd_settime(fd, flags, &raw const times, null_mut()));
        fd
    }
}

fn settime_flags(fd: i32) -> String {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("settime flags: "));
    line.unwrap_or_default().to_string()
}

/// A timer that has told of an overrun of `count`, and goes off next in 15 s.
fn overrun(clock: i32, signal: i32, count: i64) -> (libc::timer_t, i64) {
    const INTERVAL: i64 = 20 * SECOND;
    let timer = create(clock, libc::SIGEV_SIGNAL, signal, 0);
    let due = now(clock) + 15 * SECOND;
    set(timer, libc::TIMER_ABSTIME, due - (count + 1) * INTERVAL, INTERVAL);
    same("the overrun at first", take(signal, SECOND), Some(count as i32));
    (timer, due)
}

static CALLED: AtomicUsize = AtomicUsize::new(0);

extern "C" fn called(_: libc::sigval) {
    CALLED.fetch_add(1, Ordering::SeqCst);
}

/// A timer that calls a function in a thread (`SIGEV_THREAD`): the C library has a thread that waits for its
/// signals.
fn calls_often() {
    /// `struct sigevent`, of which the libc crate has not this member.
    #[repr(C)]
    struct Event {
        value: libc::sigval,
        signal: i32,
        notify: i32,
        function: extern "C" fn(libc::sigval),
        attributes: *mut libc::c_void,
        rest: [u64; 4],
    }
    const SIGEV_THREAD: i32 = 2;
    let value = libc::sigval { sival_ptr: null_mut() };
    let mut event = Event {
        value,
        signal: 0,
        notify: SIGEV_THREAD,
        function: called,
        attributes: null_mut(),
        rest: [0; 4],
    };
    // SAFETY: both outlive the call, and it is as long as the C library's.
    let timer = unsafe {
        let mut timer: libc::timer_t = null_mut();
        let at = (&raw mut event).cast::<libc::sigevent>();
        ok("timer_create", libc::timer_create(libc::CLOCK_MONOTONIC, at, &raw mut timer));
        timer
    };
    set(timer, 0, 50_000_000, 50_000_000);
}

/// Uses CPU time of this thread alone.
fn burn() {
    let end = now(libc::CLOCK_THREAD_CPUTIME_ID) + 30_000_000;
    while now(libc::CLOCK_THREAD_CPUTIME_ID) < end {}
}

/// A thread with timers on its own CPU time.
struct Worker {
    thread: std::thread::JoinHandle<()>,
    timers: Vec<(&'static str, libc::timer_t)>,
}

static ROUND: AtomicUsize = AtomicUsize::new(0);
static BURNT: AtomicUsize = AtomicUsize::new(0);
static END: AtomicBool = AtomicBool::new(false);

fn worker(signal: i32) -> Worker {
    let (tell, hear) = std::sync::mpsc::channel();
    // SAFETY: no preconditions.
    let main = unsafe { libc::gettid() };
    let thread = std::thread::spawn(move || {
        let mut clock = 0;
        // SAFETY: room for one number.
        unsafe { libc::pthread_getcpuclockid(libc::pthread_self(), &raw mut clock) };
        let timers: Vec<usize> = vec![
            create(libc::CLOCK_THREAD_CPUTIME_ID, libc::SIGEV_THREAD_ID, signal, main) as usize,
            create(libc::CLOCK_THREAD_CPUTIME_ID, libc::SIGEV_SIGNAL, signal, 0) as usize,
            create(clock, libc::SIGEV_NONE, 0, 0) as usize,
        ];
        tell.send(timers).expect("told");
        let mut done = 0;
        while !END.load(Ordering::SeqCst) {
            if ROUND.load(Ordering::SeqCst) > done {
                burn();
                done += 1;
                BURNT.store(done, Ordering::SeqCst);
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    });
    let made = hear.recv().expect("timers");
    let names = ["of its thread", "of its thread, not set", "of a thread by its number"];
    let timers = names.into_iter().zip(made.into_iter().map(|timer| timer as libc::timer_t)).collect();
    Worker { thread, timers }
}

impl Worker {
    fn check(self) {
        // The one that was not set.
        set(self.timers[1].1, 0, 100 * SECOND, 0);
        let rests = || self.timers.iter().map(|&(_, timer)| left(timer)).collect::<Vec<i64>>();
        let first = rests();
        burn();
        let second = rests();
        ROUND.store(1, Ordering::SeqCst);
        while BURNT.load(Ordering::SeqCst) == 0 {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let third = rests();
        for (n, (name, _)) in self.timers.iter().enumerate() {
            // It wakes now and then meanwhile.
            if first[n] - second[n] > 15_000_000 {
                fail(&format!("a timer {name} counts another thread's time"));
            }
            if second[n] - third[n] < 25_000_000 || !(90 * SECOND..=100 * SECOND).contains(&first[n]) {
                fail(&format!("a timer {name} has {}, {}, {} left", first[n], second[n], third[n]));
            }
        }
        END.store(true, Ordering::SeqCst);
        if self.thread.join().is_err() {
            fail("a thread has panicked");
        }
    }
}

fn itimer(which: i32) -> (i64, i64) {
    // SAFETY: the structure outlives the call.
    unsafe {
        let mut times: libc::itimerval = zeroed();
        libc::getitimer(which, &raw mut times);
        let micros = |time: libc::timeval| time.tv_sec * 1_000_000 + time.tv_usec;
        (micros(times.it_value), micros(times.it_interval))
    }
}

const CLOCKS: [(&str, i32); 4] = [
    ("on CLOCK_MONOTONIC", libc::CLOCK_MONOTONIC),
    ("on CLOCK_BOOTTIME", libc::CLOCK_BOOTTIME),
    ("on CLOCK_REALTIME", libc::CLOCK_REALTIME),
    ("on CLOCK_TAI", libc::CLOCK_TAI),
];

pub fn run(meeting: &Meeting) {
    let rt = libc::SIGRTMIN();
    let (told, waits, by_day, fires, cpu) = (rt + 1, rt + 2, rt + 3, rt + 4, rt + 5);
    let blocked = set_of(&[told, waits, by_day, fires, cpu]);
    // SAFETY: the set outlives the call.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const blocked, null_mut()) };

    let deadlines = CLOCKS.map(|(name, clock)| {
        let (timer, due) = (create(clock, libc::SIGEV_NONE, 0, 0), now(clock) + 1000 * SECOND);
        set(timer, libc::TIMER_ABSTIME, due, 0);
        (name, clock, timer, due)
    });
    let from_now = create(libc::CLOCK_REALTIME, libc::SIGEV_NONE, 0, 0);
    set(from_now, 0, 1000 * SECOND, 0);
    let soon = create(libc::CLOCK_MONOTONIC, libc::SIGEV_SIGNAL, fires, 0);
    let soon_due = now(libc::CLOCK_MONOTONIC) + 6 * SECOND;
    set(soon, libc::TIMER_ABSTIME, soon_due, 0);

    let (overran, overran_due) = overrun(libc::CLOCK_MONOTONIC, told, 2);
    let (overran_by_day, by_day_due) = overrun(libc::CLOCK_REALTIME, by_day, 1000);
    // Its signal waits from now on, and is taken by nobody before the end.
    const OFTEN: i64 = 50_000_000;
    let often = create(libc::CLOCK_MONOTONIC, libc::SIGEV_SIGNAL, waits, 0);
    set(often, 0, OFTEN, OFTEN);

    let fds = [
        ("monotonic, absolute", libc::CLOCK_MONOTONIC, 1),
        ("boottime, relative", libc::CLOCK_BOOTTIME, 0),
        ("realtime, absolute", libc::CLOCK_REALTIME, 1),
        ("realtime, told when the clock is set", libc::CLOCK_REALTIME, 3),
        ("realtime, alarm", libc::CLOCK_REALTIME_ALARM, 1),
        ("boottime, alarm", libc::CLOCK_BOOTTIME_ALARM, 0),
    ]
    .map(|(name, clock, flags)| {
        // The alarms' clocks are read as those without.
        let read = match clock {
            libc::CLOCK_REALTIME_ALARM => libc::CLOCK_REALTIME,
            libc::CLOCK_BOOTTIME_ALARM => libc::CLOCK_BOOTTIME,
            clock => clock,
        };
        let due = now(read) + 500 * SECOND;
        let fd = timerfd(clock, flags, if flags & 1 == 1 { due } else { 500 * SECOND }, 7 * SECOND);
        (name, read, fd, due, settime_flags(fd))
    });
    let begun = now(libc::CLOCK_MONOTONIC);
    let ticking = timerfd(libc::CLOCK_MONOTONIC, 0, OFTEN, OFTEN);
    let begun_after = now(libc::CLOCK_MONOTONIC);

    calls_often();
    let worker = worker(cpu);
    for n in [0, 2] {
        set(worker.timers[n].1, 0, 100 * SECOND, 0);
    }
    for (which, interval) in [(libc::ITIMER_VIRTUAL, 0), (libc::ITIMER_PROF, 3)] {
        let times = libc::itimerval {
            it_interval: libc::timeval { tv_sec: interval, tv_usec: 0 },
            it_value: libc::timeval { tv_sec: 100, tv_usec: 0 },
        };
        // SAFETY: `times` outlives the call.
        ok("setitimer", unsafe { libc::setitimer(which, &raw const times, null_mut()) });
    }
    std::thread::sleep(std::time::Duration::from_millis(120));

    meeting.pause();

    let calls = CALLED.load(Ordering::SeqCst);
    for (name, clock, timer, due) in deadlines {
        is_due(name, clock, due, || left(timer));
    }
    if !(900 * SECOND..=1000 * SECOND).contains(&left(from_now)) {
        fail(&format!("a timer set to a time from now has {} left", left(from_now)));
    }
    let overrun_of = |timer: libc::timer_t| {
        // SAFETY: made above.
        unsafe { libc::timer_getoverrun(timer) }
    };
    same("an overrun", overrun_of(overran), 2);
    same("an overrun by day", overrun_of(overran_by_day), 1000);
    is_due("a timer with an overrun", libc::CLOCK_MONOTONIC, overran_due, || left(overran));
    is_due("a timer with an overrun by day", libc::CLOCK_REALTIME, by_day_due, || left(overran_by_day));
    same("signals taken already", (take(told, 0), take(by_day, 0)), (None, None));
    let (first, second) = (take(waits, 0), take(waits, 0));
    if first.is_none_or(|overrun| overrun < 1) || second.is_some() {
        fail(&format!("what was pending of a timer has overruns {first:?}, {second:?}"));
    }
    if take(waits, SECOND).is_none() {
        fail("a timer whose signal was taken goes off no more");
    }
    for (name, clock, fd, due, flags) in fds {
        is_due(name, clock, due, || fd_left(fd).0);
        same(name, fd_left(fd).1, 7 * SECOND);
        same(name, settime_flags(fd), flags);
    }
    let mut ticks = 0u64;
    let before = now(libc::CLOCK_MONOTONIC);
    // SAFETY: room for eight bytes.
    ok("read", unsafe { libc::read(ticking, (&raw mut ticks).cast(), 8) } as i64);
    let after = now(libc::CLOCK_MONOTONIC);
    let (least, most) = ((before - begun_after - SLACK) / OFTEN, (after - begun) / OFTEN);
    if !(least..=most).contains(&(ticks as i64)) {
        fail(&format!("a timerfd has told of {ticks} expirations, not of {least} to {most}"));
    }
    worker.check();
    let (virtual_left, prof_left) = (itimer(libc::ITIMER_VIRTUAL), itimer(libc::ITIMER_PROF));
    // The kernel adds a tick to those of CPU time.
    let fits = |left: i64| (80_000_000..=100_020_000).contains(&left);
    if !fits(virtual_left.0) || !fits(prof_left.0) || (virtual_left.1, prof_left.1) != (0, 3_000_000) {
        fail(&format!("interval timers have {virtual_left:?} and {prof_left:?} left"));
    }
    same("a timer that is due", take(fires, 20 * SECOND), Some(0));
    if CALLED.load(Ordering::SeqCst) <= calls {
        fail("a timer that calls a function does not do so any more");
    }
    if now(libc::CLOCK_MONOTONIC) < soon_due {
        fail("a timer has fired early");
    }
}
