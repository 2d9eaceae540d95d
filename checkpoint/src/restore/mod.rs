//! Rebuilding a process from its image, in a task that stands in the stub.
//!
//! The same procedure serves three ends ([`RebuildOptions`]): an image restored on its own, a guest
//! on a host node, and a deputy whose guest comes home. The embedder brings the task (with its
//! descriptors and all its threads), the pages, and a way to open mapped files; everything else is
//! here. When [`Rebuild::finish`] returns, the task stands ready; [`Tracee::release`] lets it run.

mod aio;
mod births;
pub mod clocks;
mod cow;
mod credentials;
pub mod family;
mod files;
mod groups;
mod huge;
mod layout;
mod locks;
mod mappings;
mod nameless;
mod new_threads;
pub mod objects;
mod one_cpu;
mod pipes;
pub(crate) mod pkeys;
mod reports;
mod seccomp;
pub mod shell;
mod signals;
mod sockets;
pub mod standalone;
pub mod table;
mod taking;
pub mod terminals;
mod threads;
mod timers;
mod together;
mod traces;
mod traits;
mod vdso;
mod waits;
mod watches;
mod xstate;

pub use files::{make_local, open_inside};

use crate::deputy::SigInfo;
use crate::image::cpu::CpuImage;
use crate::image::objects::ObjectKey;
use crate::image::shares::ApartImage;
use crate::image::{Backing, MappedFile, ProcessImage, Vma};
use crate::inventory::cpu;
use crate::sys::ptrace::Regs;
use crate::tracee::{Tracee, TraceeError};
use cow::Inherited;
use mappings::Contents;
use new_threads::Inheritance;
use pkeys::Keys;
use std::os::unix::fs::FileExt;

/// Why a process could not be rebuilt. The task is half-built: it must be thrown away or emptied.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// A traced process could not be handled.
    #[error(transparent)]
    Tracee(#[from] TraceeError),
    /// A file could not be opened or made.
    #[error("{what}: {source}")]
    File {
        /// Which, and what was tried.
        what: String,
        /// Why.
        source: std::io::Error,
    },
    /// The image does not fit this machine, or contradicts itself.
    #[error("{0}")]
    Unfit(String),
    /// The pages' stream failed.
    #[error(transparent)]
    Stream(#[from] crate::image::stream::StreamError),
    /// A PID or TID is not free.
    #[error("{id} is in use by {holder}")]
    Taken {
        /// Which number.
        id: i32,
        /// By whom.
        holder: String,
    },
    /// The process could not be made.
    #[error("making a process with PID {pid}: {errno}")]
    Fork {
        /// Under which PID.
        pid: i32,
        /// What the kernel said.
        errno: nix::errno::Errno,
    },
    /// Its clocks would go back, as no time namespace can be made.
    #[error(
        "its clocks CLOCK_MONOTONIC and CLOCK_BOOTTIME would go back by {} s, and no time namespace can be \
         made for it: {errno}",
        back_ns.div_ceil(1_000_000_000)
    )]
    Clocks {
        /// By how much, ns.
        back_ns: u64,
        /// Why there is none.
        errno: nix::errno::Errno,
    },
    /// There are too few free huge pages (hugetlb).
    #[error("{}", huge::explain(*page_shift, *wanted, *free))]
    HugePages {
        /// They have 2 to the power of this many bytes.
        page_shift: u8,
        /// How many were asked for; 0: one more than there was.
        wanted: u64,
        /// How many can be had; `None`: the kernel has none of this size.
        free: Option<u64>,
    },
    /// The new process failed before it could be filled; in its own words.
    #[error("{0}")]
    Child(String),
}

impl RestoreError {
    pub(crate) fn file(what: impl Into<String>, errno: nix::errno::Errno) -> RestoreError {
        RestoreError::File { what: what.into(), source: errno.into() }
    }
}

