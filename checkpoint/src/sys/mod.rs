//! Kernel interfaces that need `unsafe`, one file each. Nothing outside this module uses `unsafe`.

pub mod close_range;
pub mod dirents;
pub mod fd;
pub mod file_handle;
pub mod fork;
pub mod fscred;
pub mod fuse_device;
pub mod kcmp;
pub mod loopback;
pub mod pagemap_scan;
pub mod pipe;
pub mod process_vm;
pub mod ptrace;
pub mod rlimit;
pub mod rw_flags;
pub mod sched;
pub mod seccomp;
pub mod signalfd;
pub mod sigpipe;
pub mod statx;
pub mod stdio;
pub mod terminal_ioctl;
pub mod thread_kick;
pub mod timerfd;
pub mod wait;
pub mod xattr;
