//! Masks, actions, what is pending and in which order, and a handler on an alternate stack.

use crate::calls::{fill, is_filled, ok};
use crate::{Meeting, fail, same};
use std::mem::zeroed;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};

static SEEN: AtomicI32 = AtomicI32::new(0);

extern "C" fn count(_signal: i32) {
    SEEN.fetch_add(1, Ordering::SeqCst);
}

fn set(signals: &[i32]) -> libc::sigset_t {
    // SAFETY: a sigset_t is plain data, made valid by sigemptyset.
    unsafe {
        let mut set = zeroed();
        libc::sigemptyset(&raw mut set);
        for &signal in signals {
            libc::sigaddset(&raw mut set, signal);
        }
        set
    }
}

fn block(signals: &[i32]) {
    let set = set(signals);
    // SAFETY: `set` outlives the call.
    ok("pthread_sigmask", unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, null_mut()) });
}

fn handle(signal: i32, flags: i32) {
    // SAFETY: the handler only adds to an atomic.
    unsafe {
        let mut action: libc::sigaction = zeroed();
        action.sa_sigaction = count as *const () as usize;
        action.sa_flags = flags;
        action.sa_mask = set(&[libc::SIGHUP]);
        ok("sigaction", libc::sigaction(signal, &raw const action, null_mut()));
    }
}

fn action(signal: i32) -> (usize, i32, bool) {
    // SAFETY: asks only.
    unsafe {
        let mut action: libc::sigaction = zeroed();
        ok("sigaction", libc::sigaction(signal, std::ptr::null(), &raw mut action));
        (
            action.sa_sigaction,
            action.sa_flags,
            libc::sigismember(&raw const action.sa_mask, libc::SIGHUP) == 1,
        )
    }
}

fn queue(signal: i32, value: usize) {
    let value = libc::sigval { sival_ptr: value as *mut _ };
    // SAFETY: to ourselves.
    ok("sigqueue", unsafe { libc::sigqueue(libc::getpid(), signal, value) });
}

/// Takes one that is pending: signal, code, value, sender.
fn take(signals: &[i32]) -> Option<(i32, i32, usize, i32)> {
    let set = set(signals);
    let none = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: all outlive the call; the fields read are those of queued signals.
    unsafe {
        let mut info: libc::siginfo_t = zeroed();
        let got = libc::sigtimedwait(&raw const set, &raw mut info, &raw const none);
        (got > 0).then(|| (got, info.si_code, info.si_value().sival_ptr as usize, info.si_pid()))
    }
}

pub fn run(meeting: &Meeting) {
    let (first, second) = (libc::SIGRTMIN() + 1, libc::SIGRTMIN() + 2);
    block(&[first, second, libc::SIGTERM, libc::SIGUSR2]);
    handle(libc::SIGUSR1, libc::SA_RESTART | libc::SA_NODEFER);
    handle(libc::SIGUSR2, 0);
    // SAFETY: ignoring has no handler.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    for n in 0..40 {
        queue(if n % 2 == 0 { first } else { second }, n + 100);
    }
    // SAFETY: to ourselves: on the process, and on this thread.
    unsafe {
        libc::kill(libc::getpid(), libc::SIGTERM);
        libc::pthread_kill(libc::pthread_self(), libc::SIGUSR2);
    }
    let before = [libc::SIGUSR1, libc::SIGUSR2, libc::SIGPIPE, libc::SIGHUP].map(action);
    let pid = std::process::id() as i32;
    meeting.pause();
    same("actions", [libc::SIGUSR1, libc::SIGUSR2, libc::SIGPIPE, libc::SIGHUP].map(action), before);
    for (signal, offset) in [(first, 0), (second, 1)] {
        for n in 0..20 {
            same(
                "a queued signal",
                take(&[signal]),
                Some((signal, libc::SI_QUEUE, 100 + 2 * n + offset, pid)),
            );
        }
    }
    same("nothing more", take(&[first, second]), None);
    same("SIGTERM", take(&[libc::SIGTERM]).map(|got| (got.0, got.1, got.3)), Some((15, libc::SI_USER, pid)));
    same("no handler has run", SEEN.load(Ordering::SeqCst), 0);
    let open = set(&[libc::SIGUSR2]);
    // SAFETY: `open` outlives the call.
    unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const open, null_mut()) };
    same("one handler has run", SEEN.load(Ordering::SeqCst), 1);
    // SAFETY: to ourselves.
    unsafe { libc::raise(libc::SIGUSR1) };
    same("two handlers have run", SEEN.load(Ordering::SeqCst), 2);
}

static MEETING: AtomicUsize = AtomicUsize::new(0);

extern "C" fn on_stack(_signal: i32) {
    let meeting = MEETING.load(Ordering::SeqCst) as *const Meeting;
    let mut room = [0u64; 1024];
    fill(room.as_mut_ptr().cast(), 8192, 3);
    // SAFETY: raised by ourselves outside any lock, and the meeting outlives it.
    unsafe { (*meeting).pause() };
    if !is_filled(room.as_ptr().cast(), 8192, 3) {
        fail("the alternate stack's contents");
    }
    // SAFETY: asks only.
    let flags = unsafe {
        let mut stack: libc::stack_t = zeroed();
        ok("sigaltstack", libc::sigaltstack(std::ptr::null(), &raw mut stack));
        stack.ss_flags
    };
    same("on the alternate stack", flags, libc::SS_ONSTACK);
    SEEN.fetch_add(10, Ordering::SeqCst);
}

pub fn on_alternate_stack(meeting: &Meeting) {
    MEETING.store(std::ptr::from_ref(meeting) as usize, Ordering::SeqCst);
    let mut room = vec![0u8; 256 << 10];
    let at = room.as_mut_ptr();
    let stack = libc::stack_t { ss_sp: at.cast(), ss_flags: 0, ss_size: room.len() };
    // SAFETY: the stack outlives its use; the handler is as above.
    unsafe {
        ok("sigaltstack", libc::sigaltstack(&raw const stack, null_mut()));
        let mut action: libc::sigaction = zeroed();
        action.sa_sigaction = on_stack as *const () as usize;
        action.sa_flags = libc::SA_ONSTACK;
        ok("sigaction", libc::sigaction(libc::SIGUSR1, &raw const action, null_mut()));
        libc::raise(libc::SIGUSR1);
        let mut found: libc::stack_t = zeroed();
        ok("sigaltstack", libc::sigaltstack(std::ptr::null(), &raw mut found));
        same(
            "the alternate stack",
            (found.ss_sp as usize, found.ss_size, found.ss_flags),
            (at as usize, 256 << 10, 0),
        );
    }
    same("the handler has returned", SEEN.load(Ordering::SeqCst), 10);
    handle(libc::SIGUSR2, libc::SA_ONSTACK);
    // SAFETY: to ourselves.
    unsafe { libc::raise(libc::SIGUSR2) };
    same("and runs again", SEEN.load(Ordering::SeqCst), 11);
}