/// How the embedder opens the files that are mapped.
pub trait FileSource {
    /// Opens the file inside the task, by its path and with the task's rights; gives its descriptor number there.
    /// It is closed afterwards.
    fn open_mapped(
        &mut self,
        tracee: &mut Tracee,
        file: &MappedFile,
        writable: bool,
    ) -> Result<i32, RestoreError> {
        open_inside(tracee, &file.path, writable)
    }

    /// The same of several files, each with whether it is to be writable.
    fn open_all_mapped(
        &mut self,
        tracee: &mut Tracee,
        files: &[(&MappedFile, bool)],
    ) -> Result<Vec<i32>, RestoreError> {
        files.iter().map(|(file, writable)| self.open_mapped(tracee, file, *writable)).collect()
    }

    /// What mappings of an object are made from.
    fn object(&mut self, key: ObjectKey) -> Result<objects::Source, RestoreError> {
        Err(RestoreError::Unfit(format!("mapped memory {}:{} cannot be made here", key.0, key.1)))
    }

    /// Opens what [`Self::object`] has told as a descriptor of this program inside the task, to read and write;
    /// gives its number there. It is closed afterwards.
    fn take_in(&mut self, tracee: &mut Tracee, ours: i32) -> Result<i32, RestoreError> {
        let path = format!("/proc/{}/fd/{ours}", std::process::id());
        open_inside(tracee, path.as_bytes(), true)
    }
}

/// What is rebuilt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RebuildOptions {
    /// The CPU must have what the image's had ([`crate::inventory::cpu`]).
    pub cpu: bool,
    /// Set `/proc/PID/exe`.
    pub exe: bool,
    /// Set credentials, with these capabilities at most.
    pub credentials: Option<u64>,
    /// Install the program's system-call filters.
    pub seccomp: bool,
    /// Set limits, nice value, scheduling policy, I/O priority.
    pub limits: bool,
    /// Set CPU affinity.
    pub affinity: bool,
    /// Set what is inherited by fork and not by exec: personality, dumpable, subreaper.
    pub misc: bool,
    /// The vDSO may have to be moved to where the image has it.
    pub place_vdso: bool,
    /// The vDSO may be another kernel's.
    pub copies_vdso: bool,
    /// Leave it stopped if it was.
    pub stop: bool,
    /// Make epolls: whoever has built the descriptor table has left them out.
    pub epolls: bool,
    /// Its clocks that count from boot go on where they were: what is due at a time of theirs is set to that.
    pub clocks: bool,
    /// Set its place in the system: control groups, login, the session's nice value, and its root, which may be
    /// another one (chroot(2)).
    pub place: bool,
    /// It may have explicit huge pages (hugetlb).
    pub huge_pages: bool,
    /// It may have asynchronous I/O contexts.
    pub contexts: bool,
    /// Ask again for the signal at the parent's death (to a parent that is another one now).
    pub pdeathsig: bool,
}

/// Capabilities that a guest may have: what acts on files, processes and identities of its own, and
/// nothing that acts on the host node (capabilities(7)).
pub const GUEST_CAPABILITIES: u64 = {
    // CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID, KILL, SETGID, SETUID, SETPCAP.
    let files_and_ids = 0x1ff;
    // IPC_LOCK (14), SYS_CHROOT (18), SYS_NICE (23), LEASE (28), SETFCAP (31).
    files_and_ids | 1 << 14 | 1 << 18 | 1 << 23 | 1 << 28 | 1 << 31
};

impl RebuildOptions {
    /// An image restored on its own.
    pub fn standalone() -> RebuildOptions {
        RebuildOptions {
            cpu: true,
            exe: true,
            credentials: Some(u64::MAX),
            seccomp: true,
            limits: true,
            affinity: true,
            misc: true,
            place_vdso: true,
            copies_vdso: true,
            stop: true,
            epolls: false,
            clocks: true,
            place: true,
            huge_pages: true,
            contexts: true,
            pdeathsig: true,
        }
    }

