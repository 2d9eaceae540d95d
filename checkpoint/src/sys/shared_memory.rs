//! Memory that can be shared between processes: anonymous (mmap(2)), and System V segments (shmop(2)).

use super::huge_pages;
use crate::image::PAGE_SHIFT;
use nix::errno::Errno;
use std::fs::{File, OpenOptions};
use std::io;
use std::ptr::{null, null_mut};

/// Makes the kernel's file behind `MAP_SHARED|MAP_ANONYMOUS` memory of `size` bytes in pages of this size, and
/// opens it.
///
/// Opening `/proc/self/map_files` needs CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN (proc(5)).
pub fn anonymous(size: u64, page_shift: u8) -> io::Result<File> {
    let length = usize::try_from(size).ok().and_then(|size| size.checked_next_multiple_of(1 << page_shift));
    let length = length.filter(|&length| length > 0).ok_or(Errno::EINVAL)?;
    let huge =
        if page_shift == PAGE_SHIFT { 0 } else { libc::MAP_HUGETLB | huge_pages::size_flag(page_shift) };
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | huge;
    // SAFETY: a new mapping where the kernel finds room: no memory of ours is touched.
    let at = unsafe { libc::mmap(null_mut(), length, libc::PROT_NONE, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let start = at as usize;
    let path = format!("/proc/self/map_files/{start:x}-{:x}", start + length);
    let file = OpenOptions::new().read(true).write(true).open(path);
    // SAFETY: the mapping made above, to which nothing points.
    unsafe { libc::munmap(at, length) };
    file
}

/// Makes a System V segment with this id (by `kernel.shm_next_id`, sysctl(2)), which must be free, as its key
/// must be.
pub fn make_segment(id: i32, key: i32, size: u64, mode: u32, page_shift: u8) -> io::Result<()> {
    std::fs::write("/proc/sys/kernel/shm_next_id", id.to_string())?;
    let huge =
        if page_shift == PAGE_SHIFT { 0 } else { libc::SHM_HUGETLB | huge_pages::size_flag(page_shift) };
    let flags = libc::IPC_CREAT | libc::IPC_EXCL | (mode & 0o777) as i32 | huge;
    let size = usize::try_from(size).map_err(|_| Errno::EINVAL)?;
    // SAFETY: no pointers.
    let made = Errno::result(unsafe { libc::shmget(key, size, flags) });
    // Used up by the segment made; else it would be the next one's, of whomever.
    let _ = std::fs::write("/proc/sys/kernel/shm_next_id", "-1");
    match made? {
        made if made == id => Ok(()),
        made => {
            remove_segment(made)?;
            Err(Errno::EEXIST.into())
        }
    }
}

/// Gives it its owner.
pub fn own_segment(id: i32, owner: (u32, u32), mode: u32) -> io::Result<()> {
    // SAFETY: `shmid_ds` is plain data for which all zero is valid.
    let mut about: libc::shmid_ds = unsafe { std::mem::zeroed() };
    about.shm_perm.uid = owner.0;
    about.shm_perm.gid = owner.1;
    about.shm_perm.mode = (mode & 0o777) as _;
    // SAFETY: `about` outlives the call, which only reads it.
    Errno::result(unsafe { libc::shmctl(id, libc::IPC_SET, &raw mut about) })?;
    Ok(())
}

/// It goes away with its last user.
pub fn remove_segment(id: i32) -> io::Result<()> {
    // SAFETY: IPC_RMID uses no pointer.
    Errno::result(unsafe { libc::shmctl(id, libc::IPC_RMID, null_mut()) })?;
    Ok(())
}

/// A segment attached here.
#[derive(Debug)]
pub struct Attached {
    at: *mut libc::c_void,
    length: usize,
}

impl Attached {
    /// Attaches a segment of at least `size` bytes, to be written.
    pub fn to(id: i32, size: u64) -> io::Result<Attached> {
        let length = usize::try_from(size).map_err(|_| Errno::EINVAL)?;
        // SAFETY: the kernel chooses a free place.
        let at = unsafe { libc::shmat(id, null(), 0) };
        if at as isize == -1 {
            return Err(io::Error::last_os_error());
        }
        Ok(Attached { at, length })
    }

    /// Makes the huge pages of a range, which must be whole, before they are written.
    pub fn make_pages(&self, offset: u64, length: u64) -> io::Result<()> {
        let (offset, length) = (usize::try_from(offset), usize::try_from(length));
        let (Ok(offset), Ok(length)) = (offset, length) else { return Err(Errno::EINVAL.into()) };
        if offset.checked_add(length).is_none_or(|end| end > self.length) {
            return Err(Errno::EFBIG.into());
        }
        Ok(huge_pages::populate(self.at.wrapping_byte_add(offset), length)?)
    }

    /// Writes into it; what would be beyond its end is an error.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let offset = usize::try_from(offset).map_err(|_| Errno::EINVAL)?;
        if offset.checked_add(bytes.len()).is_none_or(|end| end > self.length) {
            return Err(Errno::EFBIG.into());
        }
        // SAFETY: inside the segment, whose length was checked; the bytes are of this program, and no
        // reference into the segment exists.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.at.cast::<u8>().add(offset), bytes.len())
        };
        Ok(())
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // SAFETY: attached by `to`, and nothing points into it.
        unsafe { libc::shmdt(self.at) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt};

    #[test]
    fn anonymous_memory_is_a_file() {
        let Ok(file) = anonymous(10_000, PAGE_SHIFT) else {
            assert!(!nix::unistd::geteuid().is_root());
            return;
        };
        assert_eq!(file.metadata().expect("stat").size(), 12_288);
        file.write_all_at(b"shared", 8190).expect("written");
        let mut back = [0; 6];
        file.read_exact_at(&mut back, 8190).expect("read");
        assert_eq!(&back, b"shared");
        assert!(anonymous(0, PAGE_SHIFT).is_err() && anonymous(u64::MAX, PAGE_SHIFT).is_err());
    }

    #[test]
    fn a_segment_gets_its_id() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let id = 1_234_567;
        let _ = remove_segment(id);
        make_segment(id, 0, 10_000, 0o600, PAGE_SHIFT).expect("made");
        {
            let attached = Attached::to(id, 10_000).expect("attached");
            attached.write(9_990, b"0123456789").expect("written");
            assert!(attached.write(9_991, b"0123456789").is_err());
        }
        assert!(make_segment(id, 0, 10_000, 0o600, PAGE_SHIFT).is_err(), "the id is taken");
        remove_segment(id).expect("removed");
    }
}
