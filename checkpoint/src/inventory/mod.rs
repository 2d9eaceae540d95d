//! What a process has, and what of it cannot be carried: found without stopping it.
//!
//! The same rules judge a live process ([`inspect`]) and an image just read ([`image_blockers`]), so
//! that what appears between the two is still refused by name.

pub mod files;
pub mod locks;
pub mod sockets;

use crate::image::{Backing, FileKind, FilesImage, ProcessImage, Vma, VmaFlags};
use crate::proc::{self, maps, status::Status};
use crate::sys::kcmp::{self, Shared};
use crate::sys::pagemap_scan::{self, IS_FILE};
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

/// Looks at a process.
pub fn inspect(pid: i32, rules: Rules) -> Result<Inventory, InventoryError> {
    let io = |error| InventoryError::from_io(pid, error);
    let status = Status::read(pid).map_err(io)?;
    let mut blockers = Vec::new();
    if let Some(whole) = not_a_program(pid, &status) {
        blockers.push(whole);
        let files = FilesImage::default();
        return Ok(Inventory { bytes: 0, vmas: Vec::new(), files, threads: 0, blockers });
    }
    let vmas = mappings(pid).map_err(io)?;
    let files = files::read(pid).map_err(io)?;
    tree(pid, &status, &mut blockers);
    identity(pid, &status, &mut blockers);
    vma_blockers(&vmas, &mut blockers);
    shared_memory(pid, &vmas, &mut blockers);
    file_blockers(pid, &files, rules, &mut blockers);
    blockers.extend(locks::held(pid));
    let bytes = occupied_bytes(pid, &vmas);
    let threads = status.decimal("Threads").unwrap_or(1) as usize;
    Ok(Inventory { bytes, vmas, files, threads, blockers })
}

/// The same questions to an image that was just read from a frozen process.
pub fn image_blockers(image: &ProcessImage, rules: Rules) -> Vec<Blocker> {
    let mut blockers = Vec::new();
    vma_blockers(&image.mm.vmas, &mut blockers);
    file_blockers(image.pid, &image.files, rules, &mut blockers);
    blockers
}

/// Mappings of a process, with deleted files recognised by what their name stands for now.
pub fn mappings(pid: i32) -> io::Result<Vec<Vma>> {
    let mut vmas = maps::parse(&proc::read(pid, "smaps")?);
    for vma in &mut vmas {
        if let Backing::File(file) = &mut vma.backing {
            let gone = !names_file(pid, &file.path, file.dev, file.ino);
            if gone && let Some(path) = file.path.strip_suffix(b" (deleted)") {
                file.path = path.to_vec();
            }
            file.deleted = gone;
        }
    }
    Ok(vmas)
}

/// Whether `path`, as the process sees it, is the file with this inode number.
///
/// The device is compared only if the mount is not an overlay or a subvolume, where `stat` and `maps`
/// name different ones.
pub(crate) fn names_file(pid: i32, path: &[u8], dev: u64, ino: u64) -> bool {
    use std::os::unix::ffi::OsStrExt;
    let mut full = format!("/proc/{pid}/root").into_bytes();
    full.extend_from_slice(path);
    let Ok(found) = fs::symlink_metadata(std::ffi::OsStr::from_bytes(&full)) else { return false };
    found.ino() == ino && (found.dev() == dev || libc::major(dev) == 0 || libc::major(found.dev()) == 0)
}

fn not_a_program(pid: i32, status: &Status) -> Option<Blocker> {
    let what = match status.state() {
        'Z' => format!("process {pid} has ended and waits for its parent (a zombie)"),
        'X' => format!("process {pid} has ended"),
        _ if status.line("VmSize").is_none() => format!("process {pid} is a thread of the kernel"),
        _ => return None,
    };
    Some(Blocker { kind: "kernel", what })
}

