//! Where an image is written and read: a directory with one file in it, or the standard streams.
//!
//! The file takes its name only when it is complete and on the disk, so that a directory never shows
//! half an image.

use super::interrupt::Interrupt;
use super::{FAILED, Failure, Location, REFUSED, USAGE};
use crate::sys::rw_flags;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufReader, IsTerminal, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// The image's file in its directory.
pub const FILE: &str = "process.img";

/// An image being written.
pub enum Sink {
    Stream { out: io::Stdout, interrupt: Rc<Interrupt> },
    File { file: File, temporary: Temporary, directory: PathBuf },
}

/// Removed unless it got its name.
pub struct Temporary {
    path: PathBuf,
    kept: bool,
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.kept {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Exit code for an error of the file system.
pub fn exit_of(error: &io::Error) -> u8 {
    match error.kind() {
        io::ErrorKind::PermissionDenied => REFUSED,
        _ => FAILED,
    }
}

impl Sink {
    /// Opens where `location` says; the directory is made if it is not there. Writing to a stream that
    /// nobody reads ends when `interrupt` comes.
    pub fn create(location: &Location, interrupt: &Rc<Interrupt>) -> Result<Sink, Failure> {
        let Location::Directory(directory) = location else {
            let out = io::stdout();
            if out.is_terminal() {
                let why = "an image is binary data and the standard output is a terminal";
                let next = "redirect it (migckpt dump PID --to - > FILE), or name a directory";
                return Err(Failure::new(USAGE, "cannot write the image", why, next));
            }
            return Ok(Sink::Stream { out, interrupt: interrupt.clone() });
        };
        let failed = |error: io::Error| {
            let what = format!("cannot write an image into {}", directory.display());
            Failure::new(exit_of(&error), what, error, "name a directory that can be written with --to")
        };
        // An image holds all that the process knows: passwords too.
        DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)?;
        let path = directory.join(format!(".{FILE}.{}", std::process::id()));
        let open = || OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        let file = match open() {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                // Left by a program that had our PID before us.
                fs::remove_file(&path).map_err(failed)?;
                open()
            }
            other => other,
        };
        let file = file.map_err(failed)?;
        let temporary = Temporary { path, kept: false };
        Ok(Sink::File { file, temporary, directory: directory.clone() })
    }

    /// Makes it durable and gives it its name.
    pub fn commit(self) -> io::Result<()> {
        match self {
            Sink::Stream { mut out, .. } => out.flush(),
            Sink::File { file, mut temporary, directory } => {
                file.sync_all()?;
                fs::rename(&temporary.path, directory.join(FILE))?;
                temporary.kept = true;
                File::open(&directory)?.sync_all()
            }
        }
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Sink::Stream { out, interrupt } => write_stream(out.as_fd(), bytes, interrupt),
            Sink::File { file, .. } => file.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Sink::Stream { out, .. } => out.flush(),
            Sink::File { file, .. } => file.flush(),
        }
    }
}

/// Writes what fits; while nothing does, waits for that or for a signal.
fn write_stream(out: BorrowedFd<'_>, bytes: &[u8], interrupt: &Interrupt) -> io::Result<usize> {
    for _ in 0..2 {
        match rw_flags::write(out, bytes, -1, rw_flags::NOWAIT) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // It has no such thing, and does not block for long.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EINVAL)) => break,
            other => return other,
        }
        if interrupt.wait(out)? {
            return Err(io::Error::other("a signal asked this program to end"));
        }
    }
    // Ready, and still refuses: a file, which must be waited for.
    rw_flags::write(out, bytes, -1, 0)
}

/// Opens an image for reading; gives the file's size where there is one.
pub fn open(location: &Location) -> Result<(Box<dyn Read>, Option<u64>), Failure> {
    let Location::Directory(path) = location else {
        return Ok((Box::new(io::stdin().lock()), None));
    };
    let file = image_file(path);
    let opened = File::open(&file).and_then(|opened| Ok((opened.metadata()?.len(), opened)));
    let (length, opened) = opened.map_err(|error| {
        let what = format!("cannot open the image {}", file.display());
        Failure::new(exit_of(&error), what, error, "name a directory made by migckpt dump --to DIR")
    })?;
    Ok((Box::new(BufReader::with_capacity(1 << 18, opened)), Some(length)))
}

/// An image that comes through a pipe from a process that still lives: `migckpt dump` ends it when it
/// has written all, and only then is its PID free. So the rest is taken in first.
pub fn take_in(input: &mut Box<dyn Read>) -> io::Result<()> {
    use std::io::Seek;
    // Without a name: nothing is left of it, whatever happens.
    let flags = nix::fcntl::OFlag::O_TMPFILE | nix::fcntl::OFlag::O_RDWR | nix::fcntl::OFlag::O_CLOEXEC;
    let mode = nix::sys::stat::Mode::S_IRUSR | nix::sys::stat::Mode::S_IWUSR;
    let mut rest = File::from(nix::fcntl::open(&std::env::temp_dir(), flags, mode)?);
    io::copy(input, &mut rest)?;
    rest.rewind()?;
    *input = Box::new(BufReader::with_capacity(1 << 18, rest));
    Ok(())
}

/// The directory's file; a file may be named directly too.
fn image_file(path: &Path) -> PathBuf {
    if path.is_file() { path.to_path_buf() } else { path.join(FILE) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_left_of_what_is_not_committed() {
        let place = tempfile::tempdir().expect("a directory");
        let location = Location::Directory(place.path().join("new"));
        let interrupt = Rc::new(Interrupt::hold().expect("holds"));
        let mut sink = Sink::create(&location, &interrupt).expect("creates");
        sink.write_all(b"half").expect("writes");
        drop(sink);
        assert_eq!(fs::read_dir(place.path().join("new")).expect("lists").count(), 0);
        let mut sink = Sink::create(&location, &interrupt).expect("creates");
        sink.write_all(b"whole").expect("writes");
        sink.commit().expect("commits");
        assert_eq!(fs::read(place.path().join("new").join(FILE)).expect("reads"), b"whole");
    }
}
