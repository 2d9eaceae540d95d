//! Restart of the system call that a freeze interrupted, when the registers go on in another task.
//!
//! Where the task itself goes on, the kernel does this ([`Tracee::thaw`](super::Tracee::thaw)). In
//! another task the kernel's restart block is missing, so the registers are set back to the
//! `syscall` instruction. The codes are in the kernel's `include/linux/errno.h`; who returns which
//! is in `kernel/signal.c`, and for the calls that give a bare `EINTR`, in signal(7).

use crate::sys::ptrace::Regs;

const ERESTARTSYS: i64 = -512;
const ERESTARTNOINTR: i64 = -513;
const ERESTARTNOHAND: i64 = -514;
const ERESTART_RESTARTBLOCK: i64 = -516;
const EINTR: i64 = -(libc::EINTR as i64);
/// Length of the `syscall` instruction.
const SYSCALL_LEN: u64 = 2;

/// Calls that answer `EINTR` to an interrupt that no handler saw: those that signal(7) lists as never
/// restarted, and reads and writes on a FUSE file whose server was told of the interrupt (FUSE cannot
/// answer `ERESTARTSYS`, fs/fuse/dev.c). At a ptrace event stop no handler has run yet, so the
/// program must not see it.
const BARE_EINTR: [libc::c_long; 19] = [
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_semtimedop,
    libc::SYS_semop,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_splice,
    libc::SYS_sendfile,
    libc::SYS_copy_file_range,
];

/// Whether `EINTR` of this call may be hidden by repeating it.
pub fn is_repeatable(nr: i64) -> bool {
    BARE_EINTR.contains(&nr)
}

/// Makes `regs`, taken at an event stop, good for a task that knows nothing of the interrupted call.
///
/// A relative sleep goes on with the remainder that the kernel has written for the caller; where
/// the caller gave no place for it, and for relative time-outs of `poll` and `futex`, the call starts
/// anew with its full time.
pub fn arrange_restart(regs: &mut Regs) {
    let nr = regs.orig_rax() as i64;
    if nr < 0 {
        return;
    }
    match regs.rax() as i64 {
        ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND => {}
        ERESTART_RESTARTBLOCK => take_remainder(regs, nr),
        EINTR if is_repeatable(nr) => {}
        _ => {
            // It had its result already: nothing to restart.
            regs.set_orig_rax(u64::MAX);
            return;
        }
    }
    regs.set_rax(nr as u64);
    regs.set_rip(regs.rip() - SYSCALL_LEN);
    regs.set_orig_rax(u64::MAX);
}

fn take_remainder(regs: &mut Regs, nr: i64) {
    if nr == libc::SYS_nanosleep && regs.rsi() != 0 {
        regs.set_rdi(regs.rsi());
    }
    if nr == libc::SYS_clock_nanosleep && regs.r10() != 0 {
        regs.set_rdx(regs.r10());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stopped_in(nr: i64, result: i64) -> Regs {
        let mut regs = Regs([0; 27]);
        regs.set_rip(0x1002);
        regs.set_orig_rax(nr as u64);
        regs.set_rax(result as u64);
        regs
    }

    #[test]
    fn rewinds_an_interrupted_read() {
        for code in [ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, EINTR] {
            let mut regs = stopped_in(libc::SYS_read, code);
            arrange_restart(&mut regs);
            assert_eq!((regs.rip(), regs.rax(), regs.orig_rax()), (0x1000, 0, u64::MAX));
        }
    }

    #[test]
    fn keeps_a_result() {
        let mut regs = stopped_in(libc::SYS_read, 17);
        arrange_restart(&mut regs);
        assert_eq!((regs.rip(), regs.rax()), (0x1002, 17));
    }

    #[test]
    fn sleeps_on_with_the_remainder() {
        let mut regs = stopped_in(libc::SYS_nanosleep, ERESTART_RESTARTBLOCK);
        regs.set_rdi(0x10);
        regs.set_rsi(0x20);
        arrange_restart(&mut regs);
        assert_eq!((regs.rip(), regs.rdi()), (0x1000, 0x20));
    }
}
