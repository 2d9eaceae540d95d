//! Which pages of a file of huge pages there are, by userfaultfd(2): `UFFDIO_CONTINUE` maps a page that the file
//! has, and does not make one that it lacks (Documentation/admin-guide/mm/userfaultfd.rst, minor faults).

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
