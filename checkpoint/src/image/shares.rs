//! What processes of an image have together, as threads of one process have (clone(2)).

use serde::{Deserialize, Serialize};

/// With which earlier process of the image each thing is shared: PIDs; 0: it is its own. Of several that
/// share it, all name the first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharesImage {
    /// `CLONE_VM`: the address space. Its contents are in the stream once, with the first.
    pub memory: i32,
    /// `CLONE_FILES`: the descriptor table. It is in the images of all of them.
    pub files: i32,
    /// `CLONE_FS`: working directory, root, umask.
    pub fs: i32,
    /// `CLONE_SIGHAND`: signal actions.
    pub handlers: i32,
}

impl SharesImage {
    /// Each of them, with its `CLONE_*` flag and a name for people.
    pub fn each(&self) -> [(i32, u64, &'static str); 4] {
        [
            (self.memory, libc::CLONE_VM as u64, "its memory"),
            (self.files, libc::CLONE_FILES as u64, "its descriptor table"),
            (self.fs, libc::CLONE_FS as u64, "its working directory"),
            (self.handlers, libc::CLONE_SIGHAND as u64, "its signal actions"),
        ]
    }

    /// Whether all of it is its own.
    pub fn is_empty(&self) -> bool {
        *self == SharesImage::default()
    }
}

/// In what a thread differs from the others of its process: what it has of its own (unshare(2)), and whether
/// it is there at all.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApartImage {
    /// Working directory, root and umask, where they are others than the leader's.
    pub fs: Option<super::FsImage>,
    /// The earlier thread whose they are too; 0: none, or they are the leader's.
    pub fs_with: i32,
    /// It is the leader, and has ended before the others, with this wait status.
    pub ended: Option<i32>,
}
