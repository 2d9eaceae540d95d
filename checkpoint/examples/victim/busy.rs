//! Memory that changes all the time, one kind of change a case, until the test lets it go: then it checks what it
//! can know of itself. `busy-CASE`.

use crate::calls::{PAGE, fill, is_filled, map, ok};
use crate::{Meeting, fail, same};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
const PRIVATE: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
const HUGE: usize = 512;

/// False if it is none of these cases.
pub fn run(case: &str, meeting: &Meeting) -> bool {
    let Some(name) = case.strip_prefix("busy-") else { return false };
    match name {
        "writer" => writer(meeting, &mut Random(1)),
        "threads" => threads(meeting),
        "mapper" => mapper(meeting),
        "mremap" => mover(meeting),
        "brk" => heap(meeting),
        "advise" => adviser(meeting),
        "forks" => forks(meeting),
        "forking" => forking_threads(meeting),
        "reads" => reads(meeting),
        "direct" => direct(meeting),
        "huge" => huge(meeting),
        "hugetlb" => hugetlb(meeting),
        "files" => files(meeting),
        "stack" => stack(meeting),
        "protect" => protect(meeting),
        "exec" => exec(meeting),
        "shared" => shared(meeting),
        _ => match name.strip_prefix("steady-").and_then(|rate| rate.parse().ok()) {
            Some(pages_per_sec) => steady(meeting, pages_per_sec),
            None => return false,
        },
    }
    true
}

/// xorshift64: the same numbers each time.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

/// Steps until the test says so; a look at the directory now and then.
fn until_let_go(meeting: &Meeting, mut step: impl FnMut(u64)) {
    let go = meeting.dir.join("go");
    step(0);
    std::fs::write(meeting.dir.join("ready"), b"").expect("tells that it is ready");
    for n in 1.. {
        step(n);
        if n % 64 == 0 && go.exists() {
            break;
        }
    }
}

/// So that there are steps in every round and not only this.
fn breathe(n: u64) {
    if n.is_multiple_of(32) {
        std::thread::sleep(std::time::Duration::from_micros(200));
    }
}

fn at(base: *mut u8, page: usize) -> *mut u8 {
    // SAFETY: callers stay inside their mapping.
    unsafe { base.add(page * PAGE) }
}

/// Random pages get new contents; a table, which is memory too, has what each must have.
fn writer(meeting: &Meeting, random: &mut Random) {
    const PAGES: usize = 4096;
    let memory = map(0, PAGES, RW, PRIVATE, -1);
    let mut table = vec![0u64; PAGES];
    until_let_go(meeting, |n| {
        let page = random.below(PAGES);
        if table[page] != 0 && !is_filled(at(memory, page), PAGE, table[page]) {
            fail(&format!("page {page} is not as it was written in step {}", table[page]));
        }
        table[page] = n + 1;
        fill(at(memory, page), PAGE, n + 1);
        breathe(n);
    });
    let wrong =
        (0..PAGES).filter(|&page| table[page] != 0 && !is_filled(at(memory, page), PAGE, table[page]));
    same("pages that are wrong", wrong.count(), 0);
}

/// Sixteen threads, each with pages of its own side by side with the others'.
fn threads(meeting: &Meeting) {
    const EACH: usize = 64;
    static STOP: AtomicBool = AtomicBool::new(false);
    let memory = map(0, 16 * EACH, RW, PRIVATE, -1) as usize;
    let work = move |own: usize| {
        let mut random = Random(own as u64 + 1);
        let mut table = [0u64; EACH];
        for n in 1.. {
            let slot = random.below(EACH);
            let page = at(memory as *mut u8, slot * 16 + own);
            if table[slot] != 0 && !is_filled(page, PAGE, table[slot]) {
                fail("a thread's page is wrong");
            }
            table[slot] = n;
            fill(page, PAGE, n);
            breathe(n);
            if STOP.load(SeqCst) {
                break;
            }
        }
    };
    let all: Vec<_> = (0..16).map(|own| std::thread::spawn(move || work(own))).collect();
    until_let_go(meeting, |_| std::thread::sleep(std::time::Duration::from_micros(300)));
    STOP.store(true, SeqCst);
    all.into_iter().for_each(|thread| thread.join().expect("it ends"));
}

