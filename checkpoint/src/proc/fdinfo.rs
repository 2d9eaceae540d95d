//! `/proc/PID/fdinfo/N` (Documentation/filesystems/proc.rst).

use super::number;
use crate::image::{EpollTarget, WatchImage};

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

    /// Of an epoll: each target, with the inode number of its file.
    pub fn epoll_targets(&self) -> Vec<(EpollTarget, u64)> {
        self.text.lines().filter_map(parse_target).collect()
    }

    /// Of an inotify: each watch, without its path.
    pub fn watches(&self) -> Vec<WatchImage> {
        self.text.lines().filter_map(parse_watch).collect()
    }

    /// Of a pidfd: the process; -1: it has ended and was waited for.
    pub fn pid(&self) -> Option<i32> {
        // The last is as the process is known in its own namespace.
        let line = self.text.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
        line.split_ascii_whitespace().last()?.parse().ok()
    }

    /// Of a timerfd: remainder and interval, ns.
    pub fn timer(&self, key: &str) -> Option<u64> {
        let line = self.text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
        let (secs, nanos) = line.trim().trim_matches(['(', ')']).split_once(',')?;
        let secs: u64 = secs.trim().parse().ok()?;
        secs.checked_mul(1_000_000_000)?.checked_add(nanos.trim().parse().ok()?)
    }

    /// Locks held through this open file description, as `/proc/locks` shows them.
    pub fn locks(&self) -> impl Iterator<Item = &str> {
        self.text.lines().filter_map(|line| line.strip_prefix("lock:"))
    }
}

/// The value of `KEY:VALUE`, where blanks may stand before the value.
fn field<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    let start = line.find(key)? + key.len();
    line.get(start..)?.strip_prefix(':')?.split_ascii_whitespace().next()
}

fn hex(line: &str, key: &str) -> Option<u64> {
    u64::from_str_radix(field(line, key)?, 16).ok()
}

/// `tfd:        5 events:       19 data:                7  pos:0 ino:1 sdev:2`
fn parse_target(line: &str) -> Option<(EpollTarget, u64)> {
    line.strip_prefix("tfd:")?;
    let fd = field(line, "tfd")?.parse().ok()?;
    let events = u32::try_from(hex(line, "events")?).ok()?;
    let target = EpollTarget { fd, events, data: hex(line, "data")?, at: (0, fd), spent: false };
    // Older kernels do not tell the file.
    Some((target, hex(line, " ino").unwrap_or(0)))
}

/// `inotify wd:1 ino:9e7e sdev:800013 mask:800afce ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:7e9e0000640d1b6d`
fn parse_watch(line: &str) -> Option<WatchImage> {
    line.strip_prefix("inotify ")?;
    let device = hex(line, "sdev")?;
    let text = field(line, "f_handle").unwrap_or_default();
    let pairs = text.as_bytes().chunks_exact(2);
    let bytes = pairs.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok());
    Some(WatchImage {
        wd: i32::try_from(hex(line, "wd")?).ok()?,
        mask: u32::try_from(hex(line, " mask")?).ok()?,
        // As the kernel keeps it (linux/kdev_t.h): 20 bits for the minor number.
        dev: libc::makedev((device >> 20) as u32, (device & 0xf_ffff) as u32),
        ino: hex(line, " ino")?,
        path: Vec::new(),
        handle: (hex(line, "fhandle-type").unwrap_or(0) as i32, bytes.collect::<Option<_>>()?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn never_panics(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
            rest in "(tfd: *[-0-9]{0,12} events: *[0-9a-f]{0,20}|it_value: \\([0-9]{0,22}, [0-9]{0,22}\\)|\
                inotify wd:[0-9a-f]{0,9} ino:[0-9a-f]{0,20} sdev:[0-9a-f]{0,17} mask:[0-9a-fé]{0,9} f_handle:[0-9a-gé]{0,9}|\
                NSpid:\t[-0-9\t]{0,30})"
        ) {
            FdInfo::parse(&bytes);
            let text = format!("pos: 0\nflags: 02\n{rest}\n");
            let info = FdInfo::parse(text.as_bytes()).expect("an fdinfo");
            info.epoll_targets();
            info.timer("it_value");
            info.watches();
            info.pid();
        }
    }

    #[test]
    fn reads_what_the_kernel_shows() {
        let text = b"pos:\t12\nflags:\t02100001\nmnt_id:\t9\ntfd:        5 events:       19 data:                7  pos:0 ino:1 sdev:2\n";
        let info = FdInfo::parse(text).expect("an fdinfo");
        assert_eq!((info.pos, info.flags), (12, 0o2100001));
        let target = EpollTarget { fd: 5, events: 0x19, data: 7, at: (0, 5), spent: false };
        assert_eq!(info.epoll_targets(), [(target, 1)]);
        let text =
            b"pos:\t0\nflags:\t04000\ninotify wd:2a ino:9900a0 sdev:fe00001 mask:84000100 ignored_mask:0 \
                     fhandle-bytes:8 fhandle-type:1 f_handle:a0009900e5d70ac3\nPid:\t-1\nNSpid:\t7\t-1\n";
        let info = FdInfo::parse(text).expect("an fdinfo");
        let watches = info.watches();
        assert_eq!((watches[0].wd, watches[0].mask, watches[0].ino), (42, 0x8400_0100, 0x99_00a0));
        assert_eq!((watches[0].dev, watches[0].handle.0), (libc::makedev(254, 1), 1));
        assert_eq!(watches[0].handle.1, [0xa0, 0, 0x99, 0, 0xe5, 0xd7, 0x0a, 0xc3]);
        assert_eq!(info.pid(), Some(-1));
        let info = FdInfo::parse(b"pos: 0\nflags: 02\nclockid: 1\nit_value: (3, 500)\nit_interval: (0, 0)\n");
        assert_eq!(info.expect("an fdinfo").timer("it_value"), Some(3_000_000_500));
        assert_eq!(FdInfo::parse(b"nonsense"), None);
    }
}
