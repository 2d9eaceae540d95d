//! Kernel interfaces that need `unsafe`, one file each. Nothing outside this module uses `unsafe`.

pub mod close_range;
pub mod fd;
pub mod fork;
pub mod loopback;
pub mod ptrace;
pub mod rlimit;
pub mod seccomp;
pub mod terminal_ioctl;
pub mod wait;
