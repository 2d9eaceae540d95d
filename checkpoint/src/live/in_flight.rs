//! Memory that reads under way may still fill.
//!
//! A read past the page cache (O_DIRECT, files of FUSE servers that want it so) gets hold of the pages when it begins,
//! and the data come into them by no page table: if a page is armed in between, nobody sees that it changes. The same
//! read may wait for hours, as one of a terminal at another node does. So after pages were armed, it is looked
//! which threads are in a read, and its buffer stays dirty until they are not.
//!
//! What is read into a page before this look needs no more: the page's contents are read after it. A thread that
//! is on a CPU is looked at again, as the kernel does not tell what it is at; one that at each look is in the
//! middle of beginning such a read is missed.

use crate::proc::Dir;
use crate::sys::process_vm;
use std::time::Duration;

/// Looks at threads that are on a CPU, and the time between two.
const LOOKS: u32 = 5;
const APART: Duration = Duration::from_micros(100);
/// Of one vector (`IOV_MAX`, readv(2)).
const MAX_BUFFERS: u64 = 1024;
const PAGE: u64 = 4096;

/// What a thread is at.
enum At {
    Unknown,
    Nothing,
    Buffers(Vec<(u64, u64)>),
}

/// Ranges of whole pages.
pub fn ranges(pid: i32) -> Vec<(u64, u64)> {
    let mut tids = crate::proc::tids(pid).unwrap_or_default();
    let Ok(tasks) = Dir::open(pid, "task") else { return Vec::new() };
    let mut found = Vec::new();
    for look in 0..LOOKS {
        if look > 0 {
            std::thread::sleep(APART);
        }
        tids.retain(|tid| match at(pid, &tasks, *tid) {
            At::Unknown => true,
            At::Nothing => false,
            At::Buffers(buffers) => {
                found.extend(buffers);
                false
            }
        });
        if tids.is_empty() {
            break;
        }
    }
    found
}

/// By `/proc/PID/task/TID/syscall`: number, arguments, stack, place; or `running`.
fn at(pid: i32, tasks: &Dir, tid: i32) -> At {
    // It has ended.
    let Ok(text) = tasks.read(&format!("{tid}/syscall")) else { return At::Nothing };
    let text = String::from_utf8_lossy(&text);
    let mut words = text.split_ascii_whitespace();
    let number: Option<i64> = words.next().and_then(|word| word.parse().ok());
    let arguments: Vec<u64> =
        words.filter_map(|word| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok()).collect();
    match (number, arguments.as_slice()) {
        (None, _) => At::Unknown,
        (Some(libc::SYS_read | libc::SYS_pread64), &[_, buffer, length, ..]) => {
            At::Buffers(pages(buffer, length).into_iter().collect())
        }
        (Some(libc::SYS_readv | libc::SYS_preadv | libc::SYS_preadv2), &[_, vector, count, ..]) => {
            At::Buffers(buffers(pid, vector, count))
        }
        _ => At::Nothing,
    }
}

fn buffers(pid: i32, vector: u64, count: u64) -> Vec<(u64, u64)> {
    let mut bytes = vec![0; count.min(MAX_BUFFERS) as usize * 16];
    if process_vm::read(pid, vector, &mut bytes).is_err() {
        return Vec::new();
    }
    let word = |bytes: &[u8]| u64::from_ne_bytes(bytes.try_into().expect("eight bytes"));
    bytes.chunks_exact(16).filter_map(|entry| pages(word(&entry[..8]), word(&entry[8..]))).collect()
}

/// The pages of a buffer. It may be nonsense: what is not mapped is not looked at.
fn pages(start: u64, length: u64) -> Option<(u64, u64)> {
    /// Most that one read gives (`MAX_RW_COUNT`, include/linux/fs.h).
    const MOST: u64 = 0x7fff_f000;
    const TOP: u64 = 0x7fff_ffff_f000;
    let end = start.checked_add(length.min(MOST))?.min(TOP);
    (start < end).then(|| (start / PAGE * PAGE, end.next_multiple_of(PAGE)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_whole_pages() {
        assert_eq!(pages(0x1fff, 2), Some((0x1000, 0x3000)));
        assert_eq!(pages(0x1000, 0), None);
        assert_eq!(pages(u64::MAX, 5), None);
        assert_eq!(pages(0x1000, u64::MAX), Some((0x1000, 0x8000_0000)));
        assert_eq!(pages(0x9000_0000_0000, 1), None);
    }

    #[test]
    fn a_waiting_read_is_found() {
        let (reader, _writer) = std::io::pipe().expect("a pipe");
        let buffer = vec![0u8; 8192].leak();
        let start = buffer.as_ptr() as u64;
        std::thread::spawn(move || std::io::Read::read(&mut &reader, buffer));
        let is_found = || {
            let found = ranges(std::process::id() as i32);
            found.iter().any(|&(from, to)| from <= start && to >= start + 8192 && to - from <= 3 * PAGE)
        };
        assert!((0..1000).any(|_| is_found()));
    }
}
