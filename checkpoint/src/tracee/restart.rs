//! System calls that a freeze has interrupted, and how long they still have to wait.
//!
//! The kernel does it, in the task itself ([`Tracee::thaw`](super::Tracee::thaw)) and in another one
//! ([`Tracee::release`](super::Tracee::release)): a thread that goes on from an event stop with the
//! kernel's code as its result repeats its call, or, if a handler runs first, does what signal(7) says.
//! What the other task lacks is the restart block; it gets one by the call itself, made again with
//! what is left of its time-out ([`crate::restore`]). The codes are in the kernel's
//! `include/linux/errno.h`; who returns which is in `kernel/signal.c`, and for the calls that give a
//! bare `EINTR`, in signal(7).

use crate::sys::ptrace::Regs;

const ERESTARTSYS: i64 = -512;
const ERESTARTNOINTR: i64 = -513;
const ERESTARTNOHAND: i64 = -514;
const ERESTART_RESTARTBLOCK: i64 = -516;
const EINTR: i64 = -(libc::EINTR as i64);
/// Length of the `syscall` instruction.
const SYSCALL_LEN: u64 = 2;

/// io_pgetevents(2); libc knows no number of it.
const SYS_IO_PGETEVENTS: i64 = 333;

/// Waits that answer `EINTR` to an interrupt that no handler saw (signal(7) lists them as never
/// restarted). At a ptrace event stop no handler has run yet, so the program must not see it.
const BARE_EINTR_WAITS: [libc::c_long; 8] = [
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_semtimedop,
    libc::SYS_semop,
    libc::SYS_io_getevents,
    SYS_IO_PGETEVENTS,
];

/// Transfers that do: on a socket with a time-out (socket(7), SO_RCVTIMEO), and on a FUSE file whose
/// server was told of the interrupt (FUSE cannot answer `ERESTARTSYS`, fs/fuse/dev.c).
const BARE_EINTR_TRANSFERS: [libc::c_long; 20] = [
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
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_accept,
    libc::SYS_accept4,
];

/// Whether `EINTR` of this call may be hidden by repeating it.
pub fn is_repeatable(nr: i64) -> bool {
    BARE_EINTR_WAITS.contains(&nr) || BARE_EINTR_TRANSFERS.contains(&nr)
}

/// Whether the thread is in a call that the kernel will repeat, or end with `EINTR`, when it goes on.
pub fn is_interrupted(regs: &Regs) -> bool {
    let codes = [ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK];
    regs.orig_rax() as i64 >= 0 && codes.contains(&(regs.rax() as i64))
}

/// Whether what is left of the call's time-out is in the kernel's restart block, and nowhere else.
pub fn is_in_restart_block(regs: &Regs) -> bool {
    regs.orig_rax() as i64 >= 0 && regs.rax() as i64 == ERESTART_RESTARTBLOCK
}

/// Has the kernel make a call again as it is, without what it keeps of it.
pub fn restart_by_number(regs: &mut Regs) {
    regs.set_rax(ERESTARTNOHAND as u64);
}

/// Whether the kernel keeps nothing of this call when a stop interrupts it.
pub fn is_forgotten(nr: i64) -> bool {
    BARE_EINTR_WAITS.contains(&nr)
}

/// Takes an `EINTR` that our stop has caused for what it would be if the call could say so: repeat,
/// unless a handler runs first. Whether one does is for the kernel to see when the thread goes on.
pub fn hide_interrupt(regs: &mut Regs) -> bool {
    let nr = regs.orig_rax() as i64;
    let hidden = nr >= 0 && regs.rax() as i64 == EINTR && is_repeatable(nr);
    if hidden {
        // Waits are never repeated after a handler, transfers as the signal's action says (signal(7)).
        let code = if BARE_EINTR_WAITS.contains(&nr) { ERESTARTNOHAND } else { ERESTARTSYS };
        regs.set_rax(code as u64);
    }
    hidden
}

/// Where a call that waits finds how long it may: relative, so that a repetition would wait for the
/// whole time again. Register numbers as in [`Regs`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Timeout {
    /// Milliseconds, in this register; negative is for ever.
    Millis(usize),
    /// A `struct timespec` that this register points to.
    Time(usize),
}

/// The relative time-out of the call that a thread is in.
pub fn timeout(regs: &Regs) -> Option<Timeout> {
    const RDX: usize = 12;
    const R8: usize = 9;
    const R10: usize = 7;
    const RDI: usize = 14;
    let found = match regs.orig_rax() as i64 {
        libc::SYS_poll => Timeout::Millis(RDX),
        libc::SYS_epoll_wait | libc::SYS_epoll_pwait => Timeout::Millis(R10),
        libc::SYS_nanosleep => Timeout::Time(RDI),
        // Not TIMER_ABSTIME. No timer wakes who sleeps on a clock of CPU time: what is left is known only if
        // the kernel has written it.
        libc::SYS_clock_nanosleep
            if regs.rsi() & 1 == 0 && (regs.r10() != 0 || matches!(regs.rdi(), 0 | 1 | 7 | 11)) =>
        {
            Timeout::Time(RDX)
        }
        // Of the futex operations only FUTEX_WAIT (0) has a relative one.
        libc::SYS_futex if regs.rsi() & 0x7f == 0 => Timeout::Time(R10),
        libc::SYS_epoll_pwait2 | libc::SYS_semtimedop => Timeout::Time(R10),
        libc::SYS_rt_sigtimedwait => Timeout::Time(RDX),
        libc::SYS_io_getevents | SYS_IO_PGETEVENTS => Timeout::Time(R8),
        _ => return None,
    };
    Some(found)
}

