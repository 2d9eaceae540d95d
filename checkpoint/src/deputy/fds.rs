//! Giving a frozen process descriptors that are open in ours.
//!
//! pidfd_getfd(2) takes but nothing gives, except a Unix socket: the process is made to connect to an
//! abstract one of ours and to receive each descriptor by `SCM_RIGHTS`. The very open file
//! description arrives, with its position and flags.

use crate::tracee::{Tracee, TraceeError};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, UnixCredentials, accept4,
    bind, getsockopt, listen, sendmsg, socket, sockopt,
};
use std::collections::BTreeSet;
use std::io::IoSlice;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

/// Highest descriptor number looked at.
const MAX_FD: i32 = 1 << 20;

/// Makes the descriptor table of `tracee` be: `keep` as they are, `table` (number, file, close-on-exec)
/// installed, everything else closed.
pub fn install_fds(
    tracee: &mut Tracee,
    keep: &BTreeSet<i32>,
    table: &[(i32, BorrowedFd<'_>, bool)],
) -> Result<(), TraceeError> {
    close_others(tracee, keep)?;
    pass_fds(tracee, keep, table)
}

/// Installs descriptors beside those that it has; none of the numbers `taken` is used on the way.
pub fn pass_fds(
    tracee: &mut Tracee,
    taken: &BTreeSet<i32>,
    table: &[(i32, BorrowedFd<'_>, bool)],
) -> Result<(), TraceeError> {
    if table.is_empty() {
        return Ok(());
    }
    let mut taken: BTreeSet<i32> = taken.clone();
    taken.extend(table.iter().map(|(fd, _, _)| *fd));
    let door = Door::open(tracee, &taken)?;
    let result = table.iter().try_for_each(|&(fd, file, cloexec)| door.pass(tracee, fd, file, cloexec));
    tracee.syscall(0, libc::SYS_close, [door.inside as u64, 0, 0, 0, 0, 0])?;
    result
}

/// Gives it one descriptor, close-on-exec, where there is room; its number.
pub fn pass_one(tracee: &mut Tracee, file: BorrowedFd<'_>) -> Result<i32, TraceeError> {
    let door = Door::open(tracee, &BTreeSet::new())?;
    let got = door.send(tracee.pid(), file).and_then(|()| door.receive_inside(tracee));
    tracee.syscall(0, libc::SYS_close, [door.inside as u64, 0, 0, 0, 0, 0])?;
    got
}

fn close_others(tracee: &mut Tracee, keep: &BTreeSet<i32>) -> Result<(), TraceeError> {
    let mut from = 0;
    for &fd in keep.iter().chain(std::iter::once(&MAX_FD)) {
        if fd > from {
            let last = if fd == MAX_FD { u64::from(u32::MAX) } else { fd as u64 - 1 };
            tracee.must(0, "closing files", libc::SYS_close_range, [from as u64, last, 0, 0, 0, 0])?;
        }
        from = fd + 1;
    }
    Ok(())
}

/// A socket into the process.
struct Door {
    ours: OwnedFd,
    /// Its number inside.
    inside: i32,
}

impl Door {
    fn open(tracee: &mut Tracee, taken: &BTreeSet<i32>) -> Result<Door, TraceeError> {
        let pid = tracee.pid();
        let at = |operation| move |errno: Errno| TraceeError::Kernel { operation, tid: pid, errno };
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let name = format!("migd-door-{}-{serial}", std::process::id());
        let listener = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)
            .map_err(at("making a socket"))?;
        let address = UnixAddr::new_abstract(name.as_bytes()).map_err(at("naming a socket"))?;
        bind(listener.as_raw_fd(), &address).map_err(at("binding a socket"))?;
        listen(&listener, Backlog::new(1).map_err(at("listening"))?).map_err(at("listening"))?;

        let inside = Door::connect_inside(tracee, name.as_bytes(), taken)?;
        let ours = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC).map_err(at("accepting"))?;
        let ours = crate::sys::fd::own(ours);
        // Anybody in this network namespace could have been quicker.
        let peer: UnixCredentials = getsockopt(&ours, sockopt::PeerCredentials).map_err(at("SO_PEERCRED"))?;
        if peer.pid() != pid {
            return Err(TraceeError::Unfit { pid, what: "another process came through its door" });
        }
        Ok(Door { ours, inside })
    }

    fn connect_inside(tracee: &mut Tracee, name: &[u8], taken: &BTreeSet<i32>) -> Result<i32, TraceeError> {
        let kind = (libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC) as u64;
        let domain = libc::AF_UNIX as u64;
        let mut fd = tracee.must(0, "making a socket", libc::SYS_socket, [domain, kind, 0, 0, 0, 0])? as i32;
        let mut seen = vec![fd];
        // It must not stand where another descriptor is to go.
        while taken.contains(&fd) && seen.len() < 64 {
            let next = (fd + 1..MAX_FD).find(|n| !taken.contains(n)).unwrap_or(MAX_FD) as u64;
            let args = [fd as u64, libc::F_DUPFD_CLOEXEC as u64, next, 0, 0, 0];
            fd = tracee.must(0, "moving a socket", libc::SYS_fcntl, args)? as i32;
            seen.push(fd);
        }
        for &old in seen.iter().filter(|&&old| old != fd) {
            tracee.syscall(0, libc::SYS_close, [old as u64, 0, 0, 0, 0, 0])?;
        }
        // struct sockaddr_un with an abstract name: family, NUL, name.
        let mut address = (libc::AF_UNIX as u16).to_le_bytes().to_vec();
        address.push(0);
        address.extend_from_slice(name);
        let scratch = tracee.scratch();
        tracee.write_mem(scratch, &address)?;
        let args = [fd as u64, scratch, address.len() as u64, 0, 0, 0];
        tracee.must(0, "connecting", libc::SYS_connect, args)?;
        Ok(fd)
    }

    fn send(&self, pid: i32, file: BorrowedFd<'_>) -> Result<(), TraceeError> {
        let files = [file.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&files)];
        let flags = MsgFlags::empty();
        let failed = |errno| TraceeError::Kernel { operation: "passing a descriptor", tid: pid, errno };
        sendmsg::<UnixAddr>(self.ours.as_raw_fd(), &[IoSlice::new(b"f")], &rights, flags, None)
            .map(drop)
            .map_err(failed)
    }

    fn pass(
        &self,
        tracee: &mut Tracee,
        fd: i32,
        file: BorrowedFd<'_>,
        cloexec: bool,
    ) -> Result<(), TraceeError> {
        self.send(tracee.pid(), file)?;
        let got = self.receive_inside(tracee)?;
        if got == fd {
            let flag = if cloexec { libc::FD_CLOEXEC as u64 } else { 0 };
            let args = [fd as u64, libc::F_SETFD as u64, flag, 0, 0, 0];
            tracee.must(0, "setting close-on-exec", libc::SYS_fcntl, args)?;
            return Ok(());
        }
        let flags = if cloexec { libc::O_CLOEXEC as u64 } else { 0 };
        tracee.must(0, "placing a descriptor", libc::SYS_dup3, [got as u64, fd as u64, flags, 0, 0, 0])?;
        tracee.must(0, "closing a descriptor", libc::SYS_close, [got as u64, 0, 0, 0, 0, 0])?;
        Ok(())
    }

    /// recvmsg(2) inside; gives the number of the descriptor received.
    fn receive_inside(&self, tracee: &mut Tracee) -> Result<i32, TraceeError> {
        let pid = tracee.pid();
        let base = tracee.scratch();
        let (byte, iov, control) = (base, base + 16, base + 64);
        let words = |values: &[u64]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        tracee.write_mem(iov, &words(&[byte, 1]))?;
        // struct msghdr: name, namelen, iov, iovlen, control, controllen, flags.
        let msghdr = base + 128;
        tracee.write_mem(msghdr, &words(&[0, 0, iov, 1, control, 24, 0]))?;
        let flags = libc::MSG_CMSG_CLOEXEC as u64;
        let args = [self.inside as u64, msghdr, flags, 0, 0, 0];
        tracee.must(0, "receiving a descriptor", libc::SYS_recvmsg, args)?;
        // struct cmsghdr: len, level, type, then the descriptor.
        let mut cmsg = [0; 24];
        tracee.read_mem(control, &mut cmsg)?;
        let word = |at: usize| i32::from_le_bytes(cmsg[at..at + 4].try_into().expect("four bytes"));
        if word(8) != libc::SOL_SOCKET || word(12) != libc::SCM_RIGHTS {
            return Err(TraceeError::Unfit { pid, what: "it received no descriptor (too many open files?)" });
        }
        Ok(word(16))
    }
}
