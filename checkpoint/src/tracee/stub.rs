//! The stub: a few pages mapped into a frozen process, for injected system calls and for parking.
//!
//! ```text
//! page 0   code   +0   syscall            an injected call, which falls through into
//!                 +2   hold loop          pause() for ever (all signals are blocked)
//!                 +11  park loop          rt_sigtimedwait(all, slot, NULL), falls into hold when
//!                                         it has one
//! page 1   data   SIGSET  all signals; SCRATCH  arguments of injected calls;
//!                 SLOT    siginfo of the signal the park loop has caught; JOURNAL header
//! page 2…  journal entries: each thread's registers and mask as found
//! ```
//!
//! The journal makes a dead tracer harmless: whoever finds a process in the stub (by [`MAGIC`]) can
//! give every thread its own registers back. It is complete before any thread runs stub code; only
//! the call that maps the stub itself runs before it.

use crate::sys::ptrace::Regs;

/// Size of a page on x86-64.
pub const PAGE: u64 = 4096;
/// Where an injected call starts.
pub const CODE_SYSCALL: u64 = 0;
/// The hold loop.
pub const CODE_HOLD: u64 = 2;
/// The park loop.
pub const CODE_PARK: u64 = 11;
/// The instruction after the park loop's system call.
pub const CODE_PARKED: u64 = 32;
/// Offset of [`MAGIC`] in the code page.
pub const MAGIC_AT: u64 = 64;
/// How a stub is recognised.
pub const MAGIC: &[u8; 16] = b"migd-stub-0001\0\0";

/// The code page's beginning.
pub const CODE: [u8; 38] = [
    0x0f, 0x05, // syscall
    0xb8, 34, 0, 0, 0, // hold: mov eax, SYS_pause
    0x0f, 0x05, // syscall
    0xeb, 0xf7, // jmp hold
    0xb8, 128, 0, 0, 0, // park: mov eax, SYS_rt_sigtimedwait
    0x4c, 0x89, 0xef, // mov rdi, r13 (the set)
    0x4c, 0x89, 0xe6, // mov rsi, r12 (the slot)
    0x31, 0xd2, // xor edx, edx (no time-out)
    0x41, 0xba, 8, 0, 0, 0, // mov r10d, 8
    0x0f, 0x05, // syscall
    0x85, 0xc0, // parked: test eax, eax
    0x78, 0xe7, // js park (interrupted)
    0xeb, 0xdc, // jmp hold (one is in the slot)
];

/// Offset of the signal set in the stub.
pub const SIGSET: u64 = PAGE;
/// Offset of the scratch area.
pub const SCRATCH: u64 = PAGE + 64;
/// Length of the scratch area, bytes.
pub const SCRATCH_LEN: usize = 2048;
/// Offset of the slot.
pub const SLOT: u64 = PAGE + 2176;
/// Offset of the journal's header: phase, number of entries, argument pages kept (start, end).
pub const JOURNAL: u64 = PAGE + 2560;
/// Offset of the first entry.
pub const ENTRIES: u64 = 2 * PAGE;
/// Length of an entry: TID, mask, 27 registers, padding.
pub const ENTRY_LEN: u64 = 256;

/// Bytes a stub for so many threads takes.
pub fn stub_len(threads: usize) -> u64 {
    (ENTRIES + threads as u64 * ENTRY_LEN).next_multiple_of(PAGE)
}

/// What state the process was in when the journal was last written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Frozen: giving every thread its registers back makes it whole again.
    Frozen,
    /// Parked as a deputy: its memory is gone.
    Parked,
}

/// The journal's header and entries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Journal {
    /// Which state.
    pub phase: Phase,
    /// TID, mask and registers of every thread.
    pub threads: Vec<(i32, u64, Regs)>,
}

impl Journal {
    /// The header's bytes.
    pub fn header(&self) -> [u8; 16] {
        let mut out = [0; 16];
        let phase: u64 = match self.phase {
            Phase::Frozen => 1,
            Phase::Parked => 2,
        };
        out[..8].copy_from_slice(&phase.to_le_bytes());
        out[8..].copy_from_slice(&(self.threads.len() as u64).to_le_bytes());
        out
    }

    /// The entries' bytes.
    pub fn entries(&self) -> Vec<u8> {
        let mut out = vec![0; self.threads.len() * ENTRY_LEN as usize];
        for (entry, (tid, mask, regs)) in out.chunks_exact_mut(ENTRY_LEN as usize).zip(&self.threads) {
            entry[..8].copy_from_slice(&(*tid as u64).to_le_bytes());
            entry[8..16].copy_from_slice(&mask.to_le_bytes());
            for (slot, value) in entry[16..].chunks_exact_mut(8).zip(regs.0) {
                slot.copy_from_slice(&value.to_le_bytes());
            }
        }
        out
    }

    /// Number of entries a header announces, at most `limit`; `None` if it is no header.
    pub fn parse_header(bytes: &[u8; 16], limit: usize) -> Option<(Phase, usize)> {
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let phase = match word(0) {
            1 => Phase::Frozen,
            2 => Phase::Parked,
            _ => return None,
        };
        let count = usize::try_from(word(8)).ok().filter(|n| (1..=limit).contains(n))?;
        Some((phase, count))
    }

    /// Reads the entries that follow a header.
    pub fn parse_entries(phase: Phase, bytes: &[u8]) -> Journal {
        let word = |chunk: &[u8]| u64::from_le_bytes(chunk.try_into().expect("eight bytes"));
        let threads = bytes
            .chunks_exact(ENTRY_LEN as usize)
            .map(|entry| {
                let mut regs = Regs([0; 27]);
                for (value, chunk) in regs.0.iter_mut().zip(entry[16..].chunks_exact(8)) {
                    *value = word(chunk);
                }
                (word(&entry[..8]) as i32, word(&entry[8..16]), regs)
            })
            .collect();
        Journal { phase, threads }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn journal_round_trip() {
        let mut regs = Regs([7; 27]);
        regs.set_rip(0x1234);
        let journal = Journal { phase: Phase::Parked, threads: vec![(12, 5, regs), (13, 6, Regs([1; 27]))] };
        let (phase, count) = Journal::parse_header(&journal.header(), 10).expect("a header");
        assert_eq!((phase, count), (Phase::Parked, 2));
        assert_eq!(Journal::parse_entries(phase, &journal.entries()), journal);
        assert_eq!(Journal::parse_header(&[9; 16], 10), None);
        assert_eq!(Journal::parse_header(&journal.header(), 1), None);
    }
}
