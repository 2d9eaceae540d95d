//! Kernel interfaces that need `unsafe`, one file each. Nothing outside this module uses `unsafe`.

pub mod dirents;
pub mod fd;
pub mod fscred;
pub mod fuse_device;
pub mod ptrace;
pub mod rlimit;
pub mod rw_flags;
pub mod statx;
pub mod thread_kick;
pub mod xattr;
