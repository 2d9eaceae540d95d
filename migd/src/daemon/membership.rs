//! Who is in the cluster: SWIM with suspicion, by the `foca` crate, over the daemons' own connections.
//!
//! `foca` does no I/O. This task feeds it packets and timers, sends what it wants sent, and publishes
//! what it believes. A node that was wrongly declared down renews its identity and joins again by
//! itself; so do the two sides of a healed partition, because nodes that are down are announced to.

use super::Daemon;
use super::protocol::PeerMessage;
use crate::config::{DEFAULT_PORT, parse_address};
use foca::{AccumulatingRuntime, Foca, OwnedNotification, PeriodicParams, PostcardCodec, State, Timer};
use rand::rngs::StdRng;
use serde::{Deserialize, Serialize};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs;
use std::net::SocketAddr;
use std::num::{NonZeroU32, NonZeroUsize};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

/// Cluster size that the protocol's times are made for.
const EXPECTED_NODES: NonZeroU32 = NonZeroU32::new(16).expect("not zero");
/// Seeds and members of earlier days that are not up are called this often.
const SEED_EVERY: Duration = Duration::from_secs(3);
/// Timers that may wait; foca has a handful per member.
const MAX_TIMERS: usize = 65_536;
const MEMBERS_FILE: &str = "members.json";
const MAX_MEMBERS: usize = 4096;

/// A node as the protocol knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Where its daemon listens.
    pub address: SocketAddr,
    /// Larger is newer: the start, milliseconds, plus one for every time it was declared down.
    pub bump: u64,
    /// Its name.
    pub name: String,
}

impl foca::Identity for Identity {
    type Addr = SocketAddr;

    fn renew(&self) -> Option<Self> {
        Some(Identity { bump: self.bump.wrapping_add(1), ..self.clone() })
    }

    fn addr(&self) -> SocketAddr {
        self.address
    }

    fn win_addr_conflict(&self, adversary: &Self) -> bool {
        self.bump > adversary.bump
    }
}

/// What the membership task is told.
#[derive(Debug)]
pub enum Input {
    /// A packet from a peer.
    Packet(Vec<u8>),
    /// We go; answered when that has been said.
    Leave(oneshot::Sender<()>),
}

/// What is known of a member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Who.
    pub identity: Identity,
    /// How it does.
    pub state: State,
}

/// Times for a local network: a dead node is suspected after a second or two and down after a few.
fn settings() -> foca::Config {
    let every = |seconds, members: usize| {
        NonZeroUsize::new(members)
            .map(|num_members| PeriodicParams { frequency: Duration::from_secs(seconds), num_members })
    };
    foca::Config {
        suspect_to_down_after: Duration::from_secs(4),
        remove_down_after: Some(Duration::from_secs(600)),
        max_packet_size: NonZeroUsize::new(16 << 10).expect("not zero"),
        periodic_announce: every(10, 1),
        periodic_announce_to_down_members: every(3, 3),
        ..foca::Config::new_lan(EXPECTED_NODES)
    }
}

struct Driver {
    daemon: Arc<Daemon>,
    foca: Foca<Identity, PostcardCodec, StdRng, foca::NoCustomBroadcast>,
    runtime: AccumulatingRuntime<Identity>,
    timers: BinaryHeap<Reverse<(Instant, Timer<Identity>)>>,
    saved: Vec<Identity>,
}

/// Runs until it is told to leave.
pub async fn run(daemon: Arc<Daemon>, mut inputs: mpsc::Receiver<Input>) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let identity =
        Identity { address: daemon.address, bump: now.as_millis() as u64, name: daemon.config.name.clone() };
    let saved = load_members(&daemon);
    let mut driver = Driver {
        foca: Foca::new(identity, settings(), rand::make_rng(), PostcardCodec),
        daemon,
        runtime: AccumulatingRuntime::new(),
        timers: BinaryHeap::new(),
        saved,
    };
    let mut seeds = tokio::time::interval(SEED_EVERY);
    let mut publish = tokio::time::interval(Duration::from_millis(500));
    loop {
        let next = driver.timers.peek().map(|Reverse((at, _))| *at);
        let timer = async {
            match next {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            input = inputs.recv() => match input {
                Some(Input::Packet(bytes)) => driver.packet(&bytes),
                Some(Input::Leave(done)) => {
                    let result = driver.foca.leave_cluster(&mut driver.runtime);
                    driver.settle(result);
                    let _ = done.send(());
                    return;
                }
                None => return,
            },
            () = timer => driver.timers_due(),
            _ = seeds.tick() => driver.call_seeds().await,
            _ = publish.tick() => driver.publish(),
        }
    }
}

impl Driver {
    fn packet(&mut self, bytes: &[u8]) {
        let result = self.foca.handle_data(bytes, &mut self.runtime);
        self.settle(result);
    }