fn tree(pid: i32, status: &Status, blockers: &mut Vec<Blocker>) {
    let children: Vec<i32> = proc::tids(pid)
        .unwrap_or_default()
        .into_iter()
        .flat_map(|tid| {
            let text = fs::read_to_string(format!("/proc/{pid}/task/{tid}/children")).unwrap_or_default();
            text.split_ascii_whitespace().filter_map(|word| word.parse().ok()).collect::<Vec<i32>>()
        })
        .collect();
    if !children.is_empty() {
        let list: Vec<String> = children.iter().take(5).map(i32::to_string).collect();
        let what =
            format!("it has child processes ({}): only a process without children moves", list.join(", "));
        blockers.push(Blocker { kind: "tree", what });
    }
    let parent = status.decimal("PPid").unwrap_or(0) as i32;
    if parent > 0 {
        for (what, name) in [
            (Shared::Memory, "its memory (vfork)"),
            (Shared::Files, "its descriptor table"),
            (Shared::Fs, "its working directory"),
        ] {
            if kcmp::shared(pid, parent, what).unwrap_or(false) {
                let what = format!("it shares {name} with its parent, process {parent}");
                blockers.push(Blocker { kind: "tree", what });
            }
        }
    }
    match status.decimal("TracerPid") {
        Some(0) | None => {}
        Some(tracer) => {
            let what = format!("it is traced by process {tracer} (a debugger or strace)");
            blockers.push(Blocker { kind: "kernel", what });
        }
    }
}

fn identity(pid: i32, status: &Status, blockers: &mut Vec<Blocker>) {
    if status.decimal("Seccomp").unwrap_or(0) != 0 {
        blockers.push(Blocker { kind: "kernel", what: "it has a seccomp filter of its own".into() });
    }
    for name in ["mnt", "pid", "net", "ipc", "user", "uts", "time"] {
        let theirs = fs::read_link(format!("/proc/{pid}/ns/{name}"));
        let ours = fs::read_link(format!("/proc/self/ns/{name}"));
        if let (Ok(theirs), Ok(ours)) = (theirs, ours)
            && theirs != ours
        {
            let what = format!("it is in another {name} namespace than the daemon (a container?)");
            blockers.push(Blocker { kind: "namespace", what });
        }
    }
    if let Ok(root) = proc::link(pid, "root")
        && root != b"/"
    {
        let what = format!("its root is {} (chroot)", String::from_utf8_lossy(&root));
        blockers.push(Blocker { kind: "namespace", what });
    }
    if is_32_bit(pid) {
        blockers.push(Blocker { kind: "kernel", what: "it is a 32-bit program".into() });
    }
    // Credentials may differ between threads (setfsuid, raw setuid): one image holds one set.
    let own = [status.line("Uid"), status.line("Gid"), status.line("CapEff")];
    for tid in proc::tids(pid).unwrap_or_default().into_iter().skip(1).take(4096) {
        if let Ok(other) = Status::read(tid)
            && [other.line("Uid"), other.line("Gid"), other.line("CapEff")] != own
        {
            let what = format!("thread {tid} has other credentials than the process");
            blockers.push(Blocker { kind: "identity", what });
            break;
        }
    }
}

fn is_32_bit(pid: i32) -> bool {
    use std::io::Read;
    let mut head = [0; 5];
    let read = fs::File::open(format!("/proc/{pid}/exe")).and_then(|mut file| file.read_exact(&mut head));
    read.is_ok() && head == [0x7f, b'E', b'L', b'F', 1]
}

