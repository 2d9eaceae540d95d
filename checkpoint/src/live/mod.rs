//! Live migration, the half that looks at the process that still runs: pre-copy.
//!
//! A [`Tracker`] tells round by round which pages a running process has changed. The first round gives all pages
//! that there are; each further one the *dirty pages*, those written since they were given last. The process is
//! frozen when the rounds have become short ([`convergence`]), and a last look gives what is still missing.
//!
//! ```mermaid
//! sequenceDiagram
//!   participant T as tracker
//!   participant P as process, running
//!   T->>P: one thread makes a userfaultfd and closes it again
//!   loop each round
//!     T->>P: mappings as they are now; new ones are registered
//!     T->>P: PAGEMAP_SCAN: dirty pages, armed again in the same walk
//!     P-->>T: their contents, read after that
//!   end
//!   Note over P: frozen
//!   T->>P: PAGEMAP_SCAN without arming: the last dirty pages
//! ```
//!
//! What makes it right:
//! - A page is read after it was armed: what is written between the two is dirty in the next round.
//! - Memory that is not registered is new, and all its pages are dirty: mappings that came since the last
//!   round, were moved (mremap(2)) or replaced. The kernel says so itself (`PM_SCAN_CHECK_WPASYNC`).
//! - A page that is gone (`MADV_DONTNEED`) is told as [`Change::Gone`]; what is outside of all mappings is gone.
//! - After execve(2) everything begins anew ([`Change::Anew`]).
//!
//! - Buffers of reads that wait count as dirty, whatever the page table says: data may come into them by no page table
//!   (O_DIRECT, FUSE).
//!
//! What others write to shared memory is in no page table of this process: such mappings are named and left to
//! the freeze ([`kinds`]).

mod attach;
pub mod convergence;
mod error;
mod identity;
mod in_flight;
pub mod kinds;
mod reader;
pub mod source;
pub mod stream;
mod tracker;

pub use error::LiveError;
pub use kinds::Untracked;
pub use tracker::{Round, Tracker};

use crate::image::Vma;

/// What a target that holds a copy of the memory has to do.
#[derive(Debug)]
pub enum Change<'a> {
    /// The process runs another program: nothing of what was told counts any more.
    Anew,
    /// The mappings as they were at the beginning of the round, without their flags. What is outside of them is gone.
    Mappings(&'a [Vma]),
    /// Pages have these contents.
    Data {
        /// Where.
        addr: u64,
        /// What; whole pages, at most 1 MiB.
        bytes: &'a [u8],
    },
    /// Pages are zero.
    Zero {
        /// Where.
        addr: u64,
        /// How much, bytes.
        len: u64,
    },
    /// There are no pages of the process' own any more: fresh memory, or the file's pages.
    Gone {
        /// Where.
        addr: u64,
        /// How much, bytes.
        len: u64,
    },
}
