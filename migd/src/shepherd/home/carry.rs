//! The process' open files while it is away: they stay open at home, under handles of the home view.

use super::{Home, MoveError};
use crate::homefs::{HandleKind, HomeView};
use checkpoint::image::{Backing, FileKind, FilesImage, OpenFile, ProcessImage};
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
    /// Registers everything that stays open at home, and writes the handles into the image.
    pub(super) fn carry_out(&mut self, image: &mut ProcessImage) -> Result<(), MoveError> {
        let view = self.view.clone().ok_or_else(|| MoveError::Failed("there is no home view".into()))?;
        let pidfd = pidfd_open(self.args.pid).map_err(MoveError::failed)?;
        let shared = shared_outside(self.args.pid, &image.files);
        self.carried = Carried::default();
        for (index, file) in image.files.files.iter_mut().enumerate() {
            let Some(kind) = handle_kind(file, shared.contains(&(index as u32))) else { continue };
            let fds: Vec<i32> =
                image.files.fds.iter().filter(|fd| fd.file as usize == index).map(|fd| fd.fd).collect();
            let Some(&first) = fds.first() else { continue };
            let copy = pidfd_getfd(pidfd.as_fd(), first).map_err(MoveError::failed)?;
            let handle = view.add_handle(copy, kind).map_err(MoveError::failed)?;
            if kind == (HandleKind::Regular { shared_position: true }) {
                self.carried.shared.insert(handle);
            }
            self.carried.fds.extend(fds.into_iter().map(|fd| (fd, handle)));
            file.kind = FileKind::Foreign { handle };
        }
        self.carry_mapped(&view, image)
    }

    /// Mapped files whose name is gone are reached by a handle too.
    fn carry_mapped(&self, view: &HomeView, image: &mut ProcessImage) -> Result<(), MoveError> {
        let pid = self.args.pid;
        let mut known: BTreeMap<(u64, u64), Vec<u8>> = BTreeMap::new();
        for vma in &mut image.mm.vmas {
            let Backing::File(file) = &mut vma.backing else { continue };
            if !file.deleted {
                continue;
            }
            let path = match known.get(&(file.dev, file.ino)) {
                Some(path) => path.clone(),
                None => {
                    let link = format!("/proc/{pid}/map_files/{:x}-{:x}", vma.start, vma.end);
                    let opened = fs::File::open(&link).map_err(|error| {
                        MoveError::Failed(format!(
                            "a mapped file whose name is gone cannot be opened: {error}"
                        ))
                    })?;
                    let kind = HandleKind::Regular { shared_position: false };
                    let handle = view.add_handle(OwnedFd::from(opened), kind).map_err(MoveError::failed)?;
                    let path = view.handle_path(handle).into_os_string().into_vec();
                    known.insert((file.dev, file.ino), path.clone());
                    path
                }
            };
            file.path = path;
            file.deleted = false;
        }
        Ok(())
    }
}

fn handle_kind(file: &OpenFile, shared: bool) -> Option<HandleKind> {
    match &file.kind {
        FileKind::Regular { .. } => Some(HandleKind::Regular { shared_position: shared }),
        FileKind::Directory => Some(HandleKind::Directory),
        FileKind::Tty | FileKind::Pipe { .. } => Some(HandleKind::Stream),
        _ => None,
    }
}

/// Which regular files' open file descriptions another process has too: their position is shared
/// with it, as in `{ mosrun a; b; } > out`.
fn shared_outside(pid: i32, files: &FilesImage) -> BTreeSet<u32> {
    let mut wanted: BTreeMap<(u64, u64), Vec<(u32, i32)>> = BTreeMap::new();
    for fd in &files.fds {
        let Some(file) = files.files.get(fd.file as usize) else { continue };
        if matches!(file.kind, FileKind::Regular { .. }) {
            wanted.entry((file.stat.0, file.stat.1)).or_default().push((fd.file, fd.fd));
        }
    }
    let mut out = BTreeSet::new();
    if wanted.is_empty() {
        return out;
    }
    let Ok(processes) = fs::read_dir("/proc") else { return out };
    for other in processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok()) {
        if other == pid || other == std::process::id() as i32 {
            continue;
        }
        let Ok(dir) = fs::read_dir(format!("/proc/{other}/fd")) else { continue };
        for entry in dir.flatten() {
            let Some(number) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
                continue;
            };
            let Ok(stat) = fs::metadata(entry.path()) else { continue };
            for &(index, fd) in wanted.get(&(stat.dev(), stat.ino())).into_iter().flatten() {
                if checkpoint::sys::kcmp::same_file(pid, fd, other, number).unwrap_or(true) {
                    out.insert(index);
                }
            }
        }
    }
    out
}
