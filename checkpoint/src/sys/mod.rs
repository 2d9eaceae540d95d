//! Kernel interfaces that need `unsafe`, one file each. Nothing outside this module uses `unsafe`.

pub mod ptrace;
