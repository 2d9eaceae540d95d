//! File locks held by a process (`/proc/locks`, proc(5)): not carried yet, so they are blockers.

use super::Blocker;
use crate::image::FilesImage;
use crate::proc::{self, fdinfo::FdInfo};

/// Locks and leases of a process.
pub fn held(pid: i32) -> Vec<Blocker> {
    let Ok(text) = std::fs::read_to_string("/proc/locks") else { return Vec::new() };
    text.lines().filter_map(|line| parse(line, pid)).collect()
}

/// Locks that belong to an open file description, whoever took them (flock(2), open file description
/// locks): an image that stands alone would lose them. At home they stay with the description.
pub fn through_files(pid: i32, files: &FilesImage, blockers: &mut Vec<Blocker>) {
    for index in 0..files.files.len() {
        let Some(fd) = files.fds.iter().find(|fd| fd.file as usize == index) else { continue };
        let info = proc::read(pid, &format!("fdinfo/{}", fd.fd)).ok().and_then(|bytes| FdInfo::parse(&bytes));
        if info.is_some_and(|info| info.has_locks()) {
            let what = format!("fd {}: a file that is locked", fd.fd);
            blockers.push(Blocker { kind: "lock", what });
        }
    }
}

/// `1: POSIX  ADVISORY  WRITE 1234 fe:01:56 0 EOF`
fn parse(line: &str, pid: i32) -> Option<Blocker> {
    let words: Vec<&str> = line.split_ascii_whitespace().collect();
    // A waiter has `->` as its second word.
    let [_, kind, _, mode, owner, file, ..] = words.as_slice() else { return None };
    if owner.parse::<i32>().ok()? != pid {
        return None;
    }
    let what = format!("it holds a {kind} lock ({}) on file {file} (device:inode)", mode.to_lowercase());
    Some(Blocker { kind: "lock", what })
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn finds_the_owner() {
        let line = "1: POSIX  ADVISORY  WRITE 1234 fe:01:56 0 EOF";
        assert!(parse(line, 1234).is_some_and(|b| b.what.contains("POSIX lock (write) on file fe:01:56")));
        assert!(parse(line, 12).is_none());
        assert!(parse("1: -> POSIX", 12).is_none());
    }
}
