//! The descriptor table of a process that was made by its parent: inherited where both have the same
//! open file at a number, and else taken, by injected calls, from a helper process that has built it.
//!
//! The helper is a child of this program and runs [`table::build`](super::table::build); it is not the
//! process of the image, and ends when its descriptors have been taken (pidfd_getfd(2)).

use super::RestoreError;
use super::shell::Helper;
use super::table::{is_late, is_stream};
use crate::image::{FdImage, FilesImage};
use crate::tracee::{Call, Tracee};
use std::collections::BTreeSet;

/// Which of its descriptors a child has from its parent: numbers.
pub fn inherited(child: &FilesImage, parent: &FilesImage) -> BTreeSet<i32> {
    let file = |files: &FilesImage, fd: &FdImage| files.files.get(fd.file as usize).cloned();
    let same = |mine: &&FdImage| {
        let theirs = parent.fds.binary_search_by_key(&mine.fd, |fd| fd.fd).ok();
        let (Some(mine), Some(theirs)) =
            (file(child, mine), theirs.and_then(|at| file(parent, &parent.fds[at])))
        else {
            return false;
        };
        let streams = is_stream(&mine) && is_stream(&theirs) && mine.kind == theirs.kind;
        !is_late(&mine) && (mine.shared != 0 && mine.shared == theirs.shared || streams)
    };
    child.fds.iter().filter(same).map(|fd| fd.fd).collect()
}

/// Makes the table of `child` that of its image: `kept` are its own already, the rest is taken from
/// `helper`; `base` is a number above all of them.
pub fn take(
    child: &mut Tracee,
    files: &FilesImage,
    kept: &BTreeSet<i32>,
    helper: Option<&Helper>,
    base: i32,
) -> Result<(), RestoreError> {
    let mut calls = close_all_but(kept);
    for fd in files.fds.iter().filter(|fd| kept.contains(&fd.fd)) {
        let flag = if fd.cloexec { libc::FD_CLOEXEC } else { 0 };
        let args = [fd.fd as u64, libc::F_SETFD as u64, flag as u64, 0, 0, 0];
        calls.push(Call::must("setting close-on-exec", libc::SYS_fcntl, args));
    }
    child.must_all(0, &calls)?;
    let Some(helper) = helper else { return Ok(()) };
    let args = [helper.pid() as u64, 0, 0, 0, 0, 0];
    let opened = child.must(0, "pidfd_open", libc::SYS_pidfd_open, args)? as u64;
    let door = base as u64;
    let args = [opened, door, libc::O_CLOEXEC as u64, 0, 0, 0];
    child.must(0, "moving a pidfd", libc::SYS_dup3, args)?;
    let mut calls = vec![close(opened)];
    let mut expected = vec![None];
    let mut taken = kept.clone();
    for fd in files.fds.iter().filter(|fd| !kept.contains(&fd.fd)) {
        if !helper.has(fd.fd) {
            // Made later, by the process itself.
            continue;
        }
        // The lowest number that is free.
        let lowest = (0..).zip(&taken).find(|&(n, &taken)| n != taken).map_or(taken.len() as i32, |(n, _)| n);
        let args = [door, fd.fd as u64, 0, 0, 0, 0];
        calls.push(Call::must("taking a descriptor", libc::SYS_pidfd_getfd, args));
        expected.push(Some(lowest));
        if lowest != fd.fd {
            let flags = if fd.cloexec { libc::O_CLOEXEC } else { 0 };
            let args = [lowest as u64, fd.fd as u64, flags as u64, 0, 0, 0];
            calls.push(Call::must("placing a descriptor", libc::SYS_dup3, args));
            calls.push(close(lowest as u64));
            expected.extend([None, None]);
        } else if !fd.cloexec {
            // It comes with the flag.
            let args = [lowest as u64, libc::F_SETFD as u64, 0, 0, 0, 0];
            calls.push(Call::must("setting close-on-exec", libc::SYS_fcntl, args));
            expected.push(None);
        }
        taken.insert(fd.fd);
    }
    calls.push(close(door));
    let replies = child.must_all(0, &calls)?;
    let wrong = |(reply, expected): (&crate::tracee::Reply, &Option<i32>)| {
        expected.is_some_and(|number| i64::from(number) != reply.value)
    };
    if replies.iter().zip(&expected).any(wrong) {
        return Err(RestoreError::Unfit("a descriptor came to another number than the lowest".into()));
    }
    Ok(())
}

fn close(fd: u64) -> Call {
    Call::must("closing a descriptor", libc::SYS_close, [fd, 0, 0, 0, 0, 0])
}

fn close_all_but(kept: &BTreeSet<i32>) -> Vec<Call> {
    let range =
        |from: u64, to: u64| Call::must("closing descriptors", libc::SYS_close_range, [from, to, 0, 0, 0, 0]);
    let mut calls = Vec::new();
    let mut from = 0;
    for &fd in kept {
        if fd as u64 > from {
            calls.push(range(from, fd as u64 - 1));
        }
        from = fd as u64 + 1;
    }
    calls.push(range(from, u32::MAX.into()));
    calls
}