    /// A guest on a host node.
    pub fn guest() -> RebuildOptions {
        RebuildOptions {
            affinity: false,
            // It goes home, where its own is.
            copies_vdso: false,
            seccomp: false,
            credentials: Some(GUEST_CAPABILITIES),
            epolls: true,
            place: false,
            huge_pages: false,
            contexts: false,
            pdeathsig: false,
            ..Self::standalone()
        }
    }

    /// A deputy whose guest comes home: it has kept everything that memory does not hold.
    pub fn deputy() -> RebuildOptions {
        RebuildOptions {
            // Home must always be open to it: what it has learned since is its own affair.
            cpu: false,
            exe: false,
            credentials: None,
            seccomp: false,
            limits: false,
            affinity: false,
            misc: false,
            place_vdso: false,
            copies_vdso: false,
            stop: false,
            epolls: true,
            clocks: true,
            place: false,
            huge_pages: false,
            contexts: false,
            pdeathsig: false,
        }
    }
}

/// A rebuild under way.
pub struct Rebuild<'a> {
    tracee: &'a mut Tracee,
    image: &'a ProcessImage,
    options: RebuildOptions,
    filled: Filled,
}

/// What is known of a task whose memory is there, until the rest follows.
pub(crate) struct Filled {
    contents: Contents,
    inherited: Option<Inherited>,
    /// Its other threads have been made with all that is theirs, but for credentials; they have this of the leader.
    born: Option<Inheritance>,
    /// The task that is its parent and whose memory it has not inherited.
    parent: Option<i32>,
    queue_after: Vec<SigInfo>,
}

impl Filled {
    fn with(contents: Contents, inherited: Option<Inherited>) -> Filled {
        Filled { contents, inherited, born: None, parent: None, queue_after: Vec::new() }
    }
}

