//! Pipes and FIFOs that a family has with itself.

use super::family::Family;
use crate::image::{FileKind, FilesImage, OpenFile};
use crate::sys::fd;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::collections::BTreeMap;
use std::os::fd::AsFd;

/// Which pipe or FIFO an open file is an end of: device and inode number.
pub fn identity(file: &OpenFile) -> (u64, u64) {
    (file.stat.0, file.stat.1)
}

/// A pipe is internal if nobody outside the family has either end; one end may be gone altogether.
pub fn mark_internal(pid: i32, family: &Family, image: &mut FilesImage) {
    let mut ends: BTreeMap<(u64, u64), (bool, bool)> = BTreeMap::new();
    let is_pipe = |file: &&OpenFile| matches!(file.kind, FileKind::Pipe { .. });
    for file in image.files.iter().filter(is_pipe) {
        let access = file.flags as i32 & libc::O_ACCMODE;
        let (reads, writes) = ends.entry(identity(file)).or_default();
        *reads |= access != libc::O_WRONLY;
        *writes |= access != libc::O_RDONLY;
    }
    let has_sockets = image.files.iter().any(|file| matches!(file.kind, FileKind::Socket { .. }));
    for (index, file) in image.files.iter().enumerate().filter(|(_, file)| is_pipe(file)) {
        let Some(fd) = image.fds.iter().find(|fd| fd.file as usize == index) else { continue };
        let named = file.link.first() == Some(&b'/');
        // The end that is missing here may be a relative's, or in flight in a socket; a FIFO may be
        // waiting for its first writer.
        if family.len() <= 1
            && !has_sockets
            && !named
            && ends.get(&identity(file)).is_some_and(|&(reads, writes)| !(reads && writes))
            && !other_end_is_gone(pid, fd.fd)
        {
            ends.remove(&identity(file));
        }
    }
    if ends.is_empty() {
        // The usual case: nobody else's table has to be looked at.
        return;
    }
    for file in &mut image.files {
        if !is_pipe(&&*file) {
            continue;
        }
        // Others' tables are looked at only if it depends on them.
        let alone = ends.contains_key(&identity(file))
            && match file.link.first() {
                Some(b'/') => !family.fifos_outside().contains(&identity(file)),
                _ => !family.pipes_outside().contains(&file.stat.1),
            };
        if let FileKind::Pipe { internal } = &mut file.kind {
            *internal = alone;
        }
    }
}

/// Whether nobody has the other end of a pipe; also `true` if that cannot be asked.
fn other_end_is_gone(pid: i32, fd: i32) -> bool {
    let copy = fd::pidfd_open(pid).and_then(|pidfd| fd::pidfd_getfd(pidfd.as_fd(), fd));
    let Ok(copy) = copy else { return true };
    let mut asked = [PollFd::new(copy.as_fd(), PollFlags::empty())];
    // Nothing is asked for but what is always told.
    let polled = poll(&mut asked, PollTimeout::ZERO);
    let told = asked[0].revents().unwrap_or(PollFlags::empty());
    polled.is_err() || told.intersects(PollFlags::POLLHUP | PollFlags::POLLERR)
}
