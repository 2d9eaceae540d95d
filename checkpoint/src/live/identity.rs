//! Which program a process runs.
//!
//! execve(2) replaces the memory: the userfaultfd and an open `pagemap` go on to belong to the old one, which another
//! process may keep alive (vfork(2)). The kernel gives each program 16 random bytes (`AT_RANDOM`, getauxval(3)):
//! they are others after each execve(2).

use super::LiveError;
use crate::proc;
use crate::proc::status::Stat;
use crate::sys::process_vm;
use std::time::Duration;

const AT_RANDOM: u64 = 25;
/// How often a process that seems to have no memory is looked at, and how long apart.
const LOOKS: u32 = 50;
const APART: Duration = Duration::from_micros(100);

/// The same as long as the process has not executed another program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    auxv: Vec<u8>,
    random: [u8; 16],
}

impl Identity {
    /// Of the program that runs now.
    pub fn of(pid: i32) -> Result<Identity, LiveError> {
        let auxv = read(pid, "auxv")?;
        let words: Vec<u64> = auxv
            .chunks_exact(8)
            .map(|word| u64::from_ne_bytes(word.try_into().expect("eight bytes")))
            .collect();
        let at = words.chunks_exact(2).find(|pair| pair[0] == AT_RANDOM).map(|pair| pair[1]);
        let mut random = [0; 16];
        // Where it is gone (the program may unmap it), the rest must do.
        let _ = at.map(|at| process_vm::read(pid, at, &mut random));
        Ok(Identity { auxv, random })
    }
}

/// A file of `/proc` that is empty only where there is no memory: of a process that has ended, and of one in the
/// middle of execve(2) whose old memory was still there when the file was opened.
pub fn read(pid: i32, name: &'static str) -> Result<Vec<u8>, LiveError> {
    for _ in 0..LOOKS {
        match proc::read(proc::face(pid), name).map_err(LiveError::proc(name, pid)) {
            Ok(bytes) if !bytes.is_empty() => return Ok(bytes),
            Ok(_) | Err(LiveError::Ended { .. }) if lives(pid) => {}
            Ok(_) => break,
            Err(error) => return Err(error),
        }
        std::thread::sleep(APART);
    }
    Err(LiveError::Ended { pid })
}

/// Whether it has not ended.
pub fn lives(pid: i32) -> bool {
    let stat = Stat::read(proc::face(pid));
    stat.is_ok_and(|stat| !matches!(stat.field(3), Some("Z" | "X") | None))
}