/// Maps and unmaps all the time: places are used again, at once or later, with another content.
fn mapper(meeting: &Meeting) {
    const SLOTS: usize = 24;
    let mut random = Random(3);
    let mut there: [(*mut u8, usize, u64); SLOTS] = [(std::ptr::null_mut(), 0, 0); SLOTS];
    // A place of its own, where mappings replace each other.
    let fixed = map(0, 64, libc::PROT_NONE, PRIVATE, -1);
    until_let_go(meeting, |n| {
        let slot = random.below(SLOTS);
        let (old, pages, seed) = there[slot];
        if !old.is_null() {
            same("what was mapped", is_filled(old, pages * PAGE, seed), true);
            // SAFETY: its own mapping.
            ok("munmap", unsafe { libc::munmap(old.cast(), pages * PAGE) });
        }
        let pages = 1 + random.below(40);
        let fresh = map(0, pages, RW, PRIVATE, -1);
        fill(fresh, pages * PAGE, n + 1);
        there[slot] = (fresh, pages, n + 1);
        let (from, count) = (random.below(60), 1 + random.below(4));
        let flags = PRIVATE | libc::MAP_FIXED;
        // SAFETY: inside the place that is kept for it.
        unsafe { libc::mmap(at(fixed, from).cast(), count * PAGE, RW, flags, -1, 0) };
        if n % 3 != 0 {
            fill(at(fixed, from), PAGE, n);
        }
        breathe(n);
    });
}

/// Grows, shrinks and moves a mapping by mremap(2), and leaves the old place mapped (`MREMAP_DONTUNMAP`).
fn mover(meeting: &Meeting) {
    let mut random = Random(4);
    let (mut pages, mut seed) = (8, 1);
    let mut memory = map(0, pages, RW, PRIVATE, -1);
    fill(memory, pages * PAGE, seed);
    until_let_go(meeting, |n| {
        let new = 1 + random.below(200);
        let kept = pages.min(new);
        // SAFETY: the only pointer to it is replaced.
        let moved = unsafe { libc::mremap(memory.cast(), pages * PAGE, new * PAGE, libc::MREMAP_MAYMOVE) };
        assert_ne!(moved, libc::MAP_FAILED, "mremap");
        (memory, pages) = (moved.cast(), new);
        same("what was moved", is_filled(memory, kept * PAGE, seed), true);
        seed = n + 2;
        fill(memory, pages * PAGE, seed);
        if n % 5 == 0 {
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP;
            let length = pages * PAGE;
            // SAFETY: as above; the old place stays mapped and empty, and is unmapped.
            let moved = unsafe { libc::mremap(memory.cast(), length, length, flags) };
            assert_ne!(moved, libc::MAP_FAILED, "mremap without unmapping");
            // SAFETY: mapped, and zero.
            same("the place left", unsafe { memory.read() }, 0);
            // SAFETY: nothing is there that is needed.
            ok("munmap", unsafe { libc::munmap(memory.cast(), length) });
            memory = moved.cast();
        }
        breathe(n);
    });
    same("what was moved last", is_filled(memory, pages * PAGE, seed), true);
}

/// The heap goes up and down.
fn heap(meeting: &Meeting) {
    let mut random = Random(5);
    let (mut pages, mut seed) = (0usize, 0);
    // Calls of the system itself: the C library's allocator must not see that the end moves.
    // SAFETY: asks for the end.
    let start = (unsafe { libc::syscall(libc::SYS_brk, 0) } as usize).next_multiple_of(PAGE) + 64 * PAGE;
    until_let_go(meeting, |n| {
        if pages > 0 {
            same("the heap", is_filled(start as *mut u8, pages * PAGE, seed), true);
        }
        pages = random.below(100);
        // SAFETY: only what this function has is given back; what is above is its own.
        ok("brk", unsafe { libc::syscall(libc::SYS_brk, start + pages * PAGE) });
        seed = n + 1;
        fill(start as *mut u8, pages * PAGE, seed);
        breathe(n);
    });
}

