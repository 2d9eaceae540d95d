//! Kernel interfaces that need `unsafe`, one file each. Nothing outside this module uses `unsafe`.

pub mod fd;
pub mod kcmp;
pub mod pagemap_scan;
pub mod process_vm;
pub mod ptrace;
pub mod rlimit;
pub mod sched;
pub mod signalfd;
pub mod timerfd;
