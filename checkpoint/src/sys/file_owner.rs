//! Whom an open file description tells of what happens with it: fcntl(2), F_GETOWN_EX and F_GETSIG.

use nix::errno::Errno;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `struct f_owner_ex`.
#[repr(C)]
struct Owner {
    kind: i32,
    id: i32,
}

const _: () = assert!(size_of::<Owner>() == 8);

/// `F_GETSIG`, `F_SETSIG`, `F_SETOWN_EX`, `F_GETOWN_EX` (linux/fcntl.h); not all are in libc.
pub const F_SETSIG: i32 = 10;
const F_GETSIG: i32 = 11;
/// See [`F_SETSIG`].
pub const F_SETOWN_EX: i32 = 15;
const F_GETOWN_EX: i32 = 16;

/// Type (`F_OWNER_*`) and id of the owner, and the signal (0: SIGIO); all 0: none was ever set. An owner
/// that has ended has the id 0.
pub fn get(file: BorrowedFd<'_>) -> Result<(i32, i32, i32), Errno> {
    let mut owner = Owner { kind: 0, id: 0 };
    // SAFETY: `owner` has the layout that the request tells, and outlives the call.
    let got = unsafe { libc::fcntl(file.as_raw_fd(), F_GETOWN_EX, &raw mut owner) };
    Errno::result(got)?;
    // SAFETY: no pointers.
    let signal = Errno::result(unsafe { libc::fcntl(file.as_raw_fd(), F_GETSIG) })?;
    // The kernel answers "a process, 0" for none (fs/fcntl.c, `f_getown_ex`).
    let kind = if owner.id == 0 { 0 } else { owner.kind };
    Ok((kind, owner.id, signal))
}

/// The expected life time of what is written to the file (`F_GET_RW_HINT`); 0: none is set.
pub fn write_hint(file: BorrowedFd<'_>) -> u64 {
    const F_GET_RW_HINT: i32 = 1035;
    let mut hint = 0u64;
    // SAFETY: `hint` has the size that the request tells, and outlives the call.
    let got = unsafe { libc::fcntl(file.as_raw_fd(), F_GET_RW_HINT, &raw mut hint) };
    if got == 0 { hint } else { 0 }
}

/// Sets it.
pub fn set_write_hint(file: BorrowedFd<'_>, hint: u64) -> Result<(), Errno> {
    const F_SET_RW_HINT: i32 = 1036;
    // SAFETY: `hint` has the size that the request tells, and outlives the call.
    Errno::result(unsafe { libc::fcntl(file.as_raw_fd(), F_SET_RW_HINT, &raw const hint) }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn tells_what_was_set() {
        let (reading, _writing) = nix::unistd::pipe().expect("a pipe");
        assert_eq!(get(reading.as_fd()), Ok((0, 0, 0)));
        let fd = reading.as_raw_fd();
        // SAFETY: no pointers; ours.
        unsafe {
            assert_eq!(libc::fcntl(fd, libc::F_SETOWN, libc::getpid()), 0);
            assert_eq!(libc::fcntl(fd, F_SETSIG, libc::SIGUSR1), 0);
        }
        // F_OWNER_PID.
        assert_eq!(get(reading.as_fd()), Ok((1, std::process::id() as i32, libc::SIGUSR1)));
        let file = tempfile::tempfile().expect("a file");
        assert_eq!(write_hint(file.as_fd()), 0);
        if set_write_hint(file.as_fd(), 3).is_ok() {
            assert_eq!(write_hint(file.as_fd()), 3);
        }
    }
}