/// Drops pages, some at a time and whole tables of them, and sees zeros.
fn adviser(meeting: &Meeting) {
    const PAGES: usize = 4 * HUGE;
    let mut random = Random(6);
    let memory = map(0, PAGES, RW, PRIVATE, -1);
    let file = std::fs::File::open("/proc/self/exe").expect("opens");
    let copied = map(0, 64, RW, libc::MAP_PRIVATE, file.as_raw_fd());
    let advise = |at: *mut u8, pages: usize, advice: i32| {
        // SAFETY: inside what this function has mapped.
        ok("madvise", unsafe { libc::madvise(at.cast(), pages * PAGE, advice) });
    };
    let guards = 102;
    until_let_go(meeting, |n| {
        let (page, count) = (random.below(PAGES - 64), 1 + random.below(64));
        match n % 8 {
            0 => advise(at(memory, page), count, libc::MADV_DONTNEED),
            1 => {
                advise(at(memory, HUGE), 2 * HUGE, libc::MADV_DONTNEED);
                // SAFETY: mapped, and zero now.
                same("a dropped page", unsafe { at(memory, HUGE + 5).read() }, 0);
            }
            2 => advise(at(memory, page), count, libc::MADV_FREE),
            3 => advise(at(copied, page % 60), 2, libc::MADV_DONTNEED),
            4 => fill(at(copied, page % 64), PAGE, n),
            // Guards, installed and removed: what was there is gone. Older kernels do not know them.
            // SAFETY: inside the mapping.
            5 => unsafe {
                if libc::madvise(at(memory, 100).cast(), 3 * PAGE, guards) == 0 {
                    libc::madvise(at(memory, 101).cast(), PAGE, guards + 1);
                }
            },
            _ => {
                let page = if (99..110).contains(&page) { 200 } else { page };
                let count = if page < 100 { count.min(99 - page.min(98)).max(1) } else { count };
                fill(at(memory, page), count * PAGE, n);
            }
        }
        breathe(n);
    });
}

/// Forks all the time; children write to their copies. Nothing of that may be the parent's.
fn forks(meeting: &Meeting) {
    const PAGES: usize = 256;
    let mut random = Random(7);
    let memory = map(0, PAGES, RW, PRIVATE, -1);
    let mut table = [0u64; PAGES];
    until_let_go(meeting, |n| {
        // SAFETY: this process has one thread.
        let child = ok("fork", unsafe { libc::fork() });
        if child == 0 {
            let wrong = (0..PAGES).any(|p| table[p] != 0 && !is_filled(at(memory, p), PAGE, table[p]));
            fill(at(memory, random.below(PAGES)), PAGE, u64::MAX >> 30);
            // SAFETY: ends the child without running what belongs to its parent.
            unsafe { libc::_exit(i32::from(wrong)) };
        }
        for _ in 0..4 {
            let page = random.below(PAGES);
            table[page] = n + 1;
            fill(at(memory, page), PAGE, n + 1);
        }
        let mut status = 0;
        // SAFETY: the status outlives the call.
        unsafe { libc::waitpid(child, &raw mut status, 0) };
        same("what a child found", status, 0);
    });
    let wrong =
        (0..PAGES).filter(|&page| table[page] != 0 && !is_filled(at(memory, page), PAGE, table[page]));
    same("pages that are wrong", wrong.count(), 0);
}

/// Sixteen threads fork all the time. A child looks after a while whether it has a descriptor that nobody has opened.
fn forking_threads(meeting: &Meeting) {
    static STOP: AtomicBool = AtomicBool::new(false);
    let work = || {
        while !STOP.load(SeqCst) {
            // SAFETY: the child makes system calls only.
            let child = ok("fork", unsafe { libc::fork() });
            if child == 0 {
                let time = libc::timespec { tv_sec: 0, tv_nsec: 20_000_000 };
                // SAFETY: `time` outlives the call; nothing else is opened by number here. Ends the child without
                // running what belongs to its parent.
                unsafe {
                    libc::nanosleep(&raw const time, std::ptr::null_mut());
                    let has_more = (3..64).any(|fd| libc::fcntl(fd, libc::F_GETFD) >= 0);
                    libc::_exit(i32::from(has_more));
                }
            }
            let mut status = 0;
            // SAFETY: the status outlives the call.
            unsafe { libc::waitpid(child, &raw mut status, 0) };
            same("what a child has open", status, 0);
        }
    };
    let threads: Vec<_> = (0..16).map(|_| std::thread::spawn(work)).collect();
    until_let_go(meeting, |_| std::thread::sleep(std::time::Duration::from_micros(300)));
    STOP.store(true, SeqCst);
    threads.into_iter().for_each(|thread| thread.join().expect("it ends"));
}

