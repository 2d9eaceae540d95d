//! Sockets by the kernel's own bytes: addresses as `struct sockaddr`, options as they are read
//! (socket(7), unix(7), ip(7), tcp(7)).

use super::fd::own;
use nix::errno::Errno;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

/// Room for any address (`struct sockaddr_storage`).
const ADDRESS: usize = 128;
/// Longest value of an option that is read: a filter of 4096 instructions.
const OPTION: usize = 4096 * 8;

/// socket(2), closed on exec.
pub fn make(family: i32, kind: i32, protocol: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: no pointers.
    let got = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) };
    Errno::result(got).map(own)
}

/// socketpair(2), closed on exec.
pub fn pair(family: i32, kind: i32, protocol: i32) -> Result<(OwnedFd, OwnedFd), Errno> {
    let mut ends = [0; 2];
    // SAFETY: room for two numbers.
    let got = unsafe { libc::socketpair(family, kind | libc::SOCK_CLOEXEC, protocol, ends.as_mut_ptr()) };
    Errno::result(got).map(|_| (own(ends[0]), own(ends[1])))
}

/// bind(2).
pub fn bind(socket: BorrowedFd<'_>, address: &[u8]) -> Result<(), Errno> {
    // SAFETY: the address has the length told; the kernel copies it.
    let got = unsafe { libc::bind(socket.as_raw_fd(), address.as_ptr().cast(), address.len() as u32) };
    Errno::result(got).map(drop)
}

/// connect(2).
pub fn connect(socket: BorrowedFd<'_>, address: &[u8]) -> Result<(), Errno> {
    // SAFETY: the address has the length told; the kernel copies it.
    let got = unsafe { libc::connect(socket.as_raw_fd(), address.as_ptr().cast(), address.len() as u32) };
    Errno::result(got).map(drop)
}

/// listen(2).
pub fn listen(socket: BorrowedFd<'_>, backlog: u32) -> Result<(), Errno> {
    // SAFETY: no pointers.
    let got = unsafe { libc::listen(socket.as_raw_fd(), backlog.min(i32::MAX as u32) as i32) };
    Errno::result(got).map(drop)
}

/// accept4(2), closed on exec.
pub fn accept(socket: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let none = std::ptr::null_mut();
    // SAFETY: no address is asked for.
    let got = unsafe { libc::accept4(socket.as_raw_fd(), none, std::ptr::null_mut(), libc::SOCK_CLOEXEC) };
    Errno::result(got).map(own)
}

/// shutdown(2).
pub fn shutdown(socket: BorrowedFd<'_>, how: i32) -> Result<(), Errno> {
    // SAFETY: no pointers.
    Errno::result(unsafe { libc::shutdown(socket.as_raw_fd(), how) }).map(drop)
}

/// getsockname(2).
pub fn name(socket: BorrowedFd<'_>) -> Result<Vec<u8>, Errno> {
    let (mut address, mut len) = ([0u8; ADDRESS], ADDRESS as u32);
    // SAFETY: the buffer has the length told, and both outlive the call.
    let got = unsafe { libc::getsockname(socket.as_raw_fd(), address.as_mut_ptr().cast(), &raw mut len) };
    Errno::result(got).map(|_| address[..(len as usize).min(ADDRESS)].to_vec())
}

/// getpeername(2).
pub fn peer_name(socket: BorrowedFd<'_>) -> Result<Vec<u8>, Errno> {
    let (mut address, mut len) = ([0u8; ADDRESS], ADDRESS as u32);
    // SAFETY: the buffer has the length told, and both outlive the call.
    let got = unsafe { libc::getpeername(socket.as_raw_fd(), address.as_mut_ptr().cast(), &raw mut len) };
    Errno::result(got).map(|_| address[..(len as usize).min(ADDRESS)].to_vec())
}

/// getsockopt(2): the value, as long as the kernel makes it with room for `room` bytes.
pub fn option(socket: BorrowedFd<'_>, level: i32, name: i32, room: usize) -> Result<Vec<u8>, Errno> {
    let mut value = vec![0u8; room.min(OPTION)];
    let mut len = value.len() as u32;
    // SAFETY: the buffer has the length told, and both outlive the call.
    let got =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &raw mut len) };
    Errno::result(got)?;
    value.truncate(len as usize);
    Ok(value)
}

/// An option that is a number.
pub fn number(socket: BorrowedFd<'_>, level: i32, name: i32) -> Result<i32, Errno> {
    let value = option(socket, level, name, 4)?;
    value.try_into().map(i32::from_ne_bytes).map_err(|_| Errno::EINVAL)
}

/// setsockopt(2). Not for options that hold pointers ([`attach_filter`]).
pub fn set_option(socket: BorrowedFd<'_>, level: i32, name: i32, value: &[u8]) -> Result<(), Errno> {
    if level == libc::SOL_SOCKET && matches!(name, libc::SO_ATTACH_FILTER | libc::SO_ATTACH_REUSEPORT_CBPF) {
        return Err(Errno::EINVAL);
    }
    // SAFETY: the value has the length told, and it holds no pointers.
    let got = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, name, value.as_ptr().cast(), value.len() as u32)
    };
    Errno::result(got).map(drop)
}

