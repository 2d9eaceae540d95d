//! What a restore makes beside the processes and does not end with them: names of sockets in the file
//! system, System V segments. It goes away again if nothing comes of the restore.

use crate::sys::shared_memory::remove_segment;
use std::cell::RefCell;
use std::path::PathBuf;

/// One of them.
#[derive(Debug)]
pub enum Trace {
    /// A file that was not there before.
    Name(PathBuf),
    /// A System V segment with this id.
    Segment(i32),
}

/// All of one kind. Dropped, they are removed.
#[derive(Debug, Default)]
pub struct Traces(RefCell<Vec<(Trace, u32)>>);

impl Traces {
    /// One more.
    pub fn add(&self, trace: Trace) {
        self.0.borrow_mut().push((trace, std::process::id()));
    }

    /// They are to stay.
    pub fn keep(&self) {
        self.0.borrow_mut().clear();
    }
}

impl Drop for Traces {
    fn drop(&mut self) {
        for (trace, maker) in self.0.take() {
            // A child has copies of everything, and ends.
            if maker != std::process::id() {
                continue;
            }
            // Somebody else may have removed it, which is as good.
            let _ = match trace {
                Trace::Name(path) => std::fs::remove_file(path),
                Trace::Segment(id) => remove_segment(id),
            };
        }
    }
}
