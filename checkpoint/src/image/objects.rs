//! Objects: contents that several mappings or open files of a tree may refer to, each once in an image.
//!
//! Files without a name (memfds, deleted files), and memory that is shared between processes (anonymous, System
//! V). They are known by [`ObjectKey`]; their contents follow their description in the stream, by offsets.

use super::memory::PAGE_SHIFT;
use serde::{Deserialize, Serialize};

/// Bound on the objects of one image.
pub const MAX_OBJECTS: usize = 65_536;

/// `st_dev` and `st_ino` of the file behind it where it was read; of a System V segment [`SYSV`] and its id.
pub type ObjectKey = (u64, u64);

/// In place of `st_dev`: System V segments are numbered by themselves, and their files' inode numbers may be
/// those of other files.
pub const SYSV: u64 = u64::MAX;

/// What is known of an object beside its contents.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectImage {
    /// How mappings and open files name it.
    pub key: ObjectKey,
    /// What it is.
    pub kind: ObjectKind,
    /// Its length, bytes.
    pub size: u64,
    /// Permission bits of its mode.
    pub mode: u32,
    /// Owner: user id, group id.
    pub owner: (u32, u32),
    /// When it was read and written last: seconds and nanoseconds each.
    pub times: [(i64, i64); 2],
    /// Its pages have 2 to the power of this many bytes: [`PAGE_SHIFT`], or what its huge pages have (hugetlb).
    pub page_shift: u8,
}

/// What an object is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ObjectKind {
    /// `MAP_SHARED|MAP_ANONYMOUS` memory that several processes map.
    SharedAnon,
    /// `memfd_create`.
    Memfd {
        /// As it was given.
        name: Vec<u8>,
        /// `F_GET_SEALS`.
        seals: u32,
    },
    /// A file that has lost its last name.
    Deleted {
        /// The name it had.
        path: Vec<u8>,
        /// It was made with `O_TMPFILE`, and the description that was opened so is there still: its access
        /// mode. It may yet be given a name.
        temporary: Option<u32>,
    },
    /// A System V shared memory segment.
    SysV {
        /// `key_t`; 0: private.
        key: i32,
        /// It goes away with its last user (`IPC_RMID`); one that does not is no part of the image if it is
        /// still there at the restore.
        removed: bool,
    },
}

impl ObjectImage {
    /// Whether it is of explicit huge pages (hugetlb).
    pub fn is_huge(&self) -> bool {
        self.page_shift != PAGE_SHIFT
    }

    /// How much there is room for, bytes: its last huge page is whole.
    pub fn room(&self) -> u64 {
        match self.is_huge() {
            true => self.size.checked_next_multiple_of(1 << self.page_shift).unwrap_or(self.size),
            false => self.size,
        }
    }

    /// For messages.
    pub fn name(&self) -> String {
        match &self.kind {
            ObjectKind::SharedAnon => format!("shared memory {}", self.key.1),
            ObjectKind::Memfd { name, .. } => format!("the memfd {}", String::from_utf8_lossy(name)),
            ObjectKind::Deleted { path, .. } => format!("the deleted file {}", String::from_utf8_lossy(path)),
            ObjectKind::SysV { .. } => format!("System V segment {}", self.key.1),
        }
    }
}
