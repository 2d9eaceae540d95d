//! What the daemon knows: the cluster as it was last heard of, jobs, guests, migrations.

use super::history::History;
use super::jobs::{Jobs, Process};
use super::membership::Member;
use super::moves::Announced;
use super::names::natural;
use super::policy::Policy;
use super::protocol::PeerMessage;
use super::shepherds::{Guest, HomeShepherd};
use super::{Daemon, machine};
use crate::api::{MigrationInfo, NodeInfo, Snapshot};
use crate::config::Config;
use crate::shepherd::control::MoveFigures;
use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// How often load is told to the others.
const LOAD_EVERY: Duration = Duration::from_secs(1);
/// A node that is down is shown for so long.
const SHOW_DOWN: Duration = Duration::from_secs(600);
/// Recent migrations in a snapshot.
const RECENT: usize = 50;
/// Nodes whose load is kept.
const MAX_NODES: usize = 16_384;

/// The switches of `mosctl`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Switches {
    /// Nothing leaves by the balancer's choice.
    pub stay: bool,
    /// Nothing that is at home here leaves by the balancer's choice.
    pub lstay: bool,
    /// No guest arrives.
    pub block: bool,
    /// No load is told.
    pub quiet: bool,
}

/// A migration under way.
#[derive(Debug)]
pub struct InFlight {
    /// For lists.
    pub info: MigrationInfo,
    /// Nothing will be committed.
    pub dry_run: bool,
    /// When it began.
    pub started: Instant,
    /// Who waits for its end.
    pub outcome: Option<oneshot::Sender<Result<MoveFigures, crate::api::ApiError>>>,
    /// Who was told to do it.
    pub shepherd: Option<HomeShepherd>,
    /// That one has begun with it.
    pub taken_up: bool,
}

/// See the module.
#[derive(Debug)]
pub struct State {
    /// Members to join.
    pub seeds: Vec<String>,
    /// Whether the balancer acts.
    pub balance: bool,
    /// The other members, as the membership protocol sees them.
    pub members: Vec<Member>,
    down_since: HashMap<SocketAddr, Instant>,
    /// The others' load, by name, and when it was heard.
    pub loads: HashMap<String, (NodeInfo, Instant)>,
    /// Our own.
    pub own: NodeInfo,
    /// When that was measured.
    pub measured: Instant,
    /// `mosctl`'s switches.
    pub switches: Switches,
    /// Jobs at home here.
    pub jobs: Jobs,
    /// Home shepherds, by their process.
    pub homes: HashMap<i32, HomeShepherd>,
    /// Host shepherds, by session token (hexadecimal).
    pub guests: BTreeMap<String, Guest>,
    /// Sessions that may come.
    pub announced: HashMap<[u8; 16], Announced>,
    /// Under way, by number.
    pub migrations: BTreeMap<u64, InFlight>,
    /// The next migration's number.
    pub next_migration: u64,
    /// Ended migrations.
    pub history: History,
    /// The balancer.
    pub policy: Policy,
}

impl State {
    /// At the start.
    pub fn new(config: &Config, address: SocketAddr) -> State {
        let speed = config.speed.unwrap_or_else(|| machine::speed(&config.state_dir));
        let history = History::load(&config.state_dir);
        let mut state = State {
            seeds: config.seeds.clone(),
            balance: config.balance,
            members: Vec::new(),
            down_since: HashMap::new(),
            loads: HashMap::new(),
            own: NodeInfo {
                name: config.name.clone(),
                address: address.to_string(),
                state: "up".into(),
                speed,
                ..NodeInfo::default()
            },
            measured: Instant::now(),
            switches: Switches::default(),
            jobs: Jobs::default(),
            homes: HashMap::new(),
            guests: BTreeMap::new(),
            announced: HashMap::new(),
            migrations: BTreeMap::new(),
            next_migration: history.last_id() + 1,
            history,
            policy: Policy::default(),
        };
        super::policy::set_all(&mut state, &config.policy);
        state
    }

    /// The migration `id` of this process, if it is under way. A number alone may be of a daemon's
    /// earlier life.
    pub fn flight(&mut self, id: u64, pid: i32) -> Option<&mut InFlight> {
        self.migrations.get_mut(&id).filter(|flight| flight.info.pid == pid)
    }

