//! Messages of sockets with everything that travels beside the data: sender, descriptors,
//! credentials (recvmsg(2), unix(7)).

use super::fd::own;
use nix::errno::Errno;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

/// Descriptors in one message at most (`SCM_MAX_FD`, net/scm.h).
pub const MAX_DESCRIPTORS: usize = 253;
/// Room for those, and for credentials and what else may come.
const CONTROL: usize = 4096;
const ADDRESS: usize = 128;

/// One message, looked at in its queue.
#[derive(Debug, Default)]
pub struct Peeked {
    /// The data.
    pub data: Vec<u8>,
    /// More of it was there than the room given.
    pub cut: bool,
    /// The sender's `struct sockaddr`; empty: it has none.
    pub from: Vec<u8>,
    /// Copies of the descriptors that are in flight.
    pub descriptors: Vec<OwnedFd>,
    /// PID, uid, gid of the sender, if the kernel tells them (`SO_PASSCRED`).
    pub credentials: Option<[u32; 3]>,
    /// Ancillary data that is none of these: level, type, value.
    pub other: Vec<(i32, i32, Vec<u8>)>,
}

/// Looks at the next message without taking it, and without waiting: where `SO_PEEK_OFF` stands, or at
/// the first. `flags` are added to `MSG_PEEK`.
pub fn peek(socket: BorrowedFd<'_>, room: usize, flags: i32) -> Result<Peeked, Errno> {
    let mut data = vec![0u8; room];
    let mut address = [0u8; ADDRESS];
    // u64 for the alignment that control messages need.
    let mut control = [0u64; CONTROL / 8];
    let mut part = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() };
    // SAFETY: `msghdr` is plain data for which all zero is valid.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_name = address.as_mut_ptr().cast();
    header.msg_namelen = ADDRESS as u32;
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = CONTROL;
    let flags = flags | libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: every buffer that the header names has the length that it tells, and outlives the call.
    let got = Errno::result(unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags) })?;
    data.truncate(got as usize);
    let mut out = Peeked {
        data,
        cut: header.msg_flags & libc::MSG_TRUNC != 0,
        from: address[..(header.msg_namelen as usize).min(ADDRESS)].to_vec(),
        ..Peeked::default()
    };
    if header.msg_flags & libc::MSG_CTRUNC != 0 {
        out.other.push((0, 0, Vec::new()));
    }
    // SAFETY: the header and its control buffer are as the kernel left them; CMSG_NXTHDR stays inside
    // of it, and each message's data has the length that its header tells.
    unsafe {
        let mut at = libc::CMSG_FIRSTHDR(&raw const header);
        while !at.is_null() {
            let length = (*at).cmsg_len.saturating_sub(libc::CMSG_LEN(0) as usize);
            let bytes = std::slice::from_raw_parts(libc::CMSG_DATA(at), length);
            match ((*at).cmsg_level, (*at).cmsg_type) {
                (libc::SOL_SOCKET, libc::SCM_RIGHTS) => {
                    let numbers =
                        bytes.chunks_exact(4).map(|n| RawFd::from_ne_bytes([n[0], n[1], n[2], n[3]]));
                    out.descriptors.extend(numbers.map(own));
                }
                (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) if length == 12 => {
                    let word =
                        |n: usize| u32::from_ne_bytes([bytes[n], bytes[n + 1], bytes[n + 2], bytes[n + 3]]);
                    out.credentials = Some([word(0), word(4), word(8)]);
                }
                (level, kind) => out.other.push((level, kind, bytes.to_vec())),
            }
            at = libc::CMSG_NXTHDR(&raw const header, at);
        }
    }
    Ok(out)
}

/// Of the next `length` bytes of a stream: how many are in buffers that end before the last of them.
///
/// The kernel copies what was sent at once as a whole or not at all (`unix_stream_read_actor` in
/// net/unix/af_unix.c), so that room for all but one byte shows where the last buffer begins.
pub fn peek_before_last(socket: BorrowedFd<'_>, length: usize) -> Result<usize, Errno> {
    let Some(room) = length.checked_sub(1) else { return Ok(0) };
    let mut data = vec![0u8; room];
    /// Below `vm.mmap_min_addr`: nothing is ever there.
    const NOWHERE: usize = 8;
    let mut parts = [
        libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: room },
        libc::iovec { iov_base: std::ptr::without_provenance_mut(NOWHERE), iov_len: 1 },
    ];
    // SAFETY: `msghdr` is plain data for which all zero is valid.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = parts.as_mut_ptr();
    header.msg_iovlen = 2;
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: the first buffer has the length told; at the address of the second nothing is mapped, and
    // the kernel answers with EFAULT instead of writing. Without room for them descriptors are not made.
    match Errno::result(unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags) }) {
        Err(Errno::EFAULT) => Ok(0),
        other => other.map(|n| n as usize),
    }
}

