//! Contents of the pipes that processes have among themselves. They stay in the pipe.

use super::DumpError;
use crate::image::{FileKind, FilesImage, OpenFile, PipeImage};
use crate::inventory::pipes::identity;
use crate::sys::fd::{pidfd_getfd, pidfd_open};
use crate::sys::pipe;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::{AsFd, OwnedFd};

/// Reads what is in the internal pipe `id`, of which the process has an end; one that it can read
/// from, if any of its family can. Only for an image that stands alone: at home a pipe simply stays.
pub(super) fn read_pipe(pid: i32, files: &FilesImage, id: (u64, u64)) -> Result<PipeImage, DumpError> {
    let failed = |errno: Errno| DumpError::Proc { what: "a pipe", pid, source: errno.into() };
    let of_pipe = |file: &OpenFile| identity(file) == id && matches!(file.kind, FileKind::Pipe { .. });
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
        return Ok(PipeImage { id, capacity, data: Vec::new(), pieces: Vec::new(), hangup: false });
    };
    let end = take(end.fd)?;
    let capacity = pipe::capacity(end.as_fd()).map_err(failed)?;
    let (data, pieces) = contents(&end, capacity).map_err(failed)?;
    Ok(PipeImage { id, capacity, data, pieces, hangup: has_lost_its_writer(&end) })
}

fn has_lost_its_writer(end: &OwnedFd) -> bool {
    let mut asked = [PollFd::new(end.as_fd(), PollFlags::empty())];
    // Nothing is asked for but what is always told.
    let polled = poll(&mut asked, PollTimeout::ZERO);
    polled.is_ok() && asked[0].revents().unwrap_or(PollFlags::empty()).contains(PollFlags::POLLHUP)
}

/// Bytes, and the pieces that they came in, if any of those is a packet.
type Contents = (Vec<u8>, Vec<(u32, bool)>);

/// One tee(2) into a pipe of the same size: a second would begin with the same bytes again. The copy is
/// then taken piece by piece, as only a read tells whether one is a packet.
fn contents(end: &OwnedFd, capacity: u32) -> Result<Contents, Errno> {
    let length = pipe::filled(end.as_fd())?;
    if length == 0 {
        return Ok((Vec::new(), Vec::new()));
    }
    let (copied, copy) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    pipe::set_capacity(copy.as_fd(), capacity)?;
    if pipe::tee(end.as_fd(), copy.as_fd(), length)? != length {
        return Err(Errno::EAGAIN);
    }
    let (one_out, one_in) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    let (two_out, two_in) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    // Room for one piece.
    pipe::set_capacity(one_in.as_fd(), PAGE)?;
    pipe::set_capacity(two_in.as_fd(), 2 * PAGE)?;
    let (mut data, mut pieces) = (vec![0; length + 1], Vec::new());
    let mut at = 0;
    while at < length {
        let moved = pipe::splice(copied.as_fd(), one_in.as_fd(), length)?;
        pipe::splice(one_out.as_fd(), two_in.as_fd(), moved)?;
        // A read goes beyond the end of a piece, but not of a packet (pipe(2)).
        nix::unistd::write(&two_in, b"x")?;
        let room = data.get_mut(at..=at + moved).ok_or(Errno::EIO)?;
        let packet = match nix::unistd::read(&two_out, room)? {
            n if n == moved => {
                nix::unistd::read(&two_out, &mut [0])?;
                true
            }
            n if n == moved + 1 => false,
            _ => return Err(Errno::EIO),
        };
        pieces.push((moved as u32, packet));
        at += moved;
    }
    data.truncate(length);
    if !pieces.iter().any(|&(_, packet)| packet) {
        pieces.clear();
    }
    Ok((data, pieces))
}

/// The smallest size of a pipe's buffer, bytes.
const PAGE: u32 = 4096;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_was_written_is_told_and_stays(
            mut writes in proptest::collection::vec((1usize..9000, any::<bool>()), 0..6)
        ) {
            // A packet behind other bytes is merged with them, if there is room on their page.
            writes.sort_by_key(|&(_, packet)| !packet);
            let (reading, writing) = nix::unistd::pipe2(OFlag::O_NONBLOCK).expect("a pipe");
            let (mut wanted, mut packets) = (Vec::<u8>::new(), Vec::<u32>::new());
            for (n, &(length, packet)) in writes.iter().enumerate() {
                let bytes = vec![n as u8 + 1; if packet { length.min(4096) } else { length }];
                let flags = OFlag::O_NONBLOCK | if packet { OFlag::O_DIRECT } else { OFlag::empty() };
                nix::fcntl::fcntl(&writing, nix::fcntl::FcntlArg::F_SETFL(flags)).expect("sets flags");
                let Ok(written) = nix::unistd::write(&writing, &bytes) else { break };
                wanted.extend(&bytes[..written]);
                if packet {
                    packets.push(written as u32);
                }
            }
            for _ in 0..2 {
                let (data, pieces) = contents(&reading, 65536).expect("reads");
                assert_eq!(data, wanted);
                let found: Vec<u32> = pieces.iter().filter(|piece| piece.1).map(|piece| piece.0).collect();
                assert_eq!(found, packets);
                let total: u32 = pieces.iter().map(|piece| piece.0).sum();
                assert!(pieces.is_empty() && packets.is_empty() || total as usize == data.len());
            }
            assert_eq!(pipe::filled(reading.as_fd()), Ok(wanted.len()));
        }
    }
}
