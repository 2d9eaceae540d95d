//! What a process has, and what of it cannot be carried: found without stopping it.
//!
//! The same rules judge a live process ([`inspect`]) and an image just read ([`image_blockers`]), so
//! that what appears between the two is still refused by name.

mod aio;
pub mod cpu;
pub mod family;
pub mod files;
pub mod limits;
pub mod locks;
pub mod mapped_files;
pub mod mappings;
pub mod nameless;
pub mod objects;
pub mod owners;
pub mod pipes;
pub mod relations;
pub mod shares;
pub mod sockets;
pub(crate) mod spread;
pub mod terminals;
pub mod timers;
pub mod traits;
pub mod tree;
pub mod watches;

use crate::image::{FileKind, FilesImage, LockKind, OpenFile, ProcessImage, Vma};
use crate::proc::{self, status::Status, vm_flags};
use crate::sys::bpf::threads;
use family::Family;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;

/// With fewer processes, to learn what the kernel's flags of mappings mean takes longer than it saves.
const MANY_PROCESSES: usize = 24;
/// So often a family that changes is looked at before what is found in the way counts.
const LOOKS: usize = 4;

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
    /// Bytes of memory an image would hold; 0 where nobody wanted to know ([`inspect_quickly`]).
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
    inspect_with(pid, rules, true)
}

/// The same without the flags of mappings ([`mappings::read_quickly`]) and the bytes of memory, for who is about to freeze it: almost
/// all that is refused by them has a name as well, and the rest is refused when they are read.
pub fn inspect_quickly(pid: i32, rules: Rules) -> Result<Inventory, InventoryError> {
    inspect_with(pid, rules, is_wanted_whole(rules))
}

/// Whether all of it is of use before a freeze: a guest's seals are told by the flags of its mappings alone,
/// and the cost of a move by its memory.
fn is_wanted_whole(rules: Rules) -> bool {
    rules == Rules::Homed
}

fn inspect_with(pid: i32, rules: Rules, whole: bool) -> Result<Inventory, InventoryError> {
    let family = Family::of(vec![pid]);
    let mut found = inspect_one(pid, rules, &family, whole)?;
    if rules == Rules::Standalone {
        let of_sockets = sockets::blockers(&[(pid, &found.files)], &[pid]);
        let of_terminals = terminals::blockers(&[(pid, &found.files)], &[pid]);
        found.blockers.extend(of_sockets.into_iter().chain(of_terminals).map(|(_, blocker)| blocker));
    }
    Ok(found)
}

/// Looks at a process and all its descendants, which are to be carried together; parents come before
/// their children. Those that end meanwhile are left out.
pub fn inspect_tree(root: i32, rules: Rules) -> Result<Vec<(i32, Inventory)>, InventoryError> {
    let mut pids = tree::descendants(root);
    let mut looks = 0;
    loop {
        let found = inspect_family(&Family::of_tree(pids.clone()), rules)?;
        looks += 1;
        if found.iter().all(|(_, one)| one.blockers.is_empty()) || looks == LOOKS {
            return Ok(found);
        }
        // A child that was born meanwhile looks like a stranger that shares things with its parent.
        let now = tree::descendants(root);
        if now == pids {
            return Ok(found);
        }
        pids = now;
    }
}

