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

/// Reads several ranges (address and length, at most 1024) of another process' memory into `buf`, one
/// behind the other; all or nothing. Their lengths are together that of `buf`.
pub fn read_ranges(pid: i32, ranges: &[(u64, usize)], buf: &mut [u8]) -> Result<(), Errno> {
    let local = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    let range = |&(addr, length): &(u64, usize)| libc::iovec { iov_base: addr as *mut _, iov_len: length };
    let remote: Vec<libc::iovec> = ranges.iter().map(range).collect();
    let (at, count) = (remote.as_ptr(), remote.len() as libc::c_ulong);
    // SAFETY: `local` describes `buf`, of which the kernel fills no more than there is; `remote` outlives
    // the call, and the kernel checks the addresses in it.
    let got = unsafe { libc::process_vm_readv(pid, &raw const local, 1, at, count, 0) };
    match Errno::result(got)? {
        n if n as usize == buf.len() => Ok(()),
        _ => Err(Errno::EFAULT),
    }
}