/// The kernel writes: read(2) of a file, recv(2), and what it leaves in small structures.
fn reads(meeting: &Meeting) {
    const PAGES: usize = 128;
    let mut random = Random(8);
    let memory = map(0, PAGES, RW, PRIVATE, -1);
    let file = std::fs::File::open("/proc/self/exe").expect("opens");
    let mut ends = [0; 2];
    // SAFETY: the array outlives the call.
    ok("socketpair", unsafe { libc::socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0, ends.as_mut_ptr()) });
    let text: Vec<u8> = (0..2 * PAGE).map(|n| n as u8).collect();
    until_let_go(meeting, |n| {
        let to = at(memory, random.below(PAGES - 3));
        // SAFETY: all of these write at most two pages into the mapping.
        unsafe {
            match n % 3 {
                0 => {
                    let offset = (random.below(40) * 1000) as i64;
                    ok("pread", libc::pread(file.as_raw_fd(), to.cast(), 2 * PAGE, offset) as i64);
                }
                1 => {
                    ok("send", libc::send(ends[0], text.as_ptr().cast(), text.len(), 0) as i64);
                    ok("recv", libc::recv(ends[1], to.cast(), text.len(), libc::MSG_WAITALL) as i64);
                    same("what came", std::slice::from_raw_parts(to, text.len()) == text, true);
                }
                _ => {
                    ok("clock_gettime", libc::clock_gettime(libc::CLOCK_MONOTONIC, to.cast()));
                    ok("fstat", libc::fstat(file.as_raw_fd(), at(to, 1).cast()));
                }
            }
        }
        breathe(n);
    });
}

/// A device writes: files are read past the page cache, into pages that it was given before.
fn direct(meeting: &Meeting) {
    const PAGES: usize = 512;
    const BLOCKS: usize = 8;
    let mut random = Random(17);
    let path = meeting.dir.join("direct");
    let contents: Vec<u8> = (0..BLOCKS * 256 * PAGE).map(|n| (n / PAGE) as u8).collect();
    std::fs::write(&path, contents).expect("writes the file");
    use std::os::unix::fs::OpenOptionsExt;
    let file = std::fs::File::options().read(true).custom_flags(libc::O_DIRECT).open(&path).expect("opens");
    let memory = map(0, PAGES, RW, PRIVATE, -1);
    until_let_go(meeting, |_| {
        let (page, block) = (random.below(PAGES - 256), random.below(BLOCKS));
        let (to, offset) = (at(memory, page), (block * 256 * PAGE) as i64);
        // SAFETY: 256 pages inside the mapping.
        let got = unsafe { libc::pread(file.as_raw_fd(), to.cast(), 256 * PAGE, offset) };
        same("bytes read", ok("pread", got as i64), 256 * PAGE as i64);
        // SAFETY: as above.
        let wrong = (0..256).any(|n| unsafe { at(to, n).read_volatile() } != (block * 256 + n) as u8);
        same("a page that was not read", wrong, false);
    });
}

