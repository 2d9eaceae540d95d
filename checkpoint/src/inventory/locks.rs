//! File locks held by a process (`/proc/locks`, proc(5)): not carried yet, so they are blockers.

use super::Blocker;

/// Locks and leases of a process.
pub fn held(pid: i32) -> Vec<Blocker> {
    let Ok(text) = std::fs::read_to_string("/proc/locks") else { return Vec::new() };
    text.lines().filter_map(|line| parse(line, pid)).collect()
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
