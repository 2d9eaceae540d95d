//! Kernel interfaces that need `unsafe`, one file each. Nothing outside this module uses `unsafe`.

pub mod fd;
pub mod ptrace;
pub mod rlimit;
