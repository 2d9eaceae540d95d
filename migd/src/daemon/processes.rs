//! One look at `/proc`: every process of this node, cheaply.
//!
//! The node's own `/proc` is what counts: several nodes may share a kernel, each in a PID namespace of
//! its own, so that `/proc/loadavg` and `/proc/stat` would tell of all of them together.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};

/// Processes looked at; what is beyond is not seen.
const MAX_PROCESSES: usize = 200_000;
/// Threads of one process looked at for their state.
const MAX_THREADS: usize = 4096;

/// One process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stat {
    /// Its PID here.
    pub pid: i32,
    /// Its parent.
    pub parent: i32,
    /// `R`, `S`, `T`, `Z`, …
    pub state: char,
    /// Clock ticks after boot at which it started: tells it from a later one with its PID.
    pub start_time: u64,
    /// User and system CPU time, ms.
    pub cpu_ms: u64,
    /// Resident bytes.
    pub rss_bytes: u64,
    /// Threads.
    pub threads: u32,
    /// The name of its program.
    pub comm: String,
}

/// What is constant for this kernel.
#[derive(Debug, Clone, Copy)]
pub struct Units {
    ticks_per_second: u64,
    page: u64,
}

impl Units {
    /// Asks the kernel.
    pub fn find() -> Units {
        use nix::unistd::{SysconfVar, sysconf};
        let ask = |what, usual: u64| {
            sysconf(what)
                .ok()
                .flatten()
                .and_then(|n| u64::try_from(n).ok())
                .filter(|n| *n > 0)
                .unwrap_or(usual)
        };
        Units { ticks_per_second: ask(SysconfVar::CLK_TCK, 100), page: ask(SysconfVar::PAGE_SIZE, 4096) }
    }
}

/// Every process, by PID.
pub fn scan(units: Units) -> io::Result<BTreeMap<i32, Stat>> {
    let mut found = BTreeMap::new();
    let mut buffer = Vec::with_capacity(1024);
    for entry in fs::read_dir("/proc")?.take(MAX_PROCESSES) {
        let Some(pid) = entry.ok().and_then(|e| e.file_name().to_str()?.parse::<i32>().ok()) else {
            continue;
        };
        if let Some(stat) = read_into(&format!("/proc/{pid}/stat"), units, &mut buffer) {
            found.insert(pid, stat);
        }
    }
    Ok(found)
}

/// One process; `None`: there is none.
pub fn read(pid: i32, units: Units) -> Option<Stat> {
    read_into(&format!("/proc/{pid}/stat"), units, &mut Vec::new())
}

fn read_into(path: &str, units: Units, buffer: &mut Vec<u8>) -> Option<Stat> {
    buffer.clear();
    fs::File::open(path).ok()?.take(4096).read_to_end(buffer).ok()?;
    parse(buffer, units)
}

/// Parses `/proc/PID/stat` (proc_pid_stat(5)). The name may hold anything, so it ends at the last `)`.
fn parse(bytes: &[u8], units: Units) -> Option<Stat> {
    let open = bytes.iter().position(|b| *b == b'(')?;
    let close = bytes.iter().rposition(|b| *b == b')')?;
    let pid = std::str::from_utf8(&bytes[..open]).ok()?.trim().parse().ok()?;
    let comm = String::from_utf8_lossy(bytes.get(open + 1..close)?).into_owned();
    let fields: Vec<&str> = std::str::from_utf8(&bytes[close + 1..]).ok()?.split_ascii_whitespace().collect();
    // The list in the manual counts from 1; the state is number 3.
    let field = |number: usize| fields.get(number - 3).copied();
    let number = |at: usize| field(at)?.parse::<u64>().ok();
    let ticks = number(14)?.saturating_add(number(15)?);
    Some(Stat {
        pid,
        parent: field(4)?.parse().ok()?,
        state: field(3)?.chars().next()?,
        start_time: number(22)?,
        cpu_ms: ticks.saturating_mul(1000) / units.ticks_per_second,
        rss_bytes: number(24)?.saturating_mul(units.page),
        threads: number(20)?.min(u64::from(u32::MAX)) as u32,
        comm,
    })
}

/// Threads that run or could run, by process; those with none are left out.
pub fn runnable(stats: &BTreeMap<i32, Stat>, units: Units) -> BTreeMap<i32, usize> {
    let mut buffer = Vec::with_capacity(1024);
    let mut counts = BTreeMap::new();
    for stat in stats.values() {
        if stat.threads <= 1 {
            if stat.state == 'R' {
                counts.insert(stat.pid, 1);
            }
            continue;
        }
        let mut count = 0;
        let Ok(tasks) = fs::read_dir(format!("/proc/{}/task", stat.pid)) else { continue };
        for task in tasks.take(MAX_THREADS).flatten() {
            let Some(path) = task.path().join("stat").to_str().map(str::to_string) else { continue };
            count += usize::from(read_into(&path, units, &mut buffer).is_some_and(|t| t.state == 'R'));
        }
        if count > 0 {
            counts.insert(stat.pid, count);
        }
    }
    counts
}

/// Its command line, as `ps` shows it; empty if it has none (any more).
pub fn command_line(pid: i32) -> String {
    let mut bytes = Vec::new();
    if let Ok(file) = fs::File::open(format!("/proc/{pid}/cmdline")) {
        let _ = file.take(4096).read_to_end(&mut bytes);
    }
    let words: Vec<_> =
        bytes.split(|b| *b == 0).filter(|word| !word.is_empty()).map(String::from_utf8_lossy).collect();
    // A program may put anything there, and lists go to terminals.
    words.join(" ").replace(char::is_control, " ")
}

/// Its owner: the real user id.
pub fn owner(pid: i32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("Uid:")?.split_ascii_whitespace().next()?.parse().ok())
}

/// Milliseconds since boot, on the clock of start times.
pub fn uptime_ms() -> u64 {
    let text = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds: f64 = text.split(' ').next().and_then(|t| t.parse().ok()).unwrap_or(0.0);
    (seconds * 1000.0) as u64
}

impl Stat {
    /// How long it has been there, ms.
    pub fn age_ms(&self, units: Units, uptime_ms: u64) -> u64 {
        uptime_ms.saturating_sub(self.start_time.saturating_mul(1000) / units.ticks_per_second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_name_may_hold_anything() {
        let units = Units { ticks_per_second: 100, page: 4096 };
        let line = b"42 (a) R (b\xff) S 7 1 1 0 -1 0 0 0 0 0 50 25 0 0 20 0 3 0 999 1000 12 0\n";
        let stat = parse(line, units).expect("parses");
        assert_eq!((stat.pid, stat.parent, stat.state, stat.threads), (42, 7, 'S', 3));
        assert_eq!((stat.cpu_ms, stat.start_time, stat.rss_bytes), (750, 999, 12 * 4096));
        assert!(stat.comm.starts_with("a) R (b"));
    }

    #[test]
    fn we_are_there_and_run() {
        let units = Units::find();
        let stats = scan(units).expect("a /proc");
        let own = std::process::id() as i32;
        assert_eq!(stats[&own].pid, own);
        assert!(runnable(&stats, units)[&own] >= 1);
        assert!(command_line(own).contains("migd"));
        assert_eq!(owner(own), Some(nix::unistd::getuid().as_raw()));
        assert!(read(own, units).expect("there").age_ms(units, uptime_ms()) < 600_000);
    }

    proptest! {
        #[test]
        fn no_line_panics(line in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&line, Units { ticks_per_second: 100, page: 4096 });
        }
    }
}
