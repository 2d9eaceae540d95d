//! Objects of an image: made and filled by the program that restores, before the processes that use them.

use super::traces::{Trace, Traces};
use super::{RestoreError, huge, nameless};
use crate::image::objects::{ObjectImage, ObjectKey, ObjectKind};
use crate::image::stream::{Item, StreamReader};
use crate::image::{Backing, OpenFile, PAGE_SHIFT, ProcessImage};
use crate::inventory::objects::{is_temporary, segments};
use crate::sys::huge_pages;
use crate::sys::shared_memory::{self, Attached};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl, open};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::{Mode, fchmod, futimens};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, fchown, ftruncate};
use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

/// Longest name of a memfd (memfd_create(2)).
const MAX_NAME: usize = 249;

/// The objects of an image, made.
#[derive(Debug, Default)]
pub struct Objects {
    made: BTreeMap<ObjectKey, Made>,
    /// Segments that were made, and stay or go away with their last user.
    staying: Traces,
    going: Traces,
}

/// One of them.
#[derive(Debug)]
struct Made {
    image: ObjectImage,
    what: What,
}

/// What the embedder has for an object that is no System V segment: an empty file, open to read and write.
/// `None`: it is made here.
pub type Giver<'a> = dyn FnMut(&ObjectImage) -> std::io::Result<Option<File>> + 'a;

#[derive(Debug)]
enum What {
    File(File),
    /// A segment: attached here until it is filled and used. `None`: it was there, and has its contents.
    Segment(Option<Attached>),
}

/// How a mapping of an object is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// From this descriptor of the program that restores.
    File(i32),
    /// By attaching the System V segment with this id.
    Segment(i32),
}

impl Objects {
    /// Makes what comes next in the stream, up to the memory of the first process.
    pub fn receive<R: Read>(stream: &mut StreamReader<R>) -> Result<Objects, RestoreError> {
        Objects::receive_all(stream, &mut |_| Ok(None))
    }

    /// The same with what the embedder has of them; without huge pages, which are the node's.
    pub fn receive_with<R: Read>(
        stream: &mut StreamReader<R>,
        give: &mut Giver<'_>,
    ) -> Result<Objects, RestoreError> {
        Objects::receive_all(stream, &mut |image| match image.is_huge() {
            true => Err(Errno::EOPNOTSUPP.into()),
            false => give(image),
        })
    }

    fn receive_all<R: Read>(
        stream: &mut StreamReader<R>,
        give: &mut Giver<'_>,
    ) -> Result<Objects, RestoreError> {
        let mut objects = Objects::default();
        if !stream.next_is_object()? {
            return Ok(objects);
        }
        let unfit = |what: &str| RestoreError::Unfit(format!("the image is not consistent: {what}"));
        let mut current: Option<Made> = None;
        loop {
            match stream.next()? {
                Item::Object(image) => {
                    objects.keep(current.take())?;
                    if objects.made.contains_key(&image.key) {
                        return Err(unfit("two objects have one name"));
                    }
                    let made = Made::of(*image, give)?;
                    if let (ObjectKind::SysV { removed, .. }, What::Segment(Some(_))) =
                        (&made.image.kind, &made.what)
                    {
                        let which = if *removed { &objects.going } else { &objects.staying };
                        which.add(Trace::Segment(made.image.key.1 as i32));
                    }
                    current = Some(made);
                }
                Item::Data { addr, bytes } => match &current {
                    Some(made) => made.write(addr, bytes)?,
                    None => return Err(unfit("contents without an object")),
                },
                Item::Zero { addr, len } => {
                    if let Some(made) = &current {
                        made.zero(addr, len)?;
                    }
                }
                Item::Process(0) => break,
                _ => return Err(unfit("the memory of its first process is missing")),
            }
        }
        objects.keep(current)?;
        Ok(objects)
    }

    fn keep(&mut self, made: Option<Made>) -> Result<(), RestoreError> {
        if let Some(made) = made {
            made.finish()?;
            self.made.insert(made.image.key, made);
        }
        Ok(())
    }

    /// Mappings of them must have pages as theirs.
    pub fn check(&self, images: &[ProcessImage]) -> Result<(), RestoreError> {
        for vma in images.iter().flat_map(|image| &image.mm.vmas) {
            if let Backing::Object { key, .. } = vma.backing
                && self.get(key)?.image.page_shift != vma.page_shift
            {
                return Err(huge::inconsistent());
            }
        }
        Ok(())
    }

    /// Those that are files, as they are open here.
    pub fn files(&self) -> impl Iterator<Item = (&ObjectImage, &File)> {
        self.made.values().filter_map(|made| match &made.what {
            What::File(file) => Some((&made.image, file)),
            What::Segment(_) => None,
        })
    }

