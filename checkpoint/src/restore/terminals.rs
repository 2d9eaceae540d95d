//! Pseudo-terminals under their old numbers, with what waits on either side.

use super::{RestoreError, open_inside};
use crate::image::terminals::{MAX_TERMINALS, TerminalImage};
use crate::image::{FileKind, OpenFile, ProcessImage};
use crate::sys::act_as::{As, act};
use crate::sys::fd::own;
use crate::sys::pty::{self, Switch, TERMIOS};
use crate::sys::socket;
use crate::tracee::Tracee;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::Mode;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

/// How long what was written may take to the other side: the kernel does that in the background.
const LIMIT: Duration = Duration::from_secs(2);

/// The pairs of an image.
pub struct Terminals {
    masters: BTreeMap<u32, OwnedFd>,
    slaves: BTreeMap<u32, OwnedFd>,
    /// By the session that is controlled.
    sessions: BTreeMap<i32, u32>,
}

fn failed(index: u32, what: &str, errno: Errno) -> RestoreError {
    RestoreError::file(format!("the terminal /dev/pts/{index}: {what}"), errno)
}

fn unfit(what: &str) -> RestoreError {
    RestoreError::Unfit(format!("the image is not consistent: {what}"))
}

impl Terminals {
    /// Makes them.
    pub fn make(images: &[ProcessImage]) -> Result<Terminals, RestoreError> {
        let (masters, slaves, sessions) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        let mut made = Terminals { masters, slaves, sessions };
        let wanted: &[TerminalImage] = images.first().map_or(&[], |root| &root.files.terminals);
        if wanted.len() > MAX_TERMINALS {
            return Err(unfit("too many terminals"));
        }
        let files = || images.iter().flat_map(|image| &image.files.files);
        let mut others: BTreeMap<u32, OwnedFd> = BTreeMap::new();
        for image in wanted {
            let is_it = |file: &&OpenFile| file.kind == FileKind::PtyMaster { index: image.index };
            let file = files().find(is_it).ok_or_else(|| unfit("a terminal without a master"))?;
            let master = allocate(image.index, &file.link, &mut others)?;
            let has_slave = files().any(|file| file.kind == FileKind::PtySlave { index: image.index });
            let slave = set_up(image, master.as_fd(), has_slave)?;
            made.slaves.extend(slave.map(|slave| (image.index, slave)));
            if image.session.0 > 0 {
                made.sessions.insert(image.session.0, image.index);
            }
            made.masters.insert(image.index, master);
        }
        Ok(made)
    }

