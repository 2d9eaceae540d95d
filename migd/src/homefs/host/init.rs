//! What the host's view tells the kernel at the start: INIT, and the read-ahead that INIT can only
//! lower (`process_init_reply` in `fs/fuse/inode.c` takes the smaller).

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::homefs::abi::{Answer, InHeader, MAX_PAGES, MAX_WRITE, Reader, Reply};

/// Newest protocol minor whose INIT this was written for.
const MINOR: u32 = 45;
/// Background requests (read-ahead, writeback, RELEASE) in flight at once.
const MAX_BACKGROUND: u16 = 64;
/// The kernel calls the device congested from here.
const CONGESTION: u16 = 48;
/// Read-ahead, KiB: at 128 a fast link was half idle, beyond 1024 nothing was gained.
const READ_AHEAD_KIB: u32 = 1024;

/// INIT flags wanted, if the kernel has them (names as in `linux/fuse.h`).
const WANTED: u64 = (1 << 0)   // ASYNC_READ
    | (1 << 3)                 // ATOMIC_O_TRUNC
    | (1 << 5)                 // BIG_WRITES
    | (1 << 6)                 // DONT_MASK: home applies the umask, or the directory's default ACL
    | (1 << 12)                // AUTO_INVAL_DATA
    | (1 << 15)                // ASYNC_DIO
    | (1 << 18)                // PARALLEL_DIROPS
    | (1 << 22)                // MAX_PAGES
    | (1 << 28)                // HANDLE_KILLPRIV_V2
    | INIT_EXT
    | (1 << 36); // DIRECT_IO_ALLOW_MMAP
const INIT_EXT: u64 = 1 << 30;

/// The reply to INIT. Not asked for, and why: POSIX_LOCKS and FLOCK_LOCKS (locking calls are made at
/// home), WRITEBACK_CACHE (an append at home would be lost to the guest), READDIRPLUS (with time-outs
/// of 0 what it brings is never used), CACHE_SYMLINKS, POSIX_ACL (home checks), PASSTHROUGH.
pub fn reply(header: &InHeader, body: &[u8], out: &mut Reply) -> Answer<()> {
    let mut r = Reader(body);
    let major = r.u32()?;
    let minor = r.u32()?;
    let max_readahead = r.u32()?;
    let mut offered = u64::from(r.u32()?);
    if offered & INIT_EXT != 0 {
        offered |= u64::from(r.u32()?) << 32;
    }
    let granted = offered & WANTED;
    tracing::debug!(major, minor, granted, unique = header.unique, "FUSE INIT");
    out.u32(7);
    out.u32(minor.min(MINOR));
    out.u32(max_readahead);
    out.u32(granted as u32);
    out.u32(u32::from(MAX_BACKGROUND) | u32::from(CONGESTION) << 16);
    out.u32(MAX_WRITE);
    out.u32(1); // time granularity, ns
    out.u32(u32::from(MAX_PAGES)); // and map_alignment 0
    out.u32((granted >> 32) as u32);
    out.bytes(&[0; 28]);
    Ok(())
}

/// Raises the read-ahead of the mount that `device` serves, after INIT is answered. Where the kernel
/// does not tell which mount that is (before Linux 6.16), or `/sys` is not here, reads of large files
/// are slower and nothing else.
pub fn raise_read_ahead(device: BorrowedFd<'_>) -> io::Result<()> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", device.as_raw_fd()))?;
    let number = info.lines().find_map(|line| line.strip_prefix("fuse_connection:"));
    let number: u32 = number
        .and_then(|number| number.trim().parse().ok())
        .ok_or_else(|| io::Error::from(io::ErrorKind::Unsupported))?;
    // The number is the mount's device in the kernel's form (`fuse_ctl_add_conn`).
    let (major, minor) = (number >> 20, number & 0xf_ffff);
    let path = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
    fs::write(path, READ_AHEAD_KIB.to_string())
}
