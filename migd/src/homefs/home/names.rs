//! Operations on names: lookup, create, link, rename, remove.
//!
//! Each works on one component below an `O_PATH` directory and never follows a symbolic link, so a
//! path is resolved by the host's kernel step by step, within the served tree.

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, RenameFlags};
use nix::sys::stat::{Mode, SFlag};
use nix::unistd::UnlinkatFlags;

use super::devices::{Found, Shown, decode_dev, put_attr};
use super::handles::{Handle, Kind};
use super::nodes::{Body, Key, Node, TOKEN_DIR_ID};
use super::{Call, Connection, Intent, Shared, files, number};
use crate::homefs::abi::{Answer, InHeader, ROOT_ID, Reader, Reply};

/// A name as system calls want it.
fn c_name(r: &mut Reader<'_>) -> Answer<CString> {
    CString::new(r.name()?).map_err(|_| Errno::EINVAL)
}

/// What a name in the directory of handles begins with that is the number of an inode.
pub(super) const BY_INODE: &str = "i";
/// A thread's intents kept at most; beyond it all are dropped.
const MAX_INTENTS: usize = 4096;

pub(super) fn lookup(call: &mut Call<'_>, mut r: Reader<'_>) -> Answer<()> {
    let parent = call.shared.nodes.get(call.header.nodeid)?;
    let name = r.name()?;
    clear_intent(call);
    if parent.id == ROOT_ID && name == call.shared.token_name.as_bytes() {
        return put_token_dir(call);
    }
    if parent.id == TOKEN_DIR_ID {
        return lookup_handle(call, name);
    }
    let name = CString::new(name).map_err(|_| Errno::EINVAL)?;
    call.assume();
    enter_name(call, &parent, &name)
}

/// Looks `name` up below `parent` and writes the entry.
pub(super) fn enter_name(call: &mut Call<'_>, parent: &Node, name: &CString) -> Answer<()> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let fd = nix::fcntl::openat(parent.fd()?, name.as_c_str(), flags, Mode::empty())?;
    let found = call.shared.devices.find(fd.as_fd())?;
    let id = enter(call.shared, call.connection, fd, parent.view, &found)?;
    put_entry(&mut call.thread.reply, id, &found);
    Ok(())
}

/// The node for an `O_PATH` descriptor, counted as looked up.
pub(super) fn enter(
    shared: &Shared,
    connection: &Connection,
    fd: OwnedFd,
    view: u64,
    found: &Found,
) -> Answer<u64> {
    let kind = found.kind();
    let view = if kind == libc::S_IFDIR { view } else { 0 };
    let key = Key { view, mount: found.mount(), dev: found.dev(), ino: found.st.stx_ino };
    let device = Some(found.device);
    let make = |id, kept| Node { id, body: Body::File(kept), view, kind, device };
    shared.nodes.enter_file(connection.id, Some(key), found.mount(), fd, make)
}

/// `struct fuse_entry_out`: nothing of it may be remembered.
pub(super) fn put_entry(out: &mut Reply, id: u64, found: &Found) {
    let stream = matches!(found.kind(), libc::S_IFIFO | libc::S_IFCHR);
    put_entry_as(out, id, found, if stream { Shown::StreamEntry } else { Shown::Plain });
}

fn put_entry_as(out: &mut Reply, id: u64, found: &Found, shown: Shown) {
    out.u64(id);
    out.bytes(&[0; 32]); // generation, and both time-outs
    put_attr(out, found, shown);
}

fn put_token_dir(call: &mut Call<'_>) -> Answer<()> {
    put_token_dir_attr(call, |out| {
        out.u64(TOKEN_DIR_ID);
        out.bytes(&[0; 32]);
    })
}

/// The attributes of the directory of handles: those of the root, but for a few.
pub(super) fn put_token_dir_attr(call: &mut Call<'_>, head: impl FnOnce(&mut Reply)) -> Answer<()> {
    let root = call.shared.nodes.get(ROOT_ID)?;
    let mut found = call.shared.devices.find(root.fd()?.as_fd())?;
    found.st.stx_ino = u64::MAX;
    found.st.stx_mode = (libc::S_IFDIR | 0o555) as u16;
    found.st.stx_nlink = 2;
    (found.st.stx_uid, found.st.stx_gid) = (0, 0);
    let out = &mut call.thread.reply;
    head(out);
    put_attr(out, &found, Shown::Plain);
    Ok(())
}