/// The same, of those that are in the family by now.
fn inspect_family(family: &Family, rules: Rules) -> Result<Vec<(i32, Inventory)>, InventoryError> {
    let Some(&root) = family.first() else { return Ok(Vec::new()) };
    if family.len() >= MANY_PROCESSES {
        vm_flags::prepare();
    }
    let whole = is_wanted_whole(rules);
    let mut found = vec![(root, inspect_one(root, rules, family, whole)?)];
    let look = |pid: i32| {
        let inventory = inspect_one(pid, rules, family, whole).ok()?;
        // One without blockers was alive a moment ago.
        let ended = !inventory.blockers.is_empty()
            && Status::read(pid).is_ok_and(|status| tree::has_ended(pid, &status));
        (!ended).then_some((pid, inventory))
    };
    // The root comes first.
    found.extend(family.map(1, look).into_iter().flatten());
    let tables: Vec<(i32, &FilesImage)> =
        found.iter().map(|(pid, one)| (proc::face(*pid), &one.files)).collect();
    let of_terminals = terminals::blockers(&tables, family);
    for (pid, blocker) in sockets::blockers(&tables, family).into_iter().chain(of_terminals) {
        if let Some((_, inventory)) =
            found.iter_mut().find(|(other, _)| *other == pid || proc::face(*other) == pid)
        {
            inventory.blockers.push(blocker);
        }
    }
    if rules == Rules::Homed {
        let tables: Vec<(&FilesImage, &[Vma])> =
            found.iter().map(|(_, one)| (&one.files, one.vmas.as_slice())).collect();
        let more = objects::open_as_well(&tables);
        for ((_, inventory), more) in found.iter_mut().zip(more) {
            inventory.blockers.extend(more);
        }
    }
    let mut of_tree = Vec::new();
    // At home the processes keep their sessions and groups.
    if rules == Rules::Standalone {
        let relations = tree::relations(family);
        relations::blockers(&relations, &tree::in_use, &mut of_tree);
        shares::alive(family, &relations, &mut of_tree);
    }
    if let Some((_, inventory)) = found.first_mut() {
        inventory.blockers.append(&mut of_tree);
    }
    if family.has(std::process::id() as i32)
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
fn inspect_one(pid: i32, rules: Rules, family: &Family, whole: bool) -> Result<Inventory, InventoryError> {
    threads::prepare_beside(pid, || inspect_prepared(pid, rules, family, whole))
}

fn inspect_prepared(
    pid: i32,
    rules: Rules,
    family: &Family,
    whole: bool,
) -> Result<Inventory, InventoryError> {
    let io = |error| InventoryError::from_io(pid, error);
    let status = Status::read(pid).map_err(io)?;
    if let Some(whole) = tree::not_a_program(pid, &status, rules) {
        return Ok(Inventory::of_nothing(whole));
    }
    let face = proc::face(pid);
    let mut blockers = Vec::new();
    let vmas = if whole { mappings::read(face) } else { mappings::read_quickly(face) }.map_err(io)?;
    let files = files::read(face, family).map_err(io)?;
    let seen = threads::of_many(pid);
    tree::relatives(pid, &status, seen.as_deref(), family, rules, &mut blockers);
    tree::surroundings(face, family, rules, &mut blockers);
    traits::outside(&status, &mut blockers);
    limits::blockers(face, &status, &mut blockers);
    tree::threads(pid, &status, seen, rules, &mut blockers);
    timers::blockers(face, family, &mut blockers);
    mappings::blockers(&vmas, rules, &mut blockers);
    objects::blockers(face, family, &vmas, rules, &mut blockers);
    file_blockers(&files, rules, &mut blockers);
    locks::blockers(&files, rules, &mut blockers);
    nameless::blockers(face, family, &files, rules, &mut blockers);
    if rules == Rules::Homed {
        mapped_files::blockers(face, family, &vmas, &mut blockers);
    }
    if rules == Rules::Standalone {
        aio::blockers(face, &vmas, &mut blockers);
        locks::of_others(face, family, &files, &mut blockers);
        owners::outside(family, &files, &mut blockers);
        working_directory(proc::link(face, "cwd").ok().as_deref(), face, &mut blockers);
    }
    // A process that ended meanwhile has no memory and no descriptor table, like every thread of the
    // kernel: kcmp(2) calls that shared, and what was found says nothing.
    if let Some(whole) = tree::not_a_program(pid, &Status::read(pid).map_err(io)?, rules) {
        return Ok(Inventory::of_nothing(whole));
    }
    let bytes = if whole { mappings::occupied_bytes(face, &vmas) } else { 0 };
    let threads = status.decimal("Threads").unwrap_or(1) as usize;
    Ok(Inventory { bytes, vmas, files, threads, blockers })
}

/// The same questions to an image that was just read from a frozen process.
pub fn image_blockers(image: &ProcessImage, rules: Rules) -> Vec<Blocker> {
    let mut blockers = Vec::new();
    mappings::blockers(&image.mm.vmas, rules, &mut blockers);
    file_blockers(&image.files, rules, &mut blockers);
    locks::blockers(&image.files, rules, &mut blockers);
    tree::image_threads(image, rules, &mut blockers);
    traits::blockers(image, rules, &mut blockers);
    if rules == Rules::Standalone {
        let apart = image.threads.iter().filter_map(|thread| thread.apart.fs.as_ref());
        let removed = std::iter::once(&image.fs).chain(apart).filter(|fs| fs.cwd_deleted);
        blockers.extend(removed.map(|fs| removed_directory(&fs.cwd)));
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
    match (&file.kind, rules) {
        (FileKind::Socket { what }, Rules::Homed) => return Some(what.clone()),
        (FileKind::PtyMaster { .. }, Rules::Homed) => {
            return Some("the master side of a pseudo-terminal".into());
        }
        _ => {}
    }
    // A lease sets it too, and is named by itself.
    let leased = file.locks.iter().any(|lock| lock.kind == LockKind::Lease);
    let signals = file.flags & libc::O_ASYNC as u32 != 0 && !leased;
    match rules {
        Rules::Homed if signals => Some("signal-driven (F_SETOWN, O_ASYNC)".into()),
        Rules::Homed if matches!(file.kind, FileKind::Proc { .. }) => {
            Some(format!("a file of the process file system, {}", name()))
        }
        Rules::Homed if file.flags & libc::O_PATH as u32 != 0 => Some("an O_PATH descriptor".into()),
        Rules::Homed => match &file.kind {
            FileKind::Memfd if !file.locks.is_empty() => Some(format!("a memfd with a lock, {}", name())),
            FileKind::HugeMemfd => Some("a memfd of huge pages (MFD_HUGETLB)".into()),
            FileKind::Pidfd { .. } => Some("a kernel object of type pidfd".into()),
            FileKind::Inotify { .. } => Some("a kernel object of type inotify".into()),
            FileKind::Namespace => Some(format!("a kernel file, {}", name())),
            FileKind::Epoll { targets } => {
                let moved = targets.iter().find(|target| target.at != (0, target.fd))?;
                Some(format!("an epoll that watches a file which was closed as fd {}", moved.fd))
            }
            _ => None,
        },
        Rules::Standalone => match &file.kind {
            FileKind::Pipe { internal: false } if fd > 2 && file.link.starts_with(b"/") => {
                Some(format!("the FIFO {}, whose other end is elsewhere", name()))
            }
            FileKind::Pipe { internal: false } if fd > 2 => Some("a pipe to another process".into()),
            FileKind::Path { deleted: true } => {
                Some(format!("an O_PATH descriptor of a deleted file, {}", name()))
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
