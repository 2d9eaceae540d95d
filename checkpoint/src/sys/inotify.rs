//! inotify(7) with watch descriptors of one's choice.

use super::fd::own;
use nix::errno::Errno;
use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

/// `_IOW('I', 0, __s32)` (linux/inotify.h); needs CONFIG_CHECKPOINT_RESTORE.
const INOTIFY_IOC_SETNEXTWD: libc::c_ulong = 0x4004_4900;

/// Makes one that watches nothing.
pub fn make(nonblocking: bool) -> Result<OwnedFd, Errno> {
    let flags = libc::IN_CLOEXEC | if nonblocking { libc::IN_NONBLOCK } else { 0 };
    // SAFETY: no pointers.
    Errno::result(unsafe { libc::inotify_init1(flags) }).map(own)
}

/// Watches a file under this number, which is in use by no other.
pub fn watch(inotify: BorrowedFd<'_>, path: &CStr, mask: u32, wd: i32) -> Result<(), Errno> {
    // SAFETY: the request takes a number.
    let set = unsafe { libc::ioctl(inotify.as_raw_fd(), INOTIFY_IOC_SETNEXTWD, i64::from(wd)) };
    Errno::result(set)?;
    // SAFETY: a NUL-terminated string that outlives the call.
    let got = unsafe { libc::inotify_add_watch(inotify.as_raw_fd(), path.as_ptr(), mask) };
    if Errno::result(got)? == wd { Ok(()) } else { Err(Errno::EEXIST) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn watches_under_a_wanted_number() {
        let inotify = make(true).expect("an inotify");
        assert_eq!(watch(inotify.as_fd(), c"/", libc::IN_CREATE, 4711), Ok(()));
        assert_eq!(watch(inotify.as_fd(), c"/proc", libc::IN_CREATE, 12), Ok(()));
        let info =
            std::fs::read_to_string(format!("/proc/self/fdinfo/{}", inotify.as_raw_fd())).expect("fdinfo");
        assert!(info.contains("wd:1267 ") && info.contains("wd:c "), "{info}");
    }
}
