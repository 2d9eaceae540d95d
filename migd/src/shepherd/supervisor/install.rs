//! Putting the filter into a guest that is being built.

use super::filter;
use anyhow::{Context, Result};
use checkpoint::sys::fd::{pidfd_getfd, pidfd_open};
use checkpoint::sys::seccomp;
use checkpoint::tracee::Tracee;
use nix::errno::Errno;
use std::os::fd::{AsFd, OwnedFd};

const PAGE: usize = 4096;
/// Length of `struct sock_fprog`.
const FPROG: usize = 16;

/// Installs the filter in every thread of a frozen guest whose PID inside is `own`; gives the
/// listener. To be called while the guest still has the right to (CAP_SYS_ADMIN), and with the stub
/// in it: calls from the stub's code page are not filtered, so that the rest can still be injected.
pub fn install(tracee: &mut Tracee, own: i32) -> Result<OwnedFd> {
    let (stub, _) = tracee.stub_range().context("the guest has no stub")?;
    let program = filter::program(own, stub);
    let instructions = filter::to_bytes(&program);
    let len = (FPROG + instructions.len()).next_multiple_of(PAGE) as u64;
    let prot = (libc::PROT_READ | libc::PROT_WRITE) as u64;
    let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
    let at = tracee.must(0, "mapping memory", libc::SYS_mmap, [0, len, prot, flags, u64::MAX, 0])? as u64;
    let installed = load(tracee, at, &program, &instructions);
    let unmapped = tracee.must(0, "unmapping memory", libc::SYS_munmap, [at, len, 0, 0, 0, 0]);
    let listener = installed?;
    unmapped?;
    Ok(listener)
}

fn load(
    tracee: &mut Tracee,
    at: u64,
    program: &[filter::Instruction],
    instructions: &[u8],
) -> Result<OwnedFd> {
    // struct sock_fprog: length, padding, pointer.
    let mut bytes = (program.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(&(at + FPROG as u64).to_le_bytes());
    bytes.extend_from_slice(instructions);
    tracee.write_mem(at, &bytes)?;
    let flags = seccomp::FLAG_NEW_LISTENER
        | seccomp::FLAG_TSYNC
        | seccomp::FLAG_TSYNC_ESRCH
        | seccomp::FLAG_SPEC_ALLOW;
    let args = |flags| [seccomp::SET_MODE_FILTER, flags, at, 0, 0, 0];
    let mut inside = tracee.syscall(0, libc::SYS_seccomp, args(flags | seccomp::FLAG_WAIT_KILLABLE))?;
    if inside == -i64::from(libc::EINVAL) {
        // Before 5.19: a signal whose action has no SA_RESTART then ends a held call with EINTR.
        inside = tracee.must(0, "installing the system-call filter", libc::SYS_seccomp, args(flags))?;
    }
    if inside < 0 {
        let errno = Errno::from_raw(i32::try_from(-inside).unwrap_or(libc::EIO));
        return Err(errno).context("installing the system-call filter");
    }
    let taken = pidfd_open(tracee.pid()).and_then(|pidfd| pidfd_getfd(pidfd.as_fd(), inside as i32));
    tracee.must(0, "closing the listener", libc::SYS_close, [inside as u64, 0, 0, 0, 0, 0])?;
    taken.context("taking the listener out of the guest")
}
