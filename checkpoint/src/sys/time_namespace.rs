//! Time namespaces (time_namespaces(7)): what CLOCK_MONOTONIC and CLOCK_BOOTTIME of processes are
//! ahead of the machine's by.

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};
use nix::time::{ClockId, clock_gettime};
use std::fs::{self, File};
use std::io;

/// `CLONE_NEWTIME` (`<linux/sched.h>`), which nix does not name.
const NEWTIME: CloneFlags = CloneFlags::from_bits_retain(0x80);
const NS_PER_SEC: i64 = 1_000_000_000;

/// By how much the clocks are ahead of the machine's, ns.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offsets {
    /// CLOCK_MONOTONIC, with its `_RAW` and `_COARSE`.
    pub monotonic_ns: i64,
    /// CLOCK_BOOTTIME, with its `_ALARM`.
    pub boottime_ns: i64,
}

impl Offsets {
    /// Those of a process' children (`time_for_children`), which mostly are its own. A kernel without
    /// time namespaces has none.
    pub fn of(pid: i32) -> io::Result<Offsets> {
        match fs::read_to_string(format!("/proc/{pid}/timens_offsets")) {
            Ok(text) => Ok(Offsets::parse(&text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Offsets::default()),
            Err(error) => Err(error),
        }
    }

    /// The lines of `/proc/PID/timens_offsets`; a clock that is not there has none.
    pub fn parse(text: &str) -> Offsets {
        let of = |clock: &str| {
            let mut words = text.lines().find_map(|line| line.strip_prefix(clock))?.split_ascii_whitespace();
            let (seconds, nanos): (i64, i64) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
            seconds.checked_mul(NS_PER_SEC)?.checked_add(nanos)
        };
        Offsets { monotonic_ns: of("monotonic").unwrap_or(0), boottime_ns: of("boottime").unwrap_or(0) }
    }

    /// The same as lines to be written: clock, seconds, nanoseconds (0 to 10⁹ − 1).
    pub fn lines(self) -> String {
        let line = |clock: &str, ns: i64| {
            format!("{clock} {} {}\n", ns.div_euclid(NS_PER_SEC), ns.rem_euclid(NS_PER_SEC))
        };
        line("monotonic", self.monotonic_ns) + &line("boottime", self.boottime_ns)
    }
}

/// CLOCK_MONOTONIC and CLOCK_BOOTTIME as this process sees them, ns.
pub fn clocks_ns() -> (u64, u64) {
    let read = |clock| {
        clock_gettime(clock).map_or(0, |time| time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64)
    };
    (read(ClockId::CLOCK_MONOTONIC), read(ClockId::CLOCK_BOOTTIME))
}

/// A new time namespace for the children that this process makes from now on. Dropped, they are born
/// in that of this process again.
#[derive(Debug)]
pub struct ForChildren {
    own: File,
}

impl ForChildren {
    /// Makes one; the offsets count from the machine's clocks. This process must have one thread.
    ///
    /// `EPERM`: it takes CAP_SYS_ADMIN. `EINVAL`: the kernel has no time namespaces. `ERANGE`: a clock
    /// would be negative, or beyond what the kernel counts (146 years).
    pub fn make(offsets: Offsets) -> Result<ForChildren, Errno> {
        let errno = |error: io::Error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
        let own = File::open("/proc/self/ns/time").map_err(|error| match errno(error) {
            Errno::ENOENT => Errno::EINVAL,
            other => other,
        })?;
        unshare(NEWTIME)?;
        let made = ForChildren { own };
        fs::write("/proc/self/timens_offsets", offsets.lines()).map_err(errno)?;
        Ok(made)
    }
}

impl Drop for ForChildren {
    fn drop(&mut self) {
        let _ = setns(&self.own, NEWTIME);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_negative_offset_has_positive_nanoseconds() {
        let offsets = Offsets { monotonic_ns: -1, boottime_ns: 2_500_000_000 };
        assert_eq!(offsets.lines(), "monotonic -1 999999999\nboottime 2 500000000\n");
        let shown = "monotonic          -1 999999999\nboottime            2 500000000\n";
        assert_eq!(Offsets::parse(shown), offsets);
        assert_eq!(Offsets::parse("monotonic 99999999999999999999 0\n"), Offsets::default());
    }

    proptest! {
        #[test]
        fn never_panics(text in "((monotonic|boottime) *[-0-9]{0,22} *[-0-9]{0,22}\n){0,3}") {
            Offsets::parse(&text);
        }

        #[test]
        fn what_is_written_is_read(monotonic_ns in any::<i64>(), boottime_ns in any::<i64>()) {
            let offsets = Offsets { monotonic_ns, boottime_ns };
            // The most negative one is a second less and more than that in parts.
            prop_assume!(monotonic_ns > i64::MIN + NS_PER_SEC && boottime_ns > i64::MIN + NS_PER_SEC);
            prop_assert_eq!(Offsets::parse(&offsets.lines()), offsets);
        }
    }
}
