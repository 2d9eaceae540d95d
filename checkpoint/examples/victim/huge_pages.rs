//! Explicit huge pages (hugetlb): of every kind of mapping, between processes, and pages that were never made.

use crate::calls::{PAGE, fill, is_filled, map, ok};
use crate::{Meeting, fail, same};
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::{Duration, Instant};

const HUGE: usize = 2 << 20;
const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
const PRIVATE: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
const SHARED: i32 = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
/// 21 is the logarithm of the size.
const OF_2_MIB: i32 = libc::MAP_HUGETLB | 21 << libc::MAP_HUGE_SHIFT;

fn huge(pages: usize, flags: i32) -> *mut u8 {
    map(0, pages * HUGE / PAGE, RW, flags | OF_2_MIB, -1)
}

/// A part of a file, in huge pages.
fn part(file: &File, first: usize, pages: usize, flags: i32) -> *mut u8 {
    let (length, offset) = (pages * HUGE, (first * HUGE) as i64);
    // SAFETY: a new mapping where the kernel finds room.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), length, RW, flags, file.as_raw_fd(), offset) };
    assert_ne!(at, libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
    at.cast()
}

fn page(at: *mut u8, number: usize) -> *mut u8 {
    // SAFETY: the callers stay within their mappings.
    unsafe { at.add(number * HUGE) }
}

fn protect(at: *mut u8, prot: i32) {
    // SAFETY: a page that this test has mapped.
    ok("mprotect", unsafe { libc::mprotect(at.cast(), HUGE, prot) });
}

fn advise(at: *mut u8, pages: usize, advice: i32) {
    // SAFETY: pages that this test has mapped.
    ok("madvise", unsafe { libc::madvise(at.cast(), pages * HUGE, advice) });
}

/// Makes a page, and leaves it zero.
fn touch(at: *mut u8) {
    // SAFETY: the callers have mapped it, writable.
    unsafe { at.write_volatile(0) };
}

fn memfd(pages: usize) -> File {
    let flags = libc::MFD_HUGETLB | libc::MFD_ALLOW_SEALING | 21 << libc::MAP_HUGE_SHIFT;
    // SAFETY: the name is a string with its NUL; the descriptor is nobody else's.
    let file = unsafe { File::from_raw_fd(ok("memfd_create", libc::memfd_create(c"huge".as_ptr(), flags))) };
    file.set_len((pages * HUGE) as u64).expect("its length");
    file
}

fn seal(file: &File, seals: i32) {
    // SAFETY: no pointers.
    ok("sealing", unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) });
}

fn seals(file: &File) -> i32 {
    // SAFETY: no pointers.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) }
}

/// What the kernel shows of a mapping: rights, size of its pages, flags, blocks of the file behind it.
fn shown(at: *const u8) -> (String, String, String, u64) {
    let text = std::fs::read_to_string("/proc/self/smaps").expect("smaps");
    let start = format!("{:x}-", at as usize);
    let mut lines = text.lines().skip_while(|line| !line.starts_with(&start));
    let first: Vec<&str> = lines.next().expect("it is mapped").split_ascii_whitespace().collect();
    let mut line =
        |key: &str| lines.find_map(|line| line.strip_prefix(key)).expect("told").trim().to_string();
    let blocks = std::fs::metadata(format!("/proc/self/map_files/{}", first[0])).expect("stat").blocks();
    (first[1].to_string(), line("KernelPageSize:"), line("VmFlags:"), blocks)
}

/// The frame of each huge page, 0 where there is none.
fn frames(pid: u32, at: *const u8, pages: usize) -> Vec<u64> {
    let file = File::open(format!("/proc/{pid}/pagemap")).expect("pagemap");
    let of_page = |n: usize| {
        let mut word = [0; 8];
        file.read_exact_at(&mut word, ((at as usize + n * HUGE) / PAGE * 8) as u64).expect("read");
        let word = u64::from_le_bytes(word);
        if word >> 63 == 1 { word & ((1 << 55) - 1) } else { 0 }
    };
    (0..pages).map(of_page).collect()
}

fn present(at: *const u8, pages: usize) -> Vec<bool> {
    frames(std::process::id(), at, pages).into_iter().map(|frame| frame != 0).collect()
}

/// Free and reserved pages of the machine: nobody else uses any meanwhile.
fn counts(kilobytes: usize) -> [String; 2] {
    let read = |name| {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-{kilobytes}kB/{name}_hugepages");
        std::fs::read_to_string(path).expect("counted").trim().to_string()
    };
    [read("free"), read("resv")]
}

