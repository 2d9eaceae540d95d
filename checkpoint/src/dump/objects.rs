//! Objects of a frozen family: found among its mappings and open files, which from then on name them, and
//! read from the files behind them (`/proc/PID/map_files`, `/proc/PID/fd`; proc(5)).

use super::{DumpError, huge};
use crate::image::objects::{MAX_OBJECTS, ObjectImage, ObjectKey, ObjectKind};
use crate::image::{Backing, FileKind, ProcessImage, Vma};
use crate::inventory::objects::{
    is_object, is_temporary, segment_key, segment_of, segments, writes_to_deleted,
};
use crate::inventory::{Blocker, Rules};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::unistd::{Whence, lseek};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};

/// Largest part given at once, bytes.
pub(super) const RUN: usize = 1 << 20;

/// An object, and where its contents are read.
pub struct Object {
    /// What it is.
    pub image: ObjectImage,
    file: File,
}

/// Which of them are objects.
struct Which {
    /// Shared anonymous memory that several of the processes map.
    several: BTreeSet<u64>,
    /// Files that were made without a name.
    temporary: BTreeMap<ObjectKey, u32>,
    /// Of deleted files only these: the others stay open at home. `None`: all.
    deleted: Option<BTreeSet<ObjectKey>>,
}

impl Which {
    fn has_deleted(&self, key: ObjectKey) -> bool {
        self.deleted.as_ref().is_none_or(|deleted| deleted.contains(&key))
    }
}

/// Finds the objects of the family and lets its images name them.
pub fn collect(pids: &[i32], images: &mut [ProcessImage], rules: Rules) -> Result<Vec<Object>, DumpError> {
    let mut found: BTreeMap<ObjectKey, Object> = BTreeMap::new();
    let deleted = match rules {
        Rules::Standalone => None,
        Rules::Homed => Some(written_through_memory(pids, images)?),
    };
    let which = Which { several: shared_by_several(images), temporary: temporary_files(images), deleted };
    for (image, &pid) in images.iter_mut().zip(pids) {
        for vma in &mut image.mm.vmas {
            if let Some(backing) = of_mapping(pid, vma, &which, &mut found)? {
                vma.backing = backing;
            }
        }
        for (index, file) in image.files.files.iter().enumerate().filter(|(_, file)| is_object(file)) {
            let key = (file.stat.0, file.stat.1);
            if !file.kind.is_memfd() && !which.has_deleted(key) {
                continue;
            }
            let fd = image.files.fds.iter().find(|fd| fd.file as usize == index);
            if let (Some(fd), false) = (fd, found.contains_key(&key)) {
                let opened = open(pid, format!("fd/{}", fd.fd))?;
                let kind = match file.kind {
                    FileKind::Memfd | FileKind::HugeMemfd => memfd(pid, &opened, &file.link)?,
                    _ => {
                        let path = without_suffix(&file.link).to_vec();
                        ObjectKind::Deleted { path, temporary: which.temporary.get(&key).copied() }
                    }
                };
                found.insert(key, Object::new(pid, key, kind, opened)?);
            }
        }
        if found.len() > MAX_OBJECTS {
            return Err(DumpError::Strange { what: "the number of files without a name", pid });
        }
    }
    Ok(found.into_values().collect())
}

/// Descriptors in flight inside a socket whose contents cannot be read: nobody has them open.
pub fn unreachable(images: &[ProcessImage], objects: &[Object]) -> Vec<Blocker> {
    let in_flight = images.iter().flat_map(|image| &image.files.in_flight);
    let lost = in_flight.filter(|file| {
        let key = (file.stat.0, file.stat.1);
        is_object(file) && !objects.iter().any(|object| object.image.key == key)
    });
    lost.map(|file| {
        let name = String::from_utf8_lossy(&file.link);
        Blocker { kind: "fd", what: format!("{name} is in flight inside a socket, and nobody has it open") }
    })
    .collect()
}

