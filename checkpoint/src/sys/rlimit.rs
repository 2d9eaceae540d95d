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
