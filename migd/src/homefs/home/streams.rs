//! Pipes, FIFOs, terminals and other character devices.
//!
//! A read at home happens only when the guest reads, and never takes more than it asked for: the
//! other readers of a shared pipe (make's job server) are to find the rest. The open file
//! description may be shared with other processes at home, so its flags are never changed; that a
//! call does not wait is had from `RWF_NOWAIT`, or where the kernel does not offer that (FIFOs,
//! terminals) from a second description of the same file.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use checkpoint::sys::rw_flags;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll as poll_now};

use super::devices::{Found, encode_dev};
use super::exec::{self, Body as Request};
use super::handles::{Handle, Kind, STREAM_FLAGS, Stream};
use super::nodes::{Node, NodeFd};
use super::terminal::{self, Wants};
use super::thread::{Thread, Work};
use super::{Call, Connection, Done, Shared, files};
use crate::homefs::abi::{Answer, InHeader, MAX_WRITE, NOTIFY_POLL, POLL_SCHEDULE_NOTIFY, Reader, Reply, op};

/// How often a background group looks whether it is in the foreground now.
const FOREGROUND_EVERY: Duration = Duration::from_millis(100);
/// After so many calls in a row that were ready and yet would wait, a pause is made.
const SPURIOUS: u32 = 3;
/// A request of at least this may be one part of a larger read (the kernel splits at
/// [`MAX_WRITE`], or a page before for a buffer that is not aligned): filled to the last byte, the
/// kernel would ask for more at once, and wait, where a native read returns.
const SPLIT_FROM: usize = MAX_WRITE as usize - 4096;
/// Most that is written at once to a stream that cannot be told not to wait (`PIPE_BUF`): there is
/// room for that when it is writable.
const SAFE_WRITE: usize = 4096;

/// Whether requests of this kind can be on a stream and wait.
pub(super) fn opcode_may_wait(opcode: u32) -> bool {
    matches!(opcode, op::READ | op::WRITE | op::OPEN)
}

/// Whether this request can be interrupted.
pub(super) fn may_wait(shared: &Shared, header: &InHeader, body: &[u8]) -> bool {
    match header.opcode {
        op::READ | op::WRITE => {
            let handle = Reader(body).u64().and_then(|id| shared.handles.get(id));
            handle.is_ok_and(|h| h.is_stream())
        }
        op::OPEN => shared.nodes.get(header.nodeid).is_ok_and(|n| n.is_stream()),
        _ => false,
    }
}

/// A host wants a request to end its wait.
pub(super) fn interrupt(shared: &Shared, connection: &Connection, body: &[u8]) {
    let Ok(unique) = Reader(body).u64() else { return };
    let wait = {
        let waits = shared.waits.lock().unwrap_or_else(PoisonError::into_inner);
        waits.get(&(connection.id, unique)).map(Arc::clone)
    };
    if let Some(wait) = wait {
        shared.cancel(wait);
    }
}

/// The state of a stream behind `file`.
pub(super) fn state_of(file: &OwnedFd, found: &Found) -> Stream {
    let (major, minor) = (found.st.stx_rdev_major, found.st.stx_rdev_minor);
    let character = found.kind() == libc::S_IFCHR;
    let master = character && (major, minor) == (5, 2);
    let terminal = character && !master && nix::unistd::isatty(file).unwrap_or(false);
    let terminal = terminal.then(|| u64::from(encode_dev(major, minor)));
    Stream { terminal, master, ..Stream::default() }
}