    fn get(&self, key: ObjectKey) -> Result<&Made, RestoreError> {
        let lacks = || RestoreError::Unfit(format!("the image lacks the file {}:{}", key.0, key.1));
        self.made.get(&key).ok_or_else(lacks)
    }

    /// An open file description of its own for an open file of the image, with these flags.
    pub fn open(&self, file: &OpenFile, flags: i32) -> Result<OwnedFd, RestoreError> {
        let made = self.get((file.stat.0, file.stat.1))?;
        let What::File(object) = &made.what else {
            return Err(RestoreError::Unfit("a System V segment is no open file".into()));
        };
        let failed = |errno| RestoreError::file(format!("opening {}", made.image.name()), errno);
        if is_temporary(file) && matches!(made.image.kind, ObjectKind::Deleted { temporary: Some(_), .. }) {
            // There is one such description of a file, and only it tells that.
            let own = object.try_clone().map_err(|source| made.failed("opening", source))?;
            fcntl(&own, FcntlArg::F_SETFL(OFlag::from_bits_retain(flags))).map_err(failed)?;
            return Ok(own.into());
        }
        let path = format!("/proc/self/fd/{}", object.as_raw_fd());
        let flags =
            OFlag::from_bits_retain(flags & !(libc::O_NOFOLLOW | libc::O_DIRECTORY)) | OFlag::O_CLOEXEC;
        open(path.as_str(), flags, Mode::empty()).map_err(failed)
    }

    /// What a mapping of it is made from.
    pub fn source(&self, key: ObjectKey) -> Result<Source, RestoreError> {
        match &self.get(key)?.what {
            What::File(file) => Ok(Source::File(file.as_raw_fd())),
            What::Segment(_) => Ok(Source::Segment(key.1 as i32)),
        }
    }

    /// When all mappings are made: seals, which forbid some of them, and the removal of segments. The others
    /// are removed with what this gives, unless that is kept.
    pub fn seal(self) -> Result<Traces, RestoreError> {
        for made in self.made.values() {
            let failed = |errno| RestoreError::file(format!("sealing {}", made.image.name()), errno);
            match (&made.image.kind, &made.what) {
                (ObjectKind::Memfd { seals, .. }, What::File(file)) if *seals != 0 => {
                    let has = fcntl(file, FcntlArg::F_GET_SEALS).map_err(failed)?;
                    if has != *seals as i32 {
                        let seals = SealFlag::from_bits_retain(*seals as i32);
                        fcntl(file, FcntlArg::F_ADD_SEALS(seals)).map_err(failed)?;
                    }
                }
                _ => {}
            }
        }
        Ok(self.staying)
    }
}

impl Made {
    fn of(image: ObjectImage, give: &mut Giver<'_>) -> Result<Made, RestoreError> {
        if i64::try_from(image.size).is_err() {
            return Err(RestoreError::Unfit("the image is not consistent: an object's length".into()));
        }
        huge::check_object(&image)?;
        let failed = |source| failed(&image, "making", source);
        let given = match image.kind {
            // A segment is never given, huge or not.
            ObjectKind::SysV { .. } if !image.is_huge() => None,
            _ => give(&image).map_err(failed)?,
        };
        let what = match (&image.kind, given) {
            (_, Some(file)) => Ok(What::File(file)),
            (ObjectKind::SharedAnon, _) => {
                shared_memory::anonymous(image.size, image.page_shift).map(What::File)
            }
            (ObjectKind::Memfd { name, .. }, _) => memfd_of(name, image.page_shift).map(What::File),
            (ObjectKind::Deleted { path, temporary }, _) => {
                nameless::create(path, *temporary).map(What::File).map_err(Into::into)
            }
            (ObjectKind::SysV { key, removed }, _) => segment(&image, *key, *removed).map(What::Segment),
        };
        let what = what.map_err(failed)?;
        if let What::File(file) = &what {
            ftruncate(file, image.size as i64).map_err(|errno| failed(errno.into()))?;
        }
        Ok(Made { image, what })
    }

    fn failed(&self, doing: &str, source: std::io::Error) -> RestoreError {
        failed(&self.image, doing, source)
    }

