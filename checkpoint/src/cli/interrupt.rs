//! Ctrl-C while somebody else's process is frozen: it must be let go before we end.
//!
//! The signals are held back and asked for between two steps. SIGKILL cannot be: what is left then is
//! repaired by the next command on that process ([`crate::tracee::recover`]).

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::cell::Cell;
use std::os::fd::{AsFd, BorrowedFd};

/// Holds back what would end this program.
pub struct Interrupt {
    signals: SignalFd,
    came: Cell<bool>,
}

impl Interrupt {
    /// Holds the signals back until the end of the program.
    pub fn hold() -> nix::Result<Interrupt> {
        let mut set = SigSet::empty();
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT] {
            set.add(signal);
        }
        set.thread_block()?;
        let signals = SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        Ok(Interrupt { signals, came: Cell::new(false) })
    }

    /// Whether one has come.
    pub fn came(&self) -> bool {
        if matches!(self.signals.read_signal(), Ok(Some(_))) {
            self.came.set(true);
        }
        self.came.get()
    }

    /// Waits until `out` takes something or one has come; tells which.
    pub fn wait(&self, out: BorrowedFd<'_>) -> nix::Result<bool> {
        let mut asked =
            [PollFd::new(out, PollFlags::POLLOUT), PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
        match poll(&mut asked, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(self.came()),
            Err(errno) => Err(errno),
        }
    }
}

/// Signals held back for somebody else: they are passed on to the process that is waited for.
pub struct Held(SignalFd);

impl Held {
    /// Holds back what is passed on, and the ends of children.
    pub fn hold() -> nix::Result<Held> {
        let mut set = SigSet::empty();
        for signal in [
            Signal::SIGHUP,
            Signal::SIGINT,
            Signal::SIGQUIT,
            Signal::SIGTERM,
            Signal::SIGUSR1,
            Signal::SIGUSR2,
            Signal::SIGALRM,
            Signal::SIGWINCH,
            Signal::SIGCHLD,
        ] {
            set.add(signal);
        }
        set.thread_block()?;
        Ok(Held(SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC)?))
    }

    /// Waits for one: its number, and whether the kernel sent it (the keys of a terminal). `None`: a
    /// child has changed.
    pub fn next(&self) -> nix::Result<Option<(i32, bool)>> {
        match self.0.read_signal() {
            Ok(Some(info)) if info.ssi_signo == libc::SIGCHLD as u32 => Ok(None),
            // Above 0 is from the kernel (sigaction(2), si_code).
            Ok(Some(info)) => Ok(Some((info.ssi_signo as i32, info.ssi_code > 0))),
            Ok(None) | Err(nix::errno::Errno::EINTR) => Ok(None),
            Err(errno) => Err(errno),
        }
    }
}
