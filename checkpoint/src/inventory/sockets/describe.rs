//! What a socket is, in words, for a refusal (`/proc/PID/net/*`, proc(5)).

use crate::proc;
use crate::sys::xattr;
use std::ffi::CString;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Describes the socket with this inode number as its process sees it.
pub fn describe(pid: i32, fd: i32, ino: u64) -> String {
    for (table, name) in [("tcp", "TCP"), ("tcp6", "TCP"), ("udp", "UDP"), ("udp6", "UDP"), ("raw", "raw IP")]
    {
        if let Some(text) = internet(pid, table, name, ino) {
            return text;
        }
    }
    if let Some(text) = unix(pid, ino) {
        return text;
    }
    for (table, name) in [("netlink", "a netlink socket"), ("packet", "a packet socket")] {
        if has_inode(pid, table, ino) {
            return name.into();
        }
    }
    match protocol(pid, fd) {
        Some(name) => format!("a {name} socket that is not bound or connected"),
        None => "a socket".into(),
    }
}

/// The protocol's name, which the kernel shows as an extended attribute (net/socket.c).
pub(super) fn protocol(pid: i32, fd: i32) -> Option<String> {
    let path = CString::new(format!("/proc/{pid}/fd/{fd}")).ok()?;
    let mut name = [0; 64];
    let length = xattr::get(&path, c"system.sockprotoname", &mut name).ok()?;
    let name = String::from_utf8_lossy(name.get(..length)?).trim_end_matches('\0').to_string();
    (!name.is_empty()).then_some(name)
}

fn internet(pid: i32, table: &str, name: &str, ino: u64) -> Option<String> {
    let bytes = proc::read(pid, &format!("net/{table}")).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let words = text.lines().skip(1).find_map(|line| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        (words.get(9)?.parse::<u64>().ok()? == ino)
            .then(|| words.iter().take(4).map(|word| word.to_string()).collect::<Vec<String>>())
    })?;
    let (local, remote) = (endpoint(words.get(1)?)?, endpoint(words.get(2)?)?);
    Some(match (name, words.get(3)?.as_str()) {
        ("TCP", "01") => format!("established TCP connection to {remote} (from {local})"),
        ("TCP", "0A") => format!("TCP socket listening on {local}"),
        ("TCP", state) => format!("TCP socket {local} to {remote} in state {state}"),
        (name, _) => format!("{name} socket bound to {local}"),
    })
}

/// `0100007F:1F90`: words of the address in host order.
fn endpoint(text: &str) -> Option<String> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let words: Vec<u32> = address
        .as_bytes()
        .chunks(8)
        .map(|chunk| u32::from_str_radix(std::str::from_utf8(chunk).ok()?, 16).ok())
        .collect::<Option<_>>()?;
    let address = match words.as_slice() {
        [word] => IpAddr::V4(Ipv4Addr::from(word.to_ne_bytes())),
        [a, b, c, d] => {
            let bytes: Vec<u8> = [a, b, c, d].iter().flat_map(|word| word.to_ne_bytes()).collect();
            IpAddr::V6(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?))
        }
        _ => return None,
    };
    Some(std::net::SocketAddr::new(address, port).to_string())
}

fn unix(pid: i32, ino: u64) -> Option<String> {
    let bytes = proc::read(pid, "net/unix").ok()?;
    let text = String::from_utf8_lossy(&bytes);
    text.lines().skip(1).find_map(|line| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        if words.get(6)?.parse::<u64>().ok()? != ino {
            return None;
        }
        let kind = match *words.get(4)? {
            "0001" => "stream",
            "0002" => "datagram",
            "0005" => "seqpacket",
            _ => "",
        };
        let name = words.get(7).map_or("without a name".to_string(), |name| format!("named {name}"));
        Some(format!("Unix {kind} socket {name}"))
    })
}

fn has_inode(pid: i32, table: &str, ino: u64) -> bool {
    let Ok(bytes) = proc::read(pid, &format!("net/{table}")) else { return false };
    let wanted = ino.to_string();
    String::from_utf8_lossy(&bytes)
        .lines()
        .any(|line| line.split_ascii_whitespace().any(|word| word == wanted))
}

#[cfg(test)]
mod tests {
    use super::endpoint;

    #[test]
    fn endpoints() {
        assert_eq!(endpoint("0100007F:1F90").as_deref(), Some("127.0.0.1:8080"));
        assert_eq!(endpoint("00000000000000000000000001000000:0050").as_deref(), Some("[::1]:80"));
        assert_eq!(endpoint("zz:1"), None);
        assert_eq!(endpoint("é0000000:1"), None);
    }

    #[test]
    fn names_a_listening_socket() {
        use std::os::unix::fs::MetadataExt;
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("binds");
        use std::os::fd::AsRawFd;
        let meta = std::fs::metadata(format!("/proc/self/fd/{}", listener.as_raw_fd())).expect("stat");
        let text = super::describe(std::process::id() as i32, listener.as_raw_fd(), meta.ino());
        assert!(text.starts_with("TCP socket listening on 127.0.0.1:"), "{text}");
    }
}
