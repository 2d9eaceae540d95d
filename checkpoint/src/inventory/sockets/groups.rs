//! Multicast groups that a socket is a member of (ip(7), ipv6(7)).
//!
//! The kernel lists groups by device (`/proc/net/igmp`, `/proc/net/igmp6`), and tells of a socket whether
//! it is a member of one.

use crate::sys::socket;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::BorrowedFd;

/// One of the groups of a socket of this network namespace, and the device.
pub fn membership(copy: BorrowedFd<'_>) -> Option<(IpAddr, String)> {
    let read = |name: &str| fs::read_to_string(format!("/proc/self/net/{name}")).unwrap_or_default();
    let groups = of_ipv4(&read("igmp")).into_iter().chain(of_ipv6(&read("igmp6")));
    let found = groups.into_iter().find(|(index, _, group)| socket::is_member(copy, *index, *group));
    found.map(|(_, device, group)| (group, device))
}

/// Index and name of a device, and a group that somebody there is a member of.
type Group = (u32, String, IpAddr);

/// A line of each device, and under it indented ones of its groups: addresses as words in host order.
fn of_ipv4(text: &str) -> Vec<Group> {
    let (mut out, mut device) = (Vec::new(), None);
    for line in text.lines().skip(1) {
        let mut words = line.split_ascii_whitespace();
        let Some(first) = words.next() else { continue };
        if !line.starts_with(char::is_whitespace) {
            device = first.parse().ok().zip(words.next().map(str::to_string));
        } else if let (Some((index, name)), Ok(word)) = (&device, u32::from_str_radix(first, 16)) {
            out.push((*index, name.clone(), Ipv4Addr::from(word.to_ne_bytes()).into()));
        }
    }
    out
}

/// Index, device, group.
fn of_ipv6(text: &str) -> Vec<Group> {
    let one = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let (index, name) = (words.next()?.parse().ok()?, words.next()?.to_string());
        let group = u128::from_str_radix(words.next()?, 16).ok()?;
        Some((index, name, Ipv6Addr::from(group).into()))
    };
    text.lines().filter_map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn lists() {
        let text = "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n1\tlo        :     1      V3\n\t\t\t\t010000E0     1 0:00000000\t\t0\n";
        let all_hosts = Ipv4Addr::from(0x0100_00e0_u32.to_ne_bytes());
        assert_eq!(of_ipv4(text), [(1, "lo".to_string(), all_hosts.into())]);
        let text = "4    eth0            ff020000000000000000000000000001     1 0000000C 0\n";
        assert_eq!(of_ipv6(text), [(4, "eth0".to_string(), "ff02::1".parse().expect("an address"))]);
        assert!(of_ipv4("a\nb c d\n  zz").is_empty() && of_ipv6("x").is_empty());
    }

    #[test]
    fn of_a_socket() {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").expect("binds");
        assert_eq!(membership(socket.as_fd()), None);
        let group = Ipv4Addr::new(239, 77, 1, 2);
        // There need not be a device that can.
        if socket.join_multicast_v4(&group, &Ipv4Addr::LOCALHOST).is_ok() {
            let found = membership(socket.as_fd());
            assert_eq!(found.map(|(group, _)| group), Some(group.into()));
        }
    }
}
