//! Threads: their names, numbers, thread-local storage, vector registers, waits, robust mutexes, rseq.

use crate::calls::ok;
use crate::{Meeting, fail, same};
use std::arch::asm;
use std::cell::Cell;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};

static GO: AtomicU32 = AtomicU32::new(0);
static UP: AtomicI32 = AtomicI32::new(0);

thread_local! {
    static LOCAL: Cell<u64> = const { Cell::new(0) };
}

fn tid() -> i64 {
    // SAFETY: no arguments.
    unsafe { libc::syscall(libc::SYS_gettid) }
}

fn comm() -> String {
    std::fs::read_to_string("/proc/thread-self/comm").expect("comm").trim().to_string()
}

/// Keeps patterns in registers while it spins in user mode.
fn spin(n: u64) {
    let (own, name) = (tid(), format!("spin-{n}"));
    LOCAL.set(n * 1000);
    UP.fetch_add(1, Ordering::SeqCst);
    let pattern: [u64; 4] = std::array::from_fn(|k| n << 32 | k as u64 | 0xab00);
    let (mut out, mut low) = ([0u64; 4], [0u64; 2]);
    let avx = std::arch::is_x86_feature_detected!("avx");
    let (before, after): (u32, u32);
    // A rounding mode that is not the default (round down), to be seen again in MXCSR.
    let (mxcsr, mut found) = (0x3f80u32, 0u32);
    // SAFETY: reads and writes only the arrays named, and the flag; clobbers are declared.
    unsafe {
        if avx {
            asm!("vmovdqu ymm9, [{p}]", "vmovdqu ymm15, [{p}]", p = in(reg) pattern.as_ptr(),
                 out("ymm9") _, out("ymm15") _);
            asm!("vmovdqu ymm9, [{p}]", "2:", "pause", "cmp dword ptr [{f}], 0", "je 2b",
                 "vmovdqu [{o}], ymm9",
                 p = in(reg) pattern.as_ptr(), f = in(reg) GO.as_ptr(), o = in(reg) out.as_mut_ptr(),
                 out("ymm9") _);
        }
        asm!("movdqu xmm7, [{p}]", "stmxcsr [{s}]", "ldmxcsr [{m}]", "mov r12, {n}", "3:", "pause",
             "cmp dword ptr [{f}], 2", "jne 3b", "movdqu [{o}], xmm7", "mov {r}, r12",
             "stmxcsr [{x}]", "ldmxcsr [{s}]",
             p = in(reg) pattern.as_ptr(), f = in(reg) GO.as_ptr(), o = in(reg) low.as_mut_ptr(),
             m = in(reg) &raw const mxcsr, x = in(reg) &raw mut found, s = in(reg) &mut 0u32,
             n = in(reg) n, r = lateout(reg) _, out("r12") _, out("xmm7") _);
        before = 0;
        after = 0;
    }
    let _ = (before, after);
    if avx {
        same("AVX registers", out, pattern);
    }
    same("SSE registers", low, [pattern[0], pattern[1]]);
    same("MXCSR", found & 0xffc0, mxcsr & 0xffc0);
    same("thread-local storage", LOCAL.get(), n * 1000);
    same("the TID", tid(), own);
    same("the thread's name", comm(), name);
    check_rseq();
}

unsafe extern "C" {
    static __rseq_offset: isize;
    static __rseq_size: u32;
}

/// glibc's registration must stand, and the kernel must keep it up to date.
fn check_rseq() {
    // SAFETY: constants of the C library (2.35 and later).
    let (offset, size) = unsafe { (__rseq_offset, __rseq_size) };
    if size == 0 {
        return;
    }
    let thread: usize;
    // SAFETY: the thread pointer's first word is its own address (x86-64 ABI).
    unsafe { asm!("mov {}, fs:0", out(reg) thread) };
    let area = thread.wrapping_add_signed(offset);
    // SAFETY: asks to register what is registered: EBUSY. `cpu_id` is the second word of the area.
    let (got, cpu) = unsafe {
        let got = libc::syscall(libc::SYS_rseq, area, size.max(32), 0, 0x5305_3053);
        (if got < 0 { *libc::__errno_location() } else { 0 }, ((area + 4) as *const u32).read_volatile())
    };
    same("rseq is registered", got, libc::EBUSY);
    if cpu > 4096 {
        fail(&format!("rseq's CPU is {cpu}"));
    }
}

