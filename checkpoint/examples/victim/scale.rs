//! Many of one thing: threads, mappings, processes, memory. All of them block while they wait, so that a
//! measurement beside them is not disturbed.

use crate::calls::{PAGE, fill, is_filled, map, ok};
use crate::{Meeting, fail, same};
use std::io::Read;
use std::os::fd::FromRawFd;
use std::sync::{Arc, Condvar, Mutex};

/// `CASE-NUMBER`: false if it is none of these cases.
pub fn run(case: &str, meeting: &Meeting) -> bool {
    let Some((name, number)) = case.rsplit_once('-') else { return false };
    let Ok(number) = number.parse() else { return false };
    match name {
        "threads" => threads(number, meeting),
        "mappings" => mappings(number, meeting),
        "processes" => processes(number, meeting),
        "mebibytes" => memory(number, meeting),
        _ => return false,
    }
    true
}

fn tid() -> i64 {
    // SAFETY: no arguments.
    unsafe { libc::syscall(libc::SYS_gettid) }
}

/// Each thread finds its number, its name, its stack and its floating-point registers as they were.
fn threads(number: u64, meeting: &Meeting) {
    const STACK: usize = 64 << 10;
    let gate = Arc::new((Mutex::new(0u64), Condvar::new()));
    let all: Vec<_> = (1..number)
        .map(|n| {
            let gate = gate.clone();
            let body = move || {
                let (own, mark) = (tid(), std::hint::black_box([n ^ 0xfeed_f00d; 32]));
                let part = std::hint::black_box(1.0 / (n + 1) as f64);
                let (state, changed) = &*gate;
                let mut state = state.lock().expect("no thread panics with it");
                *state += 1;
                changed.notify_all();
                let go = changed.wait_while(state, |state| *state < u64::MAX);
                drop(go.expect("no thread panics with it"));
                let name = std::fs::read_to_string("/proc/thread-self/comm").unwrap_or_default();
                let is_same = tid() == own
                    && std::hint::black_box(mark) == [n ^ 0xfeed_f00d; 32]
                    && part.to_bits() == (1.0 / (n + 1) as f64).to_bits()
                    && name.trim() == format!("thread {n}");
                u64::from(is_same)
            };
            let name = format!("thread {n}");
            std::thread::Builder::new().name(name).stack_size(STACK).spawn(body).expect("a thread")
        })
        .collect();
    let (state, changed) = &*gate;
    let up = changed.wait_while(state.lock().expect("no thread panics with it"), |up| *up < number - 1);
    drop(up.expect("no thread panics with it"));
    meeting.pause();
    *state.lock().expect("no thread panics with it") = u64::MAX;
    changed.notify_all();
    let unchanged: u64 = all.into_iter().map(|thread| thread.join().unwrap_or(0)).sum();
    same("threads that found all as it was", unchanged, number - 1);
}

/// Every second page of a range has another protection, and all have their own contents.
fn mappings(number: u64, meeting: &Meeting) {
    let number = number as usize;
    let rw = libc::PROT_READ | libc::PROT_WRITE;
    // Between two pages that nothing merges with.
    let whole = map(0, number + 2, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1);
    // SAFETY: inside what was just mapped.
    let at = unsafe { whole.add(PAGE) };
    // SAFETY: the range is this function's own.
    ok("mprotect", unsafe { libc::mprotect(at.cast(), number * PAGE, rw) });
    for n in 0..number {
        // SAFETY: inside what was just mapped.
        let page = unsafe { at.add(n * PAGE) };
        fill(page, 64, n as u64);
        if n % 2 == 1 {
            // SAFETY: the page is this function's own.
            ok("mprotect", unsafe { libc::mprotect(page.cast(), PAGE, libc::PROT_READ) });
        }
    }
    let count = || {
        let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
        let inside = |line: &&str| {
            let start = line.split('-').next().and_then(|text| usize::from_str_radix(text, 16).ok());
            start.is_some_and(|start| (at as usize..at as usize + number * PAGE).contains(&start))
        };
        let lines: Vec<&str> = maps.lines().filter(inside).collect();
        (lines.len(), lines.iter().filter(|line| line.contains(" r--p ")).count())
    };
    let before = count();
    same("mappings made", before, (number, number / 2));
    meeting.pause();
    same("mappings", count(), before);
    // SAFETY: inside the range, which was mapped readable.
    let changed = (0..number).filter(|n| !is_filled(unsafe { at.add(n * PAGE) }, 64, *n as u64)).count();
    same("pages that are not as they were", changed, 0);
}

