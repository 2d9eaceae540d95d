//! waitpid(2) and kill(2) with plain numbers: nix refuses real-time signals, and loses the status
//! that names one.

use nix::errno::Errno;

/// One change of state of any child, if there is one now: its PID and the raw status. `ECHILD`: there
/// are no children. `flags`: such as `WUNTRACED | WCONTINUED`.
pub fn any_child(flags: i32) -> Result<Option<(i32, i32)>, Errno> {
    let mut status = 0;
    // SAFETY: `status` outlives the call.
    let got = unsafe { libc::waitpid(-1, &raw mut status, flags | libc::WNOHANG) };
    Ok(match Errno::result(got)? {
        0 => None,
        pid => Some((pid, status)),
    })
}

/// Waits for the end of this child; its raw status.
pub fn child(pid: i32) -> Result<i32, Errno> {
    let mut status = 0;
    loop {
        // SAFETY: `status` outlives the call.
        let got = unsafe { libc::waitpid(pid, &raw mut status, libc::__WALL) };
        match Errno::result(got) {
            Ok(_) => return Ok(status),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// kill(2).
pub fn kill(pid: i32, signal: i32) -> Result<(), Errno> {
    // SAFETY: no pointers.
    Errno::result(unsafe { libc::kill(pid, signal) }).map(drop)
}
