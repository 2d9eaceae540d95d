//! The CPUs on which a thread takes the places of a context: each has some of its own.

use crate::sys::sched;

/// Bound on the CPUs of a machine (`NR_CPUS`).
pub const MAX_CPUS: usize = 8192;

/// Where a thread runs: each CPU has places of its own (`kioctx_cpu`).
pub struct Cpus {
    tid: i32,
    /// What it was allowed before, once that was changed.
    before: Option<Vec<u8>>,
}

/// Each CPU once.
pub struct Round {
    next: usize,
}

impl Cpus {
    pub fn of(tid: i32) -> Cpus {
        Cpus { tid, before: None }
    }

    /// Of a thread that was allowed these before somebody else changed that.
    pub fn that_had(tid: i32, before: Vec<u8>) -> Cpus {
        Cpus { tid, before: Some(before) }
    }

    /// What the thread is allowed.
    pub fn allowed(&self) -> Vec<u8> {
        self.before.clone().or_else(|| sched::affinity(self.tid).ok()).unwrap_or_default()
    }

    pub fn round(&self) -> Round {
        Round { next: 0 }
    }

    fn go_to(&mut self, cpu: usize) -> bool {
        if self.before.is_none() {
            self.before = sched::affinity(self.tid).ok();
        }
        let mut one = vec![0; MAX_CPUS / 8];
        one[cpu / 8] = 1 << (cpu % 8);
        self.before.is_some() && sched::set_affinity(self.tid, &one).is_ok()
    }

    /// A thread that was allowed all CPUs of its control group is to have those that this gets later, too.
    pub fn give_back(&self) {
        let Some(before) = &self.before else { return };
        let all = sched::set_affinity(self.tid, &[u8::MAX; MAX_CPUS / 8]);
        if all.is_err() || sched::affinity(self.tid).as_ref() != Ok(before) {
            let _ = sched::set_affinity(self.tid, before);
        }
    }
}

impl Round {
    /// Goes to the next CPU where the thread may run. False: it was on all.
    pub fn next(&mut self, cpus: &mut Cpus) -> bool {
        let last = possible_range().min(MAX_CPUS);
        while self.next < last {
            self.next += 1;
            if cpus.go_to(self.next - 1) {
                return true;
            }
        }
        false
    }
}

/// `/sys/devices/system/cpu/possible`: ranges, as "0-3,8-11".
fn possible() -> Vec<(u32, u32)> {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/possible").unwrap_or_default();
    parse_ranges(text.trim())
}

fn parse_ranges(text: &str) -> Vec<(u32, u32)> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some((first.parse().ok()?, last.parse().ok()?))
    };
    text.split(',').filter_map(range).filter(|&(first, last): &(u32, u32)| first <= last).collect()
}

/// What the kernel counts (num_possible_cpus).
pub fn possible_cpus() -> u32 {
    possible().iter().map(|(first, last)| last - first + 1).sum::<u32>().max(1)
}

/// One more than the highest number of a CPU.
fn possible_range() -> usize {
    possible().iter().map(|&(_, last)| last as usize + 1).max().unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_cpus() {
        assert_eq!(parse_ranges("0-3,8,10-11"), [(0, 3), (8, 8), (10, 11)]);
        assert!(parse_ranges("").is_empty() && parse_ranges("3-1,x,-").is_empty());
    }
}
