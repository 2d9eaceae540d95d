//! An image restored on its own, under its own PIDs, as a child of this process.
//!
//! The order: a shell with the PID and the descriptors, adopted; its threads under their TIDs; its
//! memory from the stream; the rest of its state. Nothing of it runs before [`Restored::release`], and
//! whatever fails before that leaves no process behind.

use super::shell::{self, taken};
use super::{FileSource, Rebuild, RebuildOptions, RestoreError, add_threads, open_inside, table};
use crate::image::stream::{Item, StreamReader};
use crate::image::{FileKind, MappedFile, ProcessImage};
use crate::sys::ptrace::{self, Stop};
use crate::sys::wait;
use crate::tracee::Tracee;
use nix::unistd::{Pid, setpgid, setsid};
use std::fs;
use std::io::{IsTerminal, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// How it is restored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Standalone {
    /// It outlives this process: a session of its own, no signal at the parent's death.
    pub detach: bool,
    /// The standard input is not to be given to it (an image comes through it).
    pub no_input: bool,
    /// Mapped files need not be the very files that were mapped.
    pub other_files: bool,
}

/// A rebuilt process that has not run yet. Dropped, it is ended.
pub struct Restored {
    pid: i32,
    tracee: Option<Tracee>,
}

/// Rebuilds the process whose state has been read from `stream`, with the memory that follows.
pub fn rebuild<R: Read>(
    image: &ProcessImage,
    stream: &mut StreamReader<R>,
    how: Standalone,
) -> Result<Restored, RestoreError> {
    super::check(image)?;
    check_standalone(image)?;
    let pid = shell::spawn(image.pid, &image.files, |keep| {
        table::raise_limit();
        join_group(image, how)?;
        table::build(&image.files, how.no_input, keep)
    })?;
    let mut restored = Restored { pid, tracee: None };
    let tracee = restored.tracee.insert(Tracee::adopt(pid)?);
    check_xstate(image, tracee)?;
    let avoid: Vec<(u64, u64)> = image.mm.vmas.iter().map(|vma| (vma.start, vma.end)).collect();
    tracee.install_stub(&avoid)?;
    add_threads(tracee, image)?;
    let options = RebuildOptions { pdeathsig: !how.detach, ..RebuildOptions::standalone() };
    let mut files = ByPath { any: how.other_files };
    let mut rebuild = Rebuild::begin(tracee, image, &mut files, options)?;
    loop {
        match stream.next()? {
            Item::Data { addr, bytes } => rebuild.data(addr, bytes)?,
            Item::Zero { addr, len } => rebuild.zero(addr, len)?,
            Item::End => break,
            Item::State(_) => return Err(RestoreError::Unfit("the image has two states".into())),
        }
    }
    rebuild.finish()?;
    Ok(restored)
}

impl Restored {
    /// Its PID.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Lets it run (or stand stopped, if it was). It is a child of this process.
    pub fn release(mut self) -> Result<i32, RestoreError> {
        if let Some(tracee) = self.tracee.take() {
            tracee.release()?;
        }
        Ok(std::mem::ManuallyDrop::new(self).pid)
    }
}

impl Drop for Restored {
    fn drop(&mut self) {
        const LIMIT: Duration = Duration::from_secs(5);
        // Killed before it is let go: half of a program must not run.
        let _ = wait::kill(self.pid, libc::SIGKILL);
        let tids = self.tracee.take().map(Tracee::into_tids).unwrap_or_else(|| vec![self.pid]);
        let deadline = Instant::now() + LIMIT;
        // The leader last: its end is told when the other threads are reaped.
        for &tid in tids.iter().rev() {
            while Instant::now() < deadline {
                match ptrace::wait(tid, false) {
                    Ok(Some(Stop::Gone(_))) | Err(_) => break,
                    Ok(_) => std::thread::sleep(Duration::from_micros(200)),
                }
            }
        }
    }
}

/// What an image that stands alone cannot have.
fn check_standalone(image: &ProcessImage) -> Result<(), RestoreError> {
    let unfit = |what: String| Err(RestoreError::Unfit(what));
    if image.pid <= 0 || image.threads.iter().any(|thread| thread.tid <= 0) {
        return unfit("the image is not consistent: a PID is not positive".into());
    }
    if image.fs.cwd_deleted {
        return unfit("its working directory has been removed".into());
    }
    for thread in image.threads.iter().skip(1) {
        if Path::new(&format!("/proc/{}", thread.tid)).exists() {
            return Err(taken(thread.tid));
        }
    }
    Ok(())
}

/// Session and process group, as far as the terminal and whoever waits for us allow.
fn join_group(image: &ProcessImage, how: Standalone) -> Result<(), RestoreError> {
    let own_session = image.sid == image.pid && !has_terminal(image);
    let result = if how.detach || own_session {
        setsid().map(drop)
    } else if image.pgid == image.pid && !std::io::stdin().is_terminal() {
        setpgid(Pid::from_raw(0), Pid::from_raw(0))
    } else {
        // In our group: the keys of the terminal reach it and us.
        Ok(())
    };
    result.map_err(|errno| RestoreError::file("joining a process group", errno))
}

fn has_terminal(image: &ProcessImage) -> bool {
    image.files.files.iter().any(|file| file.kind == FileKind::Tty)
}

/// The extended state must have the same shape, and no part that this CPU or kernel lacks.
fn check_xstate(image: &ProcessImage, tracee: &Tracee) -> Result<(), RestoreError> {
    /// The kernel's mask of features in the software-reserved bytes of the legacy area
    /// (arch/x86/include/uapi/asm/sigcontext.h).
    const MASK_AT: usize = 464;
    let here = &tracee.original(0).xstate;
    let mask = |area: &[u8]| {
        area.get(MASK_AT..MASK_AT + 8).map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")))
    };
    for thread in &image.threads {
        if mask(&thread.xstate) != mask(here) || thread.xstate.len() != here.len() {
            return Err(RestoreError::Unfit(format!(
                "its CPU had other vector registers (features {:#x}, {} bytes) than this one ({:#x}, {})",
                mask(&thread.xstate).unwrap_or(0),
                thread.xstate.len(),
                mask(here).unwrap_or(0),
                here.len()
            )));
        }
    }
    Ok(())
}

/// Opens mapped files by their paths; a file that took another's place would be wrong code or data.
struct ByPath {
    any: bool,
}

impl FileSource for ByPath {
    fn open_mapped(
        &mut self,
        tracee: &mut Tracee,
        file: &MappedFile,
        writable: bool,
    ) -> Result<i32, RestoreError> {
        let name = String::from_utf8_lossy(&file.path);
        if file.deleted && !self.any {
            return Err(RestoreError::Unfit(format!("the mapped file {name} had been deleted or replaced")));
        }
        let fd = open_inside(tracee, &file.path, writable)?;
        let found = fs::metadata(format!("/proc/{}/fd/{fd}", tracee.pid()))
            .map_err(|source| RestoreError::File { what: format!("looking at {name}"), source })?;
        // On overlays and subvolumes `maps` and `stat` name different devices.
        let same_device =
            found.dev() == file.dev || libc::major(file.dev) == 0 || libc::major(found.dev()) == 0;
        if !(self.any || found.ino() == file.ino && same_device) {
            return Err(RestoreError::Unfit(format!("the mapped file {name} has been replaced")));
        }
        Ok(fd)
    }
}