/// A robust mutex that its owner leaves locked.
struct Robust(Box<std::cell::UnsafeCell<libc::pthread_mutex_t>>);
// SAFETY: a pthread mutex is made to be used by many threads.
unsafe impl Sync for Robust {}
// SAFETY: as above; it does not move, being in a box.
unsafe impl Send for Robust {}

impl Robust {
    fn new() -> Robust {
        // SAFETY: initialised as pthread_mutexattr_setrobust(3) shows.
        unsafe {
            let mutex = Box::new(std::cell::UnsafeCell::new(std::mem::zeroed()));
            let mut attributes = std::mem::zeroed();
            libc::pthread_mutexattr_init(&raw mut attributes);
            libc::pthread_mutexattr_setrobust(&raw mut attributes, libc::PTHREAD_MUTEX_ROBUST);
            ok("pthread_mutex_init", libc::pthread_mutex_init(mutex.get(), &raw const attributes));
            Robust(mutex)
        }
    }

    fn lock(&self) -> i32 {
        // SAFETY: initialised in `new`.
        unsafe { libc::pthread_mutex_lock(self.0.get()) }
    }
}

pub fn run(meeting: &Meeting) {
    let mut threads = Vec::new();
    for n in 1..=3 {
        let spinner = std::thread::Builder::new().name(format!("spin-{n}"));
        threads.push(spinner.spawn(move || spin(n)).expect("a thread"));
    }
    let robust = Arc::new(Robust::new());
    let held = Arc::clone(&robust);
    threads.push(std::thread::spawn(move || {
        same("locking", held.lock(), 0);
        UP.fetch_add(1, Ordering::SeqCst);
        while GO.load(Ordering::SeqCst) != 2 {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        // Ends with the mutex locked.
    }));
    let pair = Arc::new((Mutex::new(0u32), Condvar::new()));
    let other = Arc::clone(&pair);
    threads.push(std::thread::spawn(move || {
        let (lock, condition) = &*other;
        let mut value = lock.lock().expect("the lock");
        UP.fetch_add(1, Ordering::SeqCst);
        while *value != 42 {
            value = condition.wait(value).expect("waits");
        }
    }));
    while UP.load(Ordering::SeqCst) != 5 {
        std::thread::yield_now();
    }
    let own = tid();
    meeting.pause();
    same("the leader's TID", tid(), own);
    same("the PID", i64::from(std::process::id()), own);
    check_rseq();
    GO.store(1, Ordering::SeqCst);
    std::thread::sleep(std::time::Duration::from_millis(20));
    GO.store(2, Ordering::SeqCst);
    *pair.0.lock().expect("the lock") = 42;
    pair.1.notify_all();
    for thread in threads {
        if thread.join().is_err() {
            fail("a thread has panicked");
        }
    }
    same("a robust mutex", robust.lock(), libc::EOWNERDEAD);
    let more = std::thread::spawn(tid).join().expect("a new thread");
    if more == own {
        fail("a new thread has the leader's TID");
    }
}

/// Registrations for barriers: without them the expedited ones are refused (`EPERM`).
pub fn membarrier(meeting: &Meeting) {
    const GET_REGISTRATIONS: i32 = 1 << 9;
    // Global, private, private with rseq, and what these two allow.
    const REGISTER: [i32; 3] = [1 << 2, 1 << 4, 1 << 8];
    const USE: [i32; 3] = [1 << 1, 1 << 3, 1 << 7];
    // SAFETY: no pointers.
    let call = |command: i32| unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) };
    for command in REGISTER {
        same("registering", call(command), 0);
    }
    let registered = call(GET_REGISTRATIONS);
    meeting.pause();
    same("registrations", call(GET_REGISTRATIONS), registered);
    for command in USE {
        same("a barrier", call(command), 0);
    }
    // What it has not registered for.
    same("a barrier that was not asked for", call(1 << 5), -1);
}
