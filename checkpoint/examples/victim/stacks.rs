//! Stacks that grow downwards by themselves (`MAP_GROWSDOWN`, mmap(2)), and the gap that is kept below them.

use crate::calls::{PAGE, fill, is_filled, map, ok};
use crate::{Meeting, same};
use std::hint::black_box;

const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
const ANONYMOUS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
/// Pages of the address space that belong to one of the stacks.
const ROOM: usize = 2048;
/// What it has from the beginning.
const FIRST: usize = 16;
/// What is kept free between a stack and what is below (`stack_guard_gap`, mm/mmap.c).
const GAP: usize = 256;

/// A place of its own, with nothing else in it.
struct Room {
    start: *mut u8,
    end: *mut u8,
}

impl Room {
    /// Several, none of which has its stack in what is free of another.
    fn several<const N: usize>() -> [Room; N] {
        let reserve = |_| map(0, ROOM, libc::PROT_NONE, ANONYMOUS | libc::MAP_NORESERVE, -1);
        [(); N].map(reserve).map(Room::at)
    }

    fn at(start: *mut u8) -> Room {
        // SAFETY: it was mapped just now, and nobody knows it.
        unsafe {
            ok("munmap", libc::munmap(start.cast(), ROOM * PAGE));
            let end = start.add(ROOM * PAGE);
            let flags = ANONYMOUS | libc::MAP_GROWSDOWN | libc::MAP_FIXED_NOREPLACE;
            let stack = map(end.sub(FIRST * PAGE) as usize, FIRST, RW, flags, -1);
            assert_eq!(stack, end.sub(FIRST * PAGE), "not there");
            Room { start, end }
        }
    }

    /// The page so many pages below the end.
    fn page(&self, below: usize) -> *mut u8 {
        // SAFETY: within the room.
        unsafe { self.end.sub(below * PAGE) }
    }

    /// Whether it can be read there. A call of the kernel grows a stack as the program itself does, and tells if
    /// it cannot.
    fn can_be_read(&self, below: usize) -> bool {
        let mut pipe = [0; 2];
        // SAFETY: the descriptors are ours; what cannot be read is told by EFAULT.
        unsafe {
            ok("pipe", libc::pipe(pipe.as_mut_ptr()));
            let wrote = libc::write(pipe[1], self.page(below).cast(), 1);
            libc::close(pipe[0]);
            libc::close(pipe[1]);
            wrote == 1
        }
    }

    fn grow(&self, pages: std::ops::RangeInclusive<usize>, seed: u64) {
        pages.for_each(|below| fill(self.page(below), PAGE, seed + below as u64));
    }

    /// The first page that is not as it was written.
    fn wrong(&self, mut pages: std::ops::RangeInclusive<usize>, seed: u64) -> Option<usize> {
        pages.find(|&below| !is_filled(self.page(below), PAGE, seed + below as u64))
    }
}

/// Uses so many pages of the stack that it runs on.
#[inline(never)]
fn deep(pages: u64) -> u64 {
    let page = black_box([pages as u8; PAGE]);
    let below = if pages == 0 { 0 } else { deep(pages - 1) };
    below + u64::from(page[black_box(17)])
}

pub fn run(meeting: &Meeting) {
    let [free, bounded] = Room::several();
    free.grow(1..=300, 1000);
    // Something below the other one, near enough to be in its way before it is at its end.
    let below = map(bounded.start as usize, 8, RW, ANONYMOUS | libc::MAP_FIXED_NOREPLACE, -1);
    fill(below, 8 * PAGE, 7);
    bounded.grow(1..=600, 5000);
    let used = deep(64);
    meeting.pause();
    same("a stack that has grown", free.wrong(1..=300, 1000), None);
    free.grow(301..=900, 1000);
    same("a stack that has grown further", free.wrong(1..=900, 1000), None);
    same("a stack above something", bounded.wrong(1..=600, 5000), None);
    let most = ROOM - 8 - GAP;
    same("the last page above the gap", bounded.can_be_read(most), true);
    same("the gap", bounded.can_be_read(most + 1), false);
    same("what is below the gap", is_filled(below, 8 * PAGE, 7), true);
    same("the stack of the process", deep(64), used);
    // Far more than it had when it was saved; the limit is 8 MiB or more everywhere.
    same("the stack of the process, deeper", deep(1000) > used, true);
}
