//! A datagram of UDP as a packet, with the sender's address whoever that was (RFC 768, 791, 8200).

use std::net::{IpAddr, SocketAddr};

/// What is to be received.
#[derive(Debug, Clone, Copy)]
pub struct Datagram<'a> {
    pub from: SocketAddr,
    pub to: SocketAddr,
    pub data: &'a [u8],
    /// TTL, or hop limit.
    pub hops: u8,
    /// TOS, or traffic class.
    pub class: u8,
}

const UDP: u8 = 17;
/// Bytes of the headers.
const OF_UDP: usize = 8;
const OF_IPV4: usize = 20;

/// The whole packet, from the header of IP on. `None`: it is too long, or its two addresses are of two
/// families.
pub fn build(datagram: &Datagram<'_>) -> Option<Vec<u8>> {
    let length = u16::try_from(datagram.data.len() + OF_UDP).ok()?;
    let mut body = Vec::with_capacity(usize::from(length));
    for word in [datagram.from.port(), datagram.to.port(), length, 0] {
        body.extend_from_slice(&word.to_be_bytes());
    }
    body.extend_from_slice(datagram.data);
    let mut packet = match (datagram.from.ip(), datagram.to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let whole = u16::try_from(usize::from(length) + OF_IPV4).ok()?;
            let mut head = vec![0x45, datagram.class];
            head.extend_from_slice(&whole.to_be_bytes());
            // No fragments; the kernel fills in the checksum, and in IPv4 one of UDP can be left out.
            head.extend_from_slice(&[0, 0, 0, 0, datagram.hops, UDP, 0, 0]);
            head.extend_from_slice(&from.octets());
            head.extend_from_slice(&to.octets());
            head
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let mut pseudo = from.octets().to_vec();
            pseudo.extend_from_slice(&to.octets());
            pseudo.extend_from_slice(&u32::from(length).to_be_bytes());
            pseudo.extend_from_slice(&u32::from(UDP).to_be_bytes());
            let sum = checksum(pseudo.iter().chain(&body).copied());
            body[6..8].copy_from_slice(&sum.to_be_bytes());
            let mut head = (6u32 << 28 | u32::from(datagram.class) << 20).to_be_bytes().to_vec();
            head.extend_from_slice(&length.to_be_bytes());
            head.extend_from_slice(&[UDP, datagram.hops]);
            head.extend_from_slice(&from.octets());
            head.extend_from_slice(&to.octets());
            head
        }
        _ => return None,
    };
    packet.append(&mut body);
    Some(packet)
}

/// RFC 1071; 0, which means that there is none, is written as its twin.
fn checksum(mut bytes: impl Iterator<Item = u8>) -> u16 {
    let mut sum: u64 = 0;
    while let Some(high) = bytes.next() {
        sum += u64::from(u16::from_be_bytes([high, bytes.next().unwrap_or(0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    match !(sum as u16) {
        0 => 0xffff,
        sum => sum,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums() {
        // The example of RFC 1071.
        assert_eq!(checksum([0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7].into_iter()), !0xddf2);
        assert_eq!(checksum([0xff, 0xff].into_iter()), 0xffff);
    }

    #[test]
    fn shapes() {
        let one = |from: &str, to: &str, data: &[u8]| {
            let (from, to) = (from.parse().expect("an address"), to.parse().expect("an address"));
            build(&Datagram { from, to, data, hops: 64, class: 0 }).map(|packet| packet.len())
        };
        assert_eq!(one("1.2.3.4:5", "127.0.0.1:6", b"abc"), Some(31));
        assert_eq!(one("[::2]:5", "[::1]:6", b"abc"), Some(51));
        assert_eq!(one("[::2]:5", "127.0.0.1:6", b"abc"), None);
        assert_eq!(one("1.2.3.4:5", "127.0.0.1:6", &[0; 65_508]), None);
    }
}