    /// The master.
    pub fn master(&self, index: u32) -> Option<BorrowedFd<'_>> {
        self.masters.get(&index).map(AsFd::as_fd)
    }

    /// The slave, opened once more.
    pub fn slave(&self, index: u32, flags: i32, link: &[u8]) -> Result<OwnedFd, RestoreError> {
        let Some(master) = self.masters.get(&index).filter(|_| self.slaves.contains_key(&index)) else {
            return Err(unfit("a terminal without a slave"));
        };
        /// O_LARGEFILE, which open(2) adds and `TIOCGPTPEER` does not: how it had been opened.
        const BY_NAME: i32 = 0x8000;
        let kept = flags & (libc::O_ACCMODE | libc::O_NONBLOCK) | libc::O_CLOEXEC | libc::O_NOCTTY;
        let opened = match (flags & BY_NAME, self.slaves.get(&index)) {
            (_, Some(slave)) if link == b"/dev/tty" => {
                let open = || pty::open_as_controlling(slave.as_fd(), kept).map(|opened| [opened, 0]);
                act(&As::default(), open).map(|[opened, _]| own(opened))
            }
            // It would show the flag.
            (0, _) => pty::peer(master.as_fd(), kept & !libc::O_CLOEXEC),
            _ => open(format!("/dev/pts/{index}").as_str(), OFlag::from_bits_retain(kept), Mode::empty()),
        };
        opened.map_err(|errno| failed(index, "opening it", errno))
    }

    /// Runs in the leader of a session before it has children: they inherit its terminal.
    pub fn control_inside(&self, session: i32, tracee: &mut Tracee) -> Result<(), RestoreError> {
        let slave = self.sessions.get(&session).and_then(|index| self.slaves.get(index));
        let Some(slave) = slave else { return Ok(()) };
        let path = format!("/proc/{}/fd/{}", std::process::id(), slave.as_raw_fd());
        let fd = open_inside(tracee, path.as_bytes(), true)? as u64;
        let args = [fd, libc::TIOCSCTTY, 0, 0, 0, 0];
        tracee.must(0, "making a terminal the controlling one", libc::SYS_ioctl, args)?;
        tracee.must(0, "closing a terminal", libc::SYS_close, [fd, 0, 0, 0, 0, 0])?;
        Ok(())
    }

    /// The same in this process.
    pub fn control(&self, session: i32) -> Result<(), RestoreError> {
        let Some(&index) = self.sessions.get(&session) else { return Ok(()) };
        let Some(slave) = self.slaves.get(&index) else { return Ok(()) };
        pty::control(slave.as_fd()).map_err(|errno| failed(index, "making it the controlling one", errno))
    }

    /// What comes when all files are open: modes that would keep them closed.
    pub fn finish(&self, images: &[ProcessImage]) -> Result<(), RestoreError> {
        for image in images.first().map_or(&[][..], |root| &root.files.terminals) {
            let at = |errno| failed(image.index, "its modes", errno);
            if let (true, Some(slave)) = (image.exclusive, self.slaves.get(&image.index)) {
                pty::turn(slave.as_fd(), Switch::Exclusive, true).map_err(at)?;
            }
            if let (true, Some(master)) = (image.locked, self.masters.get(&image.index)) {
                pty::turn(master.as_fd(), Switch::Lock, true).map_err(at)?;
            }
        }
        Ok(())
    }
}

/// The master with this number: the kernel gives the lowest that is free.
fn allocate(index: u32, link: &[u8], others: &mut BTreeMap<u32, OwnedFd>) -> Result<OwnedFd, RestoreError> {
    if !link.ends_with(b"/ptmx") {
        return Err(unfit("the name of a terminal's master"));
    }
    while others.len() <= MAX_TERMINALS {
        if let Some(master) = others.remove(&index) {
            return Ok(master);
        }
        let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC | OFlag::O_NOCTTY;
        let master = open(OsStr::from_bytes(link), flags, Mode::empty())
            .map_err(|errno| failed(index, "making it", errno))?;
        let got = pty::index(master.as_fd()).map_err(|errno| failed(index, "its number", errno))?;
        others.insert(got, master);
        if got > index && !others.contains_key(&index) {
            break;
        }
    }
    let what =
        format!("the terminal /dev/pts/{index} is in use by others; its programs know it by that name");
    Err(RestoreError::Unfit(what))
}

/// Gives the slave, if it is to be open.
fn set_up(
    image: &TerminalImage,
    master: BorrowedFd<'_>,
    has_slave: bool,
) -> Result<Option<OwnedFd>, RestoreError> {
    let at = |what: &'static str| move |errno| failed(image.index, what, errno);
    let termios =
        <[u8; TERMIOS]>::try_from(image.termios.as_slice()).map_err(|_| unfit("a terminal's modes"))?;
    let window =
        <[u8; pty::WINDOW]>::try_from(image.window.as_slice()).map_err(|_| unfit("a terminal's size"))?;
    pty::turn(master, Switch::Lock, false).map_err(at("unlocking it"))?;
    pty::set_window(master, &window).map_err(at("its size"))?;
    pty::set_termios(master, &termios).map_err(at("its modes"))?;
    let path = format!("/dev/pts/{}", image.index);
    let io = |source| RestoreError::File { what: format!("the owner of {path}"), source };
    let (mode, uid, gid) = image.mode;
    let needs_slave = has_slave || image.hung_up || !image.input.is_empty() || !image.output.is_empty();
    let slave = match needs_slave {
        true => Some(
            pty::peer(master, libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC).map_err(at("opening it"))?,
        ),
        false => None,
    };
    if let Some(slave) = &slave {
        put(master, slave.as_fd(), &termios, &image.input, &image.output).map_err(at("what waits in it"))?;
    }
    if mode & libc::S_IFMT == libc::S_IFCHR {
        std::os::unix::fs::chown(&path, Some(uid), Some(gid)).map_err(io)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode & 0o7777)).map_err(io)?;
    }
    pty::turn(master, Switch::Packet, image.packet).map_err(at("packet mode"))?;
    Ok(slave.filter(|_| has_slave))
}

