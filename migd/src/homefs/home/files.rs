//! Open regular files: open and create, read and write, and what is done to an open file.

use std::cmp::Reverse;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};

use checkpoint::sys::rw_flags;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, fcntl};
use nix::sys::stat::Mode;
use nix::unistd::{AccessFlags, Whence};

use super::devices::Found;
use super::exec::Body as Request;
use super::handles::{Handle, HandleKind, Kind, Position, STREAM_FLAGS};
use super::nodes::{Body, Node};
use super::{Call, Done, Shared, attributes, names, streams};
use crate::homefs::abi::{Answer, MAX_WRITE, Reader, WRITE_CACHE, fopen};

/// `__FMODE_EXEC` (`include/linux/fs.h`): the file is opened to be executed.
const FMODE_EXEC: u32 = 0o40;

/// The flags of a guest's open that are passed to home's. Not among them: O_CREAT and O_EXCL (CREATE
/// has them), O_NOFOLLOW (the node is what it is), O_DIRECT (the guest's buffers are not here),
/// O_ASYNC.
fn wanted(flags: u32) -> OFlag {
    OFlag::from_bits_truncate(flags as i32)
        & (OFlag::O_ACCMODE
            | OFlag::O_APPEND
            | OFlag::O_NONBLOCK
            | OFlag::O_DSYNC
            | OFlag::O_SYNC
            | OFlag::O_NOATIME
            | OFlag::O_TRUNC)
}

/// A handle for a regular file the guest has opened.
fn new_handle(id: u64, file: OwnedFd, cached: bool, flags: OFlag) -> Handle {
    let reads_only = flags & OFlag::O_ACCMODE == OFlag::O_RDONLY;
    // Nothing can be unwritten behind a descriptor that cannot write: no FLUSH when it is closed.
    let noflush = if reads_only { fopen::NOFLUSH } else { 0 };
    Handle {
        id,
        file,
        kind: Kind::Regular(Position::Given),
        open_flags: noflush | if cached { 0 } else { fopen::DIRECT_IO },
        handed_over: false,
        append: AtomicBool::new(flags.contains(OFlag::O_APPEND)),
        append_seen: AtomicBool::new(flags.contains(OFlag::O_APPEND)),
    }
}

/// Writes `struct fuse_open_out`.
pub(super) fn put_open(call: &mut Call<'_>, handle: &Handle) {
    call.thread.reply.u64(handle.id);
    call.thread.reply.u32(handle.open_flags);
    call.thread.reply.u32(0);
}

pub(super) fn open(call: &mut Call<'_>, body: Request) -> Answer<Done> {
    let node = call.shared.nodes.get(call.header.nodeid)?;
    let flags = body.reader().u32()?;
    if let Some(intent) = names::take_intent(call.shared, call.connection, &call.header)
        && intent.node == node.id
    {
        let handle = call.shared.handles.open(call.connection.id, intent.handle)?;
        put_open(call, &handle);
        return Ok(Done::Reply);
    }
    if let Body::Handle(..) = &node.body {
        let handle = call.shared.handles.open(call.connection.id, node.view)?;
        put_open(call, &handle);
        return Ok(Done::Reply);
    }
    if node.is_stream() {
        return streams::open(call, &node, wanted(flags));
    }
    if flags & FMODE_EXEC != 0 {
        attributes::check_access(call, &node, AccessFlags::X_OK)?;
    }
    call.assume();
    let file = call.shared.reopen(node.fd()?, wanted(flags))?;
    let cached = node.device.is_some_and(|d| d.cached);
    let handle = call
        .shared
        .handles
        .add(Some(call.connection.id), |id| new_handle(id, file, cached, wanted(flags)))?;
    put_open(call, &handle);
    Ok(Done::Reply)
}

pub(super) fn create(call: &mut Call<'_>, mut r: Reader<'_>) -> Answer<()> {
    let parent = call.shared.nodes.get(call.header.nodeid)?;
    let (flags, mode, umask, _open_flags) = (r.u32()?, r.u32()?, r.u32()?, r.u32()?);
    let name = CString::new(r.name()?).map_err(|_| Errno::EINVAL)?;
    let extra = OFlag::O_CREAT | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NOCTTY;
    let exclusive = OFlag::from_bits_truncate(flags as i32) & OFlag::O_EXCL;
    let wanted = wanted(flags);
    call.assume();
    call.thread.umask(umask);
    // Not waiting, in case that a FIFO of this name has just been made by somebody.
    let all = wanted | extra | exclusive | OFlag::O_NONBLOCK;
    let mode = Mode::from_bits_truncate(mode & 0o7777);
    let file = nix::fcntl::openat(parent.fd()?, name.as_c_str(), all, mode)?;
    finish_create(call, &parent, file, wanted)
}