/// The handle with this name in the directory of handles: its number, or that of its inode.
pub(super) fn named_handle(shared: &Shared, name: &[u8]) -> Answer<Arc<Handle>> {
    let text = std::str::from_utf8(name).map_err(|_| Errno::ENOENT)?;
    let number = |text: &str| text.parse::<u64>().ok().filter(|number| number.to_string() == text); // not 007
    let handle = match text.strip_prefix(BY_INODE) {
        Some(inode) => files::handle_of_inode(shared, number(inode).ok_or(Errno::ENOENT)?),
        None => shared.handles.get(number(text).ok_or(Errno::ENOENT)?).ok(),
    };
    handle.ok_or(Errno::ENOENT)
}

/// A name in the directory of handles.
fn lookup_handle(call: &mut Call<'_>, name: &[u8]) -> Answer<()> {
    call.thread.assume_self();
    let handle = named_handle(call.shared, name)?;
    let found = call.shared.devices.find(handle.file.as_fd())?;
    match &handle.kind {
        Kind::Regular(_) => {
            // The file's own node, so that the host has one page cache for it, whichever way it is
            // opened. OPEN names a node only; this thread's next one is of the handle.
            let fd = call.shared.reopen(&handle.file, OFlag::O_PATH)?;
            let node = enter(call.shared, call.connection, fd, 0, &found)?;
            set_intent(call, Intent { node, handle: handle.id });
            put_entry(&mut call.thread.reply, node, &found);
        }
        Kind::Directory(_) | Kind::Stream(_) => {
            let node = enter_handle(call, &handle, &found)?;
            let stream = handle.is_stream();
            let shown = if stream { Shown::StreamEntry } else { Shown::Plain };
            put_entry_as(&mut call.thread.reply, node, &found, shown);
        }
    }
    Ok(())
}

fn enter_handle(call: &Call<'_>, handle: &Arc<Handle>, found: &Found) -> Answer<u64> {
    let key = Key { view: handle.id, mount: 0, dev: 0, ino: 0 };
    call.shared.nodes.enter(call.connection.id, key, |id| Node {
        id,
        body: Body::Handle(Arc::downgrade(handle), handle.is_stream()),
        view: handle.id,
        kind: found.kind(),
        device: Some(found.device),
    })
}

/// A thread that looks a handle up opens it next (an open is a LOOKUP and an OPEN of one thread);
/// any other lookup of the thread shows that it did not.
fn set_intent(call: &Call<'_>, intent: Intent) {
    let mut intents = call.shared.intents.lock().unwrap_or_else(PoisonError::into_inner);
    if intents.len() >= MAX_INTENTS {
        intents.clear();
    }
    intents.insert((call.connection.id, call.header.pid), intent);
    call.shared.intents_count.store(intents.len(), Ordering::SeqCst);
}

fn clear_intent(call: &Call<'_>) {
    if call.shared.intents_count.load(Ordering::SeqCst) > 0 {
        take_intent(call.shared, call.connection, &call.header);
    }
}

/// What the thread has just looked up, if that was a regular file's handle.
pub(super) fn take_intent(shared: &Shared, connection: &Connection, header: &InHeader) -> Option<Intent> {
    if shared.intents_count.load(Ordering::SeqCst) == 0 {
        return None;
    }
    let mut intents = shared.intents.lock().unwrap_or_else(PoisonError::into_inner);
    let taken = intents.remove(&(connection.id, header.pid));
    shared.intents_count.store(intents.len(), Ordering::SeqCst);
    taken
}

pub(super) fn forget(shared: &Shared, connection: &Connection, header: &InHeader, body: &[u8]) -> Answer<()> {
    let mut r = Reader(body);
    if header.opcode == crate::homefs::abi::op::FORGET {
        shared.nodes.forget(connection.id, header.nodeid, r.u64()?);
        return Ok(());
    }
    let count = r.u32()?;
    r.u32()?;
    for _ in 0..count {
        let (node, lookups) = (r.u64()?, r.u64()?); // ends with the frame at the latest
        shared.nodes.forget(connection.id, node, lookups);
    }
    Ok(())
}

pub(super) fn readlink(call: &mut Call<'_>) -> Answer<()> {
    let node = call.shared.nodes.get(call.header.nodeid)?;
    call.assume();
    let target = nix::fcntl::readlinkat(node.fd()?, "")?;
    call.thread.reply.bytes(target.as_bytes());
    Ok(())
}

pub(super) fn symlink(call: &mut Call<'_>, mut r: Reader<'_>) -> Answer<()> {
    let parent = call.shared.nodes.get(call.header.nodeid)?;
    let name = c_name(&mut r)?;
    let target = r.string()?;
    call.assume();
    nix::unistd::symlinkat(target, parent.fd()?, name.as_c_str())?;
    enter_name(call, &parent, &name)
}

