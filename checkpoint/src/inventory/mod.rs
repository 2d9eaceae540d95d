//! What a process has, and what of it cannot be carried: found without stopping it.
//!
//! The same rules judge a live process ([`inspect`]) and an image just read ([`image_blockers`]), so
//! that what appears between the two is still refused by name.

pub mod files;
pub mod locks;
pub mod mappings;
pub mod relations;
pub mod sockets;
pub mod tree;

use crate::image::{FileKind, FilesImage, OpenFile, ProcessImage, Vma};
use crate::proc::{self, status::Status};
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;

/// One reason why a process cannot be carried.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blocker {
    /// `fd`, `mapping`, `tree`, `namespace`, `kernel`, `identity`, `lock`.
    pub kind: &'static str,
    /// In words, naming the thing.
    pub what: String,
}

impl fmt::Display for Blocker {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.what)
    }
}

/// What the embedder can carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rules {
    /// An image that must stand alone: nothing may be shared with a process that stays.
    Standalone,
    /// Files, pipes and the terminal stay open at home.
    Homed,
}

/// What a process has.
#[derive(Debug, Clone)]
pub struct Inventory {
    /// Bytes of memory an image would hold.
    pub bytes: u64,
    /// Mappings.
    pub vmas: Vec<Vma>,
    /// Open files.
    pub files: FilesImage,
    /// Number of threads.
    pub threads: usize,
    /// Why it cannot be carried; empty: it can.
    pub blockers: Vec<Blocker>,
}

impl Inventory {
    /// Of what is no program, or none any more.
    fn of_nothing(why: Blocker) -> Inventory {
        let files = FilesImage::default();
        Inventory { bytes: 0, vmas: Vec::new(), files, threads: 0, blockers: vec![why] }
    }
}

/// Why a process could not be looked at.
#[derive(Debug, thiserror::Error)]
pub enum InventoryError {
    /// There is no such process (any more).
    #[error("there is no process {0}")]
    Gone(i32),
    /// Not enough rights.
    #[error("process {pid} cannot be looked at: {source}")]
    Io {
        /// Which.
        pid: i32,
        /// Why.
        source: io::Error,
    },
}

impl InventoryError {
    fn from_io(pid: i32, error: io::Error) -> InventoryError {
        match error.raw_os_error() {
            Some(libc::ENOENT | libc::ESRCH) => InventoryError::Gone(pid),
            _ => InventoryError::Io { pid, source: error },
        }
    }
}

/// Looks at a process that is carried alone.
pub fn inspect(pid: i32, rules: Rules) -> Result<Inventory, InventoryError> {
    inspect_one(pid, rules, &[pid])
}

/// Looks at a process and all its descendants, which are to be carried together; parents come before
/// their children. Those that end meanwhile are left out.
pub fn inspect_tree(root: i32) -> Result<Vec<(i32, Inventory)>, InventoryError> {
    let family = tree::descendants(root);
    let mut found = vec![(root, inspect_one(root, Rules::Standalone, &family)?)];
    for &pid in family.iter().filter(|&&pid| pid != root) {
        let Ok(inventory) = inspect_one(pid, Rules::Standalone, &family) else { continue };
        let ended = Status::read(pid).is_ok_and(|status| tree::has_ended(pid, &status));
        if !ended {
            found.push((pid, inventory));
        }
    }
    let mut of_tree = Vec::new();
    relations::blockers(&tree::relations(&family), &mut of_tree);
    if let Some((_, inventory)) = found.first_mut() {
        inventory.blockers.append(&mut of_tree);
    }
    if family.contains(&(std::process::id() as i32))
        && let Some((_, inventory)) = found.first_mut()
    {
        let what = "this program is one of its descendants, and would stop itself".to_string();
        inventory.blockers.push(Blocker { kind: "tree", what });
    }
    if family.len() > crate::image::MAX_PROCESSES
        && let Some((_, inventory)) = found.first_mut()
    {
        let what = format!("it has more than {} descendants", crate::image::MAX_PROCESSES);
        inventory.blockers.push(Blocker { kind: "tree", what });
    }
    Ok(found)
}

