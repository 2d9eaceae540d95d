//! The namespaces of a house: names, clocks, an empty network.

use super::protocol::Setup;
use anyhow::{Context, Result};
use checkpoint::sys::time_namespace::Offsets;
use nix::sched::{CloneFlags, unshare};
use std::fs;
use std::os::unix::ffi::OsStrExt;

/// `CLONE_NEWTIME` (`<linux/sched.h>`), which nix does not name.
const NEWTIME: i32 = 0x80;

/// Moves this process (with one thread) into namespaces of its own and sets them up. The clocks are
/// those of children made from now on (time_namespaces(7)).
pub fn enter(setup: &Setup) -> Result<()> {
    let flags = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::from_bits_retain(NEWTIME);
    unshare(flags).context("cannot make namespaces (needs CAP_SYS_ADMIN and a kernel with all of them)")?;
    let offsets =
        Offsets { monotonic_ns: setup.monotonic_offset_ns, boottime_ns: setup.boottime_offset_ns }.lines();
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