/// Sends one message without waiting and without SIGPIPE: with `to` (empty: to the peer), descriptors,
/// and credentials, which need a process with that PID.
pub fn send(
    socket: BorrowedFd<'_>,
    data: &[u8],
    to: &[u8],
    descriptors: &[RawFd],
    credentials: Option<[u32; 3]>,
) -> Result<usize, Errno> {
    if descriptors.len() > MAX_DESCRIPTORS {
        return Err(Errno::EINVAL);
    }
    let mut control = [0u64; CONTROL / 8];
    let mut part = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
    // SAFETY: `msghdr` is plain data for which all zero is valid.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    if !to.is_empty() {
        header.msg_name = to.as_ptr().cast_mut().cast();
        header.msg_namelen = to.len() as u32;
    }
    let mut put: Vec<(i32, Vec<u8>)> = Vec::new();
    if !descriptors.is_empty() {
        put.push((libc::SCM_RIGHTS, descriptors.iter().flat_map(|fd| fd.to_ne_bytes()).collect()));
    }
    if let Some(words) = credentials {
        put.push((libc::SCM_CREDENTIALS, words.iter().flat_map(|word| word.to_ne_bytes()).collect()));
    }
    if !put.is_empty() {
        header.msg_control = control.as_mut_ptr().cast();
        // SAFETY: only computes.
        header.msg_controllen =
            put.iter().map(|(_, bytes)| unsafe { libc::CMSG_SPACE(bytes.len() as u32) } as usize).sum();
        // SAFETY: the buffer has room for more than the descriptors allowed and the credentials; each
        // message is written where the macros place it within the length set above.
        unsafe {
            let mut at = libc::CMSG_FIRSTHDR(&raw const header);
            for (kind, bytes) in &put {
                (*at).cmsg_level = libc::SOL_SOCKET;
                (*at).cmsg_type = *kind;
                (*at).cmsg_len = libc::CMSG_LEN(bytes.len() as u32) as usize;
                std::ptr::copy_nonoverlapping(bytes.as_ptr(), libc::CMSG_DATA(at), bytes.len());
                at = libc::CMSG_NXTHDR(&raw const header, at);
            }
        }
    }
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: every buffer that the header names has the length that it tells, and outlives the call.
    let got = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const header, flags) };
    Errno::result(got).map(|n| n as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::socket;
    use std::os::fd::AsFd;

    #[test]
    fn descriptors_and_credentials_are_seen_and_stay() {
        let (a, b) = socket::pair(libc::AF_UNIX, libc::SOCK_STREAM, 0).expect("a pair");
        let (reading, _writing) = nix::unistd::pipe().expect("a pipe");
        let us = std::process::id();
        // SAFETY: no arguments.
        let ids = unsafe { [us, libc::getuid(), libc::getgid()] };
        send(a.as_fd(), b"plain", &[], &[], None).expect("sends");
        send(a.as_fd(), b"with", &[], &[reading.as_raw_fd(); 2], Some(ids)).expect("sends");
        for _ in 0..2 {
            socket::set_option(b.as_fd(), libc::SOL_SOCKET, libc::SO_PASSCRED, &1i32.to_ne_bytes())
                .expect("set");
            socket::set_option(b.as_fd(), libc::SOL_SOCKET, libc::SO_PEEK_OFF, &0i32.to_ne_bytes())
                .expect("set");
            let first = peek(b.as_fd(), 100, 0).expect("a message");
            assert_eq!((first.data.as_slice(), first.descriptors.len()), (&b"plain"[..], 0));
            // Not told at the time of sending: nobody's.
            assert_eq!(first.credentials.map(|ids| ids[0]), Some(0));
            let second = peek(b.as_fd(), 100, 0).expect("a message");
            assert_eq!((second.data.as_slice(), second.descriptors.len()), (&b"with"[..], 2));
            assert_eq!(second.credentials, Some(ids));
            assert!(peek(b.as_fd(), 100, 0).is_err());
        }
    }
}