impl<'a> Rebuild<'a> {
    /// Empties the task and maps everything; pages come next.
    pub fn begin(
        tracee: &'a mut Tracee,
        image: &'a ProcessImage,
        files: &mut dyn FileSource,
        options: RebuildOptions,
    ) -> Result<Rebuild<'a>, RestoreError> {
        check(image)?;
        check_cpu(image, tracee, options)?;
        check_node_affairs(image, options)?;
        threads::unregister_rseq(tracee)?;
        layout::empty(tracee)?;
        if options.place_vdso {
            vdso::place(tracee, image, options.copies_vdso)?;
        }
        let keys = Keys::arrange(tracee, &image.mm)?;
        let contents = mappings::map_all(tracee, &image.mm.vmas, image, files, keys)?;
        traits::set_policies(tracee, &image.traits, None)?;
        let filled = Filled::with(contents, None);
        Ok(Rebuild { tracee, image, options, filled })
    }

    /// The same of a task that was just made by its parent, whose memory it has.
    pub(crate) fn begin_child(
        tracee: &'a mut Tracee,
        image: &'a ProcessImage,
        parent: &ProcessImage,
        files: &mut dyn FileSource,
        options: RebuildOptions,
    ) -> Result<Rebuild<'a>, RestoreError> {
        check(image)?;
        check_cpu(image, tracee, options)?;
        check_node_affairs(image, options)?;
        threads::unregister_rseq(tracee)?;
        let kept = cow::empty(tracee, image, &parent.mm)?;
        if options.place_vdso {
            vdso::place(tracee, image, options.copies_vdso)?;
        }
        let keys = Keys::arrange(tracee, &image.mm)?;
        let (contents, inherited) = cow::fit(tracee, image, kept, files, keys)?;
        traits::set_policies(tracee, &image.traits, Some(&parent.traits))?;
        let filled = Filled::with(contents, Some(inherited));
        Ok(Rebuild { tracee, image, options, filled })
    }

    /// The same of one that shares its memory with who made it: that is there.
    pub(crate) fn begin_sharing(
        tracee: &'a mut Tracee,
        image: &'a ProcessImage,
        options: RebuildOptions,
    ) -> Result<Rebuild<'a>, RestoreError> {
        check(image)?;
        check_cpu(image, tracee, options)?;
        check_node_affairs(image, options)?;
        let contents = Contents::default();
        let filled = Filled::with(contents, None);
        Ok(Rebuild { tracee, image, options, filled })
    }

    /// Its memory is there; the rest comes later.
    pub(crate) fn set_aside(self) -> Filled {
        self.filled
    }

    /// Goes on with what was set aside.
    pub(crate) fn take_up(
        tracee: &'a mut Tracee,
        image: &'a ProcessImage,
        options: RebuildOptions,
        filled: Filled,
    ) -> Rebuild<'a> {
        Rebuild { tracee, image, options, filled }
    }

    /// The task that is being filled.
    pub fn tracee(&mut self) -> &mut Tracee {
        self.tracee
    }

    /// Places contents.
    pub fn data(&mut self, addr: u64, bytes: &[u8]) -> Result<(), RestoreError> {
        let Some(inherited) = &mut self.filled.inherited else {
            return self.filled.contents.data(self.tracee, addr, bytes);
        };
        for (addr, bytes) in inherited.different(self.tracee, addr, bytes) {
            self.filled.contents.data(self.tracee, addr, bytes)?;
        }
        Ok(())
    }

    /// Makes a range zero.
    pub fn zero(&mut self, addr: u64, len: u64) -> Result<(), RestoreError> {
        if let Some(inherited) = &mut self.filled.inherited {
            // Pages of anonymous memory are zero when they have been dropped.
            let end = addr.saturating_add(len);
            for vma in self.image.mm.vmas.iter().filter(|vma| vma.start < end && vma.end > addr) {
                if vma.is_huge() || matches!(vma.backing, Backing::File(_)) {
                    let (from, to) = (vma.start.max(addr), vma.end.min(end));
                    inherited.written(from, to - from);
                }
            }
        }
        self.filled.contents.zero(self.tracee, addr, len)
    }

    /// Pages that are as the parent's at the same addresses.
    pub fn same(&mut self, addr: u64, len: u64) -> Result<(), RestoreError> {
        match &mut self.filled.inherited {
            Some(inherited) => inherited.same(addr, len),
            None => self.copy_from_parent(addr, len),
        }
    }

    fn copy_from_parent(&mut self, addr: u64, len: u64) -> Result<(), RestoreError> {
        let lost = || RestoreError::Unfit("memory of a parent, and there is none".into());
        let parent = format!("/proc/{}/mem", self.filled.parent.ok_or_else(lost)?);
        let parent = std::fs::File::open(parent)
            .map_err(|source| RestoreError::File { what: "reading a parent's memory".into(), source })?;
        let end = addr.checked_add(len).ok_or_else(lost)?;
        let mut buffer = vec![0; len.min(1 << 20) as usize];
        let mut at = addr;
        while at < end {
            let part = &mut buffer[..(end - at).min(1 << 20) as usize];
            parent.read_exact_at(part, at).map_err(|_| lost())?;
            self.filled.contents.data(self.tracee, at, part)?;
            at += part.len() as u64;
        }
        Ok(())
    }

    /// What is as the parent's is copied from this task: it was there before.
    pub fn set_parent(&mut self, pid: i32) {
        self.filled.parent = Some(pid);
    }

    /// All contents have been placed: what is there besides is dropped.
    pub(crate) fn end_of_contents(&mut self) -> Result<(), RestoreError> {
        match &mut self.filled.inherited {
            Some(inherited) => inherited.drop_stale(self.tracee),
            None => Ok(()),
        }
    }

    /// Makes the other threads, under their TIDs; a task that has them already needs none. All contents must have
    /// been placed: the threads register what is in them.
    pub fn make_threads(&mut self) -> Result<(), RestoreError> {
        self.filled.born = new_threads::make(self.tracee, self.image)?;
        Ok(())
    }

    /// Signals to be queued behind those that the image has pending.
    pub fn queue_after(&mut self, signals: Vec<SigInfo>) {
        self.filled.queue_after = signals;
    }

    /// Rebuilds the rest, takes the stub away, and leaves the task ready for its release.
    pub fn finish(self) -> Result<(), RestoreError> {
        let (tracee, image, options) = self.complete()?;
        let registers = go_on(tracee, image)?;
        seal(tracee, image, options, registers)
    }

    /// Rebuilds the rest, and leaves the task in the stub; [`seal`] takes that away.
    fn complete(self) -> Result<(&'a mut Tracee, &'a ProcessImage, RebuildOptions), RestoreError> {
        let Rebuild { tracee, image, options, filled } = self;
        let Filled { contents, queue_after, born, .. } = filled;
        contents.settle(tracee)?;
        if options.epolls {
            files::make_epolls(tracee, &image.files)?;
        }
        if image.shares.memory == 0 {
            layout::set_mm(tracee, image, options.exe)?;
        }
        let mut calls = if options.misc { traits::lock_future(image) } else { Vec::new() };
        calls.extend(layout::fs(tracee.tid(0), &image.fs, options.place));
        calls.extend(layout::membarrier(image));
        calls.extend(signals::actions(image));
        tracee.must_all(0, &calls)?;
        let order = threads::order(tracee, image)?;
        timers::set(tracee, &order, image, options.clocks)?;
        if options.limits {
            threads::set_limits(tracee, image);
        }
        for (&i, thread) in order.iter().zip(&image.threads) {
            if let Some(own) = &thread.apart.fs {
                let calls = layout::fs(tracee.tid(i), own, options.place);
                tracee.must_all(i, &calls)?;
            }
        }
        let mut calls = if options.misc { layout::misc(tracee.pid(), image) } else { Vec::new() };
        if options.place {
            // A guest is in the groups of its node.
            traits::settle(tracee.pid(), image);
        }
        calls.extend(traits::of_process(image));
        tracee.must_all(0, &calls)?;
        if options.seccomp {
            // While the threads have the right to.
            seccomp::install(tracee, &order, image)?;
        }
        threads::set_threads(tracee, &order, image, options, born.as_ref())?;
        signals::queue_pending(tracee, image, &order, &queue_after, options.clocks)?;
        // Changing credentials has reset it (credentials(7), PR_SET_DUMPABLE).
        let mut calls = if options.credentials.is_some() { layout::dumpable(image) } else { Vec::new() };
        calls.extend(traits::at_last(image));
        tracee.must_all(0, &calls)?;
        Ok((tracee, image, options))
    }
}

