//! The stub: a few pages mapped into a frozen process, for injected system calls and for parking.
//!
//! ```text
//! page 0   code   +0   syscall            an injected call, which falls through into
//!                 +2   hold loop          pause() for ever (all signals are blocked)
//!                 +11  park loop          rt_sigtimedwait(all, slot, NULL), falls into hold when
//!                                         it has one
//!                 +64  MAGIC
//!                 +96  batch loop         runs an array of calls, says so, falls into hold
//! page 1   data   SIGSET  all signals; SLOT  siginfo of the signal the park loop has caught;
//!                 JOURNAL header
//! page 2…  SCRATCH    arguments of single injected calls
//! page 4…  BATCH      which threads are through with their calls; RECORDS  the calls;
//!          ARGUMENTS  what they point to
//! ENTRIES… journal entries: each thread's registers and mask as found
//! ```
//!
//! The journal makes a dead tracer harmless: whoever finds a process in the stub (by [`MAGIC`]) can
//! give every thread its own registers back. It is complete before any thread runs stub code; only
//! the call that maps the stub itself runs before it.

use crate::image::{Backing, Vma};
use crate::sys::ptrace::Regs;

/// Whether a mapping may be a stub's code.
pub fn may_be_code(vma: &Vma) -> bool {
    vma.end - vma.start == PAGE && vma.prot & libc::PROT_EXEC as u32 != 0 && vma.backing == Backing::Anon
}

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
pub const MAGIC: &[u8; 16] = b"migd-stub-0002\0\0";

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

/// The batch loop: rbx is its first record's address, r12 the number of records (not 0), r13 the
/// address of the word that tells that it is through. A new thread runs records of its own, which the
/// unused arguments of the one that has made it tell, or goes into the hold loop.
pub const CODE_BATCH: u64 = 96;
/// Its code.
pub const BATCH_CODE: [u8; 101] = [
    0x8b, 0x03, // batch: mov eax, [rbx]
    0x48, 0x8b, 0x7b, 0x08, // mov rdi, [rbx+8]
    0x48, 0x8b, 0x73, 0x10, // mov rsi, [rbx+16]
    0x48, 0x8b, 0x53, 0x18, // mov rdx, [rbx+24]
    0x4c, 0x8b, 0x53, 0x20, // mov r10, [rbx+32]
    0x4c, 0x8b, 0x43, 0x28, // mov r8, [rbx+40]
    0x4c, 0x8b, 0x4b, 0x30, // mov r9, [rbx+48]
    0x0f, 0x05, // syscall
    0xf6, 0x43, 0x04, 0x02, // test byte [rbx+4], RECORD_CLONES
    0x74, 0x05, // jz keep
    0x48, 0x85, 0xc0, // test rax, rax
    0x74, 0x28, // jz made (the new thread)
    0x48, 0x89, 0x43, 0x38, // keep: mov [rbx+56], rax
    0xf6, 0x43, 0x04, 0x01, // test byte [rbx+4], RECORD_MUST
    0x74, 0x08, // jz next
    0x48, 0x3d, 0x01, 0xf0, 0xff, 0xff, // cmp rax, -4095
    0x73, 0x09, // jae done (unsigned: an errno)
    0x48, 0x83, 0xc3, 0x40, // next: add rbx, 64
    0x49, 0xff, 0xcc, // dec r12
    0x75, 0xbe, // jnz batch
    0x49, 0xc7, 0x45, 0x00, 1, 0, 0, 0, // done: mov qword [r13], 1
    0xe9, 0x53, 0xff, 0xff, 0xff, // jmp hold
    0x4c, 0x8b, 0x63, 0x20, // made: mov r12, [rbx+32]
    0x4c, 0x8b, 0x6b, 0x28, // mov r13, [rbx+40]
    0x48, 0x8b, 0x5b, 0x18, // mov rbx, [rbx+24]
    0x4d, 0x85, 0xe4, // test r12, r12
    0x75, 0xa0, // jnz batch
    0xe9, 0x3d, 0xff, 0xff, 0xff, // jmp hold
];

/// Offset of the signal set in the stub.
pub const SIGSET: u64 = PAGE;
/// Offset of the slot.
pub const SLOT: u64 = PAGE + 2176;
/// Offset of the journal's header: phase, number of entries, argument pages kept (start, end).
pub const JOURNAL: u64 = PAGE + 2560;
/// Offset of the scratch area.
pub const SCRATCH: u64 = 2 * PAGE;
/// Length of the scratch area, bytes.
pub const SCRATCH_LEN: usize = 8192;

/// Offset of the batch area: a word for each job, 1 when it is through.
pub const BATCH: u64 = 4 * PAGE;
/// Jobs that can be under way at a time.
pub const MAX_JOBS: usize = 256;
/// Length of their words, bytes.
pub const DONE_LEN: usize = 8 * MAX_JOBS;
/// Offset of the records.
pub const RECORDS: u64 = BATCH + DONE_LEN as u64;
/// Length of a record, bytes: number (4), `RECORD_*` (4), six arguments, result.
pub const RECORD_LEN: usize = 64;
/// Records there is room for.
pub const MAX_RECORDS: usize = 512;
/// The batch stops if the call fails.
pub const RECORD_MUST: u32 = 1;
/// The call makes a thread; its third to fifth argument are that one's first record, how many it has, and the
/// word that tells that it is through.
pub const RECORD_CLONES: u32 = 2;
/// A result that no call has.
pub const NOT_RUN: i64 = i64::MIN;
/// Offset of what the calls point to.
pub const ARGUMENTS: u64 = 13 * PAGE;
/// Its length, bytes.
pub const ARGUMENTS_LEN: usize = 64 << 10;
/// Offset of the first entry.
pub const ENTRIES: u64 = ARGUMENTS + ARGUMENTS_LEN as u64;
const _: () = assert!(CODE_BATCH >= MAGIC_AT + 16 && CODE_BATCH as usize + BATCH_CODE.len() <= PAGE as usize);
const _: () = assert!(SCRATCH + SCRATCH_LEN as u64 <= BATCH);
const _: () = assert!(RECORDS + (MAX_RECORDS * RECORD_LEN) as u64 <= ARGUMENTS);

/// Length of an entry: TID, mask, 27 registers, padding.
pub const ENTRY_LEN: u64 = 256;

/// Room for some threads more, as a deputy may get them when its guest comes home.
pub const MORE_THREADS: usize = 64;

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
