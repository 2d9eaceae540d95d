//! Rebuilding a process from its image, in a task that stands in the stub.
//!
//! The same procedure serves three ends ([`RebuildOptions`]): an image restored on its own, a guest
//! on a host node, and a deputy whose guest comes home. The embedder brings the task (with its
//! descriptors and all its threads), the pages, and a way to open mapped files; everything else is
//! here. When [`Rebuild::finish`] returns, the task stands ready; [`Tracee::release`] lets it run.

mod credentials;
mod family;
mod files;
mod layout;
mod mappings;
pub mod shell;
mod signals;
pub mod standalone;
pub mod table;
mod threads;

pub use files::{make_local, open_inside};

use crate::deputy::SigInfo;
use crate::image::{MappedFile, ProcessImage};
use crate::tracee::{Tracee, TraceeError};
use mappings::Contents;

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
    /// Opens the file inside the task; gives its descriptor number there. It is closed afterwards.
    fn open_mapped(
        &mut self,
        tracee: &mut Tracee,
        file: &MappedFile,
        writable: bool,
    ) -> Result<i32, RestoreError>;
}

/// What is rebuilt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RebuildOptions {
    /// Set `/proc/PID/exe`.
    pub exe: bool,
    /// Set credentials, with these capabilities at most.
    pub credentials: Option<u64>,
    /// Set limits, nice value, scheduling policy, I/O priority.
    pub limits: bool,
    /// Set CPU affinity.
    pub affinity: bool,
    /// Set what is inherited by fork and not by exec: personality, dumpable, subreaper.
    pub misc: bool,
    /// The vDSO may have to be moved to where the image has it.
    pub place_vdso: bool,
    /// Leave it stopped if it was.
    pub stop: bool,
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
            exe: true,
            credentials: Some(u64::MAX),
            limits: true,
            affinity: true,
            misc: true,
            place_vdso: true,
            stop: true,
            pdeathsig: true,
        }
    }

    /// A guest on a host node.
    pub fn guest() -> RebuildOptions {
        RebuildOptions {
            affinity: false,
            credentials: Some(GUEST_CAPABILITIES),
            pdeathsig: false,
            ..Self::standalone()
        }
    }

    /// A deputy whose guest comes home: it has kept everything that memory does not hold.
    pub fn deputy() -> RebuildOptions {
        RebuildOptions {
            exe: false,
            credentials: None,
            limits: false,
            affinity: false,
            misc: false,
            place_vdso: false,
            stop: false,
            pdeathsig: false,
        }
    }
}

/// A rebuild under way.
pub struct Rebuild<'a> {
    tracee: &'a mut Tracee,
    image: &'a ProcessImage,
    options: RebuildOptions,
    contents: Contents,
    queue_after: Vec<SigInfo>,
}

/// Makes the threads of the image, beside the leader that is there, under their TIDs.
pub fn add_threads(tracee: &mut Tracee, image: &ProcessImage) -> Result<(), RestoreError> {
    for thread in image.threads.iter().skip(1) {
        tracee.add_thread(thread.tid, true)?;
    }
    Ok(())
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
        threads::unregister_rseq(tracee)?;
        layout::empty(tracee)?;
        if options.place_vdso {
            layout::place_vdso(tracee, image)?;
        }
        let contents = mappings::map_all(tracee, image, files)?;
        Ok(Rebuild { tracee, image, options, contents, queue_after: Vec::new() })
    }

    /// The task that is being filled.
    pub fn tracee(&mut self) -> &mut Tracee {
        self.tracee
    }

    /// Places contents.
    pub fn data(&mut self, addr: u64, bytes: &[u8]) -> Result<(), RestoreError> {
        self.contents.data(self.tracee, addr, bytes)
    }

    /// Makes a range zero.
    pub fn zero(&mut self, addr: u64, len: u64) -> Result<(), RestoreError> {
        self.contents.zero(self.tracee, addr, len)
    }

    /// Signals to be queued behind those that the image has pending.
    pub fn queue_after(&mut self, signals: Vec<SigInfo>) {
        self.queue_after = signals;
    }

    /// Rebuilds the rest, takes the stub away, and leaves the task ready for its release.
    pub fn finish(self) -> Result<(), RestoreError> {
        let Rebuild { tracee, image, options, contents, queue_after } = self;
        contents.settle(tracee)?;
        files::make_epolls(tracee, &image.files)?;
        layout::set_mm(tracee, image, options.exe)?;
        layout::set_fs(tracee, image)?;
        signals::set_actions(tracee, image)?;
        signals::set_timers(tracee, image)?;
        if options.limits {
            threads::set_limits(tracee, image);
        }
        let order = threads::order(tracee, image)?;
        for (i, thread) in order.iter().zip(&image.threads) {
            threads::set_thread(tracee, *i, thread, options)?;
        }
        if options.misc {
            layout::set_misc(tracee, image)?;
        }
        if let Some(allowed) = options.credentials {
            for &i in &order {
                credentials::set(tracee, i, &image.creds, allowed)?;
            }
            // Changing credentials has reset it (credentials(7), PR_SET_DUMPABLE).
            layout::set_dumpable(tracee, image)?;
        }
        if options.pdeathsig {
            // As have credentials with this (prctl(2), PR_SET_PDEATHSIG).
            threads::set_parent_death_signals(tracee, &order, image)?;
        }
        signals::queue_pending(tracee, image, &order, &queue_after)?;
        tracee.remove_stub()?;
        for (i, thread) in order.iter().zip(&image.threads) {
            threads::set_registers(tracee, *i, thread)?;
        }
        if options.stop && image.signals.stopped_by.is_some() {
            // Last: an injected call would take the signal away.
            signals::stop(tracee);
        }
        Ok(())
    }
}

/// What must hold before anything is touched.
fn check(image: &ProcessImage) -> Result<(), RestoreError> {
    let unfit = |what: &str| Err(RestoreError::Unfit(format!("the image is not consistent: {what}")));
    if image.threads.is_empty() || image.threads.iter().any(|thread| thread.regs.len() != 27) {
        return unfit("a thread without registers");
    }
    if image.signals.actions.len() != 64 {
        return unfit("not one action a signal");
    }
    let ordered = image.mm.vmas.windows(2).all(|pair| pair[0].end <= pair[1].start);
    if !ordered || image.mm.vmas.iter().any(|vma| vma.start >= vma.end || vma.start % 4096 != 0) {
        return unfit("mappings that overlap");
    }
    if image.mm.guards.iter().any(|&(start, end)| start >= end || start % 4096 != 0 || end % 4096 != 0) {
        return unfit("guard pages that are not pages");
    }
    Ok(())
}
