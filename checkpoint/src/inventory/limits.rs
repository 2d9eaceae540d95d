//! Limits that leave no room for what a freeze needs inside a process (getrlimit(2), proc_pid_limits(5)).

use super::Blocker;
use crate::proc::{self, status::Status};
use crate::tracee::stub;

/// Limits of what a process maps: the line of `/proc/PID/limits`, what counts in `/proc/PID/status`, the name.
const OF_MAPPINGS: [(&str, &str, &str); 2] = [
    ("Max address space", "VmSize", "address space (RLIMIT_AS)"),
    ("Max data size", "VmData", "data (RLIMIT_DATA)"),
];

/// What keeps the stub from being mapped.
pub fn blockers(pid: i32, status: &Status, blockers: &mut Vec<Blocker>) {
    // Everybody may read them, unlike by prlimit(2).
    let Ok(limits) = proc::read(pid, "limits") else { return };
    let limits = String::from_utf8_lossy(&limits);
    let threads = status.decimal("Threads").unwrap_or(1) as usize;
    let wanted = stub::stub_len(threads + stub::MORE_THREADS);
    for (line, counted, name) in OF_MAPPINGS {
        // VmSize and VmData are told in kB.
        let used = status.decimal(counted).unwrap_or(0).saturating_mul(1024);
        let Some(left) = soft(&limits, line).map(|soft| soft.saturating_sub(used)) else { continue };
        if left < wanted {
            let what = format!(
                "its limit of {name} leaves {} KiB, and {} KiB are needed in it while it is saved: raise it \
                 with prlimit(1)",
                left / 1024,
                wanted / 1024
            );
            blockers.push(Blocker { kind: "kernel", what });
        }
    }
}

/// The soft limit of a line; `None`: there is none.
fn soft(limits: &str, line: &str) -> Option<u64> {
    let rest = limits.lines().find_map(|text| text.strip_prefix(line))?;
    rest.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::soft;

    #[test]
    fn limits_as_the_kernel_tells_them() {
        let text = "Limit                     Soft Limit           Hard Limit           Units     \n\
                    Max data size             unlimited            unlimited            bytes     \n\
                    Max address space         4096                 8192                 bytes     \n";
        assert_eq!((soft(text, "Max data size"), soft(text, "Max address space")), (None, Some(4096)));
        assert_eq!((soft(text, "Max nonsense"), soft("", "Max data size")), (None, None));
    }
}
