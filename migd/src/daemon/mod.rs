//! The node daemon: membership, load, the API, the shepherds it starts, and the policy's arm.
//!
//! One [`Daemon`] is shared by a handful of tasks; what they know together is in one [`State`] behind
//! one lock, held for short moments and never across an await:
//!
//! | task | does |
//! |---|---|
//! | `listener` | the TCP port: peers and sessions |
//! | `peers` | connections to the other daemons |
//! | `membership` | who is in the cluster |
//! | `sampler` (a thread) | looks at `/proc` every second: load and jobs |
//! | `api_server`, `verbs` | the tools' socket |
//! | `moves`, `shepherds` | migrations and the processes that do them |
//! | `policy` | asks `loadsched` what to do, and does it |
//!
//! No page of any process passes through here, and a restart costs no job.

mod admission;
mod api_server;
mod doctor;
mod files;
mod history;
mod jobs;
mod listener;
mod machine;
mod membership;
mod moves;
mod names;
mod peers;
mod policy;
mod processes;
mod protocol;
mod registry;
mod rescue;
mod sampler;
mod shepherds;
mod state;
mod switches;
mod verbs;

use crate::cluster_key::ClusterKey;
use crate::config::{Config, Settings};
use anyhow::Context;
use nix::fcntl::{Flock, FlockArg};
use state::State;
use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, mpsc, oneshot};

/// Packets of the membership protocol that wait to be taken in.
const MEMBERSHIP_QUEUE: usize = 1024;

/// What all tasks share.
pub struct Daemon {
    config: Config,
    /// Where the others dial us.
    address: SocketAddr,
    state: Mutex<State>,
    peers: Arc<peers::Peers>,
    membership: mpsc::Sender<membership::Input>,
    units: processes::Units,
    /// Wakes the policy before its time: something has arrived, ended or been asked for.
    policy_now: Notify,
    /// Somebody new is to be told our load.
    load_now: Notify,
    /// What is remembered of the jobs has changed.
    save_now: Notify,
}

impl Daemon {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while it was held has left no half-done change that the next look could not bear.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Members to join; a reload may change them.
    fn seeds(&self) -> Vec<String> {
        self.lock().seeds.clone()
    }
}

/// Runs the daemon until SIGTERM or SIGINT. `reload` reads the settings again at SIGHUP.
pub fn run(
    config: Config,
    reload: impl Fn() -> anyhow::Result<Config> + Send + 'static,
) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(16)
        .enable_all()
        .build()
        .context("no runtime for the daemon")?;
    runtime.block_on(serve(config, reload))
}

async fn serve(config: Config, reload: impl Fn() -> anyhow::Result<Config>) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    make_folder(&config.state_dir, 0o700)?;
    make_folder(&config.run_dir, 0o755)?;
    make_folder(&shepherds::folder(&config), 0o700)?;
    let _lock = single_instance(&config.run_dir)?;
    let key = ClusterKey::load(&config.key)?;
    let listener = tokio::net::TcpListener::bind(config.listen).await.with_context(|| {
        format!("cannot listen on {}; is another daemon there? see --listen", config.listen)
    })?;
    let port = listener.local_addr()?.port();
    let address = config.advertise.unwrap_or_else(|| find_address(&config, port));
    let api = api_server::bind(&config.socket)?;
    let (membership, inputs) = mpsc::channel(MEMBERSHIP_QUEUE);
    let daemon = Arc::new(Daemon {
        peers: Arc::new(peers::Peers::new(key.client_config()?, &config.name, address)),
        state: Mutex::new(State::new(&config, address)),
        address,
        membership,
        units: processes::Units::find(),
        policy_now: Notify::new(),
        load_now: Notify::new(),
        save_now: Notify::new(),
        config,
    });
    registry::restore(&daemon);
    sampler::start(&daemon)?;
    shepherds::find_again(&daemon);
    tokio::spawn(listener::run(Arc::clone(&daemon), listener, key.server_config()?.into()));
    tokio::spawn(membership::run(Arc::clone(&daemon), inputs));
    tokio::spawn(state::tell_load(Arc::clone(&daemon)));
    tokio::spawn(policy::run(Arc::clone(&daemon)));
    tokio::spawn(registry::run(Arc::clone(&daemon)));
    tokio::spawn(api_server::run(Arc::clone(&daemon), api));
    tracing::info!(node = daemon.config.name, %address, version = env!("CARGO_PKG_VERSION"), "started");
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = hang_up.recv() => match reload() {
                Ok(config) => daemon.reload(config),
                Err(error) => tracing::error!("the settings stay as they were: {error:#}"),
            },
        }
    }
    stop(&daemon).await;
    Ok(())
}

