//! Which process is meant: a number that may have been given away since, and when it started.

use serde::{Deserialize, Serialize};
use std::fs;

/// A process that cannot be confused with a later one of the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its number here.
    pub pid: i32,
    /// When it started, in the kernel's ticks since boot.
    pub started: u64,
}

impl ProcessId {
    /// The process that has this number now.
    pub fn of(pid: i32) -> Option<ProcessId> {
        Some(ProcessId { pid, started: started(pid)? })
    }

    /// Whether that very process still runs (a zombie does not).
    pub fn alive(self) -> bool {
        started(self.pid) == Some(self.started)
    }
}

/// Field 22 of `/proc/PID/stat`; `None` if there is no such process or it is a zombie.
fn started(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    parse_started(&stat)
}

fn parse_started(stat: &str) -> Option<u64> {
    // The name, field 2, may hold anything, blanks and parentheses too: count from its end.
    let (_, after) = stat.rsplit_once(')')?;
    let mut fields = after.split_ascii_whitespace();
    match fields.next()? {
        "Z" | "X" => None,
        _ => fields.nth(18)?.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_alive_and_a_later_one_is_not_it() {
        let own = ProcessId::of(std::process::id() as i32).expect("we run");
        assert!(own.alive());
        assert!(!ProcessId { started: own.started + 1, ..own }.alive());
    }

    #[test]
    fn names_with_parentheses_and_zombies() {
        let rest = (3..22).map(|n| n.to_string()).collect::<Vec<_>>().join(" ");
        assert_eq!(parse_started(&format!("7 (a) R (b) S {} 4711 9", &rest[2..])), Some(4711));
        assert_eq!(parse_started(&format!("7 (x) Z {} 4711 9", &rest[2..])), None);
        assert_eq!(parse_started("7 (x"), None);
    }
}
