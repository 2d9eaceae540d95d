//! Calls of the C library with their results checked.

use std::io::Error;

/// The result of a call, or a panic that names it.
#[track_caller]
pub fn ok<T: Into<i64> + Copy>(what: &str, result: T) -> T {
    assert!(result.into() >= 0, "{what}: {}", Error::last_os_error());
    result
}

/// mmap(2) of `pages` pages.
pub fn map(at: usize, pages: usize, prot: i32, flags: i32, fd: i32) -> *mut u8 {
    // SAFETY: without MAP_FIXED nothing that exists is replaced.
    let got = unsafe { libc::mmap(at as *mut _, pages * PAGE, prot, flags, fd, 0) };
    assert_ne!(got, libc::MAP_FAILED, "mmap: {}", Error::last_os_error());
    got.cast()
}

pub const PAGE: usize = 4096;

/// Writes a pattern that depends on `seed` and the place.
pub fn fill(at: *mut u8, bytes: usize, seed: u64) {
    for word in 0..bytes / 8 {
        // SAFETY: the caller has mapped `bytes` writable bytes there.
        unsafe { at.cast::<u64>().add(word).write_volatile(pattern(seed, word)) };
    }
}

/// Whether the pattern is there.
pub fn is_filled(at: *const u8, bytes: usize, seed: u64) -> bool {
    // SAFETY: the caller has mapped `bytes` readable bytes there.
    (0..bytes / 8).all(|word| unsafe { at.cast::<u64>().add(word).read_volatile() } == pattern(seed, word))
}

fn pattern(seed: u64, word: usize) -> u64 {
    (seed << 40 ^ word as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

/// Seconds on CLOCK_MONOTONIC.
pub fn now() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` outlives the call.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// A line of `/proc/self/status`.
pub fn status(key: &str) -> String {
    let text = std::fs::read_to_string("/proc/thread-self/status").expect("status");
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    line.unwrap_or_default().trim().to_string()
}
