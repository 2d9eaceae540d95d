//! What the processes of an image can only be given when all of them are there, and before any runs:
//! whatever names another of them, and whatever others could take.

use super::{RestoreError, locks, make_local, table, watches};
use crate::deputy::pass_fds;
use crate::image::ProcessImage;
use crate::sys::rlimit;
use crate::tracee::Tracee;
use nix::sys::resource::Resource;
use std::collections::BTreeSet;
use std::collections::btree_map::{BTreeMap, Entry};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// All are filled and stand in their stubs. Whatever fails leaves none of them.
pub(super) fn settle(images: &[ProcessImage], tracees: &mut [Tracee]) -> Result<(), RestoreError> {
    give_late_files(images, tracees)?;
    watches::watch_all(images, tracees)?;
    // From here on no descriptor may be closed in them: that gives up POSIX locks.
    locks::take_all(images, tracees)?;
    // A lease has made its taker the owner.
    locks::set_owners(images, tracees)
}

/// Pidfds, and files of `/proc/PID`: opened here, and passed to whoever has them.
fn give_late_files(images: &[ProcessImage], tracees: &mut [Tracee]) -> Result<(), RestoreError> {
    let mut shared: BTreeMap<u32, OwnedFd> = BTreeMap::new();
    for (image, tracee) in images.iter().zip(tracees) {
        let late = |index: &usize| table::is_late(&image.files.files[*index]);
        let mut own = BTreeMap::new();
        for index in (0..image.files.files.len()).filter(late) {
            let file = &image.files.files[index];
            if file.shared == 0 {
                own.insert(index, make_local(file)?);
            } else if let Entry::Vacant(place) = shared.entry(file.shared) {
                place.insert(make_local(file)?);
            }
        }
        let mut passed: Vec<(i32, BorrowedFd<'_>, bool)> = Vec::new();
        for fd in &image.files.fds {
            let file = image.files.files.get(fd.file as usize);
            let made = own.get(&(fd.file as usize)).or_else(|| shared.get(&file?.shared));
            if let (Some(made), true) = (made, file.is_some_and(table::is_late)) {
                passed.push((fd.fd, made.as_fd(), fd.cloexec));
            }
        }
        if passed.is_empty() || image.shares.files != 0 {
            // A table that several have is given them once.
            continue;
        }
        let taken: BTreeSet<i32> = image.files.fds.iter().map(|fd| fd.fd).collect();
        with_room(tracee, taken.last().copied().unwrap_or(0), |tracee| {
            Ok(pass_fds(tracee, &taken, &passed)?)
        })?;
    }
    Ok(())
}

/// Its limit may be below the numbers that it has.
fn with_room(
    tracee: &mut Tracee,
    highest: i32,
    work: impl FnOnce(&mut Tracee) -> Result<(), RestoreError>,
) -> Result<(), RestoreError> {
    let (pid, which) = (tracee.pid(), Resource::RLIMIT_NOFILE as u32);
    // A socket, and what comes through it, beside them.
    let wanted = highest as u64 + 8;
    let limit = rlimit::get(pid, which).ok().filter(|&(soft, _)| soft < wanted);
    if let Some((_, hard)) = limit {
        let _ = rlimit::set(pid, which, wanted, hard.max(wanted));
    }
    let result = work(tracee);
    if let Some((soft, hard)) = limit {
        let _ = rlimit::set(pid, which, soft, hard);
    }
    result
}
