//! The clocks that count from boot: that none goes back, through the vDSO and through the kernel.

use crate::{Meeting, fail};
use std::fmt::Write;

/// Those that a time namespace moves, and how each is asked.
const CLOCKS: [(&str, i32); 4] = [
    ("monotonic", libc::CLOCK_MONOTONIC),
    ("boottime", libc::CLOCK_BOOTTIME),
    ("raw", libc::CLOCK_MONOTONIC_RAW),
    ("coarse", libc::CLOCK_MONOTONIC_COARSE),
];

fn ns(time: libc::timespec) -> u64 {
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Through the vDSO (by the C library), and by a system call.
fn read(clock: i32) -> [u64; 2] {
    let mut times = [libc::timespec { tv_sec: 0, tv_nsec: 0 }; 2];
    // SAFETY: both outlive the calls.
    unsafe {
        libc::clock_gettime(clock, &raw mut times[0]);
        libc::syscall(libc::SYS_clock_gettime, clock, &raw mut times[1]);
    }
    times.map(ns)
}

fn uptime() -> String {
    let text = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
    text.split_whitespace().next().unwrap_or_default().to_string()
}

/// One reading of every clock, in the file `times`, a line a reading.
pub fn run(meeting: &Meeting) {
    let mut last = [0u64; CLOCKS.len()];
    let mut text = String::new();
    let path = meeting.dir.join("times");
    let mut rounds = 0u64;
    while !meeting.dir.join("go").exists() {
        let mut line = String::new();
        for (n, (name, clock)) in CLOCKS.into_iter().enumerate() {
            let [by_vdso, by_call] = read(clock);
            if by_vdso < last[n] || by_call < by_vdso {
                fail(&format!("{name} goes back: {}, then {by_vdso} and {by_call}", last[n]));
            }
            last[n] = by_call;
            let _ = write!(line, "{name} {by_call} ");
        }
        let _ = writeln!(line, "uptime {}", uptime());
        text += &line;
        // Renamed: a reader finds whole lines.
        let new = meeting.dir.join("times.new");
        std::fs::write(&new, &text).expect("written");
        std::fs::rename(&new, &path).expect("renamed");
        if rounds == 3 {
            std::fs::write(meeting.dir.join("ready"), b"").expect("tells that it is ready");
        }
        rounds += 1;
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}