/// The calls that the threads are in begin again; with which registers each thread goes on, and its place.
fn go_on(tracee: &mut Tracee, image: &ProcessImage) -> Result<Vec<(usize, Regs)>, RestoreError> {
    let order = threads::order(tracee, image)?;
    let of_one = |(&i, thread)| Ok((i, waits::go_on(tracee, i, thread)?));
    order.iter().zip(&image.threads).map(of_one).collect()
}

/// Takes the stub away, and leaves the task ready for its release.
fn seal(
    tracee: &mut Tracee,
    image: &ProcessImage,
    options: RebuildOptions,
    registers: Vec<(usize, Regs)>,
) -> Result<(), RestoreError> {
    tracee.remove_stub()?;
    for ((i, regs), thread) in registers.into_iter().zip(&image.threads) {
        threads::set_registers(tracee, i, thread, regs, &image.misc.cpu)?;
    }
    if let Some(status) = image.threads[0].apart.ended {
        tracee.lose_leader(status)?;
    }
    if options.stop && image.signals.stopped_by.is_some() {
        // Last: an injected call would take the signal away.
        signals::stop(tracee);
    }
    Ok(())
}

/// Whether it can run here, and with the registers that it has.
fn check_cpu(image: &ProcessImage, tracee: &Tracee, options: RebuildOptions) -> Result<(), RestoreError> {
    let (was, here) = (&image.misc.cpu, CpuImage::here());
    if options.cpu
        && let Some(why) = cpu::blockers(was, here, &image.mm.auxv, cpu::kernel_tells()).first()
    {
        return Err(RestoreError::Unfit(why.what.clone()));
    }
    let ours = &tracee.original(0).xstate;
    let fits =
        image.threads.iter().try_for_each(|thread| xstate::fit(&thread.xstate, was, ours, here).map(drop));
    fits.map_err(RestoreError::Unfit)
}

