//! UDP sockets: bound, filled, connected, in this order, since one that is connected takes only what
//! its peer sends.

use super::packet::{Datagram, build};
use super::{address, bind, is_bound, is_udp, new_one};
use crate::image::sockets::{Message, SocketImage};
use crate::restore::RestoreError;
use crate::restore::sockets::{failed, options};
use crate::sys::socket;
use crate::sys::socket_message::send;
use nix::errno::Errno;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// What comes through a loopback device is there at once.
const LIMIT: Duration = Duration::from_secs(5);

/// Makes one with its queue.
pub fn make(image: &SocketImage, images: &[SocketImage]) -> Result<OwnedFd, RestoreError> {
    let made = new_one(image)?;
    if is_bound(image) {
        bind(made.as_fd(), image)?;
    }
    if !image.queue.is_empty() {
        fill(made.as_fd(), image, images)?;
    }
    if !image.peer_name.is_empty() {
        socket::connect(made.as_fd(), &image.peer_name)
            .map_err(|errno| failed(image, "connecting", errno))?;
    }
    Ok(made)
}

fn fill(made: BorrowedFd<'_>, image: &SocketImage, images: &[SocketImage]) -> Result<(), RestoreError> {
    let at = |errno| failed(image, "filling its queue", errno);
    // What is noted of a datagram when it comes.
    options::set_values(made, image)?;
    let bytes: usize = image.queue.iter().map(|message| message.data.len()).sum();
    options::make_room_to_receive(made, bytes, image.queue.len()).map_err(at)?;
    // Of several at one address the kernel chooses: the one that is connected to the sender.
    let same = |other: &&SocketImage| is_udp(other) && other.name == image.name;
    let several = images.iter().filter(same).count() > 1;
    let senders = [libc::AF_INET, libc::AF_INET6].map(Sender::new);
    for message in &image.queue {
        let (from, to) = addresses(image, message)?;
        if several {
            socket::connect(made, &message.from).map_err(at)?;
        }
        let sender = senders.iter().find(|sender| sender.family == address::family(to));
        let packet = message.packet.as_ref();
        let datagram = Datagram {
            from,
            to,
            data: &message.data,
            hops: packet.map_or(64, |packet| packet.hops.max(1)),
            class: packet.map_or(0, |packet| packet.class),
        };
        let before = received(made).map_err(at)?;
        match sender.map(|sender| sender.send(&datagram)) {
            Some(Ok(())) => {}
            Some(Err(Errno::EPERM)) => {
                let what = "filling its queue (CAP_NET_RAW)";
                return Err(failed(image, what, Errno::EPERM));
            }
            Some(Err(errno)) => return Err(at(errno)),
            None => return Err(at(Errno::EAFNOSUPPORT)),
        }
        await_more(made, before, image)?;
        if several {
            let nobody = (libc::AF_UNSPEC as u16).to_ne_bytes();
            let whole: Vec<u8> = nobody.into_iter().chain([0; 14]).collect();
            socket::connect(made, &whole).map_err(at)?;
        }
    }
    Ok(())
}

/// Sender and receiver of a datagram, which must be this machine.
fn addresses(image: &SocketImage, message: &Message) -> Result<(SocketAddr, SocketAddr), RestoreError> {
    let unfit = || RestoreError::Unfit("the image is not consistent: the address of a datagram".into());
    let from = address::read(&message.from).ok_or_else(unfit)?;
    let own = address::read(&image.name).ok_or_else(unfit)?;
    let to = message.packet.as_ref().map(|packet| packet.to.as_slice()).unwrap_or_default();
    let ip = match to.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(to).map_err(|_| unfit())?),
        _ => IpAddr::from(<[u8; 16]>::try_from(to).map_err(|_| unfit())?).to_canonical(),
    };
    let to = SocketAddr::new(ip, own.port());
    if own.port() == 0 || !(own.ip().is_unspecified() || own.ip() == ip) {
        return Err(unfit());
    }
    // To others nothing is sent.
    let here = socket::make(address::family(to), libc::SOCK_DGRAM, 0).and_then(|probe| {
        let name = address::write(address::family(to), SocketAddr::new(ip, 0)).ok_or(Errno::EINVAL)?;
        socket::bind(probe.as_fd(), &name)
    });
    match here {
        Ok(()) => Ok((from, to)),
        Err(errno) => Err(failed(image, &format!("filling its queue: {ip} is not of this machine"), errno)),
    }
}

/// What sends packets of one of the two protocols.
struct Sender {
    family: i32,
    socket: Result<OwnedFd, Errno>,
}

impl Sender {
    fn new(family: i32) -> Sender {
        Sender { family, socket: Sender::open(family) }
    }

    fn open(family: i32) -> Result<OwnedFd, Errno> {
        /// linux/in6.h; of IPv4 the protocol says so (raw(7)).
        const IPV6_HDRINCL: i32 = 36;
        let made = socket::make(family, libc::SOCK_RAW, libc::IPPROTO_RAW)?;
        if family == libc::AF_INET6 {
            socket::set_option(made.as_fd(), libc::IPPROTO_IPV6, IPV6_HDRINCL, &1i32.to_ne_bytes())?;
        }
        Ok(made)
    }

    fn send(&self, datagram: &Datagram<'_>) -> Result<(), Errno> {
        let made = self.socket.as_ref().map_err(|&errno| errno)?;
        let packet = build(datagram).ok_or(Errno::EMSGSIZE)?;
        // Of IPv6 a port would be taken for a protocol.
        let to = address::write(self.family, SocketAddr::new(datagram.to.ip(), 0)).ok_or(Errno::EINVAL)?;
        send(made.as_fd(), &packet, &to, &[], None).map(drop)
    }
}

/// Bytes that the kernel counts as received and not read (`SO_MEMINFO`, `SK_MEMINFO_RMEM_ALLOC`). A look
/// at the queue would mark what is in it: an empty datagram is looked at once only.
fn received(made: BorrowedFd<'_>) -> Result<u32, Errno> {
    /// asm-generic/socket.h.
    const SO_MEMINFO: i32 = 55;
    socket::number(made, libc::SOL_SOCKET, SO_MEMINFO).map(|bytes| bytes as u32)
}

/// Waits until a datagram has come; one that does not was taken by another socket, or by a rule of the
/// firewall.
fn await_more(made: BorrowedFd<'_>, before: u32, image: &SocketImage) -> Result<(), RestoreError> {
    let deadline = Instant::now() + LIMIT;
    while received(made).map_err(|errno| failed(image, "its queue", errno))? <= before {
        if Instant::now() > deadline {
            let name = address::read(&image.name).map_or(String::new(), |name| name.to_string());
            return Err(RestoreError::Unfit(format!(
                "a datagram that was in the queue of the UDP socket {name} could not be sent to it again"
            )));
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    Ok(())
}
