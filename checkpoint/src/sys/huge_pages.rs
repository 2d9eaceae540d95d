//! Explicit huge pages (Documentation/admin-guide/mm/hugetlbpage.rst): how many can be had, and files of them.
//!
//! A fault for which there is no page left is SIGBUS. So pages are made by `MADV_POPULATE_WRITE` (madvise(2),
//! Linux 5.14) before they are written, which gives an error instead.

use nix::errno::Errno;
use std::ffi::c_void;
use std::fs;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::null_mut;

const MADV_POPULATE_WRITE: libc::c_int = 23;

/// What mmap(2), memfd_create(2) and shmget(2) take for the size of huge pages, beside their own flag.
pub fn size_flag(page_shift: u8) -> libc::c_int {
    i32::from(page_shift) << libc::MAP_HUGE_SHIFT
}

/// How many huge pages can be had that nobody has reserved. `None`: this kernel has none of this size.
pub fn available(page_shift: u8) -> Option<u64> {
    let kilobytes = 1u64.checked_shl(page_shift.checked_sub(10)?.into())?;
    let read = |name: &str| {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-{kilobytes}kB/{name}");
        fs::read_to_string(path).ok()?.trim().parse::<u64>().ok()
    };
    let unreserved = read("free_hugepages")?.saturating_sub(read("resv_hugepages")?);
    // What the kernel makes when it is asked for, if memory has room.
    let surplus = read("nr_overcommit_hugepages")?.saturating_sub(read("surplus_hugepages")?);
    Some(unreserved + surplus)
}

/// A part of a file of huge pages, mapped here; nothing is reserved for it.
#[derive(Debug)]
pub struct Window {
    at: *mut c_void,
    length: usize,
}

impl Window {
    /// Pages of the file as they are, only to be looked at.
    pub fn private(file: BorrowedFd<'_>, offset: u64, length: u64) -> Result<Window, Errno> {
        Window::map(file, offset, length, libc::PROT_READ, libc::MAP_PRIVATE)
    }

    fn shared(file: BorrowedFd<'_>, offset: u64, length: u64) -> Result<Window, Errno> {
        Window::map(file, offset, length, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED)
    }

    fn map(file: BorrowedFd<'_>, offset: u64, length: u64, prot: i32, kind: i32) -> Result<Window, Errno> {
        let length = usize::try_from(length).map_err(|_| Errno::EINVAL)?;
        let offset = i64::try_from(offset).map_err(|_| Errno::EINVAL)?;
        let flags = kind | libc::MAP_NORESERVE;
        // SAFETY: a new mapping where the kernel finds room: no memory of ours is touched.
        let at = unsafe { libc::mmap(null_mut(), length, prot, flags, file.as_raw_fd(), offset) };
        match at == libc::MAP_FAILED {
            true => Err(Errno::last()),
            false => Ok(Window { at, length }),
        }
    }

    /// Where it begins.
    pub fn address(&self) -> u64 {
        self.at as u64
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`, and nothing points into it.
        unsafe { libc::munmap(self.at, self.length) };
    }
}

/// Makes the pages of a mapping of this program's that is written next.
pub(super) fn populate(at: *mut c_void, length: usize) -> Result<(), Errno> {
    // SAFETY: it changes no contents, and an address that is none is an error.
    Errno::result(unsafe { libc::madvise(at, length, MADV_POPULATE_WRITE) })?;
    Ok(())
}

/// Writes into a file of huge pages, for which there is no write(2). What lies in it must be within the file.
pub fn write(file: BorrowedFd<'_>, page_shift: u8, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
    let (first, length) = pages_around(page_shift, offset, bytes.len() as u64)?;
    let window = Window::shared(file, first, length)?;
    populate(window.at, window.length)?;
    // SAFETY: the window reaches from `first`, at or below `offset`, over all of the bytes; the bytes are of this
    // program, and no reference into the window exists.
    unsafe {
        let to = window.at.cast::<u8>().add((offset - first) as usize);
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
    }
    Ok(())
}

/// Makes the pages of a range of a file, of zeros where there are none.
pub fn make(file: BorrowedFd<'_>, page_shift: u8, offset: u64, length: u64) -> Result<(), Errno> {
    let (first, length) = pages_around(page_shift, offset, length)?;
    for at in (first..first + length).step_by(1 << page_shift) {
        let window = Window::shared(file, at, 1 << page_shift)?;
        populate(window.at, window.length)?;
    }
    Ok(())
}

/// Offset and length of the whole pages in which a range lies.
pub fn pages_around(page_shift: u8, offset: u64, length: u64) -> Result<(u64, u64), Errno> {
    let page = 1u64.checked_shl(page_shift.into()).ok_or(Errno::EINVAL)?;
    let first = offset & !(page - 1);
    let end = offset.checked_add(length).and_then(|end| end.checked_next_multiple_of(page));
    Ok((first, end.ok_or(Errno::EINVAL)? - first))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_pages() {
        assert_eq!(pages_around(21, 0x30_0000, 0x1000), Ok((0x20_0000, 0x20_0000)));
        assert_eq!(pages_around(21, 0x3f_f000, 0x2000), Ok((0x20_0000, 0x40_0000)));
        assert_eq!(pages_around(21, u64::MAX - 4096, 8192), Err(Errno::EINVAL));
        assert_eq!(pages_around(64, 0, 1), Err(Errno::EINVAL));
    }

    #[test]
    fn sizes_that_no_kernel_has() {
        for page_shift in [0, 9, 12, 13, 63, 80, 255] {
            assert_eq!(available(page_shift), None, "{page_shift}");
        }
    }
}