fn vma_blockers(vmas: &[Vma], blockers: &mut Vec<Blocker>) {
    for vma in vmas {
        let name = match &vma.backing {
            Backing::File(file) => String::from_utf8_lossy(&file.path).into_owned(),
            _ => "memory".into(),
        };
        let mut refuse = |why: &str| {
            let what = format!("mapping {:x}-{:x} of {name}: {why}", vma.start, vma.end);
            blockers.push(Blocker { kind: "mapping", what });
        };
        let flags = vma.flags;
        if flags.contains(VmaFlags::HUGETLB) {
            refuse("explicit huge pages (hugetlb)");
        } else if flags.intersects(VmaFlags::IO | VmaFlags::PFNMAP)
            && !matches!(vma.backing, Backing::Vvar | Backing::Vdso)
        {
            refuse("memory of a device");
        } else if flags.contains(VmaFlags::USERFAULT) {
            refuse("registered with the program's own userfaultfd");
        } else if flags.contains(VmaFlags::SEALED)
            && !matches!(vma.backing, Backing::Vvar | Backing::Vdso | Backing::Vsyscall)
        {
            refuse("sealed (mseal): it could not be given back");
        } else if let Backing::File(file) = &vma.backing {
            if file.path.starts_with(b"/SYSV") {
                refuse("System V shared memory");
            } else if file.path.starts_with(b"/memfd:") {
                refuse("a memfd");
            } else if file.path.starts_with(b"/[aio]") {
                refuse("an asynchronous I/O context");
            } else if file.path.starts_with(b"anon_inode:") || file.path.starts_with(b"socket:") {
                refuse("a kernel object");
            } else if file.path.starts_with(b"/dev/") {
                refuse("memory of a device");
            } else if vma.shared && file.may_write {
                refuse("a file mapped shared and writable");
            }
        }
    }
}

/// Shared anonymous memory that another process maps as well.
fn shared_memory(pid: i32, vmas: &[Vma], blockers: &mut Vec<Blocker>) {
    let ids: Vec<u64> = vmas
        .iter()
        .filter_map(|vma| match vma.backing {
            Backing::SharedAnon { id, .. } => Some(id),
            _ => None,
        })
        .collect();
    if ids.is_empty() {
        return;
    }
    for other in proc::pids().into_iter().filter(|&other| other != pid) {
        let Ok(text) = proc::read(other, "maps") else { continue };
        let also = maps::parse(&text).into_iter().any(|vma| match vma.backing {
            Backing::SharedAnon { id, .. } => ids.contains(&id),
            _ => false,
        });
        if also {
            let what = format!("it shares anonymous memory with process {other}");
            blockers.push(Blocker { kind: "mapping", what });
        }
    }
}

fn file_blockers(pid: i32, files: &FilesImage, rules: Rules, blockers: &mut Vec<Blocker>) {
    for (index, file) in files.files.iter().enumerate() {
        let Some(fd) = files.fds.iter().find(|fd| fd.file as usize == index) else { continue };
        let why = match &file.kind {
            FileKind::Unsupported { what } => what.clone(),
            FileKind::Pipe { internal: false } if rules == Rules::Standalone && fd.fd > 2 => {
                "a pipe to another process".into()
            }
            _ if file.flags & libc::O_PATH as u32 != 0 && rules == Rules::Homed => {
                "an O_PATH descriptor".into()
            }
            _ if file.owner != (0, 0, 0) => "signal-driven (F_SETOWN, O_ASYNC)".into(),
            _ => continue,
        };
        blockers.push(Blocker { kind: "fd", what: format!("fd {}: {why}", fd.fd) });
    }
    let _ = pid;
}

/// Bytes that an image would hold: private pages in memory or swap, and shared anonymous ones.
fn occupied_bytes(pid: i32, vmas: &[Vma]) -> u64 {
    let Ok(pagemap) = fs::File::open(format!("/proc/{pid}/pagemap")) else { return 0 };
    vmas.iter()
        .filter(|vma| matches!(vma.backing, Backing::Anon | Backing::SharedAnon { .. } | Backing::File(_)))
        .filter(|vma| !vma.flags.intersects(VmaFlags::IO | VmaFlags::PFNMAP))
        .flat_map(|vma| {
            let private_file = matches!(vma.backing, Backing::File(_));
            pagemap_scan::occupied(&pagemap, vma.start, vma.end)
                .unwrap_or_default()
                .into_iter()
                .filter(move |region| !private_file || region.categories & IS_FILE == 0)
        })
        .map(|region| region.end - region.start)
        .sum()
}
