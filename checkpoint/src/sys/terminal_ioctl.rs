//! Terminal requests (ioctl_tty(2)) made for another process, with their argument as bytes.
//!
//! Only requests whose argument is known are made, so that the kernel cannot touch memory that was
//! not meant for it.

use nix::errno::Errno;
use std::os::fd::{AsRawFd, BorrowedFd};

/// What a request's argument is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Argument {
    /// A number, or nothing.
    Value,
    /// The address of so many bytes that are read.
    In(usize),
    /// The address of so many bytes that are written.
    Out(usize),
}

/// `struct termios`, `termios2`, `termio`, `winsize` of the kernel (asm-generic/termbits.h, termios.h).
const TERMIOS: usize = 36;
const TERMIOS2: usize = 44;
const TERMIO: usize = 18;
const WINSIZE: usize = 8;
const INT: usize = 4;
/// Longer than any argument.
const BUFFER: usize = 256;

/// What the argument of a request is; `None`: it is not one that can be made for another process
/// (it changes who controls the terminal, or takes pointers), or is unknown.
pub fn argument(request: u32) -> Option<Argument> {
    use Argument::{In, Out, Value};
    Some(match request {
        0x5401 => Out(TERMIOS),                                                   // TCGETS
        0x5402..=0x5404 => In(TERMIOS),                                           // TCSETS, W, F
        0x5405 => Out(TERMIO),                                                    // TCGETA
        0x5406..=0x5408 => In(TERMIO),                                            // TCSETA, W, F
        0x5409..=0x540d => Value, // TCSBRK, TCXONC, TCFLSH, TIOCEXCL, TIOCNXCL
        0x5413 => Out(WINSIZE),   // TIOCGWINSZ
        0x5414 => In(WINSIZE),    // TIOCSWINSZ
        0x540f | 0x5411 | 0x5415 | 0x5419 | 0x541b | 0x5424 | 0x5429 => Out(INT), // TIOCGPGRP, OUTQ, MGET, GSOFTCAR, FIONREAD, GETD, GSID
        0x5416..=0x5418 | 0x541a => In(INT), // TIOCMBIS, MBIC, MSET, SSOFTCAR
        0x5425 | 0x5427 | 0x5428 => Value,   // TCSBRKP, TIOCSBRK, TIOCCBRK
        0x802c_542a => Out(TERMIOS2),        // TCGETS2
        0x402c_542b..=0x402c_542d => In(TERMIOS2), // TCSETS2, W, F
        0x8004_5430 | 0x8004_5432 | 0x8004_5438..=0x8004_5440 => Out(INT), // TIOCGPTN, GDEV, GPKT, GPTLCK, GEXCL
        _ => return None,
    })
}

/// Whether a request changes the terminal, so that a process in the background may not make it
/// (`tty_check_change`, drivers/tty/tty_jobctrl.c).
pub fn needs_foreground(request: u32) -> bool {
    matches!(request, 0x5402..=0x5404 | 0x5406..=0x540b | 0x5423 | 0x5425 | 0x5427 | 0x5428 | 0x402c_542b..=0x402c_542d)
}

/// Makes a request: `value` or `bytes` according to [`argument`]. Gives the result and the bytes
/// written. `ENOTTY`: not a request of the list.
pub fn call(file: BorrowedFd<'_>, request: u32, value: u64, bytes: &[u8]) -> Result<(i64, Vec<u8>), Errno> {
    let argument = argument(request).ok_or(Errno::ENOTTY)?;
    let mut buffer = [0u8; BUFFER];
    let word = match argument {
        Argument::Value => value,
        Argument::In(len) => {
            buffer[..len].copy_from_slice(bytes.get(..len).ok_or(Errno::EFAULT)?);
            buffer.as_mut_ptr() as u64
        }
        Argument::Out(_) => buffer.as_mut_ptr() as u64,
    };
    // SAFETY: `word` is a number, or the address of a live buffer that is longer than any argument
    // of the requests listed.
    let got = Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), request.into(), word) })?;
    let written = match argument {
        Argument::Out(len) => buffer[..len].to_vec(),
        Argument::Value | Argument::In(_) => Vec::new(),
    };
    Ok((got.into(), written))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_terminal_tells_its_size() {
        let pty = nix::pty::openpty(None, None).expect("a pty");
        let mut size = [0u8; WINSIZE];
        size[0] = 33;
        call(pty.slave.as_fd(), 0x5414, 0, &size).expect("sets");
        let (result, got) = call(pty.slave.as_fd(), 0x5413, 0, &[]).expect("gets");
        assert_eq!((result, &got[..]), (0, &size[..]));
        assert_eq!(call(pty.slave.as_fd(), 0x5414, 0, &size[..4]), Err(Errno::EFAULT));
        // TIOCSPGRP is not for others to make.
        assert_eq!(call(pty.slave.as_fd(), 0x5410, 0, &size), Err(Errno::ENOTTY));
        let null = std::fs::File::open("/dev/null").expect("opens");
        assert_eq!(call(null.as_fd(), 0x5401, 0, &[]), Err(Errno::ENOTTY));
    }

    #[test]
    fn no_argument_is_longer_than_the_buffer() {
        for request in (0x5400..=0x54ff).chain(0x8004_5400..=0x8004_54ff).chain([0x802c_542a, 0x402c_542b]) {
            match argument(request) {
                Some(Argument::In(len) | Argument::Out(len)) => assert!(len <= BUFFER),
                Some(Argument::Value) | None => {}
            }
        }
    }
}
