//! Contents of the pipes that processes have among themselves. They stay in the pipe.

use super::DumpError;
use crate::image::{FileKind, FilesImage, OpenFile, PipeImage};
use crate::sys::fd::{pidfd_getfd, pidfd_open};
use crate::sys::pipe;
use nix::errno::Errno;
use std::os::fd::{AsFd, OwnedFd};

/// Reads what is in the internal pipe `ino`, of which the process has an end; one that it can read
/// from, if any of its family can. Only for an image that stands alone: at home a pipe simply stays.
pub(super) fn read_pipe(pid: i32, files: &FilesImage, ino: u64) -> Result<PipeImage, DumpError> {
    let failed = |errno: Errno| DumpError::Proc { what: "a pipe", pid, source: errno.into() };
    let of_pipe = |file: &OpenFile| file.stat.1 == ino && matches!(file.kind, FileKind::Pipe { .. });
    let reads = |file: &OpenFile| file.flags as i32 & libc::O_ACCMODE != libc::O_WRONLY;
    let number = |wanted: &dyn Fn(&OpenFile) -> bool| {
        files
            .fds
            .iter()
            .find(|fd| files.files.get(fd.file as usize).is_some_and(|file| of_pipe(file) && wanted(file)))
    };
    let pidfd = pidfd_open(pid).map_err(failed)?;
    let take = |fd: i32| pidfd_getfd(pidfd.as_fd(), fd).map_err(failed);
    let Some(end) = number(&reads) else {
        // Nobody can read it any more.
        let capacity = match number(&|_| true) {
            Some(end) => pipe::capacity(take(end.fd)?.as_fd()).map_err(failed)?,
            None => 0,
        };
        return Ok(PipeImage { ino, capacity, data: Vec::new() });
    };
    let end = take(end.fd)?;
    let capacity = pipe::capacity(end.as_fd()).map_err(failed)?;
    let data = contents(&end, capacity).map_err(failed)?;
    Ok(PipeImage { ino, capacity, data })
}

/// One tee(2) into a pipe of the same size: a second would begin with the same bytes again.
fn contents(end: &OwnedFd, capacity: u32) -> Result<Vec<u8>, Errno> {
    let length = pipe::filled(end.as_fd())?;
    if length == 0 {
        return Ok(Vec::new());
    }
    let (reading, writing) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    pipe::set_capacity(writing.as_fd(), capacity)?;
    if pipe::tee(end.as_fd(), writing.as_fd(), length)? != length {
        return Err(Errno::EAGAIN);
    }
    let mut data = vec![0; length];
    let mut at = 0;
    while at < length {
        match nix::unistd::read(&reading, &mut data[at..])? {
            0 => return Err(Errno::EPIPE),
            n => at += n,
        }
    }
    Ok(data)
}