pub(super) fn mkdir(call: &mut Call<'_>, mut r: Reader<'_>) -> Answer<()> {
    let parent = call.shared.nodes.get(call.header.nodeid)?;
    let (mode, umask) = (r.u32()?, r.u32()?);
    let name = c_name(&mut r)?;
    call.assume();
    call.thread.umask(umask);
    nix::sys::stat::mkdirat(parent.fd()?, name.as_c_str(), Mode::from_bits_truncate(mode & 0o7777))?;
    enter_name(call, &parent, &name)
}

pub(super) fn mknod(call: &mut Call<'_>, mut r: Reader<'_>) -> Answer<()> {
    let parent = call.shared.nodes.get(call.header.nodeid)?;
    let (mode, rdev, umask, _) = (r.u32()?, r.u32()?, r.u32()?, r.u32()?);
    let name = c_name(&mut r)?;
    let kind = match mode & libc::S_IFMT {
        0 => libc::S_IFREG,
        kind => kind,
    };
    let rdev = match kind {
        libc::S_IFREG | libc::S_IFIFO | libc::S_IFSOCK => 0,
        // Home's kernel wants CAP_MKNOD, which a thread that acts for a user does not have.
        libc::S_IFCHR | libc::S_IFBLK => {
            let (major, minor) = decode_dev(rdev);
            nix::sys::stat::makedev(u64::from(major), u64::from(minor))
        }
        _ => return Err(Errno::EINVAL),
    };
    call.assume();
    call.thread.umask(umask);
    let permissions = Mode::from_bits_truncate(mode & 0o7777);
    let flag = SFlag::from_bits_truncate(kind);
    nix::sys::stat::mknodat(parent.fd()?, name.as_c_str(), flag, permissions, rdev)?;
    if !matches!(kind, libc::S_IFIFO | libc::S_IFCHR) {
        return enter_name(call, &parent, &name);
    }
    // The kernel insists on the type it asked for (create_new_entry), where a LOOKUP would show a
    // stream: so this answer has a node of its own, which the next lookup of the name replaces.
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let fd = nix::fcntl::openat(parent.fd()?, name.as_c_str(), flags, Mode::empty())?;
    let found = call.shared.devices.find(fd.as_fd())?;
    let device = Some(found.device);
    // S_IFSOCK: anything that is not shown as a stream.
    let make = |id, kept| Node { id, body: Body::File(kept), view: 0, kind: libc::S_IFSOCK, device };
    let id = call.shared.nodes.enter_file(call.connection.id, None, found.mount(), fd, make)?;
    put_entry_as(&mut call.thread.reply, id, &found, Shown::Plain);
    Ok(())
}

pub(super) fn unlink(call: &mut Call<'_>, mut r: Reader<'_>, directory: bool) -> Answer<()> {
    let parent = call.shared.nodes.get(call.header.nodeid)?;
    let name = c_name(&mut r)?;
    call.assume();
    let flag = if directory { UnlinkatFlags::RemoveDir } else { UnlinkatFlags::NoRemoveDir };
    nix::unistd::unlinkat(parent.fd()?, name.as_c_str(), flag)
}

pub(super) fn rename(call: &mut Call<'_>, mut r: Reader<'_>, with_flags: bool) -> Answer<()> {
    let parent = call.shared.nodes.get(call.header.nodeid)?;
    let target = call.shared.nodes.get(r.u64()?)?;
    let flags = if with_flags {
        let flags = r.u32()?;
        r.u32()?;
        RenameFlags::from_bits(flags).ok_or(Errno::EINVAL)?
    } else {
        RenameFlags::empty()
    };
    let (old, new) = (c_name(&mut r)?, c_name(&mut r)?);
    call.assume();
    nix::fcntl::renameat2(parent.fd()?, old.as_c_str(), target.fd()?, new.as_c_str(), flags)
}

pub(super) fn link(call: &mut Call<'_>, mut r: Reader<'_>) -> Answer<()> {
    let parent = call.shared.nodes.get(call.header.nodeid)?;
    let old = call.shared.nodes.get(r.u64()?)?;
    let name = c_name(&mut r)?;
    call.assume();
    // By its link in /proc: AT_EMPTY_PATH would want a capability that is given up for a user.
    let from = number(old.fd()?);
    let descriptors = call.shared.descriptors.as_fd();
    nix::unistd::linkat(
        descriptors,
        from.as_str(),
        parent.fd()?,
        name.as_c_str(),
        AtFlags::AT_SYMLINK_FOLLOW,
    )?;
    enter_name(call, &parent, &name)
}
