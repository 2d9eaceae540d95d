//! What kind of file system a file of home lies on, and how its inode numbers are told apart.
//!
//! The host sees one file system with one `st_dev` where home may have many mounts, so inode numbers
//! of other devices than the root's are shifted apart: two files never seem to be one.

use std::collections::HashMap;
use std::io::BufRead;
use std::os::fd::BorrowedFd;
use std::sync::{Mutex, PoisonError};

use checkpoint::sys::statx::{self, Statx};
use nix::errno::Errno;

use crate::homefs::abi::{Answer, Reply};

/// `STATX_MNT_ID_UNIQUE` (Linux 6.8): a mount number that is never used again.
const MNT_ID_UNIQUE: u32 = 0x4000;
/// Mounts remembered; beyond that the table starts anew (inode numbers stay, see `indexes`).
const MAX_MOUNTS: usize = 4096;

/// File systems whose files have a true size and may be kept in the host's page cache while open;
/// all others (procfs, sysfs, cgroups, devpts, whatever is unknown) are read without a cache.
/// The flag says whether attributes are known without asking a server (`statx` need not sync).
const CACHEABLE: &[(i64, bool)] = &[
    (0xef53, true),       // ext2, ext3, ext4
    (0x5846_5342, true),  // xfs
    (0x9123_683e, true),  // btrfs
    (0x0102_1994, true),  // tmpfs
    (0x8584_58f6, true),  // ramfs
    (0x794c_7630, false), // overlayfs: may lie on anything
    (0xf2f5_2010, true),  // f2fs
    (0x2fc1_2fc1, true),  // zfs
    (0xca45_1a4e, true),  // bcachefs
    (0x7371_7368, true),  // squashfs
    (0xe0f5_e1e2, true),  // erofs
    (0x9660, true),       // iso9660
    (0x1501_3346, true),  // udf
    (0x4d44, true),       // vfat
    (0x2011_bab0, true),  // exfat
    (0x7366_746e, true),  // ntfs3
    (0x3153_464a, true),  // jfs
    (0x3434, true),       // nilfs
    (0x6969, false),      // nfs
    (0xff53_4d42, false), // cifs
    (0xfe53_4d42, false), // smb2
    (0x0102_1997, false), // 9p
    (0x00c3_6400, false), // ceph
    (0x6573_5546, false), // fuse, virtiofs
    (0x4750_4653, false), // gpfs
    (0x0bd0_0bd0, false), // lustre
];

/// A file system, as far as serving its files goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Device {
    /// 0 for the root's; what inode numbers are shifted by.
    index: u16,
    /// The host may cache pages of its open files.
    pub cached: bool,
    /// Its attributes need no question to a server.
    local: bool,
    /// A mount of this very kind of file system, which must not be entered.
    refused: bool,
}

impl Device {
    /// The inode number the host is told.
    pub fn inode(&self, ino: u64) -> u64 {
        ino ^ u64::from(self.index) << 48
    }
}

/// The file systems seen so far.
#[derive(Debug, Default)]
pub struct Devices {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    mounts: HashMap<(u64, u64), Device>,
    indexes: HashMap<u64, u16>,
}

/// Attributes of a file with what is known of its file system.
#[derive(Clone, Copy)]
pub struct Found {
    /// As statx(2) gave them.
    pub st: Statx,
    /// Where it lies.
    pub device: Device,
}

impl Found {
    /// Its `st_dev` in one number.
    pub fn dev(&self) -> u64 {
        dev_of(&self.st)
    }
    /// The mount it was reached by.
    pub fn mount(&self) -> u64 {
        self.st.stx_mnt_id
    }
    /// Its type (`S_IFMT` bits).
    pub fn kind(&self) -> u32 {
        u32::from(self.st.stx_mode) & libc::S_IFMT
    }
}

fn dev_of(st: &Statx) -> u64 {
    u64::from(st.stx_dev_major) << 32 | u64::from(st.stx_dev_minor)
}

