//! The FUSE protocol's bytes: numbers, a reader of requests, a writer of replies.
//!
//! Shapes are those of `include/uapi/linux/fuse.h` (protocol 7.45), little-endian as the kernel of
//! every machine this runs on writes them. Nothing here touches a file or a device, and nothing
//! trusts a length: a short request is [`Errno::EINVAL`], never a panic.

use nix::errno::Errno;

/// Result of an operation whose failure is told to the caller as an errno.
pub type Answer<T> = Result<T, Errno>;

/// Largest WRITE (and READ) this file system negotiates, bytes.
pub const MAX_WRITE: u32 = 1 << 20;
/// Pages in one request: `MAX_WRITE` in 4 KiB pages; the kernel's default upper limit.
pub const MAX_PAGES: u16 = 256;
/// Longest frame either side accepts: the largest WRITE with its headers, or a setxattr.
pub const MAX_FRAME: usize = MAX_WRITE as usize + (64 << 10) + 4096;
/// Length of the header of a request.
pub const IN_HEADER: usize = 40;
/// Length of the header of a reply.
pub const OUT_HEADER: usize = 16;
/// Length of `struct fuse_attr`.
pub const ATTR: usize = 88;
/// Length of `struct fuse_entry_out`.
pub const ENTRY: usize = 40 + ATTR;
/// The root directory's node.
pub const ROOT_ID: u64 = 1;

/// Request numbers (`enum fuse_opcode`).
pub mod op {
    #![allow(missing_docs)]
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const ACCESS: u32 = 34;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const IOCTL: u32 = 39;
    pub const POLL: u32 = 40;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const TMPFILE: u32 = 51;
    pub const STATX: u32 = 52;
}

/// Bits of `fuse_open_out.open_flags`.
pub mod fopen {
    #![allow(missing_docs)]
    pub const DIRECT_IO: u32 = 1 << 0;
    pub const NONSEEKABLE: u32 = 1 << 2;
    pub const STREAM: u32 = 1 << 4;
    pub const NOFLUSH: u32 = 1 << 5;
    pub const PARALLEL_DIRECT_WRITES: u32 = 1 << 6;
}

/// Bits of `fuse_setattr_in.valid`.
pub mod fattr {
    #![allow(missing_docs)]
    pub const MODE: u32 = 1 << 0;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const FH: u32 = 1 << 6;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;
}

/// `fuse_notify_code`: an open file's readiness may have changed.
pub const NOTIFY_POLL: i32 = 1;
/// In `fuse_poll_in.flags`: tell when that changes.
pub const POLL_SCHEDULE_NOTIFY: u32 = 1;
/// In `fuse_write_in.write_flags`: from the page cache, by a guessed file handle.
pub const WRITE_CACHE: u32 = 1;

/// `struct fuse_in_header`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InHeader {
    /// Length of the whole request.
    pub len: u32,
    /// What is asked ([`op`]).
    pub opcode: u32,
    /// The request's number.
    pub unique: u64,
    /// The node it is about.
    pub nodeid: u64,
    /// The caller's file system user id.
    pub uid: u32,
    /// The caller's file system group id.
    pub gid: u32,
    /// The calling thread, in the mounter's PID namespace; 0 if not visible there.
    pub pid: u32,
}

impl InHeader {
    /// The header and the body of a whole request; `None` if it is not one.
    pub fn parse(frame: &[u8]) -> Option<(InHeader, &[u8])> {
        let mut r = Reader(frame);
        let header = InHeader {
            len: r.u32().ok()?,
            opcode: r.u32().ok()?,
            unique: r.u64().ok()?,
            nodeid: r.u64().ok()?,
            uid: r.u32().ok()?,
            gid: r.u32().ok()?,
            pid: r.u32().ok()?,
        };
        r.u32().ok()?;
        (header.len as usize == frame.len() && frame.len() <= MAX_FRAME).then_some((header, r.0))
    }
}

/// `struct fuse_out_header`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutHeader {
    /// 0, or a negative errno; in a notification its code.
    pub error: i32,
    /// The request answered; 0 for a notification.
    pub unique: u64,
}

impl OutHeader {
    /// The header and the body of a whole reply; `None` if it is not one.
    pub fn parse(frame: &[u8]) -> Option<(OutHeader, &[u8])> {
        let mut r = Reader(frame);
        let len = r.u32().ok()?;
        let error = r.u32().ok()? as i32;
        let unique = r.u64().ok()?;
        (len as usize == frame.len() && frame.len() <= MAX_FRAME)
            .then_some((OutHeader { error, unique }, r.0))
    }
}

/// A reply without a body.
pub fn bare_reply(unique: u64, error: i32) -> [u8; OUT_HEADER] {
    let mut out = [0; OUT_HEADER];
    out[..4].copy_from_slice(&(OUT_HEADER as u32).to_le_bytes());
    out[4..8].copy_from_slice(&error.to_le_bytes());
    out[8..].copy_from_slice(&unique.to_le_bytes());
    out
}