/// Whether it has joined a multicast group on the device with this index (`MCAST_MSFILTER`).
pub fn is_member(socket: BorrowedFd<'_>, device: u32, group: IpAddr) -> bool {
    /// linux/in.h.
    const MCAST_MSFILTER: i32 = 48;
    /// `struct group_filter` without sources: the group's address begins at 8.
    const SIZE: usize = 144;
    let mut filter = [0u8; SIZE];
    filter[..4].copy_from_slice(&device.to_ne_bytes());
    let level = match group {
        IpAddr::V4(ip) => {
            filter[8..10].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
            filter[12..16].copy_from_slice(&ip.octets());
            libc::IPPROTO_IP
        }
        IpAddr::V6(ip) => {
            filter[8..10].copy_from_slice(&(libc::AF_INET6 as u16).to_ne_bytes());
            filter[16..32].copy_from_slice(&ip.octets());
            libc::IPPROTO_IPV6
        }
    };
    let mut len = SIZE as u32;
    let at = filter.as_mut_ptr().cast();
    // SAFETY: the buffer has the length told, with no room for sources; both outlive the call.
    let got = unsafe { libc::getsockopt(socket.as_raw_fd(), level, MCAST_MSFILTER, at, &raw mut len) };
    got == 0
}

/// Bytes that can be read (`SIOCINQ`), or that were written and not yet read (`SIOCOUTQ`).
pub fn queued(socket: BorrowedFd<'_>, outgoing: bool) -> Result<usize, Errno> {
    let mut count: i32 = 0;
    // SIOCINQ is FIONREAD and SIOCOUTQ is TIOCOUTQ (linux/sockios.h).
    let request = if outgoing { libc::TIOCOUTQ } else { libc::FIONREAD };
    // SAFETY: `count` outlives the call and has the size that the request tells.
    let got = unsafe { libc::ioctl(socket.as_raw_fd(), request, &raw mut count) };
    Errno::result(got).map(|_| count.max(0) as usize)
}

/// What a classic filter consists of: 8 bytes an instruction (`SO_GET_FILTER`).
pub fn filter(socket: BorrowedFd<'_>) -> Result<Vec<u8>, Errno> {
    let mut len: u32 = 0;
    let none: *mut libc::c_void = std::ptr::null_mut();
    // SAFETY: with a length of 0 nothing is written but the number of instructions.
    let got = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_GET_FILTER, none, &raw mut len)
    };
    Errno::result(got)?;
    let mut code = vec![0u8; (len as usize * 8).min(OPTION)];
    if code.is_empty() {
        return Ok(code);
    }
    let mut len = (code.len() / 8) as u32;
    // SAFETY: the buffer has room for so many instructions of 8 bytes.
    let got = unsafe {
        let at = code.as_mut_ptr().cast();
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_GET_FILTER, at, &raw mut len)
    };
    Errno::result(got)?;
    Ok(code)
}

/// Attaches a classic filter (`SO_ATTACH_FILTER`); the kernel checks the code.
pub fn attach_filter(socket: BorrowedFd<'_>, code: &[u8]) -> Result<(), Errno> {
    let program = libc::sock_fprog {
        len: u16::try_from(code.len() / 8).map_err(|_| Errno::EINVAL)?,
        filter: code.as_ptr().cast_mut().cast(),
    };
    // SAFETY: the kernel reads `len` instructions of 8 bytes, which are there, in any alignment.
    let got = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size_of::<libc::sock_fprog>() as u32,
        )
    };
    Errno::result(got).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn names_and_options() {
        let listener = make(libc::AF_UNIX, libc::SOCK_STREAM, 0).expect("a socket");
        // No name: the kernel chooses an abstract one (unix(7), autobind).
        bind(listener.as_fd(), &(libc::AF_UNIX as u16).to_ne_bytes()).expect("binds");
        let at = name(listener.as_fd()).expect("its name");
        assert_eq!((at.len(), at[2]), (8, 0));
        listen(listener.as_fd(), 3).expect("listens");
        let client = make(libc::AF_UNIX, libc::SOCK_STREAM, 0).expect("a socket");
        connect(client.as_fd(), &at).expect("connects");
        assert_eq!(peer_name(client.as_fd()).expect("a name"), at);
        let server = accept(listener.as_fd()).expect("accepts");
        assert_eq!(name(server.as_fd()).expect("a name"), at);
        nix::unistd::write(&client, b"12345").expect("writes");
        assert_eq!(queued(server.as_fd(), false), Ok(5));
        assert!(queued(client.as_fd(), true).expect("told") >= 5);
        assert_eq!(number(server.as_fd(), libc::SOL_SOCKET, libc::SO_ACCEPTCONN), Ok(0));
        assert_eq!(
            set_option(server.as_fd(), libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &[0; 16]),
            Err(Errno::EINVAL)
        );
    }

    #[test]
    fn filters_come_back_as_they_were() {
        let (end, _other) = pair(libc::AF_UNIX, libc::SOCK_DGRAM, 0).expect("a pair");
        assert_eq!(filter(end.as_fd()), Ok(Vec::new()));
        // BPF_RET | BPF_K: take all.
        let code = [6u8, 0, 0, 0, 0xff, 0xff, 0, 0];
        attach_filter(end.as_fd(), &code).expect("attaches");
        assert_eq!(filter(end.as_fd()), Ok(code.to_vec()));
    }
}