pub(super) fn tmpfile(call: &mut Call<'_>, mut r: Reader<'_>) -> Answer<()> {
    let parent = call.shared.nodes.get(call.header.nodeid)?;
    let (flags, mode, umask, _open_flags) = (r.u32()?, r.u32()?, r.u32()?, r.u32()?);
    let exclusive = OFlag::from_bits_truncate(flags as i32) & OFlag::O_EXCL;
    let wanted = wanted(flags);
    call.assume();
    call.thread.umask(umask);
    let all = wanted | exclusive | OFlag::O_TMPFILE | OFlag::O_CLOEXEC;
    let mode = Mode::from_bits_truncate(mode & 0o7777);
    let file = nix::fcntl::openat(parent.fd()?, ".", all, mode)?;
    finish_create(call, &parent, file, wanted)
}

/// The entry and the handle of a file just opened by its name.
fn finish_create(call: &mut Call<'_>, parent: &Node, file: OwnedFd, wanted: OFlag) -> Answer<()> {
    let found = call.shared.devices.find(file.as_fd())?;
    if found.kind() != libc::S_IFREG {
        return Err(Errno::ESTALE); // the kernel looks again
    }
    if !wanted.contains(OFlag::O_NONBLOCK) {
        fcntl(&file, FcntlArg::F_SETFL(wanted & (OFlag::O_APPEND | OFlag::O_NOATIME)))?;
    }
    let node = call.shared.reopen(&file, OFlag::O_PATH)?;
    let id = names::enter(call.shared, call.connection, node, parent.view, &found)?;
    let cached = found.device.cached;
    let handle =
        call.shared.handles.add(Some(call.connection.id), |id| new_handle(id, file, cached, wanted))?;
    names::put_entry(&mut call.thread.reply, id, &found);
    put_open(call, &handle);
    Ok(())
}

impl Shared {
    /// See [`super::HomeView::add_handle`].
    pub(super) fn hand_over(&self, file: OwnedFd, kind: HandleKind) -> io::Result<u64> {
        let found = self.devices.find(file.as_fd())?;
        let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL)?);
        let kind = match kind {
            HandleKind::Stream => Kind::Stream(streams::state_of(&file, &found)),
            HandleKind::Directory if found.kind() == libc::S_IFDIR => Kind::Directory(Default::default()),
            HandleKind::Regular { shared_position } if found.kind() == libc::S_IFREG => {
                Kind::Regular(match shared_position {
                    false => Position::Given,
                    true => Position::Shared(nix::unistd::lseek(&file, 0, Whence::SeekCur)?.into()),
                })
            }
            kind => {
                let what = format!("descriptor is not of the kind {kind:?} (type {:o})", found.kind());
                return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
            }
        };
        let open_flags = flags_of(&kind, &found, flags);
        let handle = self.handles.add(None, |id| Handle {
            id,
            file,
            kind,
            open_flags,
            handed_over: true,
            append: AtomicBool::new(flags.contains(OFlag::O_APPEND)),
            append_seen: AtomicBool::new(false),
        })?;
        Ok(handle.id)
    }
}

/// The handle that does best for a mapping of the regular file with this inode number, as hosts are told it.
pub(super) fn handle_of_inode(shared: &Shared, inode: u64) -> Option<Arc<Handle>> {
    let fitness = |handle: &Handle| {
        let found = shared.devices.find(handle.file.as_fd()).ok()?;
        if found.device.inode(found.st.stx_ino) != inode {
            return None;
        }
        match OFlag::from_bits_retain(fcntl(&handle.file, FcntlArg::F_GETFL).ok()?) & OFlag::O_ACCMODE {
            OFlag::O_RDWR => Some(2),
            OFlag::O_RDONLY => Some(1),
            _ => None,
        }
    };
    let all = shared.handles.regular().into_iter();
    let fitting = all.filter_map(|handle| Some((fitness(&handle)?, handle)));
    // The oldest of those that are as good: the same every time.
    fitting.max_by_key(|(fitness, handle)| (*fitness, Reverse(handle.id))).map(|(_, handle)| handle)
}

fn flags_of(kind: &Kind, found: &Found, flags: OFlag) -> u32 {
    match kind {
        Kind::Stream(_) => STREAM_FLAGS,
        Kind::Directory(_) => 0,
        Kind::Regular(position) => {
            let reads_only = flags & OFlag::O_ACCMODE == OFlag::O_RDONLY;
            let direct = matches!(position, Position::Shared(_)) || !found.device.cached;
            (if direct { fopen::DIRECT_IO } else { 0 }) | if reads_only { fopen::NOFLUSH } else { 0 }
        }
    }
}