    fn timers_due(&mut self) {
        let now = Instant::now();
        while let Some(Reverse((at, _))) = self.timers.peek() {
            if *at > now {
                return;
            }
            let Some(Reverse((_, timer))) = self.timers.pop() else { return };
            let result = self.foca.handle_timer(timer, &mut self.runtime);
            self.settle(result);
        }
    }

    /// Does what foca wants done.
    fn settle(&mut self, result: Result<(), foca::Error>) {
        if let Err(error) = result {
            tracing::debug!(%error, "membership");
        }
        while let Some((to, packet)) = self.runtime.to_send() {
            self.daemon.peers.send(to.address, PeerMessage::Gossip(packet.to_vec()));
        }
        let now = Instant::now();
        while let Some((delay, timer)) = self.runtime.to_schedule() {
            if self.timers.len() < MAX_TIMERS {
                self.timers.push(Reverse((now + delay, timer)));
            }
        }
        let mut changed = false;
        while let Some(notification) = self.runtime.to_notify() {
            match notification {
                OwnedNotification::MemberUp(id) => {
                    tracing::info!(node = id.name, address = %id.address, "up")
                }
                OwnedNotification::MemberDown(id) => {
                    tracing::warn!(node = id.name, address = %id.address, "down");
                }
                OwnedNotification::Rename(_, id) => {
                    tracing::info!(node = id.name, address = %id.address, "came back");
                }
                OwnedNotification::Rejoin(_) => tracing::info!("declared down by others; joining again"),
                OwnedNotification::Defunct => tracing::warn!("declared down by others"),
                _ => continue,
            }
            changed = true;
        }
        if changed {
            self.publish();
        }
    }

    fn publish(&mut self) {
        let own = self.foca.identity().address;
        let members: Vec<Member> = self
            .foca
            .iter_membership_state()
            .map(|member| Member { identity: member.id().clone(), state: member.state() })
            .filter(|member| member.identity.address != own && !member.identity.name.is_empty())
            .collect();
        let up: Vec<Identity> =
            members.iter().filter(|m| m.state != State::Down).map(|m| m.identity.clone()).collect();
        self.daemon.publish_members(members);
        self.remember(up);
    }

    /// Keeps the addresses of those that were up, for the next start; nobody is forgotten by going down.
    fn remember(&mut self, up: Vec<Identity>) {
        let known =
            |id: &Identity| self.saved.iter().any(|old| old.address == id.address && old.name == id.name);
        if up.iter().all(known) {
            return;
        }
        self.saved.retain(|old| up.iter().all(|id| id.address != old.address && id.name != old.name));
        self.saved.extend(up);
        let excess = self.saved.len().saturating_sub(MAX_MEMBERS);
        self.saved.drain(..excess);
        let path = self.daemon.config.state_dir.join(MEMBERS_FILE);
        if let Err(error) = super::files::write_json(&path, &self.saved) {
            tracing::warn!(%error, path = %path.display(), "the members could not be saved");
        }
    }

    /// Announces us to seeds and remembered members that are not up.
    async fn call_seeds(&mut self) {
        let mut addresses: Vec<SocketAddr> = self.saved.iter().map(|id| id.address).collect();
        for seed in self.daemon.seeds() {
            match parse_address(&seed) {
                Some(address) => addresses.push(address),
                None => addresses.extend(look_up(&seed).await),
            }
        }
        addresses.sort();
        addresses.dedup();
        let own = self.foca.identity().address;
        let up: Vec<SocketAddr> = self.foca.iter_members().map(|member| member.id().address).collect();
        for address in addresses.into_iter().filter(|a| *a != own && !up.contains(a)).take(64) {
            let stranger = Identity { address, bump: 0, name: String::new() };
            let result = self.foca.announce(stranger, &mut self.runtime);
            self.settle(result);
        }
    }
}

async fn look_up(seed: &str) -> Option<SocketAddr> {
    let name = if seed.contains(':') { seed.to_string() } else { format!("{seed}:{DEFAULT_PORT}") };
    let found = tokio::time::timeout(Duration::from_secs(2), tokio::net::lookup_host(name)).await;
    match found {
        Ok(Ok(mut addresses)) => addresses.next(),
        Ok(Err(error)) => {
            tracing::warn!(seed, %error, "the seed's address is not known");
            None
        }
        Err(_) => None,
    }
}

fn load_members(daemon: &Daemon) -> Vec<Identity> {
    let path = daemon.config.state_dir.join(MEMBERS_FILE);
    let Ok(text) = fs::read_to_string(&path) else { return Vec::new() };
    match serde_json::from_str::<Vec<Identity>>(&text) {
        Ok(mut members) => {
            members.truncate(MAX_MEMBERS);
            members
        }
        Err(error) => {
            tracing::warn!(%error, path = %path.display(), "the saved members are not readable; starting without");
            Vec::new()
        }
    }
}