/// Children with children of their own; each waits at the same pipe, and its end tells whether it found
/// itself as it was.
fn processes(number: u64, meeting: &Meeting) {
    const BRANCHES: u64 = 20;
    let make_pipe = || {
        let mut pipe = [0; 2];
        // SAFETY: the array outlives the call.
        ok("pipe", unsafe { libc::pipe(pipe.as_mut_ptr()) });
        pipe
    };
    let (pipe, up) = (make_pipe(), make_pipe());
    let branches = BRANCHES.min(number - 1);
    let mut children = Vec::new();
    for n in 0..branches {
        // The processes below this one and itself.
        let below = (number - 1) / branches + u64::from(n < (number - 1) % branches);
        children.push(fork(move || {
            let leaves: Vec<i32> =
                (1..below).map(|leaf| fork(move || wait_at(pipe, up, n << 32 | leaf))).collect();
            let unchanged = wait_at(pipe, up, n << 32);
            leaves.into_iter().all(ends_well) && unchanged
        }));
    }
    // SAFETY: nobody else in this process has the numbers.
    let (mut up, ours) = unsafe { (std::fs::File::from_raw_fd(up[0]), std::fs::File::from_raw_fd(up[1])) };
    drop(ours);
    let mut all = vec![0; number as usize - 1];
    up.read_exact(&mut all).expect("every process says that it is there");
    drop(up);
    meeting.pause();
    // SAFETY: the write end is this process' own number.
    ok("close", unsafe { libc::close(pipe[1]) });
    let well = children.into_iter().filter(|&pid| ends_well(pid)).count();
    same("branches that ended well", well as u64, branches);
}

/// Runs `work` in a child, whose exit status is 0 if it says true.
fn fork(work: impl FnOnce() -> bool) -> i32 {
    // SAFETY: this process has one thread.
    match ok("fork", unsafe { libc::fork() }) {
        0 => {
            let well = work();
            // SAFETY: ends the child without running what belongs to its parent.
            unsafe { libc::_exit(if well { 0 } else { 1 }) }
        }
        pid => pid,
    }
}

fn ends_well(pid: i32) -> bool {
    let mut status = 0;
    // SAFETY: the status outlives the call.
    unsafe { libc::waitpid(pid, &raw mut status, 0) == pid && status == 0 }
}

/// Says that it is there, and blocks until nobody can write to the pipe any more; true if the process
/// is what it was before.
fn wait_at(pipe: [i32; 2], up: [i32; 2], mark: u64) -> bool {
    // SAFETY: this process' own copies of the numbers; one byte is read.
    unsafe {
        ok("write", libc::write(up[1], [0u8].as_ptr().cast(), 1) as i64);
        for number in [pipe[1], up[0], up[1]] {
            libc::close(number);
        }
    }
    let me = || {
        // SAFETY: no arguments.
        let (pid, parent) = unsafe { (libc::getpid(), libc::getppid()) };
        (pid, parent, tid())
    };
    let (before, memory) = (me(), std::hint::black_box(vec![mark; 600]));
    // SAFETY: nobody else in this process has the number.
    let mut reading = unsafe { std::fs::File::from_raw_fd(pipe[0]) };
    let end = reading.read(&mut [0; 1]);
    matches!(end, Ok(0)) && me() == before && std::hint::black_box(memory) == vec![mark; 600]
}

/// So much memory that does not compress.
fn memory(mebibytes: u64, meeting: &Meeting) {
    let bytes = (mebibytes << 20) as usize;
    let rw = libc::PROT_READ | libc::PROT_WRITE;
    let at = map(0, bytes / PAGE, rw, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1);
    fill(at, bytes, mebibytes);
    meeting.pause();
    if !is_filled(at, bytes, mebibytes) {
        fail("the memory is not as it was");
    }
}
