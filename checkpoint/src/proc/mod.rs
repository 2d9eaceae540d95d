//! Parsers of `/proc/PID/*`, as bytes: a path may be anything. They never panic.

pub mod fdinfo;
pub mod maps;
pub mod status;

use std::fs;
use std::io;

/// Reads `/proc/PID/NAME` whole.
pub fn read(pid: i32, name: &str) -> io::Result<Vec<u8>> {
    fs::read(format!("/proc/{pid}/{name}"))
}

/// The target of `/proc/PID/NAME`, as bytes.
pub fn link(pid: i32, name: &str) -> io::Result<Vec<u8>> {
    use std::os::unix::ffi::OsStringExt;
    Ok(fs::read_link(format!("/proc/{pid}/{name}"))?.into_os_string().into_vec())
}

/// The number behind `key` (up to the first blank) in text of `key: value` or `key value` lines.
pub fn number(text: &str, key: &str, radix: u32) -> Option<u64> {
    let line = text.lines().find_map(|line| {
        let rest = line.strip_prefix(key)?;
        rest.starts_with([':', ' ', '\t']).then_some(rest)
    })?;
    let word = line.trim_start_matches(':').split_ascii_whitespace().next()?;
    u64::from_str_radix(word.trim_start_matches("0x"), radix).ok()
}

/// The process' threads.
pub fn tids(pid: i32) -> io::Result<Vec<i32>> {
    let dir = fs::read_dir(format!("/proc/{pid}/task"))?;
    let mut tids: Vec<i32> = dir.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    tids.sort_by_key(|&tid| (tid != pid, tid));
    Ok(tids)
}

/// All processes of this `/proc`.
pub fn pids() -> Vec<i32> {
    let Ok(dir) = fs::read_dir("/proc") else { return Vec::new() };
    dir.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect()
}