/// Looks at one process of a family that is carried together.
fn inspect_one(pid: i32, rules: Rules, family: &[i32]) -> Result<Inventory, InventoryError> {
    let io = |error| InventoryError::from_io(pid, error);
    let status = Status::read(pid).map_err(io)?;
    if let Some(whole) = tree::not_a_program(pid, &status) {
        return Ok(Inventory::of_nothing(whole));
    }
    let mut blockers = Vec::new();
    let vmas = mappings::read(pid).map_err(io)?;
    let files = files::read(pid, family).map_err(io)?;
    tree::relatives(pid, &status, family, &mut blockers);
    tree::surroundings(pid, &mut blockers);
    tree::threads(pid, &status, &mut blockers);
    mappings::blockers(&vmas, rules, &mut blockers);
    mappings::shared_memory(pid, &vmas, &mut blockers);
    file_blockers(&files, rules, &mut blockers);
    blockers.extend(locks::held(pid));
    if rules == Rules::Standalone {
        locks::through_files(pid, &files, &mut blockers);
        working_directory(proc::link(pid, "cwd").ok().as_deref(), pid, &mut blockers);
    }
    // A process that ended meanwhile has no memory and no descriptor table, like every thread of the
    // kernel: kcmp(2) calls that shared, and what was found says nothing.
    if let Some(whole) = tree::not_a_program(pid, &Status::read(pid).map_err(io)?) {
        return Ok(Inventory::of_nothing(whole));
    }
    let bytes = mappings::occupied_bytes(pid, &vmas);
    let threads = status.decimal("Threads").unwrap_or(1) as usize;
    Ok(Inventory { bytes, vmas, files, threads, blockers })
}

/// The same questions to an image that was just read from a frozen process.
pub fn image_blockers(image: &ProcessImage, rules: Rules) -> Vec<Blocker> {
    let mut blockers = Vec::new();
    mappings::blockers(&image.mm.vmas, rules, &mut blockers);
    file_blockers(&image.files, rules, &mut blockers);
    if rules == Rules::Standalone && image.fs.cwd_deleted {
        blockers.push(removed_directory(&image.fs.cwd));
    }
    blockers
}

fn file_blockers(files: &FilesImage, rules: Rules, blockers: &mut Vec<Blocker>) {
    for (index, file) in files.files.iter().enumerate() {
        let Some(fd) = files.fds.iter().find(|fd| fd.file as usize == index) else { continue };
        if let Some(why) = why_not_file(file, fd.fd, rules) {
            blockers.push(Blocker { kind: "fd", what: format!("fd {}: {why}", fd.fd) });
        }
    }
}

fn why_not_file(file: &OpenFile, fd: i32, rules: Rules) -> Option<String> {
    let name = || String::from_utf8_lossy(&file.link).into_owned();
    if let FileKind::Unsupported { what } = &file.kind {
        return Some(what.clone());
    }
    if file.owner != (0, 0, 0) {
        return Some("signal-driven (F_SETOWN, O_ASYNC)".into());
    }
    match rules {
        Rules::Homed if file.flags & libc::O_PATH as u32 != 0 => Some("an O_PATH descriptor".into()),
        Rules::Homed => None,
        Rules::Standalone => match &file.kind {
            FileKind::Pipe { internal: false } if fd > 2 && file.link.starts_with(b"/") => {
                Some(format!("the FIFO {}, whose other end is elsewhere", name()))
            }
            FileKind::Pipe { internal: false } if fd > 2 => Some("a pipe to another process".into()),
            FileKind::Regular { deleted: true } => Some(format!("a deleted file, {}", name())),
            FileKind::Directory if file.link.ends_with(b" (deleted)") => {
                Some(format!("a removed directory, {}", name()))
            }
            _ => None,
        },
    }
}

/// The kernel's ` (deleted)` may be a part of the name: a removed directory has no link to it.
fn working_directory(cwd: Option<&[u8]>, pid: i32, blockers: &mut Vec<Blocker>) {
    let Some(path) = cwd.and_then(|cwd| cwd.strip_suffix(b" (deleted)")) else { return };
    if fs::metadata(format!("/proc/{pid}/cwd")).is_ok_and(|meta| meta.nlink() == 0) {
        blockers.push(removed_directory(path));
    }
}

fn removed_directory(path: &[u8]) -> Blocker {
    let what = format!("its working directory {} has been removed", String::from_utf8_lossy(path));
    Blocker { kind: "fd", what }
}