/// Where the fields of `struct termios2` are: input, output and local modes, then the characters.
const INPUT: usize = 0;
const OUTPUT: usize = 4;
const LOCAL: usize = 12;
const CHARACTERS: usize = 17;

fn clear(termios: &mut [u8; TERMIOS], at: usize, flags: u32) {
    let word = u32::from_ne_bytes([termios[at], termios[at + 1], termios[at + 2], termios[at + 3]]) & !flags;
    termios[at..at + 4].copy_from_slice(&word.to_ne_bytes());
}

/// Whether it works line by line.
pub fn by_lines(termios: &[u8; TERMIOS]) -> bool {
    u32::from_ne_bytes([termios[LOCAL], termios[LOCAL + 1], termios[LOCAL + 2], termios[LOCAL + 3]])
        & libc::ICANON
        != 0
}

/// The same modes, but everything that was written is to be read at once.
pub fn raw(termios: &[u8; TERMIOS]) -> [u8; TERMIOS] {
    let mut changed = *termios;
    clear(&mut changed, LOCAL, libc::ICANON);
    changed[CHARACTERS + libc::VMIN] = 0;
    changed[CHARACTERS + libc::VTIME] = 0;
    changed
}

/// The same modes, but what is written is neither changed nor answered. Flow control stays: a master in
/// packet mode is told of its changes.
fn quiet(termios: &[u8; TERMIOS]) -> [u8; TERMIOS] {
    let mut changed = *termios;
    clear(
        &mut changed,
        INPUT,
        libc::ICRNL | libc::INLCR | libc::IGNCR | libc::ISTRIP | libc::IUCLC | libc::PARMRK,
    );
    clear(&mut changed, OUTPUT, libc::OPOST);
    clear(&mut changed, LOCAL, libc::ECHO | libc::ECHONL | libc::ISIG | libc::IEXTEN);
    let kept = [libc::VEOF, libc::VEOL, libc::VEOL2, libc::VMIN, libc::VTIME, libc::VSTART, libc::VSTOP];
    for at in (0..19).filter(|at| !kept.contains(at)) {
        // _POSIX_VDISABLE.
        changed[CHARACTERS + at] = 0;
    }
    changed
}

/// Puts what waits to be read on either side into an empty pair with these modes.
pub fn put(
    master: BorrowedFd<'_>,
    slave: BorrowedFd<'_>,
    termios: &[u8; TERMIOS],
    input: &[u8],
    output: &[u8],
) -> Result<(), Errno> {
    if input.is_empty() && output.is_empty() {
        return Ok(());
    }
    pty::set_termios(master, &quiet(termios))?;
    let done = write_all(slave, output)
        .and_then(|()| arrived(master, output.len()))
        .and_then(|()| put_input(master, slave, termios, input));
    pty::set_termios(master, termios).and(done)
}

