//! What `inspect` shows, for people and as JSON: bytes as text, addresses as hexadecimal strings
//! (a JSON number holds 53 bits).

use crate::image::{Backing, FileKind, FilesImage, ProcessImage, Vma};
use crate::inventory::Inventory;
use serde::Serialize;

/// Totals of an image.
#[derive(Debug, Default, Serialize)]
pub struct Totals {
    pub memory_bytes: u64,
    pub data_bytes: u64,
    pub zero_bytes: u64,
    /// Of children, and as their parents'.
    pub shared_bytes: u64,
    pub frames: u64,
    pub file_bytes: Option<u64>,
}

/// An image.
#[derive(Debug, Serialize)]
pub struct ImageView {
    pub pid: i32,
    pub pgid: i32,
    pub sid: i32,
    pub comm: String,
    pub exe: String,
    pub cwd: String,
    pub cwd_deleted: bool,
    pub umask: String,
    pub uids: [u32; 4],
    pub gids: [u32; 4],
    pub groups: Vec<u32>,
    pub capabilities: String,
    pub host: String,
    pub kernel: String,
    pub stopped_by: Option<u8>,
    pub signals_handled: Vec<u32>,
    pub signals_ignored: Vec<u32>,
    pub signals_pending: usize,
    pub interval_timers: usize,
    pub posix_timers: usize,
    pub threads: Vec<ThreadView>,
    pub files: Vec<FileView>,
    pub mappings: Vec<MappingView>,
    /// The other processes of the image.
    pub descendants: Vec<MemberView>,
    pub totals: Totals,
}

/// A descendant, living or ended.
#[derive(Debug, Serialize)]
pub struct MemberView {
    pub pid: i32,
    pub ppid: i32,
    pub pgid: i32,
    pub sid: i32,
    pub comm: String,
    pub threads: usize,
    pub ended: bool,
}

/// One thread.
#[derive(Debug, Serialize)]
pub struct ThreadView {
    pub tid: i32,
    pub comm: String,
    pub instruction: String,
    pub blocked_signals: String,
    pub pending: usize,
}

/// One open file description, with the descriptors that name it.
#[derive(Debug, Serialize)]
pub struct FileView {
    pub fds: Vec<i32>,
    pub kind: &'static str,
    pub path: String,
    pub pos: u64,
    pub flags: String,
    pub detail: String,
}

/// One mapping.
#[derive(Debug, Serialize)]
pub struct MappingView {
    pub start: String,
    pub end: String,
    pub prot: String,
    pub shared: bool,
    pub path: String,
    pub offset: u64,
}

/// A live process.
#[derive(Debug, Serialize)]
pub struct LiveView {
    pub pid: i32,
    pub bytes: u64,
    pub threads: usize,
    pub files: Vec<FileView>,
    pub mappings: Vec<MappingView>,
    pub blockers: Vec<BlockerView>,
}

