//! userfaultfd(2), for two things (Documentation/admin-guide/mm/userfaultfd.rst).
//!
//! Which pages of a file of huge pages there are: `UFFDIO_CONTINUE` maps a page that the file has, and does not make one
//! that it lacks (minor faults).
//!
//! Which pages of a process are written ([`Tracking`]): asynchronous write protection. A write to an armed page
//! is let through by the kernel itself, which disarms the page; [`super::pagemap_scan`] tells which are disarmed.

use super::huge_pages::Window;
use nix::errno::Errno;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Continue {
    start: u64,
    len: u64,
    mode: u64,
    mapped: i64,
}

const _: () = assert!(size_of::<Api>() == 24 && size_of::<Register>() == 32 && size_of::<Continue>() == 32);
const UFFD_API: u64 = 0xaa;
const UFFD_USER_MODE_ONLY: libc::c_int = 1;
const UFFD_FEATURE_MINOR_HUGETLBFS: u64 = 1 << 9;
const UFFDIO_REGISTER_MODE_MINOR: u64 = 1 << 2;
const UFFDIO_CONTINUE_MODE_DONTWAKE: u64 = 1;
/// `_IOWR(0xaa, 0x3f, struct uffdio_api)`.
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
/// `_IOWR(0xaa, 0x00, struct uffdio_register)`.
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
/// `_IOWR(0xaa, 0x07, struct uffdio_continue)`.
const UFFDIO_CONTINUE: libc::c_ulong = 0xc020_aa07;
/// A range that nobody else tracks is armed and looked at; Linux 6.7.
const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;
/// What is not there can be armed: without it the scan refuses anonymous memory (`userfaultfd_wp_use_markers`).
const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const UFFD_FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;
/// `_IOWR(0xaa, 0x06, struct uffdio_writeprotect)`.
const UFFDIO_WRITEPROTECT: libc::c_ulong = 0xc018_aa06;
/// Arguments of the call that makes one to track with. In user mode only is enough, and needs no privilege: what
/// the kernel writes for the process is let through in the fault handler, before there is anybody to be told.
pub const TRACKING_FLAGS: libc::c_int = libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY;
/// Mapped at a time, bytes.
const WINDOW: u64 = 64 << 30;

/// The numbers of the pages that a file of `pages` huge pages has, if there are `there` of them.
pub fn present_pages(
    file: BorrowedFd<'_>,
    page_shift: u8,
    pages: u64,
    there: u64,
) -> Result<Vec<u64>, Errno> {
    let uffd = open()?;
    let mut found = Vec::new();
    let in_window = WINDOW >> page_shift;
    let mut first = 0;
    while first < pages && (found.len() as u64) < there {
        let count = (pages - first).min(in_window);
        // Private: that takes no right to write, and changes nothing of the file.
        let window = Window::private(file, first << page_shift, count << page_shift)?;
        register(&uffd, &window, count << page_shift)?;
        for number in 0..count {
            if is_there(&uffd, window.address() + (number << page_shift), 1 << page_shift)? {
                found.push(first + number);
            }
        }
        first += count;
    }
    Ok(found)
}

fn open() -> Result<OwnedFd, Errno> {
    // SAFETY: no pointers; what is returned is a descriptor of ours alone.
    let uffd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | UFFD_USER_MODE_ONLY) };
    let uffd = Errno::result(uffd)?;
    // SAFETY: just opened.
    let uffd = unsafe { OwnedFd::from_raw_fd(uffd as i32) };
    let mut api = Api { api: UFFD_API, features: UFFD_FEATURE_MINOR_HUGETLBFS, ioctls: 0 };
    // SAFETY: the structure outlives the call.
    Errno::result(unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_API, &raw mut api) })?;
    Ok(uffd)
}

fn register(uffd: &OwnedFd, window: &Window, len: u64) -> Result<(), Errno> {
    let mode = UFFDIO_REGISTER_MODE_MINOR;
    let mut range = Register { start: window.address(), len, mode, ioctls: 0 };
    // SAFETY: the structure outlives the call; the window is nobody's memory, and is not touched while it is
    // registered.
    Errno::result(unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_REGISTER, &raw mut range) })?;
    Ok(())
}

fn is_there(uffd: &OwnedFd, start: u64, len: u64) -> Result<bool, Errno> {
    let mut page = Continue { start, len, mode: UFFDIO_CONTINUE_MODE_DONTWAKE, mapped: 0 };
    // SAFETY: as above.
    let done = Errno::result(unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_CONTINUE, &raw mut page) });
    match done {
        Ok(_) => Ok(true),
        // The file has none (hugetlb_mfill_atomic_pte in mm/hugetlb.c).
        Err(Errno::EFAULT) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// Tracks the writes to another process' memory. When it is closed, by whatever end, the kernel disarms and
/// unregisters all of it (`userfaultfd_release`, fs/userfaultfd.c).
#[derive(Debug)]
pub struct Tracking(OwnedFd);

#[repr(C)]
struct WriteProtect {
    start: u64,
    len: u64,
    mode: u64,
}

const _: () = assert!(size_of::<WriteProtect>() == 24);

impl Tracking {
    /// By a userfaultfd that the process has made, with [`TRACKING_FLAGS`], and nobody has set up. `EINVAL`: the kernel
    /// cannot track (before Linux 6.7).
    pub fn with(uffd: OwnedFd) -> Result<Tracking, Errno> {
        let features = UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED | UFFD_FEATURE_WP_HUGETLBFS_SHMEM;
        let mut api = Api { api: UFFD_API, features, ioctls: 0 };
        // SAFETY: the structure outlives the call.
        Errno::result(unsafe { libc::ioctl(uffd.as_raw_fd(), UFFDIO_API, &raw mut api) })?;
        Ok(Tracking(uffd))
    }

    /// Registers what is mapped in a range; nothing is armed yet. `EINVAL` or `ENOMEM`: nothing is mapped there;
    /// `EBUSY`: a part is another userfaultfd's; `EPERM`: a shared mapping that cannot be written; `ESRCH`: the
    /// memory's last process has ended or runs another program.
    pub fn register(&self, start: u64, end: u64) -> Result<(), Errno> {
        let mut range = Register { start, len: end - start, mode: UFFDIO_REGISTER_MODE_WP, ioctls: 0 };
        // SAFETY: the structure outlives the call; writes to the memory go through as before.
        Errno::result(unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_REGISTER, &raw mut range) })?;
        Ok(())
    }

    /// Disarms a range that is registered.
    pub fn disarm(&self, start: u64, end: u64) -> Result<(), Errno> {
        let mut range = WriteProtect { start, len: end - start, mode: 0 };
        // SAFETY: as above.
        Errno::result(unsafe { libc::ioctl(self.0.as_raw_fd(), UFFDIO_WRITEPROTECT, &raw mut range) })?;
        Ok(())
    }

    /// The descriptor, to compare it with others'.
    pub fn number(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

impl Tracking {
    /// Of this process' own memory.
    pub fn of_this_process() -> Result<Tracking, Errno> {
        // SAFETY: no pointers; what is returned is a descriptor of ours alone.
        let uffd = Errno::result(unsafe { libc::syscall(libc::SYS_userfaultfd, TRACKING_FLAGS) })?;
        Tracking::with(super::fd::own(uffd as i32))
    }

    /// Another descriptor of it.
    pub fn try_clone(&self) -> std::io::Result<OwnedFd> {
        self.0.try_clone()
    }
}

/// Whether this kernel can track: Linux 6.7.
pub fn can_track() -> bool {
    Tracking::of_this_process().is_ok()
}