/// Huge pages by advice: written here and there, dropped in part, moved.
fn huge(meeting: &Meeting) {
    const COUNT: usize = 12;
    let mut random = Random(9);
    let whole = map(0, (COUNT + 1) * HUGE, RW, PRIVATE, -1);
    let memory = (whole as usize).next_multiple_of(HUGE * PAGE) as *mut u8;
    // SAFETY: inside the mapping.
    ok("madvise", unsafe { libc::madvise(memory.cast(), COUNT * HUGE * PAGE, libc::MADV_HUGEPAGE) });
    fill(memory, COUNT * HUGE * PAGE, 1);
    until_let_go(meeting, |n| {
        let page = random.below(COUNT * HUGE);
        match n % 50 {
            0 => {
                let huge = at(memory, page / HUGE * HUGE);
                // SAFETY: inside the mapping.
                ok("madvise", unsafe { libc::madvise(huge.cast(), HUGE * PAGE, libc::MADV_DONTNEED) });
            }
            // Comes as a huge page again.
            1 => fill(at(memory, page), 64, n),
            2 => {
                // SAFETY: inside the mapping.
                ok("madvise", unsafe { libc::madvise(at(memory, page).cast(), PAGE, libc::MADV_DONTNEED) });
            }
            _ => fill(at(memory, page), PAGE, n),
        }
        breathe(n);
    });
}

/// Explicit huge pages: written and dropped. The test has put some into the pool.
fn hugetlb(meeting: &Meeting) {
    const COUNT: usize = 4;
    let memory = map(0, COUNT * HUGE, RW, PRIVATE | libc::MAP_HUGETLB, -1);
    let mut random = Random(10);
    until_let_go(meeting, |n| {
        let page = random.below(COUNT * HUGE);
        if n % 100 == 0 {
            let huge = at(memory, page / HUGE * HUGE);
            // SAFETY: inside the mapping.
            ok("madvise", unsafe { libc::madvise(huge.cast(), HUGE * PAGE, libc::MADV_DONTNEED) });
        }
        if n % 100 > 50 {
            fill(at(memory, page), PAGE, n);
        }
        breathe(n);
    });
}

/// Private pages of files: they become the process' own, and the file's again.
fn files(meeting: &Meeting) {
    const PAGES: usize = 256;
    let mut random = Random(11);
    let path = meeting.dir.join("mapped");
    let contents: Vec<u8> = (0..PAGES * PAGE).map(|n| (n % 251) as u8 | 1).collect();
    std::fs::write(&path, &contents).expect("writes the file");
    let file = std::fs::File::open(&path).expect("opens");
    let memory = map(0, PAGES, RW, libc::MAP_PRIVATE, file.as_raw_fd());
    until_let_go(meeting, |n| {
        let page = random.below(PAGES - 8);
        match n % 16 {
            0 => {
                // SAFETY: inside the mapping.
                ok("madvise", unsafe {
                    libc::madvise(at(memory, page).cast(), 8 * PAGE, libc::MADV_DONTNEED)
                });
                // SAFETY: as above.
                let found = unsafe { std::slice::from_raw_parts(at(memory, page), PAGE) };
                same("a page of the file", found == &contents[page * PAGE..(page + 1) * PAGE], true);
            }
            1 => {
                let (prot, place) = (libc::PROT_READ | libc::PROT_EXEC, at(memory, page).cast());
                // SAFETY: inside the mapping, and writable again before anybody writes.
                ok("mprotect", unsafe { libc::mprotect(place, 4 * PAGE, prot) });
                // SAFETY: as above.
                ok("mprotect", unsafe { libc::mprotect(place, 4 * PAGE, RW) });
            }
            // Zeros that are not the file's.
            // SAFETY: inside the mapping.
            2 => unsafe { at(memory, page).write_bytes(0, PAGE) },
            // Only read: it stays the file's.
            // SAFETY: inside the mapping.
            3..=6 => drop(std::hint::black_box(unsafe { at(memory, page).read_volatile() })),
            _ => fill(at(memory, page), 64, n),
        }
        breathe(n);
    });
}

/// The stack grows, is written, and is left.
fn stack(meeting: &Meeting) {
    #[inline(never)]
    fn descend(depth: usize, mark: u64) -> u64 {
        let mut room = [mark ^ depth as u64; 512];
        std::hint::black_box(&mut room);
        let below = if depth == 0 { 0 } else { descend(depth - 1, mark) };
        below + u64::from(std::hint::black_box(room)[511] != mark ^ depth as u64)
    }
    let mut random = Random(12);
    until_let_go(meeting, |n| {
        // Deeper as time goes by.
        let depth = random.below(20 + (n as usize / 4).min(300));
        same("frames that are wrong", descend(depth, n), 0);
        breathe(n);
    });
}