impl Devices {
    /// What the open file `fd` (`O_PATH` will do) is. A mount of migd's own is `EACCES`, found
    /// without asking that mount anything: it might be waiting for us.
    pub fn find(&self, fd: BorrowedFd<'_>) -> Answer<Found> {
        let mask = statx::MASK | MNT_ID_UNIQUE;
        let empty = libc::AT_EMPTY_PATH;
        let ask = |flags| {
            statx::statx(fd, c"", empty | flags, mask)
                .map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))
        };
        let st = ask(libc::AT_STATX_DONT_SYNC)?;
        let device = self.device(&st, fd)?;
        if device.refused {
            return Err(Errno::EACCES);
        }
        let st = if device.local { st } else { ask(0)? };
        Ok(Found { st, device })
    }

    fn device(&self, st: &Statx, fd: BorrowedFd<'_>) -> Answer<Device> {
        let dev = dev_of(st);
        let key = (st.stx_mnt_id, dev);
        if let Some(known) = self.lock().mounts.get(&key) {
            return Ok(*known);
        }
        // Outside of the lock: a network file system may take its time to answer.
        let refused = is_own_mount(st.stx_dev_major, st.stx_dev_minor);
        let (cached, local) = if refused { (false, false) } else { classify(fd)? };
        let mut state = self.lock();
        if state.mounts.len() >= MAX_MOUNTS {
            state.mounts.clear();
        }
        let next = u16::try_from(state.indexes.len()).unwrap_or(u16::MAX);
        let index = *state.indexes.entry(dev).or_insert(next);
        let device = Device { index, cached, local, refused };
        state.mounts.insert(key, device);
        Ok(device)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn classify(fd: BorrowedFd<'_>) -> Answer<(bool, bool)> {
    let magic = nix::sys::statfs::fstatfs(fd)?.filesystem_type().0 as i64;
    Ok(CACHEABLE.iter().find(|(m, _)| *m == magic).map_or((false, true), |(_, local)| (true, *local)))
}

/// Whether the mounts visible here know the device as one of migd's.
fn is_own_mount(major: u32, minor: u32) -> bool {
    let wanted = format!("{major}:{minor}");
    let Ok(file) = std::fs::File::open("/proc/self/mountinfo") else { return false };
    std::io::BufReader::new(file).split(b'\n').map_while(Result::ok).any(|line| {
        let mut words = line.split(|b| *b == b' ');
        words.nth(2) == Some(wanted.as_bytes())
            && words.skip_while(|w| *w != b"-").nth(1) == Some(b"fuse.migd")
    })
}

/// How a file is shown to the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shown {
    /// As it is.
    Plain,
    /// As a regular file that is really a stream, in a GETATTR: size 0, as for any pipe.
    Stream,
    /// The same in a LOOKUP. The size, which no program sees, lets several threads write at once:
    /// direct writes beyond the end take the inode's lock (`fuse_dio_wr_exclusive_lock`).
    StreamEntry,
}

/// Size of a stream in a LOOKUP; its low 32 bits are 0, as a FIONREAD must not count it.
const STREAM_SIZE: u64 = 1 << 40;

/// Writes `struct fuse_attr`.
pub fn put_attr(out: &mut Reply, found: &Found, shown: Shown) {
    let st = &found.st;
    let mode = u32::from(st.stx_mode);
    let (mode, size, blocks, rdev) = match shown {
        Shown::Plain => (mode, st.stx_size, st.stx_blocks, encode_dev(st.stx_rdev_major, st.stx_rdev_minor)),
        Shown::Stream => (libc::S_IFREG | (mode & 0o7777), 0, 0, 0),
        Shown::StreamEntry => (libc::S_IFREG | (mode & 0o7777), STREAM_SIZE, 0, 0),
    };
    out.u64(found.device.inode(st.stx_ino));
    out.u64(size);
    out.u64(blocks);
    out.u64(st.stx_atime.tv_sec as u64);
    out.u64(st.stx_mtime.tv_sec as u64);
    out.u64(st.stx_ctime.tv_sec as u64);
    out.u32(st.stx_atime.tv_nsec);
    out.u32(st.stx_mtime.tv_nsec);
    out.u32(st.stx_ctime.tv_nsec);
    out.u32(mode);
    out.u32(st.stx_nlink);
    out.u32(st.stx_uid);
    out.u32(st.stx_gid);
    out.u32(rdev);
    out.u32(st.stx_blksize);
    out.u32(0);
}

/// `new_encode_dev` of the kernel (`include/linux/kdev_t.h`).
pub fn encode_dev(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// `new_decode_dev`: major and minor.
pub fn decode_dev(dev: u32) -> (u32, u32) {
    ((dev & 0xf_ff00) >> 8, (dev & 0xff) | ((dev >> 12) & 0xf_ff00))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn device_numbers_survive_encoding() {
        for pair in [(0, 0), (8, 1), (253, 255), (4095, 1_048_575), (136, 256)] {
            assert_eq!(decode_dev(encode_dev(pair.0, pair.1)), pair);
        }
    }

    #[test]
    fn two_file_systems_never_share_an_inode_number() {
        let devices = Devices::default();
        let root = std::fs::File::open("/").expect("/");
        let proc = std::fs::File::open("/proc").expect("/proc");
        let a = devices.find(root.as_fd()).expect("statx /");
        let b = devices.find(proc.as_fd()).expect("statx /proc");
        assert_eq!(a.device.inode(5), 5);
        assert_ne!(a.device.inode(5), b.device.inode(5));
        assert!(!b.device.cached, "procfs must not be cached");
    }
}
