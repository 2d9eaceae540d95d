//! Acting for a moment as another process: with its PID, its ids, or in another root.
//!
//! The kernel notes who makes a connection (`SO_PEERCRED`, unix(7)) and from where a name is seen. A
//! child that shares the table of descriptors does it and ends; what it has made stays open here.

use super::fork::{Side, exit_now, fork};
use super::wait;
use nix::errno::Errno;
use std::path::Path;

/// Whom to act as.
#[derive(Debug, Clone, Default)]
pub struct As<'a> {
    /// Under this PID, which must be free.
    pub pid: Option<i32>,
    /// Effective and real user and group, and supplementary groups.
    pub ids: Option<(u32, u32, &'a [u32])>,
    /// In this root.
    pub root: Option<&'a Path>,
}

/// Runs `work` in a child that shares this process' descriptors; gives what it gives. `work` must not
/// keep anything that has to be dropped: its memory ends with it. `EEXIST`: the PID is taken.
pub fn act(who: &As<'_>, work: impl FnOnce() -> Result<[i32; 2], Errno>) -> Result<[i32; 2], Errno> {
    let (ours, theirs) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    match fork(libc::CLONE_FILES, who.pid)? {
        Side::Child => {
            let done = become_other(who).and_then(|()| work());
            let words = match done {
                Ok([a, b]) => [0, a, b],
                Err(errno) => [errno as i32, 0, 0],
            };
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
            let _ = nix::unistd::write(&theirs, &bytes);
            exit_now(0)
        }
        Side::Parent(child) => {
            let mut bytes = [0u8; 12];
            let ended = wait::child(child);
            // It has ended, and a pipe has room for so little: what is not there never comes.
            let flags = nix::fcntl::OFlag::O_NONBLOCK;
            nix::fcntl::fcntl(&ours, nix::fcntl::FcntlArg::F_SETFL(flags))?;
            let got = nix::unistd::read(&ours, &mut bytes);
            ended?;
            if got != Ok(12) {
                return Err(Errno::ECHILD);
            }
            let word = |n: usize| i32::from_ne_bytes([bytes[n], bytes[n + 1], bytes[n + 2], bytes[n + 3]]);
            match word(0) {
                0 => Ok([word(4), word(8)]),
                errno => Err(Errno::from_raw(errno)),
            }
        }
    }
}

fn become_other(who: &As<'_>) -> Result<(), Errno> {
    if let Some(root) = who.root {
        nix::unistd::chroot(root)?;
        nix::unistd::chdir("/")?;
    }
    let Some((uid, gid, groups)) = who.ids else { return Ok(()) };
    /// `SECBIT_NO_SETUID_FIXUP` (linux/securebits.h): the rights stay when the user changes.
    const KEEP: libc::c_ulong = 1 << 2;
    // SAFETY: plain numbers, and a list that outlives the call with its length; the raw system calls
    // act on this process' only thread.
    unsafe {
        Errno::result(libc::prctl(libc::PR_SET_SECUREBITS, KEEP))?;
        Errno::result(libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()))?;
        Errno::result(libc::syscall(libc::SYS_setresgid, gid, gid, gid))?;
        Errno::result(libc::syscall(libc::SYS_setresuid, uid, uid, uid))?;
    }
    Ok(())
}
