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

/// Which call a thread is in whose interrupted call the kernel has restarted once already: it then is
/// in restart_syscall(2) and its own number is lost, though not its arguments. It can be one of four.
///
/// Most programs load the number by `mov eax, NUMBER` right before `syscall`; where that is not so, the
/// arguments tell. `read` reads the thread's memory.
pub fn original_call(regs: &Regs, read: &mut dyn FnMut(u64, &mut [u8]) -> bool) -> Option<i64> {
    const CALLS: [libc::c_long; 4] =
        [libc::SYS_nanosleep, libc::SYS_clock_nanosleep, libc::SYS_poll, libc::SYS_futex];
    let mut code = [0; 5];
    // The instruction pointer is behind `syscall`.
    if read(regs.rip().wrapping_sub(SYSCALL_LEN + 5), &mut code) && code[0] == 0xb8 {
        let number = u32::from_le_bytes([code[1], code[2], code[3], code[4]]).into();
        if CALLS.contains(&number) {
            return Some(number);
        }
    }
    let mut is_time = |addr: u64| {
        let mut bytes = [0; 16];
        let nanos = |bytes: &[u8; 16]| i64::from_le_bytes(bytes[8..].try_into().expect("eight bytes"));
        addr != 0 && read(addr, &mut bytes) && (0..1_000_000_000).contains(&nanos(&bytes))
    };
    // FUTEX_WAIT or FUTEX_WAIT_BITSET, with FUTEX_PRIVATE_FLAG or without, and FUTEX_CLOCK_REALTIME.
    let waits = matches!(regs.rsi() & !0x180, 0 | 9);
    if waits
        && regs.rdi().is_multiple_of(4)
        && regs.rdi() > 0xffff
        && is_time(regs.r10())
        && !is_time(regs.rdi())
    {
        return Some(libc::SYS_futex);
    }
    // A clock's number, and no flags.
    if regs.rdi() < 16 && regs.rsi() == 0 && is_time(regs.rdx()) {
        return Some(libc::SYS_clock_nanosleep);
    }
    if is_time(regs.rdi()) && (regs.rsi() == 0 || regs.rsi() > 0xffff) {
        return Some(libc::SYS_nanosleep);
    }
    (regs.rsi() <= 1 << 20).then_some(libc::SYS_poll)
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
    fn finds_the_call_that_was_restarted_before() {
        let mut regs = stopped_in(libc::SYS_restart_syscall, ERESTART_RESTARTBLOCK);
        let mut by_code = |at: u64, buffer: &mut [u8]| {
            buffer.copy_from_slice(&[0xb8, 0xca, 0, 0, 0][..buffer.len()]);
            at == 0x1000 - 5
        };
        assert_eq!(original_call(&regs, &mut by_code), Some(libc::SYS_futex));
        // Only a time at 0x20000 can be read.
        let mut by_time = |at: u64, buffer: &mut [u8]| {
            buffer.fill(0);
            at == 0x20000
        };
        regs.set_rdi(0x20000);
        assert_eq!(original_call(&regs, &mut by_time), Some(libc::SYS_nanosleep));
        regs.set_rdi(1);
        regs.set_rdx(0x20000);
        assert_eq!(original_call(&regs, &mut by_time), Some(libc::SYS_clock_nanosleep));
        regs.set_rdi(0x30000);
        regs.set_rsi(128);
        regs.set_r10(0x20000);
        assert_eq!(original_call(&regs, &mut by_time), Some(libc::SYS_futex));
        regs.set_rsi(3);
        assert_eq!(original_call(&regs, &mut by_time), Some(libc::SYS_poll));
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
