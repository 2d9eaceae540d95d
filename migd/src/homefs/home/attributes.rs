//! Attributes: stat, chmod and its kin, file systems' figures, access, extended attributes.

use std::ffi::CString;
use std::os::fd::AsFd;

use checkpoint::sys::xattr;
use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::stat::{FchmodatFlags, Mode, UtimensatFlags};
use nix::sys::time::TimeSpec;
use nix::unistd::{AccessFlags, Gid, Uid};

use super::devices::{Found, Shown, put_attr};
use super::nodes::{Node, TOKEN_DIR_ID};
use super::{Call, names, number};
use crate::homefs::abi::{Answer, Reader, Reply, fattr};

/// Longest extended attribute (`XATTR_SIZE_MAX`), and list of names.
const XATTR_MAX: usize = 65536;

pub(super) fn getattr(call: &mut Call<'_>) -> Answer<()> {
    let node = call.shared.nodes.get(call.header.nodeid)?;
    put_attributes(call, &node)
}

/// Writes `struct fuse_attr_out`: nothing of it may be remembered.
fn put_attributes(call: &mut Call<'_>, node: &Node) -> Answer<()> {
    if node.id == TOKEN_DIR_ID {
        return names::put_token_dir_attr(call, |out| out.bytes(&[0; 16]));
    }
    let found = call.shared.devices.find(node.fd()?.as_fd())?;
    let shown = if node.is_stream() { Shown::Stream } else { Shown::Plain };
    call.thread.reply.bytes(&[0; 16]);
    put_attr(&mut call.thread.reply, &found, shown);
    Ok(())
}

pub(super) fn setattr(call: &mut Call<'_>, mut r: Reader<'_>) -> Answer<()> {
    let node = call.shared.nodes.get(call.header.nodeid)?;
    let valid = r.u32()?;
    r.u32()?;
    let handle = r.u64()?;
    let size = r.u64()?;
    let _lock_owner = r.u64()?;
    let (atime, mtime, _ctime) = (r.u64()?, r.u64()?, r.u64()?);
    let (atime_nsec, mtime_nsec, _ctime_nsec) = (r.u32()?, r.u32()?, r.u32()?);
    let mode = r.u32()?;
    r.u32()?;
    let (uid, gid) = (r.u32()?, r.u32()?);
    let name = number(node.fd()?);
    call.assume();
    let all = call.shared.descriptors.as_fd();
    if valid & (fattr::UID | fattr::GID) != 0 {
        let owner = (valid & fattr::UID != 0).then(|| Uid::from_raw(uid));
        let group = (valid & fattr::GID != 0).then(|| Gid::from_raw(gid));
        nix::unistd::fchownat(all, name.as_str(), owner, group, AtFlags::empty())?;
    }
    if valid & fattr::MODE != 0 {
        let mode = Mode::from_bits_truncate(mode & 0o7777);
        nix::sys::stat::fchmodat(all, name.as_str(), mode, FchmodatFlags::FollowSymlink)?;
    }
    if valid & fattr::SIZE != 0 {
        let size = i64::try_from(size).map_err(|_| Errno::EFBIG)?;
        if valid & fattr::FH != 0 {
            nix::unistd::ftruncate(&call.shared.handles.get(handle)?.file, size)?;
        } else {
            nix::unistd::truncate(path(&node)?.as_c_str(), size)?;
        }
    }
    if valid & (fattr::ATIME | fattr::MTIME) != 0 {
        let time = |set, now, seconds: u64, nanoseconds: u32| match valid {
            v if v & set == 0 => TimeSpec::UTIME_OMIT,
            v if v & now != 0 => TimeSpec::UTIME_NOW,
            _ => TimeSpec::new(seconds as i64, i64::from(nanoseconds)),
        };
        let atime = time(fattr::ATIME, fattr::ATIME_NOW, atime, atime_nsec);
        let mtime = time(fattr::MTIME, fattr::MTIME_NOW, mtime, mtime_nsec);
        // Following ends at the node itself, even at a symbolic link: the link in /proc is the one
        // that is followed.
        let follow = UtimensatFlags::FollowSymlink;
        nix::sys::stat::utimensat(all, name.as_str(), &atime, &mtime, follow)?;
    }
    put_attributes(call, &node)
}

pub(super) fn statx(call: &mut Call<'_>) -> Answer<()> {
    let node = call.shared.nodes.get(call.header.nodeid)?;
    if node.id == TOKEN_DIR_ID {
        return Err(Errno::EOPNOTSUPP);
    }
    let found = call.shared.devices.find(node.fd()?.as_fd())?;
    call.thread.reply.bytes(&[0; 32]); // time-outs, flags, spare
    put_statx(&mut call.thread.reply, &found, node.is_stream());
    Ok(())
}

