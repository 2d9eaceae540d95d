//! The raw copy: what any dump has to do at least.

use checkpoint::sys::process_vm;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

/// Reads all private memory of a process that can be read into one buffer, writes it to a file and makes
/// that durable, as a dump does. The file is removed.
pub fn memory(pid: i32, to: &Path) -> Duration {
    let ranges = writable_ranges(pid);
    let mut buffer = vec![0u8; 1 << 20];
    let begun = Instant::now();
    let mut file = File::create(to).expect("a file");
    for (start, end) in ranges {
        let mut at = start;
        while at < end {
            let length = (end - at).min(buffer.len() as u64) as usize;
            if process_vm::read(pid, at, &mut buffer[..length]).is_ok() {
                file.write_all(&buffer[..length]).expect("writes");
            }
            at += length as u64;
        }
    }
    file.sync_all().expect("is durable");
    let took = begun.elapsed();
    std::fs::remove_file(to).expect("removes it");
    took
}

fn writable_ranges(pid: i32) -> Vec<(u64, u64)> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).expect("maps");
    let parse = |line: &str| {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let parsed = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
        rest.starts_with("rw-p").then_some(parsed)
    };
    maps.lines().filter_map(parse).collect()
}
