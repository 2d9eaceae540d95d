//! Every kind of mapping, and the map as a whole.

use crate::calls::{PAGE, fill, is_filled, map, ok, status};
use crate::{Meeting, fail, same};
use std::os::fd::AsRawFd;

const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
const PRIVATE: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
const SHARED: i32 = libc::MAP_SHARED | libc::MAP_ANONYMOUS;

fn protect(at: *mut u8, pages: usize, prot: i32) {
    // SAFETY: a range that this test has mapped.
    ok("mprotect", unsafe { libc::mprotect(at.cast(), pages * PAGE, prot) });
}

fn advise(at: *mut u8, pages: usize, advice: i32) {
    // SAFETY: a range that this test has mapped.
    ok("madvise", unsafe { libc::madvise(at.cast(), pages * PAGE, advice) });
}

/// `/proc/self/maps` into memory that is there already, so that reading it changes nothing.
fn maps(buffer: &mut Vec<u8>) -> String {
    use std::io::Read;
    buffer.clear();
    let mut file = std::fs::File::open("/proc/self/maps").expect("maps");
    file.read_to_end(buffer).expect("reads maps");
    String::from_utf8_lossy(buffer).into_owned()
}

/// Lines of the map, where neighbours that are alike count as one: the kernel may have kept them apart
/// for what only it knows (one had been writable once).
fn merged(maps: &str) -> Vec<(u64, u64, String)> {
    let mut out: Vec<(u64, u64, String)> = Vec::new();
    for line in maps.lines() {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let hex = |text: &str| u64::from_str_radix(text, 16).expect("hexadecimal");
        let (start, end) = words[0].split_once('-').expect("a range");
        let (start, end, offset) = (hex(start), hex(end), hex(words[2]));
        let rest = format!("{} {} {}", words[1], offset.wrapping_sub(start), words[3..].join(" "));
        // The kernel numbers shared memory as it is made.
        let rest = if words[4] == "0" || words.get(5) == Some(&"/dev/zero") {
            format!("{} {}", words[1], words[5..].join(" "))
        } else {
            rest
        };
        match out.last_mut() {
            Some(last) if last.1 == start && last.2 == rest => last.1 = end,
            _ => out.push((start, end, rest)),
        }
    }
    out
}

fn flags_of(at: *const u8) -> String {
    let text = std::fs::read_to_string("/proc/self/smaps").expect("smaps");
    let start = format!("{:x}-", at as usize);
    let mut lines = text.lines().skip_while(|line| !line.starts_with(&start));
    lines.find_map(|line| line.strip_prefix("VmFlags:")).unwrap_or_default().trim().to_string()
}

/// Uses about a mebibyte and a half of the stack.
#[inline(never)]
fn descend(depth: u64) -> u64 {
    let mut room = [depth; 512];
    std::hint::black_box(&mut room);
    if depth == 0 { room[0] } else { descend(depth - 1) + room[511] }
}