/// One process with every kind.
pub fn run(meeting: &Meeting) {
    let private = huge(6, PRIVATE);
    fill(private, HUGE, 1);
    touch(page(private, 2));
    fill(page(private, 3), HUGE, 2);
    fill(page(private, 5), HUGE, 3);
    protect(page(private, 3), libc::PROT_READ);
    protect(page(private, 5), libc::PROT_NONE);
    // SAFETY: a page of that mapping, which nothing uses.
    ok("munmap", unsafe { libc::munmap(page(private, 4).cast(), HUGE) });
    let unreserved = huge(16, PRIVATE | libc::MAP_NORESERVE);
    fill(page(unreserved, 7), HUGE, 4);
    advise(unreserved, 16, libc::MADV_DONTFORK);
    let shared = huge(4, SHARED);
    fill(page(shared, 1), HUGE, 5);
    touch(page(shared, 2));
    let file = memfd(4);
    let window = part(&file, 1, 2, libc::MAP_SHARED);
    fill(window, HUGE, 6);
    let copied = part(&file, 0, 2, libc::MAP_PRIVATE);
    fill(copied, HUGE, 7);
    seal(&file, libc::F_SEAL_SHRINK | libc::F_SEAL_GROW);
    // SAFETY: no pointers.
    ok("lseek", unsafe { libc::lseek(file.as_raw_fd(), 12_345, libc::SEEK_SET) });
    let closed = memfd(3);
    let while_open = part(&closed, 0, 3, libc::MAP_SHARED | libc::MAP_NORESERVE);
    fill(page(while_open, 2), HUGE, 8);
    // SAFETY: that mapping, which nothing uses any more.
    ok("munmap", unsafe { libc::munmap(while_open.cast(), 3 * HUGE) });
    seal(&closed, libc::F_SEAL_WRITE | libc::F_SEAL_SEAL);
    let segment = segment();
    fill(segment, HUGE / 2, 9);
    // Behind the length that was asked for, and within the page.
    fill(page(segment, 2).wrapping_sub(PAGE), PAGE, 10);

    let look = || {
        let parts =
            [private, page(private, 3), page(private, 5), unreserved, shared, window, copied, segment];
        let own = [(private, 4), (page(private, 5), 1), (unreserved, 16), (copied, 1)];
        (
            parts.map(|at| shown(at)),
            own.map(|(at, pages)| present(at, pages)),
            [&file, &closed].map(|file| file.metadata().expect("stat").blocks()),
            [&file, &closed].map(seals),
            counts(2048),
        )
    };
    let before = look();
    meeting.pause();
    same("what the kernel shows", look(), before);

    protect(page(private, 5), libc::PROT_READ);
    let filled = [
        is_filled(private, HUGE, 1),
        is_filled(page(private, 3), HUGE, 2),
        is_filled(page(private, 5), HUGE, 3),
        is_filled(page(unreserved, 7), HUGE, 4),
        is_filled(page(shared, 1), HUGE, 5),
        is_filled(window, HUGE, 6),
        is_filled(copied, HUGE, 7),
        is_filled(page(copied, 1), HUGE, 6),
        is_filled(segment, HUGE / 2, 9),
        is_filled(page(segment, 2).wrapping_sub(PAGE), PAGE, 10),
    ];
    same("contents", filled, [true; 10]);
    for zero in [page(private, 1), page(private, 2), shared, page(shared, 2), page(window, 1)] {
        // SAFETY: pages of those mappings.
        same("zeros", unsafe { std::slice::from_raw_parts(zero, HUGE) }.iter().all(|&byte| byte == 0), true);
    }
    // What is written to the memory is in the file.
    fill(page(window, 1), PAGE, 11);
    let mut back = vec![0u8; HUGE];
    file.read_exact_at(&mut back[..PAGE], 2 * HUGE as u64).expect("read");
    same("in the file", is_filled(back.as_ptr(), PAGE, 11), true);
    closed.read_exact_at(&mut back, 2 * HUGE as u64).expect("read");
    same("in the sealed file", is_filled(back.as_ptr(), HUGE, 8), true);
    // SAFETY: no pointers.
    same("position", unsafe { libc::lseek(file.as_raw_fd(), 0, libc::SEEK_CUR) }, 12_345);
    same("sealed", file.set_len(HUGE as u64).is_err(), true);
}

fn segment() -> *mut u8 {
    let flags = libc::IPC_CREAT | libc::SHM_HUGETLB | 21 << libc::MAP_HUGE_SHIFT | 0o600;
    // SAFETY: no pointers.
    let id = ok("shmget", unsafe { libc::shmget(libc::IPC_PRIVATE, HUGE + 5000, flags) });
    // SAFETY: the kernel finds room for it.
    let at = unsafe { libc::shmat(id, std::ptr::null(), 0) };
    // SAFETY: no pointers.
    ok("shmctl", unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) });
    assert_ne!(at as isize, -1, "shmat: {}", std::io::Error::last_os_error());
    at.cast()
}

/// Pages of the private mapping of a family.
const COMMON: usize = 8;

/// What the processes of a family tell each other, in a huge page that all have.
struct Board {
    ready: AtomicU32,
    go: AtomicU32,
    pids: [AtomicU32; 2],
    checked: AtomicU32,
}

