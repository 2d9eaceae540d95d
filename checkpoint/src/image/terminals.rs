//! Pseudo-terminals whose master is in the image.

use serde::{Deserialize, Serialize};

/// Bound on the pseudo-terminals of one image.
pub const MAX_TERMINALS: usize = 4096;

/// One pair.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalImage {
    /// N of `/dev/pts/N`.
    pub index: u32,
    /// `struct termios2`, as it is.
    pub termios: Vec<u8>,
    /// `struct winsize`, as it is.
    pub window: Vec<u8>,
    /// Packet mode.
    pub packet: bool,
    /// The slave may not be opened (`TIOCSPTLCK`).
    pub locked: bool,
    /// `TIOCEXCL` of the slave.
    pub exclusive: bool,
    /// The slave was open, and is no more: the master reads `EIO`.
    pub hung_up: bool,
    /// The session that it controls, and its foreground process group; 0: none.
    pub session: (i32, i32),
    /// `st_mode`, `st_uid`, `st_gid` of the slave.
    pub mode: (u32, u32, u32),
    /// What was written to the master and not read from the slave, after the line discipline.
    pub input: Vec<u8>,
    /// What was written to the slave and not read from the master, after the line discipline.
    pub output: Vec<u8>,
}
