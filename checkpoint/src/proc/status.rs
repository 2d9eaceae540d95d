//! `/proc/PID/status` and `/proc/PID/stat`.

use super::{lines_after, number, read};
use crate::image::CredsImage;
use std::io;

/// `status` as text.
pub struct Status(String);

impl Status {
    /// Reads it for a process or a thread.
    pub fn read(pid: i32) -> io::Result<Status> {
        Ok(Status::parse(&read(pid, "status")?))
    }

    /// Reads it for a thread: with many of them less work than by its TID alone, as the directory of the
    /// process is known to the kernel already.
    pub fn of_thread(pid: i32, tid: i32) -> io::Result<Status> {
        Ok(Status::parse(&read(pid, &format!("task/{tid}/status"))?))
    }

    /// From the file's bytes.
    pub fn parse(bytes: &[u8]) -> Status {
        Status(String::from_utf8_lossy(bytes).into_owned())
    }

    /// The rest of the line that begins with `key:`, trimmed.
    pub fn line(&self, key: &str) -> Option<&str> {
        lines_after(&self.0, key).find_map(|rest| Some(rest.strip_prefix(':')?.trim()))
    }

    /// A decimal number.
    pub fn decimal(&self, key: &str) -> Option<u64> {
        number(&self.0, key, 10)
    }

    /// A hexadecimal mask.
    pub fn mask(&self, key: &str) -> Option<u64> {
        number(&self.0, key, 16)
    }

    /// All numbers of a line.
    pub fn numbers(&self, key: &str) -> Vec<u32> {
        let line = self.line(key).unwrap_or_default();
        line.split_ascii_whitespace().filter_map(|word| word.parse().ok()).collect()
    }

    /// The state's letter.
    pub fn state(&self) -> char {
        self.line("State").and_then(|line| line.chars().next()).unwrap_or('?')
    }

    /// Ids, groups and capabilities; the secure bits are told by no file. `None`: something is missing.
    pub fn credentials(&self, securebits: u32) -> Option<CredsImage> {
        let ids = |key| <[u32; 4]>::try_from(self.numbers(key)).ok();
        let mut caps = [0; 5];
        for (mask, key) in caps.iter_mut().zip(["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"]) {
            *mask = self.mask(key)?;
        }
        Some(CredsImage {
            uids: ids("Uid")?,
            gids: ids("Gid")?,
            groups: self.numbers("Groups"),
            caps,
            securebits,
            no_new_privs: self.decimal("NoNewPrivs")? == 1,
        })
    }

    /// PID or TID in the innermost namespace of the task.
    pub fn inner_id(&self) -> Option<i32> {
        self.numbers("NSpid").last().map(|&id| id as i32)
    }
}

/// Fields of `/proc/PID/stat` by their number in proc_pid_stat(5), from 3 on.
pub struct Stat(Vec<String>);

impl Stat {
    /// Reads it for a process or a thread.
    pub fn read(pid: i32) -> io::Result<Stat> {
        Ok(Stat::parse(&String::from_utf8_lossy(&read(pid, "stat")?)))
    }

    /// From the file's text.
    pub fn parse(text: &str) -> Stat {
        // The name may contain anything, also `) `.
        let tail = text.rsplit_once(')').map_or("", |(_, tail)| tail);
        Stat(tail.split_ascii_whitespace().map(str::to_string).collect())
    }

    /// Field `n`.
    pub fn field(&self, n: usize) -> Option<&str> {
        self.0.get(n.checked_sub(3)?).map(String::as_str)
    }

    /// Field `n` as a number (negative ones as the kernel's wrap).
    pub fn number(&self, n: usize) -> Option<u64> {
        let text = self.field(n)?;
        text.parse::<u64>().ok().or_else(|| text.parse::<i64>().ok().map(|value| value as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn never_panics(text in "[ -~\\n\\t]{0,200}") {
            let status = Status(text.clone());
            status.state();
            status.inner_id();
            status.mask("SigBlk");
            status.numbers("Uid");
            Stat::parse(&text).number(26);
        }
    }

    #[test]
    fn a_name_cannot_imitate_fields() {
        let stat = Stat::parse("12 (a) R 9 (x) S 7 8 9");
        assert_eq!((stat.field(3), stat.number(4), stat.number(5)), (Some("S"), Some(7), Some(8)));
        assert_eq!(stat.number(2), None);
        let status = Status("Name:\tx\nSeccomp:\t2\nSeccomp_filters:\t5\nNSpid:\t9\t3\n".into());
        assert_eq!((status.decimal("Seccomp"), status.inner_id()), (Some(2), Some(3)));
        assert_eq!(status.decimal("Sec"), None);
    }
}
