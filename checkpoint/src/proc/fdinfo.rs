//! `/proc/PID/fdinfo/N` (Documentation/filesystems/proc.rst).

use super::number;

/// What every file shows, and the text for the rest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FdInfo {
    /// Position.
    pub pos: u64,
    /// `O_*`, with `O_CLOEXEC` as the descriptor has it.
    pub flags: u32,
    text: String,
}

impl FdInfo {
    /// Parses; `None` if it is not an fdinfo.
    pub fn parse(bytes: &[u8]) -> Option<FdInfo> {
        let text = String::from_utf8_lossy(bytes).into_owned();
        let flags = number(&text, "flags", 8)?;
        Some(FdInfo { pos: number(&text, "pos", 10)?, flags: u32::try_from(flags).ok()?, text })
    }

    /// A number by its key.
    pub fn number(&self, key: &str, radix: u32) -> Option<u64> {
        number(&self.text, key, radix)
    }

    /// Of an epoll: fd, events, data of each target.
    pub fn epoll_targets(&self) -> Vec<(i32, u32, u64)> {
        self.text.lines().filter_map(parse_target).collect()
    }

    /// Of a timerfd: remainder and interval, ns.
    pub fn timer(&self, key: &str) -> Option<u64> {
        let line = self.text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
        let (secs, nanos) = line.trim().trim_matches(['(', ')']).split_once(',')?;
        let secs: u64 = secs.trim().parse().ok()?;
        secs.checked_mul(1_000_000_000)?.checked_add(nanos.trim().parse().ok()?)
    }

    /// Locks held through this open file description.
    pub fn has_locks(&self) -> bool {
        self.text.lines().any(|line| line.starts_with("lock:"))
    }
}

fn parse_target(line: &str) -> Option<(i32, u32, u64)> {
    let rest = line.strip_prefix("tfd:")?;
    let mut words = rest.split_ascii_whitespace();
    let fd = words.next()?.parse().ok()?;
    let events = words.next()?.strip_prefix("events:").map(str::to_string);
    let events = events.filter(|text| !text.is_empty()).or_else(|| words.next().map(str::to_string))?;
    let data = words.next()?.strip_prefix("data:").map(str::to_string);
    let data = data.filter(|text| !text.is_empty()).or_else(|| words.next().map(str::to_string))?;
    Some((fd, u32::from_str_radix(&events, 16).ok()?, u64::from_str_radix(&data, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn never_panics(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
            rest in "(tfd: *[-0-9]{0,12} events: *[0-9a-f]{0,20}|it_value: \\([0-9]{0,22}, [0-9]{0,22}\\))"
        ) {
            FdInfo::parse(&bytes);
            let text = format!("pos: 0\nflags: 02\n{rest}\n");
            let info = FdInfo::parse(text.as_bytes()).expect("an fdinfo");
            info.epoll_targets();
            info.timer("it_value");
        }
    }

    #[test]
    fn reads_what_the_kernel_shows() {
        let text = b"pos:\t12\nflags:\t02100001\nmnt_id:\t9\ntfd:        5 events:       19 data:                7  pos:0 ino:1 sdev:2\n";
        let info = FdInfo::parse(text).expect("an fdinfo");
        assert_eq!((info.pos, info.flags), (12, 0o2100001));
        assert_eq!(info.epoll_targets(), [(5, 0x19, 7)]);
        let info = FdInfo::parse(b"pos: 0\nflags: 02\nclockid: 1\nit_value: (3, 500)\nit_interval: (0, 0)\n");
        assert_eq!(info.expect("an fdinfo").timer("it_value"), Some(3_000_000_500));
        assert_eq!(FdInfo::parse(b"nonsense"), None);
    }
}