/// One reason against.
#[derive(Debug, Serialize)]
pub struct BlockerView {
    pub kind: &'static str,
    pub what: String,
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

impl ImageView {
    /// Of the first of these processes, with the others in a few words.
    pub fn of(images: &[ProcessImage], totals: Totals) -> ImageView {
        let image = &images[0];
        let with_handler = |wanted: fn(u64) -> bool| {
            let numbered = (1u32..).zip(&image.signals.actions);
            numbered.filter(|(_, action)| wanted(action[0])).map(|(signal, _)| signal).collect()
        };
        let pending: usize = image.threads.iter().map(|thread| thread.pending.len()).sum();
        ImageView {
            pid: image.pid,
            pgid: image.pgid,
            sid: image.sid,
            comm: image.threads.first().map(|thread| text(&thread.comm)).unwrap_or_default(),
            exe: text(&image.mm.exe),
            cwd: text(&image.fs.cwd),
            cwd_deleted: image.fs.cwd_deleted,
            umask: format!("{:04o}", image.fs.umask),
            uids: image.creds.uids,
            gids: image.creds.gids,
            groups: image.creds.groups.clone(),
            capabilities: format!("{:016x}", image.creds.caps[2]),
            host: text(&image.misc.utsname.0),
            kernel: image.misc.kernel.clone(),
            stopped_by: image.signals.stopped_by,
            // SIG_DFL is 0, SIG_IGN 1.
            signals_handled: with_handler(|handler| handler > 1),
            signals_ignored: with_handler(|handler| handler == 1),
            signals_pending: pending + image.signals.pending.len(),
            interval_timers: image.timers.itimers.iter().filter(|(_, value)| *value > 0).count(),
            posix_timers: image.timers.posix.len(),
            threads: image.threads.iter().map(ThreadView::of).collect(),
            files: files(&image.files),
            mappings: image.mm.vmas.iter().map(MappingView::of).collect(),
            descendants: MemberView::of_all(images),
            totals,
        }
    }
}

impl MemberView {
    fn of_all(images: &[ProcessImage]) -> Vec<MemberView> {
        let mut members = Vec::new();
        for (index, image) in images.iter().enumerate() {
            if index > 0 {
                members.push(MemberView {
                    pid: image.pid,
                    ppid: image.ppid,
                    pgid: image.pgid,
                    sid: image.sid,
                    comm: image.threads.first().map(|thread| text(&thread.comm)).unwrap_or_default(),
                    threads: image.threads.len(),
                    ended: false,
                });
            }
            members.extend(image.zombies.iter().map(|zombie| MemberView {
                pid: zombie.pid,
                ppid: image.pid,
                pgid: zombie.pgid,
                sid: zombie.sid,
                comm: String::new(),
                threads: 0,
                ended: true,
            }));
        }
        members
    }
}

impl ThreadView {
    fn of(thread: &crate::image::ThreadImage) -> ThreadView {
        /// Index of `rip` in `struct user_regs_struct`.
        const RIP: usize = 16;
        ThreadView {
            tid: thread.tid,
            comm: text(&thread.comm),
            instruction: format!("{:#x}", thread.regs.get(RIP).copied().unwrap_or(0)),
            blocked_signals: format!("{:016x}", thread.sigmask),
            pending: thread.pending.len(),
        }
    }
}

impl MappingView {
    fn of(vma: &Vma) -> MappingView {
        let letter = |bit: i32, letter: char| if vma.prot & bit as u32 != 0 { letter } else { '-' };
        let prot =
            [letter(libc::PROT_READ, 'r'), letter(libc::PROT_WRITE, 'w'), letter(libc::PROT_EXEC, 'x')];
        let (path, offset) = match &vma.backing {
            Backing::File(file) => {
                let gone = if file.deleted { " (deleted)" } else { "" };
                (format!("{}{gone}", text(&file.path)), file.offset)
            }
            Backing::Object { key, offset, .. } => (format!("object {:x}:{}", key.0, key.1), *offset),
            Backing::SharedAnon { id, offset } => (format!("shared memory {id}"), *offset),
            Backing::Anon if vma.is_huge() => {
                let kilobytes = 1u64.checked_shl(vma.page_shift.saturating_sub(10).into()).unwrap_or(0);
                (format!("memory of huge pages ({kilobytes} kB)"), 0)
            }
            Backing::Anon => {
                let label = vma.name.as_deref().map(text).unwrap_or_default();
                (if label.is_empty() { "memory".into() } else { format!("memory [{label}]") }, 0)
            }
            Backing::Vdso => ("[vdso]".into(), 0),
            Backing::Vvar => ("[vvar]".into(), 0),
            Backing::Vsyscall => ("[vsyscall]".into(), 0),
            Backing::Aio { .. } => ("[aio]".into(), 0),
        };
        MappingView {
            start: format!("{:x}", vma.start),
            end: format!("{:x}", vma.end),
            prot: prot.iter().collect(),
            shared: vma.shared,
            path,
            offset,
        }
    }
}

impl LiveView {
    pub fn of(pid: i32, found: &Inventory) -> LiveView {
        LiveView {
            pid,
            bytes: found.bytes,
            threads: found.threads,
            files: files(&found.files),
            mappings: found.vmas.iter().map(MappingView::of).collect(),
            blockers: found
                .blockers
                .iter()
                .map(|blocker| BlockerView { kind: blocker.kind, what: blocker.what.clone() })
                .collect(),
        }
    }
}

fn files(image: &FilesImage) -> Vec<FileView> {
    let numbers = |index: usize| {
        let same = image.fds.iter().filter(|fd| fd.file as usize == index);
        same.map(|fd| fd.fd).collect()
    };
    let one = |(index, file): (usize, &crate::image::OpenFile)| {
        let (kind, detail) = kind_of(&file.kind);
        FileView {
            fds: numbers(index),
            kind,
            path: text(&file.link),
            pos: file.pos,
            flags: format!("0{:o}", file.flags),
            detail,
        }
    };
    image.files.iter().enumerate().map(one).collect()
}

fn kind_of(kind: &FileKind) -> (&'static str, String) {
    match kind {
        FileKind::Regular { deleted: true } => ("file", "the name is gone".into()),
        FileKind::Regular { .. } => ("file", String::new()),
        FileKind::Memfd => ("memfd", String::new()),
        FileKind::HugeMemfd => ("memfd", "of huge pages".into()),
        FileKind::Directory => ("directory", String::new()),
        FileKind::LocalDevice => ("device", String::new()),
        FileKind::Tty => ("terminal", String::new()),
        FileKind::Pipe { internal: true } => ("pipe", "both ends are its own".into()),
        FileKind::Pipe { .. } => ("pipe", String::new()),
        FileKind::EventFd { count, .. } => ("eventfd", format!("count {count}")),
        FileKind::Epoll { targets } => ("epoll", format!("watches {}", targets.len())),
        FileKind::TimerFd { value_ns, .. } => ("timerfd", format!("in {} ms", value_ns / 1_000_000)),
        FileKind::SignalFd { mask } => ("signalfd", format!("mask {mask:016x}")),
        FileKind::Path { deleted: true } => ("path", "the name is gone".into()),
        FileKind::Path { .. } => ("path", String::new()),
        FileKind::Pidfd { pid: 0 } => ("pidfd", "a process that has ended".into()),
        FileKind::Pidfd { pid } => ("pidfd", format!("process {pid}")),
        FileKind::Proc { pid: 0 } => ("proc", String::new()),
        FileKind::Proc { pid } => ("proc", format!("of process {pid}")),
        FileKind::Namespace => ("namespace", String::new()),
        FileKind::Inotify { watches } => ("inotify", format!("watches {}", watches.len())),
        FileKind::PtyMaster { index } => ("terminal", format!("the master of /dev/pts/{index}")),
        FileKind::PtySlave { index } => ("terminal", format!("/dev/pts/{index}, of the image")),
        FileKind::Socket { what } => ("socket", what.clone()),
        FileKind::Foreign { handle } => ("foreign", format!("handle {handle}")),
        FileKind::Unsupported { what } => ("other", what.clone()),
    }
}