/// Writes `struct fuse_statx` (the layout of `struct statx`).
fn put_statx(out: &mut Reply, found: &Found, stream: bool) {
    let st = &found.st;
    let mode = if stream { libc::S_IFREG | u32::from(st.stx_mode & 0o7777) } else { u32::from(st.stx_mode) };
    out.u32(st.stx_mask & (libc::STATX_BASIC_STATS | libc::STATX_BTIME));
    out.u32(st.stx_blksize);
    out.u64(st.stx_attributes);
    out.u32(st.stx_nlink);
    out.u32(st.stx_uid);
    out.u32(st.stx_gid);
    out.u32(mode);
    out.u64(found.device.inode(st.stx_ino));
    out.u64(if stream { 0 } else { st.stx_size });
    out.u64(if stream { 0 } else { st.stx_blocks });
    out.u64(st.stx_attributes_mask);
    for time in [&st.stx_atime, &st.stx_btime, &st.stx_ctime, &st.stx_mtime] {
        out.u64(time.tv_sec as u64);
        out.u32(time.tv_nsec);
        out.u32(0);
    }
    out.u32(if stream { 0 } else { st.stx_rdev_major });
    out.u32(if stream { 0 } else { st.stx_rdev_minor });
    out.bytes(&[0; 8 + 112]); // the device is the host's matter
}

pub(super) fn statfs(call: &mut Call<'_>) -> Answer<()> {
    let node = call.shared.nodes.get(call.header.nodeid)?;
    let fs = nix::sys::statvfs::fstatvfs(node.fd()?)?;
    let out = &mut call.thread.reply;
    out.u64(fs.blocks());
    out.u64(fs.blocks_free());
    out.u64(fs.blocks_available());
    out.u64(fs.files());
    out.u64(fs.files_free());
    out.u32(fs.block_size() as u32);
    out.u32(fs.name_max() as u32);
    out.u32(fs.fragment_size() as u32);
    out.bytes(&[0; 28]);
    Ok(())
}

pub(super) fn access(call: &mut Call<'_>, mut r: Reader<'_>) -> Answer<()> {
    let node = call.shared.nodes.get(call.header.nodeid)?;
    let mask = AccessFlags::from_bits_truncate((r.u32()? & 7) as i32);
    if node.id == TOKEN_DIR_ID {
        let writes = mask.contains(AccessFlags::W_OK);
        return if writes { Err(Errno::EACCES) } else { Ok(()) };
    }
    check_access(call, &node, mask)
}

/// Whether the caller may use the node so. AT_EACCESS: under the thread's own ids, which are already
/// the ones the guest's kernel wants checked.
pub(super) fn check_access(call: &mut Call<'_>, node: &Node, mask: AccessFlags) -> Answer<()> {
    call.assume();
    let name = number(node.fd()?);
    nix::unistd::faccessat(call.shared.descriptors.as_fd(), name.as_str(), mask, AtFlags::AT_EACCESS)
}

/// The node's path for calls that know no descriptors.
fn path(node: &Node) -> Answer<CString> {
    CString::new(format!("/proc/self/fd/{}", number(node.fd()?))).map_err(|_| Errno::EINVAL)
}

fn errno(error: std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

pub(super) fn setxattr(call: &mut Call<'_>, mut r: Reader<'_>) -> Answer<()> {
    let node = call.shared.nodes.get(call.header.nodeid)?;
    let (size, flags) = (r.u32()? as usize, r.u32()?);
    let name = CString::new(r.string()?).map_err(|_| Errno::EINVAL)?;
    let value = r.bytes(size)?;
    call.assume();
    xattr::set(&path(&node)?, &name, value, flags as i32).map_err(errno)
}

pub(super) fn getxattr(call: &mut Call<'_>, mut r: Reader<'_>) -> Answer<()> {
    let node = call.shared.nodes.get(call.header.nodeid)?;
    let size = r.u32()? as usize;
    r.u32()?;
    let name = CString::new(r.string()?).map_err(|_| Errno::EINVAL)?;
    call.assume();
    let path = path(&node)?;
    answer_sized(call, size, |out| xattr::get(&path, &name, out).map_err(errno))
}

pub(super) fn listxattr(call: &mut Call<'_>, mut r: Reader<'_>) -> Answer<()> {
    let node = call.shared.nodes.get(call.header.nodeid)?;
    let size = r.u32()? as usize;
    call.assume();
    let path = path(&node)?;
    answer_sized(call, size, |out| xattr::list(&path, out).map_err(errno))
}

/// With a size of 0 only the length is asked for (`struct fuse_getxattr_out`).
fn answer_sized(
    call: &mut Call<'_>,
    size: usize,
    get: impl FnOnce(&mut [u8]) -> Answer<usize>,
) -> Answer<()> {
    let out = &mut call.thread.reply;
    if size == 0 {
        let length = get(&mut [])?;
        out.u32(length as u32);
        out.u32(0);
        return Ok(());
    }
    let got = get(out.room(size.min(XATTR_MAX)))?;
    out.advance(got);
    Ok(())
}

pub(super) fn removexattr(call: &mut Call<'_>, mut r: Reader<'_>) -> Answer<()> {
    let node = call.shared.nodes.get(call.header.nodeid)?;
    let name = CString::new(r.string()?).map_err(|_| Errno::EINVAL)?;
    call.assume();
    xattr::remove(&path(&node)?, &name).map_err(errno)
}