pub(super) fn read(call: &mut Call<'_>, body: Request) -> Answer<Done> {
    let mut r = body.reader();
    let handle = call.shared.handles.get(r.u64()?)?;
    let offset = r.offset()?;
    let size = r.u32()?.min(MAX_WRITE) as usize;
    let _read_flags = r.u32()?;
    let _lock_owner = r.u64()?;
    let flags = OFlag::from_bits_retain(r.u32()? as i32);
    match &handle.kind {
        Kind::Stream(_) => return streams::read(call, handle, size, flags.contains(OFlag::O_NONBLOCK)),
        Kind::Directory(_) => return Err(Errno::EISDIR),
        Kind::Regular(position) => {
            let room = call.thread.reply.room(size);
            let got = match position {
                Position::Given => nix::sys::uio::pread(&handle.file, room, offset)?,
                Position::Shared(expected) => {
                    let mut expected = expected.lock().unwrap_or_else(PoisonError::into_inner);
                    seek_if_moved(&handle, *expected, offset)?;
                    let got = nix::unistd::read(&handle.file, room)?;
                    *expected = offset.saturating_add(got as i64);
                    got
                }
            };
            call.thread.reply.advance(got);
        }
    }
    Ok(Done::Reply)
}

/// The guest has moved the position since its last request.
fn seek_if_moved(handle: &Handle, expected: i64, offset: i64) -> Answer<()> {
    if expected != offset {
        nix::unistd::lseek(&handle.file, offset, Whence::SeekSet)?;
    }
    Ok(())
}

pub(super) fn write(call: &mut Call<'_>, mut body: Request) -> Answer<Done> {
    let mut r = body.reader();
    let handle = call.shared.handles.get(r.u64()?)?;
    let offset = r.offset()?;
    let size = r.u32()? as usize;
    let write_flags = r.u32()?;
    let _lock_owner = r.u64()?;
    let flags = OFlag::from_bits_retain(r.u32()? as i32);
    r.u32()?;
    if r.0.len() != size {
        return Err(Errno::EINVAL);
    }
    body.skip(40);
    if handle.is_stream() {
        return streams::write(call, handle, body, flags.contains(OFlag::O_NONBLOCK));
    }
    let Kind::Regular(position) = &handle.kind else { return Err(Errno::EBADF) };
    // Under the caller's ids, so that home's kernel takes set-user-ID off as it would for him, and
    // counts the blocks as his.
    call.assume();
    let from_cache = write_flags & WRITE_CACHE != 0;
    if !from_cache {
        follow_append(&handle, flags)?;
    }
    let put = if from_cache {
        write_page(call.shared, &handle, body.bytes(), offset)?
    } else {
        match position {
            Position::Given => nix::sys::uio::pwrite(&handle.file, body.bytes(), offset)?,
            Position::Shared(expected) => {
                let mut expected = expected.lock().unwrap_or_else(PoisonError::into_inner);
                if !handle.append.load(Ordering::SeqCst) {
                    seek_if_moved(&handle, *expected, offset)?;
                }
                let put = nix::unistd::write(&handle.file, body.bytes())?;
                *expected = offset.saturating_add(put as i64);
                put
            }
        }
    };
    call.thread.reply.u32(put as u32);
    call.thread.reply.u32(0);
    Ok(Done::Reply)
}

/// fcntl(F_SETFL) is not told to a FUSE server; each write says whether O_APPEND is on. It is taken
/// off only if it was seen on, so that a forgotten flag never turns an append into an overwrite.
fn follow_append(handle: &Handle, flags: OFlag) -> Answer<()> {
    let wants = flags.contains(OFlag::O_APPEND);
    let seen = handle.append_seen.swap(wants, Ordering::SeqCst);
    let has = handle.append.load(Ordering::SeqCst);
    if wants == has || (!wants && !seen) {
        return Ok(());
    }
    let mut now = OFlag::from_bits_retain(fcntl(&handle.file, FcntlArg::F_GETFL)?);
    now.set(OFlag::O_APPEND, wants);
    fcntl(&handle.file, FcntlArg::F_SETFL(now))?;
    handle.append.store(wants, Ordering::SeqCst);
    Ok(())
}

