//! ptrace(2), the parts the engine needs, x86-64 only.
//!
//! nix lacks `NT_X86_XSTATE`, the signal mask requests, the rseq request and `PTRACE_LISTEN`, so the
//! raw call is used throughout: one style is easier to read than two. Every function acts on a *task*
//! (a TID), and must be called from the OS thread that seized it.

use crate::image::RseqImage;
use nix::errno::Errno;

/// `PTRACE_O_TRACESYSGOOD`: system-call stops carry bit 7.
pub const O_TRACESYSGOOD: u64 = 1;
/// `PTRACE_O_TRACEFORK`: a new child is seized and stopped at once.
pub const O_TRACEFORK: u64 = 2;
/// `PTRACE_O_TRACEVFORK`: the same of one made with `CLONE_VFORK`.
pub const O_TRACEVFORK: u64 = 4;
/// `PTRACE_O_TRACECLONE`: a new thread is seized and stopped at once, as is a new child that tells
/// of its end by another signal than SIGCHLD.
pub const O_TRACECLONE: u64 = 8;
/// `PTRACE_O_SUSPEND_SECCOMP`: filters do not act on the tracee's calls. Needs CAP_SYS_ADMIN, and a
/// tracer without filters of its own.
pub const O_SUSPEND_SECCOMP: u64 = 1 << 21;
/// `PTRACE_O_EXITKILL`: it is killed when its tracer ends.
pub const O_EXITKILL: u64 = 1 << 20;
/// Status of a system-call stop (with `TRACESYSGOOD`).
pub const SYSCALL_STOP: i32 = libc::SIGTRAP | 0x80;

const PTRACE_SEIZE: libc::c_uint = 0x4206;
const PTRACE_INTERRUPT: libc::c_uint = 0x4207;
const PTRACE_LISTEN: libc::c_uint = 0x4208;
const PTRACE_PEEKSIGINFO: libc::c_uint = 0x4209;
const PTRACE_GETSIGMASK: libc::c_uint = 0x420a;
const PTRACE_SETSIGMASK: libc::c_uint = 0x420b;
const PTRACE_GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;
const PTRACE_EVENT_FORK: i32 = 1;
const PTRACE_EVENT_VFORK: i32 = 2;
const PTRACE_EVENT_CLONE: i32 = 3;
const PTRACE_EVENT_STOP: i32 = 128;
const NT_PRSTATUS: usize = 1;
const NT_X86_XSTATE: usize = 0x202;
/// Larger than any XSTATE so far (AMX needs 11 KiB).
const XSTATE_MAX: usize = 16 << 10;

/// General registers, in the order of `struct user_regs_struct` (`<sys/user.h>`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Regs(pub [u64; 27]);

