//! ioctl(2) requests of a guest: what a file of home's has to be asked is asked at home.

use super::{Outcome, SupervisorHooks, errno_of, memory};
use crate::homefs;
use crate::shepherd::terminal::{DESPITE_BACKGROUND, IN_BACKGROUND};
use checkpoint::sys::fd::pidfd_getfd;
use checkpoint::sys::seccomp::{Answer, Call};
use checkpoint::sys::terminal_ioctl::{Argument, argument, needs_foreground};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Type of terminal requests (bits 8 to 15).
const TERMINAL: u32 = 0x5400;

/// What becomes of the request. `waits` tells whether the call still waits: memory that was read
/// before is not to be trusted otherwise.
pub fn request(
    call: &Call,
    guest: BorrowedFd<'_>,
    hooks: &dyn SupervisorHooks,
    waits: impl Fn() -> bool,
) -> Outcome {
    let request = call.args[1] as u32;
    let file = match pidfd_getfd(guest, call.args[0] as i32) {
        Ok(file) => file,
        // Our own limit.
        Err(Errno::EMFILE | Errno::ENFILE) => return Outcome::Again,
        Err(_) => return Outcome::Answer(Answer::Continue),
    };
    let Ok(handle) = homefs::handle_of(file.as_fd()) else {
        // Not a file of home's: made here, the kernel knows the answer.
        return Outcome::Answer(Answer::Continue);
    };
    match (request & 0xff00 == TERMINAL, is_stream(&file)) {
        // On a plain file the kernel answers what there is to answer (FIONREAD), else ENOTTY.
        (true, false) => Outcome::Answer(Answer::Continue),
        (true, true) => match argument(request) {
            Some(argument) => ask(call, handle, argument, hooks, waits),
            None => Outcome::Retreat(format!("the terminal request {request:#x}")),
        },
        (false, _) => Outcome::Retreat(format!("the file request {request:#x}")),
    }
}

/// Pipes and terminals of home's cannot be sought in.
fn is_stream(file: &OwnedFd) -> bool {
    lseek(file, 0, Whence::SeekCur) == Err(Errno::ESPIPE)
}

fn ask(
    call: &Call,
    handle: u64,
    argument: Argument,
    hooks: &dyn SupervisorHooks,
    waits: impl Fn() -> bool,
) -> Outcome {
    let mut request = u64::from(call.args[1] as u32);
    let address = call.args[2];
    let mut bytes = Vec::new();
    if let Argument::In(len) = argument {
        bytes = vec![0; len];
        let read = memory::read(call.tid, address, &mut bytes);
        if !waits() {
            return Outcome::Nothing;
        }
        if read.is_err() {
            return Outcome::Answer(Answer::Error(Errno::EFAULT));
        }
    }
    if needs_foreground(request as u32) && unmoved_by_ttou(call.tid) {
        request |= DESPITE_BACKGROUND;
    }
    let Ok(reply) = hooks.terminal(handle, request, call.args[2], &bytes) else { return Outcome::Again };
    if reply.result == IN_BACKGROUND {
        return Outcome::Again;
    }
    if reply.result < 0 {
        return Outcome::Answer(Answer::Error(errno_of(reply.result)));
    }
    if let Argument::Out(len) = argument {
        if !waits() {
            return Outcome::Nothing;
        }
        // Home is trusted as far as this: no more is written than the program expects.
        if reply.bytes.len() != len {
            return Outcome::Answer(Answer::Error(Errno::EIO));
        }
        if memory::write(call.tid, address, &reply.bytes).is_err() {
            return Outcome::Answer(Answer::Error(Errno::EFAULT));
        }
    }
    Outcome::Answer(Answer::Value(reply.result))
}

/// Whether the thread has SIGTTOU blocked or ignored (`tty_check_change`).
fn unmoved_by_ttou(tid: i32) -> bool {
    let Ok(status) = fs::read_to_string(format!("/proc/{tid}/status")) else { return false };
    let mask = |key: &str| {
        let value = status.lines().find_map(|line| line.strip_prefix(key))?;
        u64::from_str_radix(value.trim(), 16).ok()
    };
    let set = mask("SigBlk:").unwrap_or(0) | mask("SigIgn:").unwrap_or(0);
    set >> (libc::SIGTTOU - 1) & 1 == 1
}
