//! process_vm_readv(2) and process_vm_writev(2).

use nix::errno::Errno;

/// Reads other processes' memory into `buf`; all or nothing.
pub fn read(pid: i32, addr: u64, buf: &mut [u8]) -> Result<(), Errno> {
    let local = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    let remote = libc::iovec { iov_base: addr as *mut _, iov_len: buf.len() };
    // SAFETY: `local` describes `buf`; the remote address is checked by the kernel.
    let got = unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
    match Errno::result(got)? {
        n if n as usize == buf.len() => Ok(()),
        _ => Err(Errno::EFAULT),
    }
}

/// Writes `buf` into another process' memory; all or nothing is reported, a part may be written.
pub fn write(pid: i32, addr: u64, buf: &[u8]) -> Result<(), Errno> {
    let local = libc::iovec { iov_base: buf.as_ptr().cast_mut().cast(), iov_len: buf.len() };
    let remote = libc::iovec { iov_base: addr as *mut _, iov_len: buf.len() };
    // SAFETY: `local` describes `buf`, which is only read; the remote address is checked by the kernel.
    let got = unsafe { libc::process_vm_writev(pid, &raw const local, 1, &raw const remote, 1, 0) };
    match Errno::result(got)? {
        n if n as usize == buf.len() => Ok(()),
        _ => Err(Errno::EFAULT),
    }
}