/// Protections change all the time; a part is locked.
fn protect(meeting: &Meeting) {
    const PAGES: usize = 128;
    let mut random = Random(13);
    let memory = map(0, PAGES, RW, PRIVATE, -1);
    // SAFETY: inside the mapping.
    ok("mlock", unsafe { libc::mlock(at(memory, 100).cast(), 16 * PAGE) });
    let set = |page: usize, count: usize, prot: i32| {
        // SAFETY: inside the mapping.
        ok("mprotect", unsafe { libc::mprotect(at(memory, page).cast(), count * PAGE, prot) });
    };
    until_let_go(meeting, |n| {
        let (page, count) = (random.below(PAGES - 8), 1 + random.below(8));
        set(page, count, RW);
        fill(at(memory, page), count * PAGE, n + 1);
        set(page, count, [libc::PROT_NONE, libc::PROT_READ, RW, RW][random.below(4)]);
        breathe(n);
    });
}

/// Executes itself again and again; after each a little is written.
fn exec(meeting: &Meeting) {
    let memory = map(0, 64, RW, PRIVATE, -1);
    // SAFETY: no arguments.
    let seed = unsafe { libc::getpid() } as u64 ^ memory as u64;
    let mut passes = 0;
    until_let_go(meeting, |n| {
        fill(at(memory, (n % 64) as usize), PAGE, seed + n);
        breathe(n);
        passes += 1;
        if passes == 3000 {
            use std::os::unix::process::CommandExt;
            let mut arguments = std::env::args_os();
            let program = arguments.next().expect("its name");
            panic!("exec: {}", std::process::Command::new(program).args(arguments).exec());
        }
    });
}

/// Memory shared with a child that writes to it, and private memory beside it.
fn shared(meeting: &Meeting) {
    let memory = map(0, 64, RW, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1);
    let private = map(0, 64, RW, PRIVATE, -1);
    // SAFETY: this process has one thread.
    let child = ok("fork", unsafe { libc::fork() });
    if child == 0 {
        let mut random = Random(14);
        for n in 1.. {
            fill(at(memory, 32 + random.below(32)), PAGE, n);
            std::thread::sleep(std::time::Duration::from_micros(50));
        }
    }
    let mut random = Random(15);
    until_let_go(meeting, |n| {
        fill(at(memory, random.below(32)), PAGE, n + 1);
        fill(at(private, random.below(64)), PAGE, n + 1);
        breathe(n);
    });
    // SAFETY: a child of this process' own.
    unsafe { libc::kill(child, libc::SIGKILL) };
}

/// Dirties pages of 256 MiB at a steady rate, and computes in between; its steps are the measure of how it is slowed
/// down (the first word of `DIR/steps`).
fn steady(meeting: &Meeting, pages_per_sec: f64) {
    let pages = (256 << 20) / PAGE;
    let memory = map(0, pages, RW, PRIVATE, -1);
    fill(memory, pages * PAGE, 1);
    let counter = map(0, 1, RW, libc::MAP_SHARED, {
        let path = meeting.dir.join("steps");
        std::fs::write(&path, [0; PAGE]).expect("writes");
        let file = std::fs::File::options().read(true).write(true).open(path).expect("opens");
        std::os::fd::IntoRawFd::into_raw_fd(file)
    });
    let mut random = Random(16);
    let start = crate::calls::now();
    let (mut written, mut steps, mut state) = (0u64, 0u64, 1u64);
    until_let_go(meeting, |_| {
        for _ in 0..200 {
            state = std::hint::black_box(state.wrapping_mul(6364136223846793005).wrapping_add(1));
        }
        steps += 1;
        // SAFETY: the counter's page.
        unsafe { counter.cast::<u64>().write_volatile(steps) };
        if steps % 16 == 0 {
            let due = ((crate::calls::now() - start) * pages_per_sec) as u64;
            while written < due {
                // SAFETY: inside the mapping.
                unsafe { at(memory, random.below(pages)).cast::<u64>().write_volatile(state) };
                written += 1;
            }
        }
    });
}
