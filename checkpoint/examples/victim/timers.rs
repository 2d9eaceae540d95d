//! Interval timers and POSIX timers: that they fire, when, how often, and with what.

use crate::calls::{now, ok};
use crate::{Meeting, fail, same};
use std::mem::zeroed;
use std::ptr::null_mut;
use std::time::Duration;

fn spec(value_ms: i64, interval_ms: i64) -> libc::itimerspec {
    let time = |ms: i64| libc::timespec { tv_sec: ms / 1000, tv_nsec: ms % 1000 * 1_000_000 };
    libc::itimerspec { it_interval: time(interval_ms), it_value: time(value_ms) }
}

fn create(clock: i32, notify: i32, signal: i32, value: usize) -> libc::timer_t {
    // SAFETY: both structures outlive the call.
    unsafe {
        let mut event: libc::sigevent = zeroed();
        event.sigev_notify = notify;
        event.sigev_signo = signal;
        event.sigev_value.sival_ptr = value as *mut _;
        event.sigev_notify_thread_id = libc::gettid();
        let mut timer: libc::timer_t = null_mut();
        ok("timer_create", libc::timer_create(clock, &raw mut event, &raw mut timer));
        timer
    }
}

fn arm(timer: libc::timer_t, spec: libc::itimerspec) {
    // SAFETY: `spec` outlives the call.
    ok("timer_settime", unsafe { libc::timer_settime(timer, 0, &raw const spec, null_mut()) });
}

/// Seconds left, and the interval.
fn left(timer: libc::timer_t) -> (f64, f64) {
    let seconds = |time: libc::timespec| time.tv_sec as f64 + time.tv_nsec as f64 / 1e9;
    let mut spec = spec(0, 0);
    // SAFETY: `spec` outlives the call.
    ok("timer_gettime", unsafe { libc::timer_gettime(timer, &raw mut spec) });
    (seconds(spec.it_value), seconds(spec.it_interval))
}

/// Waits for one of the signals: which, and its value.
fn await_signal(set: &libc::sigset_t, limit: Duration) -> Option<(i32, usize)> {
    let limit = libc::timespec { tv_sec: limit.as_secs() as i64, tv_nsec: i64::from(limit.subsec_nanos()) };
    // SAFETY: all outlive the call.
    unsafe {
        let mut info: libc::siginfo_t = zeroed();
        let got = libc::sigtimedwait(set, &raw mut info, &raw const limit);
        (got > 0).then(|| (got, info.si_value().sival_ptr as usize))
    }
}

pub fn run(meeting: &Meeting) {
    let rt = libc::SIGRTMIN();
    // SAFETY: plain data, then filled; nothing handles these signals.
    let set = unsafe {
        let mut set: libc::sigset_t = zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in [libc::SIGALRM, libc::SIGVTALRM, libc::SIGPROF, rt + 1, rt + 2, rt + 3] {
            libc::sigaddset(&raw mut set, signal);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, null_mut());
        set
    };
    let early = create(libc::CLOCK_MONOTONIC, libc::SIGEV_SIGNAL, rt + 1, 1);
    let once = create(libc::CLOCK_MONOTONIC, libc::SIGEV_SIGNAL, rt + 1, 0x7777_1234_5678);
    let often = create(libc::CLOCK_REALTIME, libc::SIGEV_THREAD_ID, rt + 2, 22);
    let idle = create(libc::CLOCK_BOOTTIME, libc::SIGEV_NONE, 0, 0);
    let busy = create(libc::CLOCK_PROCESS_CPUTIME_ID, libc::SIGEV_SIGNAL, rt + 3, 33);
    // A gap in the numbers.
    // SAFETY: made above.
    ok("timer_delete", unsafe { libc::timer_delete(early) });
    arm(once, spec(4_000, 0));
    arm(often, spec(3_000, 200));
    arm(idle, spec(100_000, 0));
    arm(busy, spec(200, 0));
    let real = libc::itimerval {
        it_interval: libc::timeval { tv_sec: 0, tv_usec: 0 },
        it_value: libc::timeval { tv_sec: 3, tv_usec: 500_000 },
    };
    // SAFETY: `real` outlives the call.
    ok("setitimer", unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const real, null_mut()) });
    let begun = now();
    meeting.pause();
    // Frozen time does not count for a timer that was saved with its remainder.
    let (seconds, interval) = left(often);
    if seconds > 3.0 || interval != 0.2 {
        fail(&format!("a timer with interval has {seconds} s left, interval {interval}"));
    }
    let (seconds, _) = left(idle);
    if !(90.0..100.0).contains(&seconds) {
        fail(&format!("a timer without signal has {seconds} s left"));
    }
    let mut seen = Vec::new();
    while seen.len() < 12 && now() - begun < 20.0 {
        // The CPU-time timer needs some.
        let busy_until = now() + 0.02;
        while now() < busy_until {}
        if let Some(got) = await_signal(&set, Duration::from_millis(20)) {
            seen.push(got);
        }
        let enough = |signal: i32, times: usize| seen.iter().filter(|got| got.0 == signal).count() >= times;
        if enough(libc::SIGALRM, 1) && enough(rt + 1, 1) && enough(rt + 2, 3) && enough(rt + 3, 1) {
            break;
        }
    }
    let count = |wanted: (i32, usize)| seen.iter().filter(|&&got| got == wanted).count();
    same("SIGALRM", seen.iter().filter(|got| got.0 == libc::SIGALRM).count(), 1);
    same("a timer's signal", count((rt + 1, 0x7777_1234_5678)), 1);
    same("the CPU timer's signal", count((rt + 3, 33)), 1);
    if count((rt + 2, 22)) < 3 {
        fail(&format!("the timer with interval has fired {} times", count((rt + 2, 22))));
    }
    if now() - begun < 3.9 {
        fail("a timer has fired early");
    }
    // The number that was given back can be had again.
    // SAFETY: made above.
    unsafe { libc::timer_delete(once) };
    create(libc::CLOCK_MONOTONIC, libc::SIGEV_SIGNAL, rt + 1, 1);
}