/// Where huge pages are the node's own affair, and files are elsewhere.
fn check_node_affairs(image: &ProcessImage, options: RebuildOptions) -> Result<(), RestoreError> {
    if !options.huge_pages && image.mm.vmas.iter().any(Vma::is_huge) {
        return Err(RestoreError::Unfit("it has explicit huge pages (hugetlb)".into()));
    }
    let is_ring = |vma: &Vma| matches!(vma.backing, Backing::Aio { .. });
    if !options.contexts && image.mm.vmas.iter().any(is_ring) {
        return Err(RestoreError::Unfit("it has an asynchronous I/O context".into()));
    }
    Ok(())
}

/// Threads that share a directory of their own name one before them that has it.
fn check_apart(image: &ProcessImage) -> Result<(), RestoreError> {
    let mut own = Vec::new();
    for (at, thread) in image.threads.iter().enumerate() {
        let ApartImage { fs, fs_with, ended } = &thread.apart;
        if ended.is_some_and(|status| at > 0 || image.threads.len() < 2 || !libc::WIFEXITED(status)) {
            return Err(RestoreError::Unfit("the image is not consistent: a thread that has ended".into()));
        }
        let is_right = match (fs, fs_with) {
            (None, 0) => true,
            (Some(fs), 0) => at > 0 && fs.root == image.fs.root,
            (None, first) => at > 0 && own.contains(first),
            _ => false,
        };
        if !is_right {
            return Err(RestoreError::Unfit("the image is not consistent: a thread's directory".into()));
        }
        own.extend(fs.as_ref().map(|_| thread.tid));
    }
    Ok(())
}

/// What must hold before anything is touched.
fn check(image: &ProcessImage) -> Result<(), RestoreError> {
    let unfit = |what: &str| Err(RestoreError::Unfit(format!("the image is not consistent: {what}")));
    if image.threads.is_empty() || image.threads.iter().any(|thread| thread.regs.len() != 27) {
        return unfit("a thread without registers");
    }
    seccomp::check(image)?;
    check_apart(image)?;
    if image.shares.handlers != 0 && image.shares.memory == 0 {
        return unfit("signal actions of another memory");
    }
    pkeys::check(&image.mm, CpuImage::here())?;
    let groups =
        |thread: &crate::image::ThreadImage| thread.creds.as_ref().map_or(0, |creds| creds.groups.len());
    if image.threads.iter().any(|thread| groups(thread) > 65_536) {
        return unfit("a thread in too many groups");
    }
    if image.signals.actions.len() != 64 {
        return unfit("not one action a signal");
    }
    image.mm.vmas.iter().try_for_each(huge::check)?;
    aio::check(&image.mm)?;
    let ordered = image.mm.vmas.windows(2).all(|pair| pair[0].end <= pair[1].start);
    if !ordered || image.mm.vmas.iter().any(|vma| vma.start >= vma.end || vma.start % 4096 != 0) {
        return unfit("mappings that overlap");
    }
    if image.mm.guards.iter().any(|&(start, end)| start >= end || start % 4096 != 0 || end % 4096 != 0) {
        return unfit("guard pages that are not pages");
    }
    Ok(())
}
