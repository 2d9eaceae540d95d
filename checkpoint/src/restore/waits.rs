//! Threads that go on waiting in the call that the freeze has interrupted, for as long as was left.
//!
//! Most of these calls are made again by the kernel, from the registers alone. Those of which it keeps
//! what is left in a restart block are made again here, with the rest of their time, and interrupted at
//! once: the block is there again, and the thread goes on as after any stop, with all its registers
//! and memory as they were.

use super::RestoreError;
use crate::image::ThreadImage;
use crate::sys::ptrace::Regs;
use crate::tracee::Tracee;
use crate::tracee::restart::{self, Timeout};

/// The registers with which thread `i` goes on. Nothing but registers and mask may be set after this.
pub fn go_on(tracee: &mut Tracee, i: usize, thread: &ThreadImage) -> Result<Regs, RestoreError> {
    let mut regs = Regs(super::threads::registers(thread)?);
    if !restart::is_in_restart_block(&regs) {
        return Ok(regs);
    }
    let mut again = regs;
    if let (Some(timeout), Some(left)) = (restart::timeout(&regs), thread.wait_left_ns) {
        let at = tracee.scratch();
        tracee.write_mem(at, &restart::timespec(left))?;
        match timeout {
            Timeout::Millis(register) => again.0[register] = restart::millis(left),
            Timeout::Time(register) => again.0[register] = at,
        }
    }
    let args = [again.rdi(), again.rsi(), again.rdx(), again.r10(), again.r8(), again.r9()];
    let result = tracee.interrupted_call(i, regs.orig_rax() as i64, args)?;
    if result != regs.rax() as i64 {
        // It has ended meanwhile: its time was over, or what it waited for is there.
        regs.set_rax(result as u64);
        regs.set_orig_rax(u64::MAX);
    }
    Ok(regs)
}
