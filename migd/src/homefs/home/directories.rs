//! Open directories. Positions are the file system's own, so they mean the same on every host and
//! at home.

use std::ffi::CString;
use std::os::fd::AsFd;
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, PoisonError};

use checkpoint::sys::dirents;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::Whence;

use super::Call;
use super::handles::{Handle, Kind};
use super::names::enter_name;
use super::nodes::{Body, Node};
use crate::homefs::abi::{Answer, ENTRY, MAX_WRITE, Reader};

/// Length of `struct linux_dirent64` before the name.
const LINUX_DIRENT: usize = 19;
/// Length of `struct fuse_dirent` before the name.
const FUSE_DIRENT: usize = 24;
/// Bytes of entries asked of home's kernel at once.
const BATCH: usize = 32 << 10;

pub(super) fn open(call: &mut Call<'_>, mut r: Reader<'_>) -> Answer<()> {
    let node = call.shared.nodes.get(call.header.nodeid)?;
    let flags = r.u32()?;
    let handle = match &node.body {
        Body::TokenDir => return Err(Errno::EACCES),
        Body::Handle(_, false) => call.shared.handles.open(call.connection.id, node.view)?,
        _ => {
            let wanted = OFlag::from_bits_truncate(flags as i32) & (OFlag::O_NOATIME | OFlag::O_NONBLOCK);
            call.assume();
            let file = call.shared.reopen(node.fd()?, wanted | OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
            call.shared.handles.add(Some(call.connection.id), |id| Handle {
                id,
                file,
                kind: Kind::Directory(Mutex::new(())),
                open_flags: 0,
                handed_over: false,
                append: AtomicBool::new(false),
                append_seen: AtomicBool::new(false),
            })?
        }
    };
    call.thread.reply.u64(handle.id);
    call.thread.reply.u32(0);
    call.thread.reply.u32(0);
    Ok(())
}

/// READDIR, and READDIRPLUS (`plus`), which looks every entry up as well.
pub(super) fn read(call: &mut Call<'_>, mut r: Reader<'_>, plus: bool) -> Answer<()> {
    let node = call.shared.nodes.get(call.header.nodeid)?;
    let handle = call.shared.handles.get(r.u64()?)?;
    let Kind::Directory(reading) = &handle.kind else { return Err(Errno::ENOTDIR) };
    let mut position = r.offset()?;
    let limit = (r.u32()?).min(MAX_WRITE) as usize;
    let device = node.device.ok_or(Errno::ENOTDIR)?;
    let _one_at_a_time = reading.lock().unwrap_or_else(PoisonError::into_inner);
    if plus {
        call.assume();
    }
    nix::unistd::lseek(handle.file.as_fd(), position, Whence::SeekSet)?;
    let mut batch = std::mem::take(&mut call.thread.scratch);
    batch.resize(BATCH, 0);
    let ask = limit.clamp(512, BATCH);
    let result = loop {
        let got = match dirents::read(handle.file.as_fd(), &mut batch[..ask]) {
            Ok(0) => break Ok(()),
            Ok(got) => got,
            Err(error) => break Err(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))),
        };
        let (next, full) = put_batch(call, &node, &device, &batch[..got], limit, position, plus);
        position = next;
        if full {
            // What did not fit is read again by the next request; at home the position is to be
            // where the guest's is.
            break nix::unistd::lseek(handle.file.as_fd(), position, Whence::SeekSet).map(drop);
        }
        if limit - call.thread.reply.body_len().min(limit) < BATCH {
            break Ok(());
        }
    };
    call.thread.scratch = batch;
    match result {
        Err(errno) if call.thread.reply.body_len() == 0 => Err(errno),
        _ => Ok(()),
    }
}

/// Appends the entries of one getdents64 as far as they fit; gives the position after the last one,
/// and whether one did not fit.
fn put_batch(
    call: &mut Call<'_>,
    node: &Node,
    device: &super::devices::Device,
    batch: &[u8],
    limit: usize,
    mut position: i64,
    plus: bool,
) -> (i64, bool) {
    let mut rest = Reader(batch);
    while let Some((ino, next, kind, name)) = entry(&mut rest) {
        let size = FUSE_DIRENT + name.len().next_multiple_of(8) + if plus { ENTRY } else { 0 };
        if call.thread.reply.body_len() + size > limit {
            return (position, true);
        }
        if plus {
            put_looked_up(call, node, name);
        }
        let out = &mut call.thread.reply;
        out.u64(device.inode(ino));
        out.u64(next as u64);
        out.u32(name.len() as u32);
        out.u32(u32::from(kind));
        out.bytes(name);
        out.bytes(&[0; 7][..name.len().next_multiple_of(8) - name.len()]);
        position = next;
    }
    (position, false)
}

/// The next record: inode, position after it, type, name.
fn entry<'a>(r: &mut Reader<'a>) -> Option<(u64, i64, u8, &'a [u8])> {
    let (ino, next, length) = (r.u64().ok()?, r.u64().ok()?, r.u16().ok()?);
    let rest = r.bytes(usize::from(length).checked_sub(LINUX_DIRENT - 1)?).ok()?;
    let (kind, name) = rest.split_first()?;
    let end = name.iter().position(|b| *b == 0)?;
    Some((ino, next as i64, shown_kind(*kind), &name[..end]))
}

/// `d_type` as a lookup would show it.
fn shown_kind(kind: u8) -> u8 {
    match kind {
        libc::DT_FIFO | libc::DT_CHR => libc::DT_REG,
        kind => kind,
    }
}

/// A `fuse_entry_out` for the name, or an empty one where the kernel must ask by itself.
fn put_looked_up(call: &mut Call<'_>, node: &Node, name: &[u8]) {
    let before = call.thread.reply.body_len();
    let dots = name == b"." || name == b"..";
    let hidden = node.id == crate::homefs::abi::ROOT_ID && name == call.shared.token_name.as_bytes();
    let done = match CString::new(name) {
        Ok(name) if !dots && !hidden => enter_name(call, node, &name).is_ok(),
        _ => false,
    };
    if !done {
        call.thread.reply.truncate_body(before);
        call.thread.reply.bytes(&[0; ENTRY]);
    }
}