    /// Whole pages; behind its end they are cut off.
    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), RestoreError> {
        let inside = self.image.room().saturating_sub(offset).min(bytes.len() as u64) as usize;
        let (bytes, beyond) = bytes.split_at(inside);
        if beyond.len() >= 4096 {
            return Err(RestoreError::Unfit(BEHIND.into()));
        }
        let written = match &self.what {
            What::File(file) if self.image.is_huge() => {
                huge_pages::write(file.as_fd(), self.image.page_shift, offset, bytes).map_err(Into::into)
            }
            What::File(file) => file.write_all_at(bytes, offset),
            What::Segment(Some(attached)) if self.image.is_huge() => self
                .make_pages(attached, offset, bytes.len() as u64)
                .and_then(|()| attached.write(offset, bytes)),
            What::Segment(Some(attached)) => attached.write(offset, bytes),
            What::Segment(None) => Ok(()),
        };
        written.map_err(|source| self.failed("filling", source))
    }

    /// A fresh file has nothing but holes, which are zero; of huge pages those are made that had been made.
    fn zero(&self, offset: u64, length: u64) -> Result<(), RestoreError> {
        if !self.image.is_huge() {
            return Ok(());
        }
        if offset.checked_add(length).is_none_or(|end| end > self.image.room()) {
            return Err(RestoreError::Unfit(BEHIND.into()));
        }
        let made = match &self.what {
            What::File(file) => {
                huge_pages::make(file.as_fd(), self.image.page_shift, offset, length).map_err(Into::into)
            }
            What::Segment(Some(attached)) => self.make_pages(attached, offset, length),
            What::Segment(None) => Ok(()),
        };
        made.map_err(|source| self.failed("filling", source))
    }

    fn make_pages(&self, attached: &Attached, offset: u64, length: u64) -> std::io::Result<()> {
        let (first, length) = huge_pages::pages_around(self.image.page_shift, offset, length)?;
        attached.make_pages(first, length)
    }

    /// Owner, mode and times, when the contents are there.
    fn finish(&self) -> Result<(), RestoreError> {
        let ObjectImage { owner, mode, times, key, .. } = self.image;
        let failed = |source| self.failed("finishing", source);
        match &self.what {
            What::File(_) if self.image.kind == ObjectKind::SharedAnon => Ok(()),
            What::File(file) => {
                let [read, written] =
                    times.map(|(seconds, nanos)| TimeSpec::new(seconds, nanos.clamp(0, 999_999_999)));
                fchown(file, Some(Uid::from_raw(owner.0)), Some(Gid::from_raw(owner.1)))
                    // After that: a change of owner takes the set-user-ID bit.
                    .and_then(|()| fchmod(file, Mode::from_bits_truncate(mode)))
                    .and_then(|()| futimens(file, &read, &written))
                    .map_err(|errno| failed(errno.into()))
            }
            What::Segment(Some(_)) => shared_memory::own_segment(key.1 as i32, owner, mode).map_err(failed),
            What::Segment(None) => Ok(()),
        }
    }
}

/// What is wrong with contents of an object that it has no room for.
const BEHIND: &str = "the image is not consistent: contents behind an object's end";

fn failed(image: &ObjectImage, doing: &str, source: std::io::Error) -> RestoreError {
    let error = RestoreError::File { what: format!("{doing} {}", image.name()), source };
    match image.is_huge() {
        true => huge::why(error, image.page_shift, 0),
        false => error,
    }
}

/// A memfd that may be sealed.
pub fn memfd(name: &[u8]) -> std::io::Result<File> {
    memfd_of(name, PAGE_SHIFT)
}

/// The same of pages of this size.
fn memfd_of(name: &[u8], page_shift: u8) -> std::io::Result<File> {
    let name = CString::new(&name[..name.len().min(MAX_NAME)])?;
    let mut flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    if page_shift != PAGE_SHIFT {
        // MFD_HUGE_SHIFT is MAP_HUGE_SHIFT (memfd_create(2)).
        let size = huge_pages::size_flag(page_shift) as libc::c_uint;
        flags |= MFdFlags::MFD_HUGETLB | MFdFlags::from_bits_retain(size);
    }
    Ok(File::from(memfd_create(name.as_c_str(), flags)?))
}

/// `None`: the segment is there still, and its contents are what its users have made of them since.
fn segment(image: &ObjectImage, key: i32, removed: bool) -> std::io::Result<Option<Attached>> {
    let id = i32::try_from(image.key.1).map_err(|_| Errno::EINVAL)?;
    if let Some(found) = segments().into_iter().find(|segment| segment.id == id) {
        return match found.key == key && found.size == image.size && found.removed == removed {
            true => Ok(None),
            false => Err(Errno::EEXIST.into()),
        };
    }
    shared_memory::make_segment(id, key, image.size, image.mode, image.page_shift)?;
    let attached = Attached::to(id, image.room());
    if attached.is_err() {
        shared_memory::remove_segment(id)?;
    }
    attached.map(Some)
}
