//! The process' open files while it is away: they stay open at home, under handles of the home view.

use super::{Home, MoveError};
use crate::homefs::{HandleKind, HomeView};
use checkpoint::dump::objects::Object;
use checkpoint::image::{Backing, FileKind, OpenFile, ProcessImage};
use checkpoint::inventory::mapped_files::named_and_written;
use checkpoint::sys::fd::{pidfd_getfd, pidfd_open};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;

/// What the deputy still holds: descriptor number → handle of the same open file.
#[derive(Debug, Default)]
pub struct Carried {
    /// The deputy's own descriptors that stand for a handle.
    pub fds: BTreeMap<i32, u64>,
    /// Handles whose position is shared with other processes at home.
    pub shared: BTreeSet<u64>,
}

impl Home {
    /// Registers everything that stays open at home, and writes the handles into the images. What
    /// several of the processes share has one handle. Objects are not among it: they go with them.
    pub(super) fn carry_out(
        &self,
        images: &mut [ProcessImage],
        objects: &[Object],
    ) -> Result<Vec<Carried>, MoveError> {
        let moves =
            |file: &OpenFile| objects.iter().any(|object| object.image.key == (file.stat.0, file.stat.1));
        let view = self.view.clone().ok_or_else(|| MoveError::Failed("there is no home view".into()))?;
        let family: Vec<i32> = images.iter().map(|image| image.pid).collect();
        let outside = shared_outside(&family, images);
        // By the number under which the image says that it is shared.
        let mut known: BTreeMap<u32, u64> = BTreeMap::new();
        let mut mapped = Mapped::new();
        let mut all = Vec::with_capacity(images.len());
        for (who, image) in images.iter_mut().enumerate() {
            let pid = image.pid;
            let pidfd = pidfd_open(pid).map_err(MoveError::failed)?;
            let mut carried = Carried::default();
            for (index, file) in image.files.files.iter_mut().enumerate() {
                if moves(file) {
                    continue;
                }
                let Some(kind) = handle_kind(file, outside.contains(&(who, index as u32))) else { continue };
                let fds: Vec<i32> =
                    image.files.fds.iter().filter(|fd| fd.file as usize == index).map(|fd| fd.fd).collect();
                let Some(&first) = fds.first() else { continue };
                let handle = match known.get(&file.shared).filter(|_| file.shared != 0) {
                    Some(&handle) => handle,
                    None => {
                        let copy = pidfd_getfd(pidfd.as_fd(), first).map_err(MoveError::failed)?;
                        view.add_handle(copy, kind).map_err(MoveError::failed)?
                    }
                };
                if file.shared != 0 {
                    known.insert(file.shared, handle);
                }
                if kind == (HandleKind::Regular { shared_position: true }) {
                    carried.shared.insert(handle);
                }
                carried.fds.extend(fds.into_iter().map(|fd| (fd, handle)));
                file.kind = FileKind::Foreign { handle };
            }
            carry_mapped(&view, image, &mut mapped)?;
            all.push(carried);
        }
        Ok(all)
    }
}

/// The paths of handles of mapped files: by device and inode number as `maps` has them, and whether it can be written.
type Mapped = BTreeMap<(u64, u64, bool), Vec<u8>>;

/// Mapped files are reached by a handle too if their name is gone, or if they are written through memory: that is
/// to come into this very file, whatever becomes of its name meanwhile.
fn carry_mapped(view: &HomeView, image: &mut ProcessImage, known: &mut Mapped) -> Result<(), MoveError> {
    let pid = image.pid;
    for vma in &mut image.mm.vmas {
        let writes = named_and_written(vma).is_some();
        let (start, end) = (vma.start, vma.end);
        let Backing::File(file) = &mut vma.backing else { continue };
        if !file.deleted && !writes {
            continue;
        }
        let key = (file.dev, file.ino, writes);
        let path = match known.get(&key) {
            Some(path) => path.clone(),
            None => {
                let link = format!("/proc/{pid}/map_files/{start:x}-{end:x}");
                let opened =
                    fs::OpenOptions::new().read(true).write(writes).open(&link).map_err(|error| {
                        let name = String::from_utf8_lossy(&file.path);
                        MoveError::Failed(format!(
                            "the mapped file {name} cannot be opened for the guest: {error}"
                        ))
                    })?;
                let kind = HandleKind::Regular { shared_position: false };
                let handle = view.add_handle(OwnedFd::from(opened), kind).map_err(MoveError::failed)?;
                let path = view.handle_path(handle).into_os_string().into_vec();
                known.insert(key, path.clone());
                path
            }
        };
        file.path = path;
        file.deleted = false;
    }
    Ok(())
}

fn handle_kind(file: &OpenFile, shared: bool) -> Option<HandleKind> {
    match &file.kind {
        FileKind::Regular { .. } => Some(HandleKind::Regular { shared_position: shared }),
        FileKind::Directory => Some(HandleKind::Directory),
        FileKind::Tty | FileKind::Pipe { .. } => Some(HandleKind::Stream),
        _ => None,
    }
}

/// Which regular files' open file descriptions a process outside the subtree has too: their position is
/// shared with it, as in `{ mosrun a; b; } > out`. Gives the process' place and the file's.
fn shared_outside(family: &[i32], images: &[ProcessImage]) -> BTreeSet<(usize, u32)> {
    /// A file of the subtree: whose it is, its place there, a descriptor.
    type Wanted = (usize, u32, i32);
    let mut wanted: BTreeMap<(u64, u64), Vec<Wanted>> = BTreeMap::new();
    for (who, image) in images.iter().enumerate() {
        for fd in &image.files.fds {
            let Some(file) = image.files.files.get(fd.file as usize) else { continue };
            if matches!(file.kind, FileKind::Regular { .. }) {
                let alike = wanted.entry((file.stat.0, file.stat.1)).or_default();
                alike.push((who, fd.file, fd.fd));
            }
        }
    }
    let mut out = BTreeSet::new();
    if wanted.is_empty() {
        return out;
    }
    let Ok(processes) = fs::read_dir("/proc") else { return out };
    for other in processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok()) {
        if family.contains(&other) || other == std::process::id() as i32 {
            continue;
        }
        let Ok(dir) = fs::read_dir(format!("/proc/{other}/fd")) else { continue };
        for entry in dir.flatten() {
            let Some(number) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
                continue;
            };
            let Ok(stat) = fs::metadata(entry.path()) else { continue };
            for &(who, index, fd) in wanted.get(&(stat.dev(), stat.ino())).into_iter().flatten() {
                if checkpoint::sys::kcmp::same_file(images[who].pid, fd, other, number).unwrap_or(true) {
                    out.insert((who, index));
                }
            }
        }
    }
    out
}