fn put_input(
    master: BorrowedFd<'_>,
    slave: BorrowedFd<'_>,
    termios: &[u8; TERMIOS],
    input: &[u8],
) -> Result<(), Errno> {
    if input.is_empty() {
        return Ok(());
    }
    let mut bytes = input.to_vec();
    let mut complete = bytes.len();
    if by_lines(termios) {
        let end = termios[CHARACTERS + libc::VEOF];
        for byte in bytes.iter_mut().filter(|byte| **byte == 0) {
            // The kernel keeps an end of file as a NUL that ends a line (n_tty.c, __DISABLED_CHAR).
            *byte = end;
        }
        complete = input.iter().rposition(|&byte| byte == b'\n' || byte == 0).map_or(0, |at| at + 1);
    }
    write_all(master, &bytes)?;
    // Ends of file are not counted (inq_canon).
    let ends =
        if by_lines(termios) { input[..complete].iter().filter(|&&byte| byte == 0).count() } else { 0 };
    arrived(slave, complete - ends)?;
    if complete < bytes.len() {
        // Not counted. Asking makes the kernel do what is left (n_tty_poll), or it has been done
        // together with the lines before it.
        poll(&mut [PollFd::new(slave, PollFlags::POLLIN)], PollTimeout::ZERO)?;
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Writes all of it without waiting for a reader: there is none, and more than a pty holds would never go in.
fn write_all(file: BorrowedFd<'_>, bytes: &[u8]) -> Result<(), Errno> {
    let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    fcntl(file, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    let written = write_while(file, bytes, Instant::now() + LIMIT);
    fcntl(file, FcntlArg::F_SETFL(flags))?;
    written
}

fn write_while(file: BorrowedFd<'_>, mut bytes: &[u8], deadline: Instant) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match nix::unistd::write(file, bytes) {
            // The kernel makes room in the background.
            Ok(0) | Err(Errno::EAGAIN) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(0) | Err(Errno::EAGAIN) => return Err(Errno::ENOSPC),
            Ok(n) => bytes = &bytes[n..],
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Waits until so much can be read.
fn arrived(file: BorrowedFd<'_>, wanted: usize) -> Result<(), Errno> {
    let deadline = Instant::now() + LIMIT;
    while socket::queued(file, false)? < wanted {
        if Instant::now() > deadline {
            return Err(Errno::ETIMEDOUT);
        }
        poll(&mut [PollFd::new(file, PollFlags::POLLIN)], PollTimeout::ZERO)?;
        std::thread::sleep(Duration::from_micros(200));
    }
    Ok(())
}

/// Puts the right process group into the foreground: asked by the session's leader, when all groups
/// are there.
pub fn set_foreground(images: &[ProcessImage], tracees: &mut [&mut Tracee]) -> Result<(), RestoreError> {
    for terminal in images.first().map_or(&[][..], |root| &root.files.terminals) {
        let (session, group) = terminal.session;
        let leader = images.iter().position(|image| image.pid == session && image.sid == session);
        let Some(tracee) = leader.filter(|_| group > 0).and_then(|at| tracees.get_mut(at)) else { continue };
        let scratch = tracee.scratch();
        tracee.write_mem(scratch, b"/dev/tty\0")?;
        let flags = (libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC) as u64;
        let args = [libc::AT_FDCWD as u64, scratch, flags, 0, 0, 0];
        let fd = tracee.must(0, "opening its controlling terminal", libc::SYS_openat, args)? as u64;
        tracee.write_mem(scratch, &group.to_ne_bytes())?;
        // ESRCH: the group had ended when it was saved.
        let set = tracee.syscall(0, libc::SYS_ioctl, [fd, libc::TIOCSPGRP, scratch, 0, 0, 0])?;
        tracee.must(0, "closing its controlling terminal", libc::SYS_close, [fd, 0, 0, 0, 0, 0])?;
        if set < 0 && set != -i64::from(libc::ESRCH) {
            return Err(failed(terminal.index, "its foreground group", Errno::from_raw(-set as i32)));
        }
    }
    Ok(())
}