    /// Our own line, as of now.
    pub fn own_info(&self) -> NodeInfo {
        let away = |process: &&Process| process.node != self.own.name;
        NodeInfo {
            guests_out: self.jobs.processes.values().filter(away).count() as u32,
            guests_in: self.guests.len() as u32,
            blocked: self.switches.block,
            stay: self.switches.stay || self.switches.lstay,
            age_ms: self.measured.elapsed().as_millis() as u64,
            ..self.own.clone()
        }
    }

    /// Every node known, ours among them, in the order of their numbers.
    pub fn nodes(&self) -> Vec<NodeInfo> {
        let mut nodes = BTreeMap::new();
        for member in &self.members {
            let identity = &member.identity;
            let state = match member.state {
                foca::State::Alive => "up",
                foca::State::Suspect => "suspect",
                foca::State::Down => "down",
            };
            let since = self.down_since.get(&identity.address);
            if state == "down" && since.is_none_or(|since| since.elapsed() > SHOW_DOWN) {
                continue;
            }
            let mut info = match self.loads.get(&identity.name) {
                Some((info, heard)) => NodeInfo {
                    age_ms: info.age_ms.saturating_add(heard.elapsed().as_millis() as u64),
                    ..info.clone()
                },
                None => NodeInfo { age_ms: u64::MAX >> 12, ..NodeInfo::default() },
            };
            info.name.clone_from(&identity.name);
            info.address = identity.address.to_string();
            info.state = state.into();
            // Two members of one name: the one that is up is meant.
            let place = nodes.entry(natural(&info.name)).or_insert_with(|| info.clone());
            if place.state == "down" {
                *place = info;
            }
        }
        nodes.insert(natural(&self.own.name), self.own_info());
        let number = |(index, node): (usize, NodeInfo)| NodeInfo { number: index as u32 + 1, ..node };
        nodes.into_values().enumerate().map(number).collect()
    }

    /// Everything at this moment.
    pub fn snapshot(&self) -> Snapshot {
        let home = &self.own.name;
        let mut processes: Vec<_> =
            self.jobs.processes.values().map(|process| self.jobs.info(home, process)).collect();
        processes.extend(self.guests.values().flat_map(|guest| guest.infos(home)));
        let in_flight = self.migrations.values().map(|flight| MigrationInfo {
            total_ms: flight.started.elapsed().as_secs_f64() * 1000.0,
            ..flight.info.clone()
        });
        let migrations = in_flight.chain(self.history.newest(RECENT).cloned()).collect();
        Snapshot { node: home.clone(), nodes: self.nodes(), processes, migrations }
    }
}

impl Daemon {
    /// What the membership protocol believes now.
    pub(super) fn publish_members(&self, members: Vec<Member>) {
        let mut state = self.lock();
        let now = Instant::now();
        let down: Vec<SocketAddr> = members
            .iter()
            .filter(|member| member.state == foca::State::Down)
            .map(|member| member.identity.address)
            .collect();
        state.down_since.retain(|address, _| down.contains(address));
        for address in down {
            state.down_since.entry(address).or_insert(now);
        }
        // A restarted node has a new identity at the old address; the old one is of no interest.
        let newest = |member: &Member| {
            members.iter().all(|other| {
                other.identity.address != member.identity.address
                    || other.identity.bump <= member.identity.bump
            })
        };
        let up = |members: &[Member]| members.iter().filter(|m| m.state != foca::State::Down).count();
        if up(&members) > up(&state.members) {
            self.load_now.notify_one();
        }
        state.members = members.iter().filter(|member| newest(member)).cloned().collect();
    }

    /// A peer has told its load.
    pub(super) fn load_heard(&self, info: NodeInfo) {
        let mut state = self.lock();
        if state.loads.len() < MAX_NODES || state.loads.contains_key(&info.name) {
            state.loads.insert(info.name.clone(), (info, Instant::now()));
        }
    }
}

/// Tells our load to every member that is not down, every second.
pub async fn tell_load(daemon: Arc<Daemon>) {
    let mut every = tokio::time::interval(LOAD_EVERY);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = every.tick() => {}
            () = daemon.load_now.notified() => {}
        }
        let (info, addresses) = {
            let state = daemon.lock();
            if state.switches.quiet {
                continue;
            }
            let up = state.members.iter().filter(|member| member.state != foca::State::Down);
            (state.own_info(), up.map(|member| member.identity.address).collect::<Vec<_>>())
        };
        for address in addresses {
            daemon.peers.send(address, PeerMessage::Load(Box::new(info.clone())));
        }
    }
}