impl Daemon {
    /// What can be changed while running: seeds, the policy, whether the balancer acts.
    fn reload(&self, config: Config) {
        let mut state = self.lock();
        state.seeds = config.seeds;
        state.balance = config.balance;
        policy::set_all(&mut state, &config.policy);
        tracing::info!("settings read again; name, addresses and folders change with a restart only");
    }
}

/// Brings processes home and sends guests home as far as time allows, and says good-bye.
async fn stop(daemon: &Arc<Daemon>) {
    tracing::info!("stopping");
    let limit = Duration::from_secs(daemon.config.stop_deadline_secs);
    if tokio::time::timeout(limit, switches::clear(daemon)).await.is_err() {
        tracing::warn!("not everything was brought home in time; the rest goes on under its shepherds");
    }
    registry::save(daemon);
    let (done, told) = oneshot::channel();
    if daemon.membership.try_send(membership::Input::Leave(done)).is_ok() {
        let _ = tokio::time::timeout(Duration::from_secs(1), told).await;
        // The links' queues empty themselves in the background.
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let _ = fs::remove_file(&daemon.config.socket);
}

fn make_folder(path: &Path, mode: u32) -> anyhow::Result<()> {
    let made = fs::DirBuilder::new().recursive(true).mode(mode).create(path);
    made.and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(mode)))
        .with_context(|| format!("cannot use the folder {}; run as root, or name another", path.display()))
}

fn single_instance(run_dir: &Path) -> anyhow::Result<Flock<File>> {
    let path = run_dir.join("migd.lock");
    let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| {
        anyhow::anyhow!(
            "{} is locked ({errno}): another migd uses this folder; stop it first",
            path.display()
        )
    })
}

/// The address under which others reach us, if we were not told: the one that leads to the first seed,
/// else the first that is not loopback.
fn find_address(config: &Config, port: u16) -> SocketAddr {
    let bound = config.listen.ip();
    if !bound.is_unspecified() {
        return SocketAddr::new(bound, port);
    }
    let seed = config.seeds.iter().find_map(|seed| crate::config::parse_address(seed));
    let towards = seed.and_then(|seed| {
        let any: IpAddr = if seed.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { bound };
        // Connecting a datagram socket sends nothing; it only chooses the local address.
        let socket = UdpSocket::bind((any, 0)).ok()?;
        socket.connect(seed).ok()?;
        socket.local_addr().ok().map(|address| address.ip())
    });
    let first = || {
        nix::ifaddrs::getifaddrs().ok()?.find_map(|interface| {
            let ip = interface.address?.as_sockaddr_in()?.ip();
            (!ip.is_loopback() && !ip.is_link_local()).then_some(IpAddr::V4(ip))
        })
    };
    SocketAddr::new(towards.or_else(first).unwrap_or(Ipv4Addr::LOCALHOST.into()), port)
}

/// `migd` without a subcommand: settings from flags over the file, then the daemon.
pub fn main(flags: Settings, file: Option<std::path::PathBuf>) -> anyhow::Result<()> {
    let read = move || -> anyhow::Result<Config> {
        let below = Settings::from_file(file.as_deref())?;
        Ok(flags.clone().over(below).resolve()?)
    };
    run(read()?, read)
}