/// A page of a shared mapping goes where it belongs, whatever descriptor the kernel has guessed: a
/// pwrite to one with O_APPEND would append it (pwrite(2), "BUGS"). What is behind the end by now, as somebody has
/// made the file shorter, is dropped, as home's kernel would have dropped the page.
fn write_page(shared: &Shared, handle: &Handle, data: &[u8], offset: i64) -> Answer<usize> {
    let room = nix::sys::stat::fstat(&handle.file)?.st_size.saturating_sub(offset).max(0) as usize;
    let kept = &data[..data.len().min(room)];
    let mut put = 0;
    // The host's kernel does not look how much was written (fuse_writepage_end): all of it, or an error.
    while put < kept.len() {
        match write_at(shared, handle, &kept[put..], offset.saturating_add(put as i64))? {
            0 => return Err(Errno::EIO),
            more => put += more,
        }
    }
    Ok(data.len())
}

fn write_at(shared: &Shared, handle: &Handle, data: &[u8], offset: i64) -> Answer<usize> {
    if !handle.append.load(Ordering::SeqCst) {
        return nix::sys::uio::pwrite(&handle.file, data, offset);
    }
    match rw_flags::write(handle.file.as_fd(), data, offset, rw_flags::NOAPPEND) {
        Ok(put) => Ok(put),
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
            let other = shared.reopen(&handle.file, OFlag::O_WRONLY)?;
            nix::sys::uio::pwrite(other, data, offset)
        }
        Err(error) => Err(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))),
    }
}

pub(super) fn release(call: &mut Call<'_>, mut r: Reader<'_>) -> Answer<()> {
    call.shared.handles.release(call.connection.id, r.u64()?);
    Ok(())
}

/// close(2) of one descriptor: network file systems write now and may fail.
pub(super) fn flush(call: &mut Call<'_>, mut r: Reader<'_>) -> Answer<()> {
    let handle = call.shared.handles.get(r.u64()?)?;
    if handle.is_stream() {
        return Ok(());
    }
    let copy = nix::unistd::dup(&handle.file)?;
    nix::unistd::close(copy)
}

pub(super) fn fsync(call: &mut Call<'_>, mut r: Reader<'_>) -> Answer<()> {
    let handle = call.shared.handles.get(r.u64()?)?;
    let data_only = r.u32()? & 1 != 0;
    if data_only { nix::unistd::fdatasync(&handle.file) } else { nix::unistd::fsync(&handle.file) }
}

pub(super) fn fallocate(call: &mut Call<'_>, mut r: Reader<'_>) -> Answer<()> {
    let handle = call.shared.handles.get(r.u64()?)?;
    let (offset, length, mode) = (r.offset()?, r.offset()?, r.u32()?);
    let mode = FallocateFlags::from_bits(mode as i32).ok_or(Errno::EOPNOTSUPP)?;
    call.assume();
    nix::fcntl::fallocate(&handle.file, mode, offset, length)
}

/// Only SEEK_DATA and SEEK_HOLE come here. The description's position is not to move, as others may
/// share it, so the file is opened once more for it.
pub(super) fn lseek(call: &mut Call<'_>, mut r: Reader<'_>) -> Answer<()> {
    let handle = call.shared.handles.get(r.u64()?)?;
    let offset = r.offset()?;
    let whence = match r.u32()? as i32 {
        libc::SEEK_DATA => Whence::SeekData,
        libc::SEEK_HOLE => Whence::SeekHole,
        _ => return Err(Errno::EINVAL),
    };
    let found = if handle.handed_over {
        call.thread.assume_self();
        let other = call.shared.reopen(&handle.file, OFlag::O_RDONLY | OFlag::O_NONBLOCK)?;
        nix::unistd::lseek(other, offset, whence)?
    } else {
        nix::unistd::lseek(&handle.file, offset, whence)?
    };
    call.thread.reply.u64(found as u64);
    Ok(())
}

pub(super) fn copy_file_range(call: &mut Call<'_>, mut r: Reader<'_>) -> Answer<()> {
    let from = call.shared.handles.get(r.u64()?)?;
    let offset_in = r.offset()?;
    let _node = r.u64()?;
    let to = call.shared.handles.get(r.u64()?)?;
    let offset_out = r.offset()?;
    let length = usize::try_from(r.u64()?).map_err(|_| Errno::EINVAL)?;
    // The answer has 32 bits for the length, and a worker is not to be gone for long.
    let length = length.min(64 << 20);
    call.assume();
    let copied = rw_flags::copy_range(from.file.as_fd(), offset_in, to.file.as_fd(), offset_out, length)
        .map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))?;
    call.thread.reply.u32(copied as u32);
    call.thread.reply.u32(0);
    Ok(())
}
