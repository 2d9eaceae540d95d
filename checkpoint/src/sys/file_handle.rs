//! Names of files that need no open descriptor: name_to_handle_at(2), open_by_handle_at(2).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// Longest handle the kernel makes (`MAX_HANDLE_SZ`).
const MAX: usize = 128;

/// A file within its mount. It includes the inode's generation, so a file that has come into the
/// place of a removed one has another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileHandle {
    kind: i32,
    bytes: Vec<u8>,
}

impl FileHandle {
    /// One that the kernel has told elsewhere; `None` if it is longer than the kernel makes them.
    pub fn of_parts(kind: i32, bytes: &[u8]) -> Option<FileHandle> {
        (!bytes.is_empty() && bytes.len() <= MAX).then(|| FileHandle { kind, bytes: bytes.to_vec() })
    }
}

#[repr(C)]
struct Raw {
    length: u32,
    kind: i32,
    bytes: [u8; MAX],
}

const _: () = assert!(size_of::<Raw>() == 8 + MAX);

/// The handle of what `file` (`O_PATH` will do) stands for; `EOPNOTSUPP` where there is none.
pub fn of(file: BorrowedFd<'_>) -> io::Result<FileHandle> {
    let mut raw = Raw { length: MAX as u32, kind: 0, bytes: [0; MAX] };
    let mut mount = 0i32;
    // SAFETY: `raw` has the layout of `struct file_handle` with MAX bytes behind it, as its length
    // says; all pointers are live and writable, the path is a constant that ends in NUL.
    let done = unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            file.as_raw_fd(),
            c"".as_ptr(),
            &raw mut raw,
            &raw mut mount,
            libc::AT_EMPTY_PATH,
        )
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    let bytes = raw.bytes.get(..raw.length as usize).unwrap_or_default().to_vec();
    Ok(FileHandle { kind: raw.kind, bytes })
}

/// Opens the file in the mount that `mount` (an open file or directory, not `O_PATH`) is in;
/// `ESTALE` if it is no more. Needs CAP_DAC_READ_SEARCH.
pub fn open(mount: BorrowedFd<'_>, handle: &FileHandle, flags: i32) -> io::Result<OwnedFd> {
    let mut raw = Raw { length: handle.bytes.len().min(MAX) as u32, kind: handle.kind, bytes: [0; MAX] };
    for (to, from) in raw.bytes.iter_mut().zip(&handle.bytes) {
        *to = *from;
    }
    // SAFETY: `raw` has the layout of `struct file_handle`, and its length is within its bytes.
    let fd = unsafe {
        libc::syscall(libc::SYS_open_by_handle_at, mount.as_raw_fd(), &raw mut raw, flags | libc::O_CLOEXEC)
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor the kernel has just made for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_handle_finds_its_file_again() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("f");
        std::fs::write(&path, "x").expect("write");
        let mount = std::fs::File::open(dir.path()).expect("open");
        let handle = match of(std::fs::File::open(&path).expect("open").as_fd()) {
            Ok(handle) => handle,
            Err(error) => return eprintln!("skipped: no handles here: {error}"),
        };
        match open(mount.as_fd(), &handle, libc::O_PATH) {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                return eprintln!("skipped: needs CAP_DAC_READ_SEARCH");
            }
            Err(error) => panic!("{error}"),
        }
        std::fs::remove_file(&path).expect("unlink");
        let error = open(mount.as_fd(), &handle, libc::O_PATH).expect_err("gone");
        assert_eq!(error.raw_os_error(), Some(libc::ESTALE));
    }
}
