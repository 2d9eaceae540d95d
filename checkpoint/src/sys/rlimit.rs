//! prlimit(2) of another process, which nix lacks.

use nix::errno::Errno;
use nix::sys::resource::Resource;

/// Lowers the soft limit of `pid` to at most `to`.
pub fn lower_soft(pid: i32, resource: Resource, to: u64) -> Result<(), Errno> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` outlives both calls; a null pointer means "do not set" / "do not get".
    let got = unsafe { libc::prlimit(pid, resource as _, std::ptr::null(), &raw mut limit) };
    Errno::result(got)?;
    limit.rlim_cur = limit.rlim_cur.min(to);
    // SAFETY: as above.
    let set = unsafe { libc::prlimit(pid, resource as _, &raw const limit, std::ptr::null_mut()) };
    Errno::result(set).map(drop)
}

/// Number of limits (`RLIM_NLIMITS`).
pub const LIMITS: u32 = 16;

/// A limit of `pid`: soft, hard.
pub fn get(pid: i32, resource: u32) -> Result<(u64, u64), Errno> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` outlives the call; nothing is set.
    let got = unsafe { libc::prlimit(pid, resource as _, std::ptr::null(), &raw mut limit) };
    Errno::result(got).map(|_| (limit.rlim_cur, limit.rlim_max))
}

/// Sets a limit of `pid`.
pub fn set(pid: i32, resource: u32, soft: u64, hard: u64) -> Result<(), Errno> {
    let limit = libc::rlimit { rlim_cur: soft, rlim_max: hard };
    // SAFETY: `limit` outlives the call; nothing is asked for.
    let got = unsafe { libc::prlimit(pid, resource as _, &raw const limit, std::ptr::null_mut()) };
    Errno::result(got).map(drop)
}
