//! Contents without a name while their users are away ([`checkpoint::image::objects`]): memory that processes of
//! the subtree share, memfds, deleted files that are written through memory.
//!
//! Away they are made anew, once for all of the subtree; nobody else at home has them (the inventory has looked).
//! Here the kernel's own stay open, emptied, so that what comes home comes into the same file.

use super::MoveError;
use crate::homefs::HomeView;
use checkpoint::deputy;
use checkpoint::dump::objects::Object;
use checkpoint::image::objects::{ObjectImage, ObjectKey, ObjectKind};
use checkpoint::image::{MappedFile, OpenFile};
use checkpoint::restore::objects::{Objects, Source};
use checkpoint::restore::{self, FileSource, RestoreError};
use checkpoint::tracee::Tracee;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::unistd::{Whence, ftruncate, lseek};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::mem::discriminant;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// The objects of a subtree that is away.
#[derive(Debug, Default)]
pub(super) struct Kept(BTreeMap<ObjectKey, (ObjectKind, File)>);

impl Kept {
    /// Keeps them open, to be written one day.
    pub fn of(objects: Vec<Object>) -> Result<Kept, MoveError> {
        let keep = |object: Object| {
            let path = format!("/proc/self/fd/{}", object.file().as_raw_fd());
            let file = OpenOptions::new().read(true).write(true).open(path)?;
            Ok((object.image.key, (object.image.kind, file)))
        };
        let kept: io::Result<_> = objects.into_iter().map(keep).collect();
        kept.map(Kept).map_err(|error| {
            MoveError::Failed(format!("a file without a name cannot be kept open to be written: {error}"))
        })
    }

    /// Gives their memory back: their contents are elsewhere.
    pub fn empty(&self) {
        for (kind, file) in self.0.values() {
            if let Err(error) = punch(file) {
                // Sealed: it stays, and nobody looks at it.
                tracing::debug!(?kind, %error, "an object keeps its memory");
            }
        }
    }

    /// The file in which an object comes home, empty; `None`: it was made away, or cannot be written.
    pub fn give(&self, image: &ObjectImage) -> io::Result<Option<File>> {
        let Some((kind, file)) = self.0.get(&image.key) else { return Ok(None) };
        if discriminant(kind) != discriminant(&image.kind) {
            return Ok(None);
        }
        if matches!(kind, ObjectKind::Memfd { .. }) {
            let seals = SealFlag::from_bits_retain(fcntl(file, FcntlArg::F_GET_SEALS)?);
            if !seals.is_empty() {
                // Its contents or its length are fixed.
                return Ok(None);
            }
        }
        match punch(file) {
            Ok(()) => {}
            // The file system has no holes.
            Err(Errno::EOPNOTSUPP) => ftruncate(file, 0)?,
            Err(errno) => return Err(errno.into()),
        }
        file.try_clone().map(Some)
    }
}

fn punch(file: &File) -> nix::Result<()> {
    let size = file.metadata().map_or(0, |meta| meta.len());
    if size == 0 {
        return Ok(());
    }
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(file, flags, 0, i64::try_from(size).map_err(|_| Errno::EFBIG)?)
}

/// A description of its own of an object that comes home.
pub(super) fn open(objects: &Objects, file: &OpenFile) -> Result<OwnedFd, MoveError> {
    const STATUS: i32 =
        libc::O_ACCMODE | libc::O_APPEND | libc::O_NONBLOCK | libc::O_DIRECT | libc::O_NOATIME;
    let opened = objects.open(file, file.flags as i32 & STATUS).map_err(MoveError::failed)?;
    lseek(&opened, file.pos as i64, Whence::SeekSet).map_err(MoveError::failed)?;
    Ok(opened)
}

/// What deputies map: files by path, inside the deputy and with its rights; objects, and files that are open at home,
/// from here.
pub(super) struct AtHome<'a> {
    pub objects: &'a Objects,
    pub view: &'a HomeView,
}

impl FileSource for AtHome<'_> {
    fn open_mapped(
        &mut self,
        tracee: &mut Tracee,
        file: &MappedFile,
        writable: bool,
    ) -> Result<i32, RestoreError> {
        match self.view.file_at(&file.path) {
            Some(ours) => Ok(deputy::pass_one(tracee, ours.as_fd())?),
            None => restore::open_inside(tracee, &file.path, writable),
        }
    }

    fn object(&mut self, key: ObjectKey) -> Result<Source, RestoreError> {
        self.objects.source(key)
    }

    fn take_in(&mut self, tracee: &mut Tracee, ours: i32) -> Result<i32, RestoreError> {
        let known = self.objects.files().find(|(_, file)| file.as_raw_fd() == ours);
        let lost = || RestoreError::Unfit("an object that is not open here".into());
        // The deputy may have no right to open ours by /proc.
        Ok(deputy::pass_one(tracee, known.ok_or_else(lost)?.1.as_fd())?)
    }
}