/// Takes a request apart, front to back.
#[derive(Debug, Clone, Copy)]
pub struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    /// The next `n` bytes.
    pub fn bytes(&mut self, n: usize) -> Answer<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(n).ok_or(Errno::EINVAL)?;
        self.0 = rest;
        Ok(head)
    }

    /// The next 16 bits.
    pub fn u16(&mut self) -> Answer<u16> {
        Ok(u16::from_le_bytes(self.bytes(2)?.try_into().map_err(|_| Errno::EINVAL)?))
    }

    /// The next 32 bits.
    pub fn u32(&mut self) -> Answer<u32> {
        Ok(u32::from_le_bytes(self.bytes(4)?.try_into().map_err(|_| Errno::EINVAL)?))
    }

    /// The next 64 bits.
    pub fn u64(&mut self) -> Answer<u64> {
        Ok(u64::from_le_bytes(self.bytes(8)?.try_into().map_err(|_| Errno::EINVAL)?))
    }

    /// The next 64 bits, as a file offset.
    pub fn offset(&mut self) -> Answer<i64> {
        i64::try_from(self.u64()?).map_err(|_| Errno::EINVAL)
    }

    /// The bytes up to the next NUL, which is taken too.
    pub fn string(&mut self) -> Answer<&'a [u8]> {
        let end = self.0.iter().position(|b| *b == 0).ok_or(Errno::EINVAL)?;
        let text = &self.0[..end];
        self.0 = &self.0[end + 1..];
        Ok(text)
    }

    /// A NUL-ended name of one directory entry: not empty, no slash, not `.` or `..`.
    pub fn name(&mut self) -> Answer<&'a [u8]> {
        let name = self.string()?;
        if name.len() > 255 {
            return Err(Errno::ENAMETOOLONG);
        }
        if name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') {
            return Err(Errno::EINVAL);
        }
        Ok(name)
    }
}

/// A reply under construction. The buffer is kept from one reply to the next, so that a large READ
/// costs no fresh memory.
#[derive(Debug, Default)]
pub struct Reply {
    buffer: Vec<u8>,
    len: usize,
}

impl Reply {
    /// Empties it.
    pub fn clear(&mut self) {
        self.len = OUT_HEADER;
        if self.buffer.len() < OUT_HEADER {
            self.buffer.resize(OUT_HEADER, 0);
        }
    }

    /// Bytes of body so far.
    pub fn body_len(&self) -> usize {
        self.len.saturating_sub(OUT_HEADER)
    }

    /// Room for `n` more bytes (of old content); [`Reply::advance`] then says how many were used.
    pub fn room(&mut self, n: usize) -> &mut [u8] {
        let end = self.len + n;
        if self.buffer.len() < end {
            self.buffer.resize(end, 0);
        }
        &mut self.buffer[self.len..end]
    }

    /// `n` bytes of the room were used.
    pub fn advance(&mut self, n: usize) {
        self.len = (self.len + n).min(self.buffer.len());
    }

    /// Adds bytes.
    pub fn bytes(&mut self, data: &[u8]) {
        self.room(data.len()).copy_from_slice(data);
        self.advance(data.len());
    }

    /// Adds 32 bits.
    pub fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    /// Adds 64 bits.
    pub fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }

    /// Drops the body's end, keeping `n` bytes.
    pub fn truncate_body(&mut self, n: usize) {
        self.len = self.len.min(OUT_HEADER + n);
    }

    /// The whole frame, with its header; an error carries no body.
    pub fn finish(&mut self, unique: u64, error: i32) -> &[u8] {
        if error != 0 || self.len < OUT_HEADER {
            self.clear();
        }
        self.header(unique, error)
    }

    /// The whole frame as a notification: its code is where a reply has its error, its number is 0.
    pub fn finish_notification(&mut self, code: i32) -> &[u8] {
        self.header(0, code)
    }

    fn header(&mut self, unique: u64, error: i32) -> &[u8] {
        self.buffer[..4].copy_from_slice(&(self.len as u32).to_le_bytes());
        self.buffer[4..8].copy_from_slice(&error.to_le_bytes());
        self.buffer[8..16].copy_from_slice(&unique.to_le_bytes());
        &self.buffer[..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_must_be_whole() {
        let mut frame = vec![0u8; IN_HEADER + 3];
        frame[..4].copy_from_slice(&43u32.to_le_bytes());
        frame[4..8].copy_from_slice(&op::LOOKUP.to_le_bytes());
        frame[40..42].copy_from_slice(b"ab");
        let (header, body) = InHeader::parse(&frame).expect("well formed");
        assert_eq!((header.opcode, body), (op::LOOKUP, &b"ab\0"[..]));
        assert_eq!(Reader(body).name(), Ok(&b"ab"[..]));
        assert!(InHeader::parse(&frame[..42]).is_none());
        frame.push(0);
        assert!(InHeader::parse(&frame).is_none());
    }

    #[test]
    fn names_are_checked() {
        for bad in [&b"\0"[..], b".\0", b"..\0", b"a/b\0", b"unended"] {
            assert!(Reader(bad).name().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_reply_has_its_length_and_errors_have_no_body() {
        let mut reply = Reply::default();
        reply.clear();
        reply.u64(7);
        assert_eq!(reply.finish(5, 0).len(), 24);
        let (header, body) = OutHeader::parse(reply.finish(5, -2)).expect("well formed");
        assert_eq!((header.error, header.unique, body.len()), (-2, 5, 0));
    }
}
