//! Addresses of TCP and UDP: `struct sockaddr_in`, `struct sockaddr_in6` (ip(7), ipv6(7)).

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

const OF_IPV4: usize = size_of::<libc::sockaddr_in>();
const OF_IPV6: usize = size_of::<libc::sockaddr_in6>();

/// Reads one; an IPv4 address inside of IPv6 as such. `None`: it is none.
pub fn read(name: &[u8]) -> Option<SocketAddr> {
    let family = i32::from(u16::from_ne_bytes(name.get(..2)?.try_into().ok()?));
    let port = u16::from_be_bytes(name.get(2..4)?.try_into().ok()?);
    let ip = match (family, name.len()) {
        (libc::AF_INET, OF_IPV4) => IpAddr::from(<[u8; 4]>::try_from(&name[4..8]).ok()?),
        (libc::AF_INET6, OF_IPV6) => IpAddr::from(<[u8; 16]>::try_from(&name[8..24]).ok()?).to_canonical(),
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

/// Writes one for a socket of this family. `None`: such a socket cannot have it.
pub fn write(family: i32, address: SocketAddr) -> Option<Vec<u8>> {
    let mut name = (family as u16).to_ne_bytes().to_vec();
    name.extend_from_slice(&address.port().to_be_bytes());
    match (family, address.ip()) {
        (libc::AF_INET, IpAddr::V4(ip)) => {
            name.extend_from_slice(&ip.octets());
            name.resize(OF_IPV4, 0);
        }
        (libc::AF_INET6, ip) => {
            let ip: Ipv6Addr = match ip {
                IpAddr::V4(ip) => ip.to_ipv6_mapped(),
                IpAddr::V6(ip) => ip,
            };
            name.extend_from_slice(&[0; 4]);
            name.extend_from_slice(&ip.octets());
            name.resize(OF_IPV6, 0);
        }
        _ => return None,
    }
    Some(name)
}

/// Family of an address.
pub fn family(address: SocketAddr) -> i32 {
    match address {
        SocketAddr::V4(_) => libc::AF_INET,
        SocketAddr::V6(_) => libc::AF_INET6,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        for (text, family) in
            [("127.0.0.1:80", libc::AF_INET), ("[::1]:81", libc::AF_INET6), ("1.2.3.4:5", libc::AF_INET6)]
        {
            let address: SocketAddr = text.parse().expect("an address");
            assert_eq!(read(&write(family, address).expect("fits")), Some(address));
        }
        assert_eq!(write(libc::AF_INET, "[::1]:1".parse().expect("an address")), None);
        assert_eq!((read(&[2, 0, 0]), read(&[2, 0, 0, 1, 0, 0]), read(&[10; 28])), (None, None, None));
    }
}