fn wait_until(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(300);
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn check_pages(who: &str, at: *mut u8, own: &[(usize, u64)], gone: Option<usize>) {
    for number in (0..COMMON).filter(|&number| Some(number) != gone) {
        let seed = own.iter().find(|own| own.0 == number).map_or(number as u64, |own| own.1);
        if !is_filled(page(at, number), HUGE, seed) {
            fail(&format!("{who}: page {number}"));
        }
    }
    if let Some(gone) = gone {
        same("what was given up", present(at, COMMON)[gone], false);
    }
}

/// Runs in a process of its own until it has checked itself; never returns to the caller.
fn member(board: &Board, who: usize, prepare: impl FnOnce(), check: impl FnOnce()) -> u32 {
    // SAFETY: this program has one thread.
    let pid = ok("fork", unsafe { libc::fork() });
    if pid > 0 {
        return pid as u32;
    }
    prepare();
    board.pids[who].store(std::process::id(), SeqCst);
    board.ready.fetch_add(1, SeqCst);
    wait_until("the word to go on", || board.go.load(SeqCst) == 1);
    check();
    board.checked.fetch_add(1, SeqCst);
    let failed = crate::FAILURES.load(SeqCst) > 0;
    std::process::exit(i32::from(failed));
}

/// Three generations with pages in common, which are no more than there are: memory is copied by nobody.
pub fn family(meeting: &Meeting) {
    let private = huge(COMMON, PRIVATE);
    (0..COMMON).for_each(|number| fill(page(private, number), HUGE, number as u64));
    // SAFETY: a huge page of zeros, which are a board; it stays mapped.
    let board = unsafe { &*huge(1, SHARED).cast::<Board>() };
    let file = memfd(2);
    let window = part(&file, 0, 2, libc::MAP_SHARED);
    let pages_of_child = [(2, 22), (3, 33)];
    let pages_of_grandchild = [(2, 22), (3, 33), (4, 44)];
    let prepare = || {
        pages_of_child.iter().for_each(|&(number, seed)| fill(page(private, number), HUGE, seed));
        advise(page(private, 5), 1, libc::MADV_DONTNEED);
        let prepare = || fill(page(private, 4), HUGE, 44);
        let check = || check_pages("grandchild", private, &pages_of_grandchild, Some(5));
        member(board, 1, prepare, check);
    };
    let check = || {
        check_pages("child", private, &pages_of_child, Some(5));
        wait_until("the grandchild", || board.checked.load(SeqCst) == 1);
        fill(page(window, 1), HUGE, 77);
        // SAFETY: waits for any child, and wants no status.
        ok("wait", unsafe { libc::wait(std::ptr::null_mut()) });
    };
    let child = member(board, 0, prepare, check);
    wait_until("the others", || board.ready.load(SeqCst) == 2);
    fill(page(private, 6), HUGE, 66);
    let all = [std::process::id(), child, board.pids[1].load(SeqCst)];
    let common = |a: u32, b: u32| {
        let pairs = frames(a, private, COMMON).into_iter().zip(frames(b, private, COMMON));
        pairs.map(|(a, b)| a != 0 && a == b).collect::<Vec<bool>>()
    };
    let look = || (common(all[0], all[1]), common(all[1], all[2]), counts(2048));
    let before = look();
    same("in common", before.0.iter().filter(|&&one| one).count(), 4);
    meeting.pause();
    same("in common and counted", look(), before);
    // Not before: what is looked at must not change.
    board.go.store(1, SeqCst);
    check_pages("root", private, &[(6, 66)], None);
    wait_until("the child", || board.checked.load(SeqCst) == 2);
    same("through the file", is_filled(page(window, 1), HUGE, 77), true);
    let mut status = 0;
    // SAFETY: `status` outlives the call.
    same("child", unsafe { libc::waitpid(child as i32, &raw mut status, 0) }, child as i32);
    same("child's status", status, 0);
}

/// Pages that nothing is reserved for.
pub fn unreserved(meeting: &Meeting) {
    let at = huge(8, PRIVATE | libc::MAP_NORESERVE);
    (2..5).for_each(|number| fill(page(at, number), HUGE, number as u64));
    let before = present(at, 8);
    meeting.pause();
    same("pages", present(at, 8), before);
    same("contents", (2..5).all(|number| is_filled(page(at, number), HUGE, number as u64)), true);
}

/// A page of a gibibyte, of which little is not zero.
pub fn gigabyte(meeting: &Meeting) {
    const GIBIBYTE: usize = 1 << 30;
    let flags = PRIVATE | libc::MAP_HUGETLB | 30 << libc::MAP_HUGE_SHIFT;
    let at = map(0, GIBIBYTE / PAGE, RW, flags, -1);
    let end = at.wrapping_add(GIBIBYTE - HUGE);
    fill(at, 3 * PAGE, 1);
    fill(end, HUGE, 2);
    let before = (shown(at), counts(1 << 20));
    meeting.pause();
    same("what the kernel shows", (shown(at), counts(1 << 20)), before);
    same("contents", (is_filled(at, 3 * PAGE, 1), is_filled(end, HUGE, 2)), (true, true));
}
