//! The lab's network: one bridge in the keeper's own network namespace, one veth pair a node.
//!
//! There is no route out: not to the machine, not to the world. A partition moves the ports of the
//! nodes concerned to a bridge of their own, so that frames to the others vanish without any error,
//! as on a cut wire; the nodes cut off together still see each other.

use anyhow::{Context, Result, bail};
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};

/// The tools live in the sbin folders, which an ordinary PATH may lack.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Room `tbf` keeps for a burst, bytes: one large segment and some.
const BURST_BYTES: u32 = 256 << 10;

/// The bridge of an island.
fn bridge(island: u32) -> String {
    format!("br{island}")
}

/// The bridge's end of a node's link.
fn port(node: &str) -> String {
    format!("v-{node}")
}

/// Makes the bridge of an island, in this process' network namespace.
pub fn make_bridge(island: u32) -> Result<()> {
    let bridge = bridge(island);
    run("ip", &["link", "add", &bridge, "type", "bridge"])?;
    run("ip", &["link", "set", &bridge, "up"])
}

/// Links the node whose PID 1 is `init` to an island.
pub fn attach(node: &str, init: i32, island: u32, bandwidth: Option<&str>) -> Result<()> {
    let port = port(node);
    let init = init.to_string();
    run("ip", &["link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &init])?;
    run("ip", &["link", "set", &port, "master", &bridge(island), "up"])?;
    limit(&port, bandwidth)
}

/// Removes what is left of a node's link.
pub fn detach(node: &str) {
    // It may be gone already.
    let _ = run("ip", &["link", "del", &port(node)]);
}

/// Moves a node's link to another island.
pub fn move_to(node: &str, island: u32) -> Result<()> {
    run("ip", &["link", "set", &port(node), "master", &bridge(island)])
}

/// Inside a node: its address, and `lo`.
pub fn configure_node(address: Ipv4Addr, bandwidth: Option<&str>) -> Result<()> {
    run("ip", &["link", "set", "lo", "up"])?;
    run("ip", &["addr", "add", &format!("{address}/24"), "dev", "eth0"])?;
    run("ip", &["link", "set", "eth0", "up"])?;
    limit("eth0", bandwidth)
}

/// Limits what a link sends. Each direction is limited by the end that sends.
fn limit(link: &str, bandwidth: Option<&str>) -> Result<()> {
    let Some(rate) = bandwidth else { return Ok(()) };
    let burst = BURST_BYTES.to_string();
    run("tc", &["qdisc", "add", "dev", link, "root", "tbf", "rate", rate, "burst", &burst, "latency", "50ms"])
}

/// Runs one of iproute2's programs in this process' network namespace.
fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program)
        .args(arguments)
        .env("PATH", PATH)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("`{program}` cannot be run; install the package iproute2"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("`{program} {}` failed: {}", arguments.join(" "), said.trim());
    }
    Ok(())
}