/// Shared anonymous memory that more than one of them maps.
fn shared_by_several(images: &[ProcessImage]) -> BTreeSet<u64> {
    let mut users: BTreeMap<u64, usize> = BTreeMap::new();
    for image in images {
        let ids: BTreeSet<u64> = image.mm.vmas.iter().filter_map(shared_id).collect();
        ids.into_iter().for_each(|id| *users.entry(id).or_default() += 1);
    }
    users.into_iter().filter(|&(_, users)| users > 1).map(|(id, _)| id).collect()
}

/// Deleted files that are written through memory: where they are not, they cannot be written so.
fn written_through_memory(pids: &[i32], images: &[ProcessImage]) -> Result<BTreeSet<ObjectKey>, DumpError> {
    let mut keys = BTreeSet::new();
    for (image, &pid) in images.iter().zip(pids) {
        for vma in image.mm.vmas.iter().filter(|vma| writes_to_deleted(vma)) {
            let opened = open(pid, format!("map_files/{:x}-{:x}", vma.start, vma.end))?;
            let meta = opened.metadata().map_err(|source| failed(pid, source))?;
            keys.insert((meta.dev(), meta.ino()));
        }
    }
    Ok(keys)
}

/// Files whose description by `O_TMPFILE` is there, with its access mode.
fn temporary_files(images: &[ProcessImage]) -> BTreeMap<ObjectKey, u32> {
    let files = images.iter().flat_map(|image| &image.files.files);
    let temporary = files.filter(|file| is_object(file) && is_temporary(file));
    temporary.map(|file| ((file.stat.0, file.stat.1), file.flags & libc::O_ACCMODE as u32)).collect()
}

fn shared_id(vma: &Vma) -> Option<u64> {
    match vma.backing {
        Backing::SharedAnon { id, .. } => Some(id),
        _ => None,
    }
}

/// What the mapping is of, if it is of an object.
fn of_mapping(
    pid: i32,
    vma: &Vma,
    which: &Which,
    found: &mut BTreeMap<ObjectKey, Object>,
) -> Result<Option<Backing>, DumpError> {
    let (offset, may_write) = match &vma.backing {
        // Of huge pages there is no second mapping by mremap(2), so that it is made from a file always.
        Backing::SharedAnon { id, offset } if which.several.contains(id) || vma.is_huge() => (*offset, true),
        Backing::File(file) if file.deleted => (file.offset, file.may_write),
        _ => return Ok(None),
    };
    let is_plain = |path: &[u8]| !path.starts_with(b"/memfd:") && !path.starts_with(b"/SYSV");
    let plain = matches!(&vma.backing, Backing::File(file) if is_plain(&file.path));
    if plain && which.deleted.as_ref().is_some_and(BTreeSet::is_empty) {
        return Ok(None);
    }
    let opened = open(pid, format!("map_files/{:x}-{:x}", vma.start, vma.end))?;
    let meta = opened.metadata().map_err(|source| failed(pid, source))?;
    let segment = match &vma.backing {
        Backing::File(file) => segment_of(file),
        _ => None,
    };
    let key = segment.map_or((meta.dev(), meta.ino()), segment_key);
    if plain && !which.has_deleted(key) {
        return Ok(None);
    }
    if let Entry::Vacant(place) = found.entry(key) {
        let kind = match (&vma.backing, segment) {
            (_, Some(id)) => sysv(pid, id)?,
            (Backing::File(file), _) if file.path.starts_with(b"/memfd:") => memfd(pid, &opened, &file.path)?,
            (Backing::File(file), _) => {
                ObjectKind::Deleted { path: file.path.clone(), temporary: which.temporary.get(&key).copied() }
            }
            _ => ObjectKind::SharedAnon,
        };
        place.insert(Object::new(pid, key, kind, opened)?);
    }
    Ok(Some(Backing::Object { key, offset, may_write }))
}

