//! May this guest come? What a node looks at before it says yes to another node's question.

use super::Daemon;
use super::protocol::{Answer, Question};
use std::fs;
use std::sync::OnceLock;
use std::time::Instant;

/// Sessions announced and not yet come.
const MAX_ANNOUNCED: usize = 64;
/// Memory that a node keeps free for itself: this part of what it has.
const KEEP_FREE: f64 = 0.05;

/// Who may come in a session.
#[derive(Debug, Clone)]
pub struct Announced {
    /// When that was said.
    pub at: Instant,
    /// Home node.
    pub home: String,
    /// PID at home.
    pub pid: i32,
    /// Its memory.
    pub bytes: u64,
}

/// What this CPU offers that a program may have come to rely on. A program probes once, at its start;
/// on a CPU that lacks what it found, it ends with SIGILL. Kernel-only features do not matter.
pub fn cpu_features() -> &'static [String] {
    static FOUND: OnceLock<Vec<String>> = OnceLock::new();
    FOUND.get_or_init(|| features_of(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default()))
}

/// Instruction sets, as `/proc/cpuinfo` calls them, by beginning of their names.
const FAMILIES: [&str; 18] = [
    "sse",
    "ssse3",
    "avx",
    "fma",
    "bmi",
    "aes",
    "vaes",
    "sha",
    "xsave",
    "clflush",
    "amx",
    "pclmulqdq",
    "vpclmulqdq",
    "rdseed",
    "rdrand",
    "rdtscp",
    "gfni",
    "pni",
];
/// And by their whole names.
const SINGLE: [&str; 22] = [
    "mmx",
    "fxsr",
    "cmov",
    "cx16",
    "movbe",
    "popcnt",
    "f16c",
    "adx",
    "abm",
    "lahf_lm",
    "fsgsbase",
    "clwb",
    "movdiri",
    "movdir64b",
    "serialize",
    "waitpkg",
    "ospke",
    "tbm",
    "xop",
    "rdpid",
    "3dnowprefetch",
    "user_shstk",
];

fn features_of(cpuinfo: &str) -> Vec<String> {
    let flags = cpuinfo.lines().find_map(|line| line.strip_prefix("flags")?.split_once(':'));
    let matters =
        |flag: &&str| SINGLE.contains(flag) || FAMILIES.iter().any(|family| flag.starts_with(family));
    let mut found: Vec<String> =
        flags.map_or("", |(_, f)| f).split_ascii_whitespace().filter(matters).map(str::to_string).collect();
    found.push(std::env::consts::ARCH.to_string());
    found.sort();
    found.dedup();
    found
}

/// Answers another daemon.
pub fn answer(daemon: &Daemon, from: &str, question: Question) -> Answer {
    let Question::PrepareGuest { token, home, pid, uid: _, bytes, cpu, by_hand: _ } = question;
    if home != from {
        return refused("policy", format!("{from} asked in the name of {home}"));
    }
    let ours = cpu_features();
    let missing: Vec<&str> = cpu.iter().filter(|f| !ours.contains(f)).map(String::as_str).take(20).collect();
    if !missing.is_empty() {
        return refused("cpu", format!("its CPU lacks {}", missing.join(", ")));
    }
    let mut state = daemon.lock();
    if state.switches.block {
        return refused("policy", "it takes no guests (`mosctl noblock` there lets them in)".into());
    }
    state.announced.retain(|_, announced| announced.at.elapsed() < super::moves::SESSION_LIMIT);
    if state.announced.len() >= MAX_ANNOUNCED {
        return refused("policy", "too many guests are on their way to it already".into());
    }
    let coming: u64 = state.announced.values().map(|a| a.bytes).fold(0, u64::saturating_add);
    let keep = (state.own.mem_total_bytes as f64 * KEEP_FREE) as u64;
    let free = state.own.mem_available_bytes.saturating_sub(coming).saturating_sub(keep);
    // Before the first look at /proc nothing is known; the next question will find it.
    if state.own.mem_total_bytes > 0 && bytes > free {
        let mib = |bytes: u64| bytes >> 20;
        return refused(
            "memory",
            format!("it needs {} MiB and {} MiB are free there", mib(bytes), mib(free)),
        );
    }
    state.announced.insert(token, Announced { at: Instant::now(), home, pid, bytes });
    Answer::Ok
}

fn refused(kind: &str, reason: String) -> Answer {
    Answer::Refused { kind: kind.into(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_programs_see_counts() {
        let found =
            features_of("processor : 0\nflags\t\t: fpu vme sse sse4_2 avx2 smep ibrs popcnt\nflags : x\n");
        assert_eq!(found, ["avx2", "popcnt", "sse", "sse4_2", std::env::consts::ARCH]);
        assert!(!cpu_features().is_empty());
    }
}
