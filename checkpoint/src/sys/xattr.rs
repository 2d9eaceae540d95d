//! Extended attributes by path, following symbolic links (xattr(7)).
//!
//! There is no descriptor form here: an `O_PATH` descriptor is reached as `/proc/self/fd/N`.

use std::ffi::CStr;
use std::io;

fn length(got: isize) -> io::Result<usize> {
    usize::try_from(got).map_err(|_| io::Error::last_os_error())
}

/// The value of `name` into `out`; with an empty `out`, only its length.
pub fn get(path: &CStr, name: &CStr, out: &mut [u8]) -> io::Result<usize> {
    // SAFETY: both strings end in NUL; the kernel writes at most `out.len()` bytes to `out`.
    length(unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), out.as_mut_ptr().cast(), out.len()) })
}

/// The names, each ended by a NUL, into `out`; with an empty `out`, only their length.
pub fn list(path: &CStr, out: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the string ends in NUL; the kernel writes at most `out.len()` bytes to `out`.
    length(unsafe { libc::listxattr(path.as_ptr(), out.as_mut_ptr().cast(), out.len()) })
}

/// Sets `name`; `flags` are `XATTR_CREATE` and `XATTR_REPLACE`.
pub fn set(path: &CStr, name: &CStr, value: &[u8], flags: i32) -> io::Result<()> {
    // SAFETY: both strings end in NUL; the kernel reads `value.len()` bytes from `value`.
    let done =
        unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), flags) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Removes `name`.
pub fn remove(path: &CStr, name: &CStr) -> io::Result<()> {
    // SAFETY: both strings end in NUL and outlive the call.
    let done = unsafe { libc::removexattr(path.as_ptr(), name.as_ptr()) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