fn sysv(pid: i32, id: i32) -> Result<ObjectKind, DumpError> {
    let known = segments().into_iter().find(|segment| segment.id == id);
    let segment = known.ok_or(DumpError::Strange { what: "sysvipc/shm", pid })?;
    Ok(ObjectKind::SysV { key: segment.key, removed: segment.removed })
}

fn memfd(pid: i32, file: &File, link: &[u8]) -> Result<ObjectKind, DumpError> {
    let name = without_suffix(link).strip_prefix(b"/memfd:").unwrap_or_default().to_vec();
    let seals = fcntl(file, FcntlArg::F_GET_SEALS).map_err(|errno| failed(pid, errno.into()))?;
    Ok(ObjectKind::Memfd { name, seals: seals as u32 })
}

fn without_suffix(link: &[u8]) -> &[u8] {
    link.strip_suffix(b" (deleted)").unwrap_or(link)
}

fn open(pid: i32, name: String) -> Result<File, DumpError> {
    let path = format!("/proc/{pid}/{name}");
    // Not as read: that is a trace too. Where it is not ours, not all kernels allow it.
    let quietly = OpenOptions::new().read(true).custom_flags(libc::O_NOATIME).open(&path);
    quietly.or_else(|_| File::open(&path)).map_err(|source| failed(pid, source))
}

fn failed(pid: i32, source: std::io::Error) -> DumpError {
    DumpError::Proc { what: "a file without a name (CAP_CHECKPOINT_RESTORE)", pid, source }
}

pub(super) fn unread(source: std::io::Error) -> DumpError {
    DumpError::Proc { what: "the contents of a file without a name", pid: 0, source }
}

impl Object {
    fn new(pid: i32, key: ObjectKey, kind: ObjectKind, file: File) -> Result<Object, DumpError> {
        let meta = fs::File::metadata(&file).map_err(|source| failed(pid, source))?;
        let (mut size, mut mode, mut owner) = (meta.len(), meta.mode() & 0o7777, (meta.uid(), meta.gid()));
        if let ObjectKind::SysV { .. } = kind
            && let Some(segment) = segments().into_iter().find(|segment| segment_key(segment.id) == key)
        {
            (size, mode, owner) = (segment.size, segment.mode, segment.owner);
        }
        let page_shift = huge::page_shift(&file).map_err(|source| failed(pid, source))?;
        let times = [(meta.atime(), meta.atime_nsec()), (meta.mtime(), meta.mtime_nsec())];
        Ok(Object { image: ObjectImage { key, kind, size, mode, owner, times, page_shift }, file })
    }

    /// What its contents are read from.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Calls `each` with offset and contents (whole pages) of all that is not a hole.
    pub fn for_each_run<E: From<DumpError>>(
        &self,
        mut each: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.image.is_huge() {
            return huge::for_each_run(&self.file, self.image.page_shift, each);
        }
        let mut buffer = vec![0; RUN];
        let size = self.image.size;
        let mut at = 0;
        while at < size {
            let start = match lseek(&self.file, at as i64, Whence::SeekData) {
                Ok(start) => (start as u64) & !4095,
                // ENXIO: a hole to the end.
                Err(Errno::ENXIO) => break,
                Err(errno) => return Err(unread(errno.into()).into()),
            };
            let end =
                lseek(&self.file, start as i64, Whence::SeekHole).map_err(|errno| unread(errno.into()))?;
            let end = (end as u64).next_multiple_of(4096).min(size.next_multiple_of(4096));
            let mut from = start;
            while from < end {
                let whole = (end - from).min(RUN as u64) as usize;
                let part = &mut buffer[..whole];
                let inside = size.saturating_sub(from).min(whole as u64) as usize;
                // Behind the end of the file a page is zero.
                part[inside..].fill(0);
                self.file.read_exact_at(&mut part[..inside], from).map_err(unread)?;
                each(from, part)?;
                from += whole as u64;
            }
            at = end.max(at + 1);
        }
        Ok(())
    }
}
