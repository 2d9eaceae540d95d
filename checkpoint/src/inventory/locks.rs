//! File locks and leases: what `fdinfo` shows of a descriptor (`lock:` lines, proc(5)), and which of
//! them cannot be carried.
//!
//! A line is shown for a lock that was taken through this open file description: flock(2), open file
//! description locks and leases belong to it; POSIX locks belong to the process whose `fdinfo` is read.

use super::family::Family;
use super::{Blocker, Rules};
use crate::image::{FilesImage, LockImage, LockKind, OpenFile};
use crate::proc;
use crate::sys::kcmp;
use std::fs;
use std::os::unix::fs::MetadataExt;

/// The locks that the lines of an `fdinfo` tell. What cannot be read is told as a lock of an unknown kind.
pub fn parse_all<'a>(lines: impl Iterator<Item = &'a str>) -> Vec<LockImage> {
    lines.map(|line| parse(line).unwrap_or_else(|| LockImage::unknown(line))).collect()
}

/// `1: POSIX  ADVISORY  WRITE 1234 fe:01:56 0 EOF`, as in `/proc/locks`.
fn parse(line: &str) -> Option<LockImage> {
    let words: Vec<&str> = line.split_ascii_whitespace().collect();
    // A waiter has `->` as its second word.
    let [_, kind, how, mode, pid, _, start, end] = words.as_slice() else { return None };
    let kind = match (*kind, *how) {
        ("POSIX", "ADVISORY") => LockKind::Posix,
        ("OFDLCK", "ADVISORY") => LockKind::Description,
        ("FLOCK", "ADVISORY") => LockKind::Flock,
        ("LEASE", "ACTIVE") => LockKind::Lease,
        _ => return None,
    };
    let exclusive = match *mode {
        "WRITE" => true,
        "READ" => false,
        _ => return None,
    };
    let end = if *end == "EOF" { u64::MAX } else { end.parse().ok()? };
    Some(LockImage { kind, exclusive, start: start.parse().ok()?, end, pid: pid.parse().ok()? })
}

/// What cannot be carried of the locks in an image, or in what was read of a process.
pub fn blockers(files: &FilesImage, rules: Rules, blockers: &mut Vec<Blocker>) {
    for (index, file) in files.files.iter().enumerate() {
        let Some(fd) = files.fds.iter().find(|fd| fd.file as usize == index) else { continue };
        for lock in &file.locks {
            if let Some(why) = why_not(lock, rules) {
                let name = String::from_utf8_lossy(&file.link);
                let what = format!("fd {}: {} on {name}{why}", fd.fd, lock.name());
                blockers.push(Blocker { kind: "lock", what });
            }
        }
    }
}

fn why_not(lock: &LockImage, rules: Rules) -> Option<&'static str> {
    match (&lock.kind, rules) {
        (LockKind::Unknown { .. }, _) => Some(""),
        // They would not be given up when the guest closes another descriptor of the file.
        (LockKind::Posix, Rules::Homed) => Some(", which cannot be held for it at home"),
        // To be told of the other's open(2), it has to be there.
        (LockKind::Lease, Rules::Homed) => Some(", which cannot be held for it at home"),
        // At home they stay with the description.
        _ => None,
    }
}

/// Locks of a live process that an image would lose: those that another process holds as well and
/// would go on holding. A POSIX lock is always told by a descriptor of its owner: a process loses it with
/// any descriptor of the file, and threads with a descriptor table of their own are refused by name.
/// `/proc/locks` is not asked: the kernel waits for a grace period of RCU first (`locks_start`,
/// fs/locks.c), some milliseconds.
pub fn of_others(pid: i32, family: &Family, files: &FilesImage, blockers: &mut Vec<Blocker>) {
    let through_description = |file: &&OpenFile| {
        file.locks.iter().any(|lock| matches!(lock.kind, LockKind::Flock | LockKind::Description))
    };
    for (index, file) in files.files.iter().enumerate().filter(|(_, file)| through_description(file)) {
        let Some(fd) = files.fds.iter().find(|fd| fd.file as usize == index) else { continue };
        if let Some(other) = holder_outside(pid, fd.fd, file, family) {
            let name = String::from_utf8_lossy(&file.link);
            let what = format!("fd {}: it holds a lock on {name} together with process {other}", fd.fd);
            blockers.push(Blocker { kind: "lock", what });
        }
    }
}

/// A process outside of the family that has the same open file description.
fn holder_outside(pid: i32, fd: i32, file: &OpenFile, family: &Family) -> Option<i32> {
    let us = std::process::id() as i32;
    proc::pids().into_iter().filter(|&other| !family.has(other) && other != us).find(|&other| {
        let Ok(dir) = fs::read_dir(format!("/proc/{other}/fd")) else { return false };
        dir.flatten().any(|entry| {
            let alike = fs::metadata(entry.path())
                .is_ok_and(|meta| (meta.dev(), meta.ino()) == (file.stat.0, file.stat.1));
            let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
            alike && number.is_some_and(|number| kcmp::same_file(pid, fd, other, number).unwrap_or(false))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn never_panics(line in "[0-9]{0,3}:? ?(POSIX|FLOCK|LEASE|->)? *[A-Z]{0,9} *[A-Z]{0,5} *[-0-9]{0,12} [^\n]{0,40}") {
            parse_all([line.as_str()].into_iter());
        }
    }

    #[test]
    fn reads_what_the_kernel_shows() {
        let lock = parse("1: POSIX  ADVISORY  WRITE 1234 fe:01:56 5 14").expect("a lock");
        assert_eq!((lock.kind, lock.exclusive, lock.start, lock.end), (LockKind::Posix, true, 5, 14));
        assert_eq!(lock.pid, 1234);
        let lock = parse("2: OFDLCK ADVISORY  READ -1 fe:01:56 0 EOF").expect("a lock");
        assert_eq!((lock.kind, lock.exclusive, lock.end), (LockKind::Description, false, u64::MAX));
        let lock = parse("1: LEASE  ACTIVE    READ 23323 fe:00:10027171 0 EOF").expect("a lease");
        assert_eq!(lock.kind, LockKind::Lease);
        assert_eq!(parse("1: LEASE  BREAKING  READ 23323 fe:00:10027171 0 EOF"), None);
        assert_eq!(parse("1: -> POSIX  ADVISORY  WRITE 12 fe:01:56 0 EOF"), None);
        let unknown = parse_all(["1: DELEG  ACTIVE    READ 1 a:b:c 0 EOF"].into_iter());
        assert!(unknown[0].name().contains("DELEG"));
    }
}