macro_rules! registers {
    ($($(#[$doc:meta])* $name:ident $set:ident $index:expr;)*) => {
        impl Regs {
            $($(#[$doc])* pub fn $name(&self) -> u64 { self.0[$index] }
              $(#[$doc])* pub fn $set(&mut self, value: u64) { self.0[$index] = value; })*
        }
    };
}
registers! {
    /// r13.
    r13 set_r13 2;
    /// r12.
    r12 set_r12 3;
    /// rbx.
    rbx set_rbx 5;
    /// r10: the fourth argument of a system call.
    r10 set_r10 7;
    /// r9: the sixth.
    r9 set_r9 8;
    /// r8: the fifth.
    r8 set_r8 9;
    /// rax: the result.
    rax set_rax 10;
    /// rdx: the third argument.
    rdx set_rdx 12;
    /// rsi: the second.
    rsi set_rsi 13;
    /// rdi: the first.
    rdi set_rdi 14;
    /// The number of the system call we are in, −1 if in none.
    orig_rax set_orig_rax 15;
    /// Instruction pointer.
    rip set_rip 16;
    /// Code segment: 0x33 for 64-bit code.
    cs set_cs 17;
    /// Flags.
    eflags set_eflags 18;
    /// Stack pointer.
    rsp set_rsp 19;
}

/// A change of state that waitpid(2) told of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// System-call entry or exit stop.
    Syscall,
    /// `PTRACE_EVENT_STOP` by `PTRACE_INTERRUPT`, `SIGCONT`, or the start of a new thread.
    Event,
    /// `PTRACE_EVENT_STOP` in a group stop by this signal.
    Group(u8),
    /// `PTRACE_EVENT_CLONE`, `_FORK`, `_VFORK`.
    Clone,
    /// Signal-delivery stop: this signal is about to be delivered.
    Signal(u8),
    /// The task has ended with this wait status.
    Gone(i32),
}

impl Stop {
    fn from_status(status: i32) -> Stop {
        if !libc::WIFSTOPPED(status) {
            return Stop::Gone(status);
        }
        let signal = libc::WSTOPSIG(status);
        match status >> 16 {
            PTRACE_EVENT_STOP if signal == libc::SIGTRAP => Stop::Event,
            PTRACE_EVENT_STOP => Stop::Group(signal as u8),
            PTRACE_EVENT_FORK | PTRACE_EVENT_VFORK | PTRACE_EVENT_CLONE => Stop::Clone,
            _ if signal == SYSCALL_STOP => Stop::Syscall,
            _ => Stop::Signal(signal as u8),
        }
    }
}

fn call(request: libc::c_uint, tid: i32, addr: usize, data: usize) -> Result<i64, Errno> {
    // SAFETY: every caller in this file passes either plain numbers or the address of a live object
    // of the size the request expects; the kernel validates the task and its state.
    let result = unsafe { libc::ptrace(request, tid, addr, data) };
    Errno::result(result)
}

/// Starts tracing `tid` without stopping it.
pub fn seize(tid: i32, options: u64) -> Result<(), Errno> {
    call(PTRACE_SEIZE, tid, 0, options as usize).map(drop)
}

/// Changes the options of a stopped tracee.
pub fn set_options(tid: i32, options: u64) -> Result<(), Errno> {
    call(libc::PTRACE_SETOPTIONS, tid, 0, options as usize).map(drop)
}

/// Asks for an event stop.
pub fn interrupt(tid: i32) -> Result<(), Errno> {
    call(PTRACE_INTERRUPT, tid, 0, 0).map(drop)
}

/// Lets a task in a group stop stay in it, and tell of its end.
pub fn listen(tid: i32) -> Result<(), Errno> {
    call(PTRACE_LISTEN, tid, 0, 0).map(drop)
}

/// Lets it run.
pub fn cont(tid: i32, signal: u8) -> Result<(), Errno> {
    call(libc::PTRACE_CONT, tid, 0, signal.into()).map(drop)
}

/// Lets it run to the next system-call stop.
pub fn cont_to_syscall(tid: i32, signal: u8) -> Result<(), Errno> {
    call(libc::PTRACE_SYSCALL, tid, 0, signal.into()).map(drop)
}

/// Lets it run untraced.
pub fn detach(tid: i32, signal: u8) -> Result<(), Errno> {
    call(libc::PTRACE_DETACH, tid, 0, signal.into()).map(drop)
}

/// The message of the last event: for a clone, the new TID.
pub fn event_message(tid: i32) -> Result<u64, Errno> {
    let mut message: libc::c_ulong = 0;
    call(libc::PTRACE_GETEVENTMSG, tid, 0, &raw mut message as usize)?;
    Ok(message)
}

/// Reads the general registers.
pub fn regs(tid: i32) -> Result<Regs, Errno> {
    let mut regs = Regs([0; 27]);
    let mut iov = libc::iovec { iov_base: regs.0.as_mut_ptr().cast(), iov_len: size_of::<Regs>() };
    call(libc::PTRACE_GETREGSET, tid, NT_PRSTATUS, &raw mut iov as usize)?;
    if iov.iov_len != size_of::<Regs>() {
        // A 32-bit task has a shorter set.
        return Err(Errno::ENOTSUP);
    }
    Ok(regs)
}

/// Writes the general registers.
pub fn set_regs(tid: i32, regs: &Regs) -> Result<(), Errno> {
    let mut copy = *regs;
    let mut iov = libc::iovec { iov_base: copy.0.as_mut_ptr().cast(), iov_len: size_of::<Regs>() };
    call(libc::PTRACE_SETREGSET, tid, NT_PRSTATUS, &raw mut iov as usize).map(drop)
}

/// Reads the whole extended state (x87, SSE, AVX, … PKRU).
pub fn xstate(tid: i32) -> Result<Vec<u8>, Errno> {
    let mut area = [0u8; XSTATE_MAX];
    let mut iov = libc::iovec { iov_base: area.as_mut_ptr().cast(), iov_len: area.len() };
    call(libc::PTRACE_GETREGSET, tid, NT_X86_XSTATE, &raw mut iov as usize)?;
    Ok(area[..iov.iov_len.min(XSTATE_MAX)].to_vec())
}

/// Writes the whole extended state.
pub fn set_xstate(tid: i32, area: &[u8]) -> Result<(), Errno> {
    // The kernel only reads it.
    let mut iov = libc::iovec { iov_base: area.as_ptr().cast_mut().cast(), iov_len: area.len() };
    call(libc::PTRACE_SETREGSET, tid, NT_X86_XSTATE, &raw mut iov as usize).map(drop)
}

/// Reads the blocked signals.
pub fn sigmask(tid: i32) -> Result<u64, Errno> {
    let mut mask = 0u64;
    call(PTRACE_GETSIGMASK, tid, 8, &raw mut mask as usize)?;
    Ok(mask)
}

/// Sets the blocked signals.
pub fn set_sigmask(tid: i32, mask: u64) -> Result<(), Errno> {
    let mut mask = mask;
    call(PTRACE_SETSIGMASK, tid, 8, &raw mut mask as usize).map(drop)
}

/// `siginfo_t` as the kernel keeps it.
pub const SIGINFO_LEN: usize = 128;

/// Up to 16 pending signals from `offset` on, oldest first; of the process (`shared`) or of this task.
pub fn peek_siginfo(tid: i32, offset: u64, shared: bool) -> Result<Vec<[u8; SIGINFO_LEN]>, Errno> {
    #[repr(C)]
    struct Args {
        offset: u64,
        flags: u32,
        count: i32,
    }
    const BATCH: usize = 16;
    let mut args = Args { offset, flags: shared.into(), count: BATCH as i32 };
    let mut infos = [[0u8; SIGINFO_LEN]; BATCH];
    let n = call(PTRACE_PEEKSIGINFO, tid, &raw mut args as usize, infos.as_mut_ptr() as usize)?;
    Ok(infos[..n as usize].to_vec())
}

/// Whether a thread's system calls are handed to the thread itself (Linux 6.4;
/// Documentation/admin-guide/syscall-user-dispatch.rst).
pub fn dispatches_calls(tid: i32) -> bool {
    const PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG: libc::c_uint = 0x4211;
    /// `struct ptrace_sud_config`: mode, selector, offset, len.
    #[repr(C)]
    #[derive(Default)]
    struct Config([u64; 4]);
    const _: () = assert!(size_of::<Config>() == 32);
    let mut got = Config::default();
    let size = size_of::<Config>();
    call(PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, tid, size, &raw mut got as usize).is_ok() && got.0[0] != 0
}

/// The rseq registration; all zero if there is none. Kernels before 5.13 answer `EIO`.
pub fn rseq(tid: i32) -> Result<RseqImage, Errno> {
    #[repr(C)]
    #[derive(Default)]
    struct Configuration {
        addr: u64,
        len: u32,
        signature: u32,
        flags: u32,
        pad: u32,
    }
    const _: () = assert!(size_of::<Configuration>() == 24);
    let mut got = Configuration::default();
    let size = size_of::<Configuration>();
    call(PTRACE_GET_RSEQ_CONFIGURATION, tid, size, &raw mut got as usize)?;
    Ok(RseqImage { addr: got.addr, len: got.len, signature: got.signature, flags: got.flags })
}

/// The task's system-call filter number `index`, the newest being 0: its program, and whether it logs
/// what it forbids. `ENOENT`: there are not so many; `EINVAL`: there are none.
pub fn seccomp_filter(tid: i32, index: usize) -> Result<(Vec<u8>, bool), Errno> {
    const PTRACE_SECCOMP_GET_FILTER: libc::c_uint = 0x420c;
    const PTRACE_SECCOMP_GET_METADATA: libc::c_uint = 0x420d;
    /// `struct sock_filter`.
    const INSTRUCTION: usize = 8;
    const FLAG_LOG: u64 = 2;
    let count = call(PTRACE_SECCOMP_GET_FILTER, tid, index, 0)? as usize;
    let mut program = vec![0u8; count * INSTRUCTION];
    call(PTRACE_SECCOMP_GET_FILTER, tid, index, program.as_mut_ptr() as usize)?;
    let mut metadata = [index as u64, 0];
    call(PTRACE_SECCOMP_GET_METADATA, tid, size_of_val(&metadata), metadata.as_mut_ptr() as usize)?;
    Ok((program, metadata[1] & FLAG_LOG != 0))
}

/// Waits for a change of state of `tid`; with `block` false gives `None` if there is none.
pub fn wait(tid: i32, block: bool) -> Result<Option<Stop>, Errno> {
    let mut status = 0;
    let flags = libc::__WALL | if block { 0 } else { libc::WNOHANG };
    loop {
        // SAFETY: `status` outlives the call.
        let got = unsafe { libc::waitpid(tid, &raw mut status, flags) };
        match Errno::result(got) {
            Ok(0) => return Ok(None),
            Ok(_) => return Ok(Some(Stop::from_status(status))),
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(errno),
        }
    }
}

/// Where in a system call a task at a [`Stop::Syscall`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SyscallSide {
    /// Before the call.
    Entry,
    /// After it.
    Exit,
    /// Not in one.
    None,
}

/// Entry or exit (`PTRACE_GET_SYSCALL_INFO`, ptrace(2)).
pub fn syscall_side(tid: i32) -> Result<SyscallSide, Errno> {
    const PTRACE_GET_SYSCALL_INFO: libc::c_uint = 0x420e;
    let mut info = [0u64; 12];
    call(PTRACE_GET_SYSCALL_INFO, tid, size_of_val(&info), info.as_mut_ptr() as usize)?;
    // The first byte is `op`.
    Ok(match info[0] as u8 {
        1 => SyscallSide::Entry,
        2 => SyscallSide::Exit,
        _ => SyscallSide::None,
    })
}