/// Opens a FIFO or a character device of the tree; on a thread of its own, as a FIFO waits for its
/// other end.
pub(super) fn open(call: &mut Call<'_>, node: &Arc<Node>, flags: OFlag) -> Answer<Done> {
    let NodeFd::File(fd) = node.fd()? else { return Err(Errno::ENXIO) };
    go_on(call, move |call| {
        let found = call.shared.devices.find(fd.as_fd())?;
        let controlling =
            found.kind() == libc::S_IFCHR && (found.st.stx_rdev_major, found.st.stx_rdev_minor) == (5, 0);
        let file = if controlling { open_controlling(call, flags)? } else { open_waiting(call, &fd, flags)? };
        let found = call.shared.devices.find(file.as_fd())?;
        let state = state_of(&file, &found);
        let handle = call.shared.handles.add(Some(call.connection.id), |id| Handle {
            id,
            file,
            kind: Kind::Stream(state),
            open_flags: STREAM_FLAGS,
            handed_over: false,
            append: false.into(),
            append_seen: false.into(),
        })?;
        files::put_open(call, &handle);
        Ok(())
    })
}

fn open_waiting(call: &mut Call<'_>, fd: &OwnedFd, flags: OFlag) -> Answer<OwnedFd> {
    loop {
        if call.wait.as_ref().is_some_and(|w| w.is_cancelled()) {
            return Err(Errno::EINTR);
        }
        call.assume();
        match call.shared.reopen(fd, flags) {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

/// `/dev/tty` is the deputy's terminal, not this process'.
fn open_controlling(call: &mut Call<'_>, flags: OFlag) -> Answer<OwnedFd> {
    let device = call.shared.identity.deputy().and_then(terminal::controlling).ok_or(Errno::ENXIO)?;
    let (major, minor) = super::devices::decode_dev(device as u32);
    let path = match major {
        136..=143 => format!("/dev/pts/{}", (major - 136) * 256 + minor),
        4 if minor < 64 => format!("/dev/tty{minor}"),
        _ => return Err(Errno::ENXIO),
    };
    // No permission is asked for one's own controlling terminal (tty_open_current_tty).
    call.thread.assume_self();
    let flags = flags | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    nix::fcntl::open(path.as_str(), flags, nix::sys::stat::Mode::empty())
}

/// Continues a request on a thread that may wait.
fn go_on(call: &Call<'_>, work: impl FnOnce(&mut Call<'_>) -> Answer<()> + Send + 'static) -> Answer<Done> {
    let (shared, connection) = (Arc::clone(call.shared), Arc::clone(call.connection));
    let (header, wait) = (call.header, call.wait.clone());
    let work: Work = Box::new(move |thread: &mut Thread| {
        thread.reply.clear();
        if let Some(wait) = &wait {
            wait.enter(thread);
        }
        let mut call = Call { shared: &shared, connection: &connection, thread, header, wait: wait.clone() };
        let result = work(&mut call);
        let thread = call.thread;
        if let Some(wait) = &wait {
            wait.leave(thread);
        }
        exec::finish(&shared, &connection, thread, &header, result);
    });
    match call.shared.waiters.run(work) {
        Ok(()) => Ok(Done::Later),
        Err(_) => {
            tracing::warn!("too many guests' threads wait for pipes and terminals");
            Err(Errno::ENOBUFS)
        }
    }
}

pub(super) fn read(call: &mut Call<'_>, handle: Arc<Handle>, size: usize, nonblock: bool) -> Answer<Done> {
    let size = if size > SPLIT_FROM { size - 1 } else { size };
    if background(call.shared, &handle, Wants::Input).is_none() {
        match try_read(call, &handle, size) {
            Ok(()) => return Ok(Done::Reply),
            Err(Errno::EAGAIN) if !nonblock => {}
            Err(errno) => return Err(errno),
        }
    }
    go_on(call, move |call| patiently(call, &handle, Wants::Input, |call| try_read(call, &handle, size)))
}

pub(super) fn write(
    call: &mut Call<'_>,
    handle: Arc<Handle>,
    mut body: Request,
    nonblock: bool,
) -> Answer<Done> {
    let total = body.bytes().len();
    let mut written = 0;
    if background(call.shared, &handle, Wants::Output).is_none() {
        match try_write(call.shared, &handle, body.bytes()) {
            Ok(n) => written = n,
            Err(Errno::EAGAIN) if !nonblock => {}
            Err(errno) => return Err(errno),
        }
        if written == total || (nonblock && written > 0) {
            put_written(&mut call.thread.reply, written);
            return Ok(Done::Reply);
        }
        body.skip(written);
    }
    go_on(call, move |call| {
        let result = patiently(call, &handle, Wants::Output, |call| {
            let n = try_write(call.shared, &handle, body.bytes())?;
            body.skip(n);
            written += n;
            if body.bytes().is_empty() { Ok(()) } else { Err(Errno::EAGAIN) }
        });
        // As natively: an error after some bytes is for the next call.
        match result {
            Err(errno) if written == 0 => return Err(errno),
            _ => put_written(&mut call.thread.reply, written),
        }
        Ok(())
    })
}

/// `struct fuse_write_out`.
fn put_written(out: &mut Reply, written: usize) {
    out.u32(written as u32);
    out.u32(0);
}

/// Repeats `attempt` until it is something else than `EAGAIN`, waiting for readiness in between.
fn patiently(
    call: &mut Call<'_>,
    handle: &Handle,
    wants: Wants,
    mut attempt: impl FnMut(&mut Call<'_>) -> Answer<()>,
) -> Answer<()> {
    let events = match wants {
        Wants::Input => PollFlags::POLLIN,
        Wants::Output => PollFlags::POLLOUT,
    };
    let mut spurious = 0;
    let mut told = false;
    loop {
        if call.wait.as_ref().is_some_and(|w| w.is_cancelled()) {
            return Err(Errno::EINTR);
        }
        if let Some(group) = background(call.shared, handle, wants) {
            if !told {
                terminal::refuse(group, wants);
                told = true;
            }
            let own = PollFlags::empty();
            let _ = call.thread.wait_for(&call.shared.descriptors, own, Some(FOREGROUND_EVERY));
            continue;
        }
        told = false;
        match attempt(call) {
            Err(Errno::EAGAIN) => {}
            Err(Errno::EINTR) => continue,
            result => return result,
        }
        // A terminal's group may change while this waits.
        let patience = handle.stream().and_then(|s| s.terminal).map(|_| FOREGROUND_EVERY * 5);
        match call.thread.wait_for(&handle.file, events, patience) {
            Ok(ready) if ready.is_empty() => {}
            Ok(_) => {
                spurious += 1;
                if spurious > SPURIOUS {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// The deputy's group, if it is in the background of this terminal.
fn background(shared: &Shared, handle: &Handle, wants: Wants) -> Option<i32> {
    let device = handle.stream()?.terminal?;
    terminal::background_group(&shared.identity.family(), device, handle.file.as_fd(), wants)
}

/// How to do a call on a stream without waiting.
enum Way<'a> {
    Flag,
    Own(&'a OwnedFd),
    PollFirst,
}

const NOWAIT_YES: u8 = 1;
const NOWAIT_NO: u8 = 2;

/// The way for `handle` after `RWF_NOWAIT` has been tried or not.
fn way<'a>(shared: &Shared, handle: &'a Handle, stream: &'a Stream) -> Way<'a> {
    if stream.nowait.load(Ordering::Relaxed) != NOWAIT_NO {
        return Way::Flag;
    }
    let flags = fcntl(&handle.file, FcntlArg::F_GETFL).map_or(OFlag::empty(), OFlag::from_bits_retain);
    if flags.contains(OFlag::O_NONBLOCK) {
        return Way::Own(&handle.file);
    }
    if stream.master {
        return Way::PollFirst; // opened again it would be a new terminal
    }
    let own = stream
        .own
        .get_or_init(|| shared.reopen(&handle.file, (flags & OFlag::O_ACCMODE) | OFlag::O_NONBLOCK).ok());
    own.as_ref().map_or(Way::PollFirst, Way::Own)
}

/// One attempt by the best way there is; the closure gets the descriptor and the `RWF_` flags.
fn attempt<T>(
    shared: &Shared,
    handle: &Handle,
    events: PollFlags,
    mut io: impl FnMut(std::os::fd::BorrowedFd<'_>, i32, bool) -> std::io::Result<T>,
) -> Answer<T> {
    let stream = handle.stream().ok_or(Errno::EBADF)?;
    let errno = |e: std::io::Error| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO));
    loop {
        return match way(shared, handle, stream) {
            Way::Flag => match io(handle.file.as_fd(), rw_flags::NOWAIT, true).map_err(errno) {
                Err(Errno::EOPNOTSUPP) => {
                    stream.nowait.store(NOWAIT_NO, Ordering::Relaxed);
                    continue;
                }
                result => {
                    stream.nowait.store(NOWAIT_YES, Ordering::Relaxed);
                    result
                }
            },
            Way::Own(own) => io(own.as_fd(), 0, true).map_err(errno),
            Way::PollFirst => {
                let mut set = [PollFd::new(handle.file.as_fd(), events)];
                poll_now(&mut set, PollTimeout::ZERO)?;
                if set[0].revents().is_none_or(|e| e.is_empty()) {
                    return Err(Errno::EAGAIN);
                }
                // Should another reader be faster, this waits; an interruption kicks the thread.
                io(handle.file.as_fd(), 0, false).map_err(errno)
            }
        };
    }
}

fn try_read(call: &mut Call<'_>, handle: &Handle, size: usize) -> Answer<()> {
    let room = call.thread.reply.room(size);
    let got =
        attempt(call.shared, handle, PollFlags::POLLIN, |fd, flags, _| rw_flags::read(fd, room, -1, flags))?;
    call.thread.reply.advance(got);
    Ok(())
}

fn try_write(shared: &Shared, handle: &Handle, data: &[u8]) -> Answer<usize> {
    attempt(shared, handle, PollFlags::POLLOUT, |fd, flags, never_waits| {
        let most = if never_waits { data.len() } else { data.len().min(SAFE_WRITE) };
        rw_flags::write(fd, &data[..most], -1, flags)
    })
}

pub(super) fn poll(call: &mut Call<'_>, mut r: Reader<'_>) -> Answer<()> {
    let handle = call.shared.handles.get(r.u64()?)?;
    let (kernel, flags, events) = (r.u64()?, r.u32()?, r.u32()?);
    let always = PollFlags::POLLIN | PollFlags::POLLOUT | PollFlags::POLLRDNORM | PollFlags::POLLWRNORM;
    let ready = if handle.is_stream() {
        if flags & POLL_SCHEDULE_NOTIFY != 0 {
            // Before looking: an edge in between is then told.
            call.shared.poller.arm(&handle, call.connection.id, kernel)?;
        }
        let wanted = PollFlags::from_bits_truncate(events as u16 as i16);
        let mut set = [PollFd::new(handle.file.as_fd(), wanted)];
        poll_now(&mut set, PollTimeout::ZERO)?;
        set[0].revents().unwrap_or(PollFlags::empty())
    } else {
        always & PollFlags::from_bits_truncate(events as u16 as i16)
    };
    call.thread.reply.u32(u32::from(ready.bits() as u16));
    call.thread.reply.u32(0);
    Ok(())
}

/// Wakes the hosts that have polled the handle `id`.
pub(super) fn notify(shared: &Shared, id: u64) {
    let Ok(handle) = shared.handles.get(id) else { return };
    let Some(stream) = handle.stream() else { return };
    let armed = {
        let mut watch = stream.watch.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut watch.armed)
    };
    let mut frame = Reply::default();
    for (connection, kernel) in armed {
        let Some(connection) = shared.connection(connection) else { continue };
        frame.clear();
        frame.u64(kernel);
        connection.send(frame.finish_notification(NOTIFY_POLL));
    }
}