pub fn run(meeting: &Meeting) {
    let private = map(0, 2048, RW, PRIVATE, -1);
    fill(private, 2048 * PAGE, 1);
    // SAFETY: all within that mapping, and nothing else uses it.
    let (hole, guard, constant) =
        unsafe { (private.add(100 * PAGE), private.add(200 * PAGE), private.add(300 * PAGE)) };
    // SAFETY: as above.
    ok("munmap", unsafe { libc::munmap(hole.cast(), PAGE) });
    protect(guard, 4, libc::PROT_NONE);
    protect(constant, 4, libc::PROT_READ);
    let sparse = map(0, 4096, RW, PRIVATE | libc::MAP_NORESERVE, -1);
    // SAFETY: within the mapping.
    fill(unsafe { sparse.add(4000 * PAGE) }, PAGE, 2);

    let shared = map(0, 16, RW, SHARED, -1);
    fill(shared, 16 * PAGE, 3);
    // SAFETY: a second mapping of shared memory (mremap(2), old size 0).
    let again = unsafe { libc::mremap(shared.cast(), 0, 16 * PAGE, libc::MREMAP_MAYMOVE) }.cast::<u8>();
    assert_ne!(again.cast(), libc::MAP_FAILED);
    let read_only_shared = map(0, 4, RW, SHARED, -1);
    fill(read_only_shared, 4 * PAGE, 4);
    protect(read_only_shared, 4, libc::PROT_READ);

    let path = meeting.dir.join("mapped");
    let original: Vec<u8> = (0..16 * PAGE).map(|n| (n % 251) as u8 | 1).collect();
    std::fs::write(&path, &original).expect("writes the file");
    let file = std::fs::File::options().read(true).write(true).open(&path).expect("opens");
    let copied = map(0, 16, RW, libc::MAP_PRIVATE, file.as_raw_fd());
    let read_only = map(0, 16, libc::PROT_READ, libc::MAP_PRIVATE, file.as_raw_fd());
    drop(file);
    let of_file = std::fs::File::open(&path).expect("opens");
    let shared_file = map(0, 16, libc::PROT_READ, libc::MAP_SHARED, of_file.as_raw_fd());
    drop(of_file);
    // SAFETY: pages of the private mapping above.
    unsafe {
        fill(copied.add(3 * PAGE), PAGE, 5);
        copied.add(5 * PAGE).write_bytes(0, PAGE);
        fill(copied.add(6 * PAGE), PAGE, 6);
        protect(copied.add(6 * PAGE), 1, libc::PROT_READ);
    }
    let huge = map(0, 4096, RW, PRIVATE, -1);
    advise(huge, 4096, libc::MADV_HUGEPAGE);
    fill(huge, 4096 * PAGE, 7);
    let advised = map(0, 8, RW, PRIVATE, -1);
    // Apart from its neighbours, so that it stays a mapping of its own.
    advise(advised, 8, libc::MADV_DONTFORK);
    advise(advised, 8, libc::MADV_DONTDUMP);
    advise(advised, 8, libc::MADV_NOHUGEPAGE);
    let locked = map(0, 8, RW, PRIVATE, -1);
    // SAFETY: the mapping just made.
    ok("mlock", unsafe { libc::mlock(locked.cast(), 8 * PAGE) });
    descend(10);

    let wanted = [flags_of(huge), flags_of(advised), flags_of(locked), status("VmLck")];
    let mut buffer = Vec::with_capacity(1 << 16);
    // So that the heap has room for what comes.
    drop([maps(&mut buffer), maps(&mut buffer), maps(&mut buffer)]);
    let before = maps(&mut buffer);
    // SAFETY: asks for the end.
    let heap_end = unsafe { libc::sbrk(0) } as usize;
    meeting.pause();
    // SAFETY: asks for the end.
    same("the heap's end", unsafe { libc::sbrk(0) } as usize, heap_end);
    let after = maps(&mut buffer);
    let (after, before) = (merged(&after), merged(&before));
    for (found, wanted) in after.iter().zip(&before) {
        same("a line of the map", found, wanted);
    }
    same("mappings", after.len(), before.len());
    same("flags", [flags_of(huge), flags_of(advised), flags_of(locked), status("VmLck")], wanted);

    let intact = |from: usize, pages: usize| {
        // The pattern goes by the place in the whole.
        let scratch = map(0, 2048, RW, PRIVATE, -1);
        fill(scratch, 2048 * PAGE, 1);
        // SAFETY: both are mapped and readable over that length.
        let equal = unsafe {
            libc::memcmp(private.add(from * PAGE).cast(), scratch.add(from * PAGE).cast(), pages * PAGE) == 0
        };
        // SAFETY: made above.
        unsafe { libc::munmap(scratch.cast(), 2048 * PAGE) };
        equal
    };
    protect(guard, 4, libc::PROT_READ);
    same("private memory", [intact(0, 100), intact(101, 1947)], [true; 2]);
    // SAFETY: within the mapping.
    let far = unsafe { sparse.add(4000 * PAGE) };
    same("sparse memory", is_filled(far, PAGE, 2), true);
    // SAFETY: within the mapping.
    same("its zeros", unsafe { sparse.read() }, 0);
    same("shared memory", is_filled(again, 16 * PAGE, 3), true);
    same("constant shared memory", is_filled(read_only_shared, 4 * PAGE, 4), true);
    fill(shared, PAGE, 8);
    same("shared memory is one", is_filled(again, PAGE, 8), true);
    // SAFETY: pages of the private mapping.
    unsafe {
        same("a changed page", is_filled(copied.add(3 * PAGE), PAGE, 5), true);
        same("a zeroed page", (0..PAGE).all(|n| copied.add(5 * PAGE + n).read() == 0), true);
        same("a constant page", is_filled(copied.add(6 * PAGE), PAGE, 6), true);
        for mapping in [copied, read_only, shared_file] {
            let page = std::slice::from_raw_parts(mapping.add(7 * PAGE), PAGE);
            same("a page of the file", page == &original[7 * PAGE..8 * PAGE], true);
        }
    }
    same("the file", std::fs::read(&path).expect("reads") == original, true);
    same("huge pages", is_filled(huge, 4096 * PAGE, 7), true);
    // SAFETY: moves the heap's end up; malloc knows that others do.
    unsafe {
        let end = libc::sbrk(1 << 20);
        fill(end.cast(), 1 << 20, 9);
        same("a larger heap", libc::sbrk(0) as usize, end as usize + (1 << 20));
    }
    if descend(400) == 0 {
        fail("the stack");
    }
}