/// How long, ns; `None`: for ever, or it cannot be read. `read` reads the thread's memory.
pub fn timeout_ns(
    regs: &Regs,
    timeout: Timeout,
    read: &mut dyn FnMut(u64, &mut [u8]) -> bool,
) -> Option<u64> {
    match timeout {
        Timeout::Millis(register) => u64::try_from(regs.0[register] as i32).ok().map(|ms| ms * 1_000_000),
        Timeout::Time(register) => time_at(regs.0[register], read),
    }
}

/// As the argument of a call, rounded up: it must not come back early.
pub fn millis(ns: u64) -> u64 {
    ns.div_ceil(1_000_000).min(i32::MAX as u64)
}

/// A `struct timespec` as the kernel reads it.
pub fn timespec(ns: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&(ns / 1_000_000_000).to_le_bytes());
    bytes[8..].copy_from_slice(&(ns % 1_000_000_000).to_le_bytes());
    bytes
}

/// Where the kernel has written what is left of a sleep, if its caller wanted to know.
pub fn remainder_at(regs: &Regs) -> Option<u64> {
    let at = match regs.orig_rax() as i64 {
        libc::SYS_nanosleep => regs.rsi(),
        libc::SYS_clock_nanosleep => regs.r10(),
        _ => 0,
    };
    (at != 0).then_some(at)
}

/// A `struct timespec` in nanoseconds.
pub fn time_at(addr: u64, read: &mut dyn FnMut(u64, &mut [u8]) -> bool) -> Option<u64> {
    let mut bytes = [0; 16];
    if addr == 0 || !read(addr, &mut bytes) {
        return None;
    }
    let word = |at: usize| i64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    let (seconds, nanos) = (u64::try_from(word(0)).ok()?, u64::try_from(word(8)).ok()?);
    Some(seconds.saturating_mul(1_000_000_000).saturating_add(nanos))
}

/// The call of a thread that waits in this place of the kernel (`/proc/TID/wchan`), of those that
/// leave a restart block.
pub fn call_by_place(place: &str, regs: &Regs) -> Option<i64> {
    match place {
        _ if place.contains("futex") => Some(libc::SYS_futex),
        _ if place.contains("poll") => Some(libc::SYS_poll),
        _ if place.contains("nanosleep") || place.contains("alarm") => {
            // One takes a clock's number first (negative for those of CPU time), the other an address.
            let first = regs.rdi();
            let is_clock = first < 0x1000 || (first as i64) < 0 || (1 << 31..1 << 32).contains(&first);
            Some(if is_clock { libc::SYS_clock_nanosleep } else { libc::SYS_nanosleep })
        }
        _ => None,
    }
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
    fn hides_an_interrupt_and_nothing_else() {
        for (nr, code) in [(libc::SYS_epoll_wait, ERESTARTNOHAND), (libc::SYS_read, ERESTARTSYS)] {
            let mut regs = stopped_in(nr, EINTR);
            assert!(!is_interrupted(&regs) && hide_interrupt(&mut regs) && is_interrupted(&regs));
            assert_eq!((regs.rax() as i64, regs.rip(), regs.orig_rax()), (code, 0x1002, nr as u64));
        }
        for mut regs in [stopped_in(libc::SYS_read, 17), stopped_in(libc::SYS_connect, EINTR)] {
            assert!(!hide_interrupt(&mut regs) && !is_interrupted(&regs));
        }
        let mut regs = stopped_in(-1, EINTR);
        assert!(!hide_interrupt(&mut regs));
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
    fn finds_the_call_by_where_it_sleeps() {
        let mut regs = stopped_in(libc::SYS_restart_syscall, ERESTART_RESTARTBLOCK);
        assert_eq!(call_by_place("futex_do_wait", &regs), Some(libc::SYS_futex));
        assert_eq!(call_by_place("poll_schedule_timeout.constprop.0", &regs), Some(libc::SYS_poll));
        assert_eq!(call_by_place("0", &regs), None);
        for (first, call) in [
            (1, libc::SYS_clock_nanosleep),
            (-6i64 as u64, libc::SYS_clock_nanosleep),
            (-6i32 as u32 as u64, libc::SYS_clock_nanosleep),
            (0x7f14_d912_3910, libc::SYS_nanosleep),
        ] {
            regs.set_rdi(first);
            assert_eq!(call_by_place("do_nanosleep", &regs), Some(call), "{first:#x}");
        }
    }

    #[test]
    fn knows_what_is_relative() {
        let mut memory = |at: u64, buffer: &mut [u8]| {
            buffer.copy_from_slice(&[[2u8, 0, 0, 0, 0, 0, 0, 0], [7, 0, 0, 0, 0, 0, 0, 0]].concat());
            at == 0x2000
        };
        let mut regs = stopped_in(libc::SYS_futex, ERESTART_RESTARTBLOCK);
        regs.set_r10(0x2000);
        let found = timeout(&regs).expect("relative");
        assert_eq!(timeout_ns(&regs, found, &mut memory), Some(2_000_000_007));
        // FUTEX_WAIT_BITSET's is absolute.
        regs.set_rsi(9 | 128);
        assert_eq!(timeout(&regs), None);
        let mut regs = stopped_in(libc::SYS_poll, ERESTART_RESTARTBLOCK);
        for (ms, wanted) in [(250u64, Some(250_000_000)), (0xffff_ffff, None), (u64::MAX, None)] {
            regs.set_rdx(ms);
            let found = timeout(&regs).expect("relative");
            assert_eq!(timeout_ns(&regs, found, &mut memory), wanted);
        }
        let mut regs = stopped_in(libc::SYS_clock_nanosleep, ERESTART_RESTARTBLOCK);
        regs.set_r10(0x30);
        assert_eq!(remainder_at(&regs), Some(0x30));
        regs.set_rsi(1);
        assert_eq!(timeout(&regs), None);
    }
}
