//! Ctrl-C while somebody else's process is frozen: it must be let go before we end.
//!
//! The signals are held back and asked for between two steps. SIGKILL cannot be: what is left then is
//! repaired by the next command on that process ([`crate::tracee::recover`]).

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// Holds back what would end this program.
pub struct Interrupt(SignalFd);

impl Interrupt {
    /// Holds the signals back until the end of the program.
    pub fn hold() -> nix::Result<Interrupt> {
        let mut set = SigSet::empty();
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT] {
            set.add(signal);
        }
        set.thread_block()?;
        Ok(Interrupt(SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?))
    }

    /// Whether one has come.
    pub fn came(&self) -> bool {
        matches!(self.0.read_signal(), Ok(Some(_)))
    }
}
