//! Files and directories without a name: made anew where they were, and their name removed again.
//! What is in the files is an object of the image ([`super::objects`]).

use super::RestoreError;
use crate::image::OpenFile;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, mkdir, unlink, unlinkat};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// Names tried where one is in use.
const NAMES: u32 = 1000;

/// The path without the kernel's word for it.
fn base(file: &OpenFile) -> Result<&[u8], RestoreError> {
    let base = file.link.strip_suffix(b" (deleted)").filter(|base| base.first() == Some(&b'/'));
    base.ok_or_else(|| {
        RestoreError::Unfit("the image is not consistent: a file without a name has one".into())
    })
}

/// The path itself, or the first like it that is free.
fn with_free_name<T>(base: &[u8], make: impl Fn(&OsStr) -> Result<T, Errno>) -> Result<(OsString, T), Errno> {
    for n in 0..NAMES {
        let mut name = base.to_vec();
        if n > 0 {
            name.extend_from_slice(format!(".{n}").as_bytes());
        }
        let name = OsString::from_vec(name);
        match make(&name) {
            Err(Errno::EEXIST) => {}
            made => return made.map(|made| (name, made)),
        }
    }
    Err(Errno::EEXIST)
}

/// A file that had this path, and has no name; with `temporary` one made with `O_TMPFILE` and that access mode.
pub(super) fn create(path: &[u8], temporary: Option<u32>) -> Result<File, Errno> {
    let mode = Mode::S_IRUSR | Mode::S_IWUSR;
    if temporary.is_none() {
        let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | OFlag::O_CREAT | OFlag::O_EXCL;
        match with_free_name(path, |path| open(path, flags, mode)) {
            Ok((path, made)) => {
                // With a name for a moment: then `/proc/PID/fd` shows the one it had.
                unlink(path.as_os_str())?;
                return Ok(made.into());
            }
            // Its directory is gone as well.
            Err(Errno::ENOENT | Errno::ENOTDIR) => {}
            Err(errno) => return Err(errno),
        }
    }
    let access = temporary.map_or(libc::O_RDWR, |access| access as i32 & libc::O_ACCMODE);
    let flags = OFlag::from_bits_retain(libc::O_TMPFILE | access | libc::O_CLOEXEC);
    let mut directory = std::path::Path::new(OsStr::from_bytes(path));
    while let Some(above) = directory.parent() {
        directory = above;
        match open(directory, flags, mode) {
            Err(Errno::ENOENT | Errno::ENOTDIR) => {}
            made => return made.map(File::from),
        }
    }
    Err(Errno::ENOENT)
}

/// A directory that was removed while it was open: an empty one, removed again.
pub(super) fn open_removed_directory(file: &OpenFile, flags: i32) -> Result<OwnedFd, RestoreError> {
    let failed = |errno| RestoreError::file(format!("making {}", String::from_utf8_lossy(&file.link)), errno);
    let mode = Mode::from_bits_truncate(file.stat.2 & 0o7777);
    let (path, ()) = with_free_name(base(file)?, |path| mkdir(path, mode)).map_err(failed)?;
    let flags = OFlag::from_bits_retain(flags) | OFlag::O_CLOEXEC;
    let opened = open(path.as_os_str(), flags, Mode::empty());
    unlinkat(nix::fcntl::AT_FDCWD, path.as_os_str(), UnlinkatFlags::RemoveDir).map_err(failed)?;
    opened.map_err(failed)
}
