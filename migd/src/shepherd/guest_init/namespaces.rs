//! The namespaces of a house: names, clocks, an empty network.

use super::protocol::Setup;
use anyhow::{Context, Result};
use nix::sched::{CloneFlags, unshare};
use std::fs;
use std::os::unix::ffi::OsStrExt;

/// `CLONE_NEWTIME` (`<linux/sched.h>`), which nix does not name.
const NEWTIME: i32 = 0x80;
const NS_PER_SEC: i64 = 1_000_000_000;

/// Moves this process (with one thread) into namespaces of its own and sets them up. The clocks are
/// those of children made from now on (time_namespaces(7)).
pub fn enter(setup: &Setup) -> Result<()> {
    let flags = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::from_bits_retain(NEWTIME);
    unshare(flags).context("cannot make namespaces (needs CAP_SYS_ADMIN and a kernel with all of them)")?;
    let offsets = clock_offsets(setup);
    fs::write("/proc/self/timens_offsets", &offsets)
        .with_context(|| format!("cannot set the clocks' offsets {offsets:?}"))?;
    nix::unistd::sethostname(std::ffi::OsStr::from_bytes(&setup.hostname))
        .context("cannot set the host name")?;
    if !setup.domainname.is_empty() && setup.domainname != b"(none)" {
        // Writes to the writer's own UTS namespace (kernel/utsname_sysctl.c).
        fs::write("/proc/sys/kernel/domainname", &setup.domainname).context("cannot set the domain name")?;
    }
    checkpoint::sys::loopback::up().context("cannot bring up the loopback device")
}

/// The lines of `/proc/PID/timens_offsets`: clock, seconds, nanoseconds (0 to 10⁹ − 1).
fn clock_offsets(setup: &Setup) -> String {
    let line = |clock: &str, ns: i64| {
        format!("{clock} {} {}\n", ns.div_euclid(NS_PER_SEC), ns.rem_euclid(NS_PER_SEC))
    };
    line("monotonic", setup.monotonic_offset_ns) + &line("boottime", setup.boottime_offset_ns)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_negative_offset_has_positive_nanoseconds() {
        let setup = Setup {
            hostname: b"n".to_vec(),
            domainname: Vec::new(),
            monotonic_offset_ns: -1,
            boottime_offset_ns: 2_500_000_000,
            token: [0; 16],
            terminal: None,
            tid_base: 300,
            pid_max: 1000,
        };
        assert_eq!(clock_offsets(&setup), "monotonic -1 999999999\nboottime 2 500000000\n");
    }
}
