//! The daemon's settings: flags override the file, which overrides the defaults.

use crate::api::DEFAULT_SOCKET;
use crate::cluster_key::DEFAULT_KEY;
use serde::Deserialize;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

/// Where the settings lie unless told otherwise.
pub const DEFAULT_CONFIG: &str = "/etc/migd/migd.toml";
/// The daemon's port.
pub const DEFAULT_PORT: u16 = 7700;
/// Seeds recorded by `mosctl cluster join`, in the state directory, one a line.
const SEEDS_FILE: &str = "seeds";
const MAX_NAME: usize = 64;
const MAX_SEEDS: usize = 1024;

/// What flags and file may set; what is absent has its default.
#[derive(Debug, Clone, Default, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// This node's name (default: the host name)
    #[arg(long)]
    pub name: Option<String>,
    /// Address and port to listen on (default 0.0.0.0:7700)
    #[arg(long, value_name = "ADDR")]
    pub listen: Option<String>,
    /// Address under which the other nodes reach this one (default: found out)
    #[arg(long, value_name = "ADDR")]
    pub advertise: Option<String>,
    /// A member of the cluster to join; repeatable
    #[arg(long, value_name = "ADDR")]
    pub join: Vec<String>,
    /// The API's Unix socket
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Where members, history and the measured speed are kept
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Where sockets of shepherds lie
    #[arg(long, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
    /// The cluster key
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// CPUs this node has to offer; a share of one counts as that share (default: found out)
    #[arg(long, value_name = "N")]
    pub cpus: Option<f64>,
    /// Memory this node has to offer, as 512M or 4G (default: found out)
    #[arg(long, value_name = "SIZE")]
    pub mem: Option<String>,
    /// This node's speed, 10000 is the standard node (default: measured once)
    #[arg(long, value_name = "N")]
    pub speed: Option<u32>,
    /// Whether the balancer moves processes by itself (default true)
    #[arg(long, value_name = "BOOL")]
    pub balance: Option<bool>,
    /// At SIGTERM, how long to try to bring processes home, seconds (default 10)
    #[arg(long, value_name = "SECS")]
    pub stop_deadline_secs: Option<u64>,
    /// The balancer's settings, as `mosctl policy set` takes them (file only)
    #[arg(skip)]
    pub policy: std::collections::BTreeMap<String, toml::Value>,
}

/// What the daemon runs with.
#[derive(Debug, Clone)]
pub struct Config {
    /// This node's name.
    pub name: String,
    /// Where the one TCP port is.
    pub listen: SocketAddr,
    /// Under which address the others dial it, if told.
    pub advertise: Option<SocketAddr>,
    /// Members to join.
    pub seeds: Vec<String>,
    /// The API's socket.
    pub socket: PathBuf,
    /// Persistent state.
    pub state_dir: PathBuf,
    /// Sockets of shepherds.
    pub run_dir: PathBuf,
    /// The cluster key file.
    pub key: PathBuf,
    /// CPUs to offer, if told.
    pub cpus: Option<f64>,
    /// Memory to offer, bytes, if told.
    pub mem_bytes: Option<u64>,
    /// Speed to claim, if told.
    pub speed: Option<u32>,
    /// Whether the balancer acts.
    pub balance: bool,
    /// How long SIGTERM tries to bring processes home, seconds.
    pub stop_deadline_secs: u64,
    /// The balancer's settings from the file.
    pub policy: std::collections::BTreeMap<String, String>,
}

/// Why there are no usable settings.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("the settings in {path} cannot be read: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is not what it should be.
    #[error("the settings in {path} are wrong: {source}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// A value is not usable.
    #[error("setting `{key}`: `{value}` is not {wanted}")]
    Value {
        /// The setting.
        key: &'static str,
        /// What it is.
        value: String,
        /// What it should be.
        wanted: &'static str,
    },
}

impl Settings {
    /// Reads the file. `path` absent: the usual one, which need not exist.
    pub fn from_file(path: Option<&Path>) -> Result<Settings, ConfigError> {
        let usual = Path::new(DEFAULT_CONFIG);
        let text = match fs::read_to_string(path.unwrap_or(usual)) {
            Ok(text) => text,
            Err(error) if path.is_none() && error.kind() == io::ErrorKind::NotFound => String::new(),
            Err(source) => {
                return Err(ConfigError::Read { path: path.unwrap_or(usual).to_path_buf(), source });
            }
        };
        toml::from_str(&text).map_err(|source| ConfigError::Parse {
            path: path.unwrap_or(usual).to_path_buf(),
            source: Box::new(source),
        })
    }

    /// These settings, and `below` where they say nothing. Seeds add up.
    pub fn over(mut self, below: Settings) -> Settings {
        self.join.extend(below.join);
        Settings {
            name: self.name.or(below.name),
            listen: self.listen.or(below.listen),
            advertise: self.advertise.or(below.advertise),
            join: self.join,
            socket: self.socket.or(below.socket),
            state_dir: self.state_dir.or(below.state_dir),
            run_dir: self.run_dir.or(below.run_dir),
            key: self.key.or(below.key),
            cpus: self.cpus.or(below.cpus),
            mem: self.mem.or(below.mem),
            speed: self.speed.or(below.speed),
            balance: self.balance.or(below.balance),
            stop_deadline_secs: self.stop_deadline_secs.or(below.stop_deadline_secs),
            policy: below.policy.into_iter().chain(self.policy).collect(),
        }
    }

    /// With the defaults where nothing was said.
    pub fn resolve(self) -> Result<Config, ConfigError> {
        let name = match self.name {
            Some(name) => name,
            None => nix::unistd::gethostname().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default(),
        };
        if !is_name(&name) {
            let wanted =
                "a node name: letters, digits, `-`, `_` and `.`, not only digits, not home/best/here";
            return Err(ConfigError::Value { key: "name", value: name, wanted });
        }
        let address = |key, text: &str| {
            parse_address(text).ok_or_else(|| ConfigError::Value {
                key,
                value: text.to_string(),
                wanted: "an IP address with an optional port",
            })
        };
        let state_dir = self.state_dir.unwrap_or_else(|| "/var/lib/migd".into());
        let mut seeds = self.join;
        seeds.extend(recorded_seeds(&state_dir));
        seeds.sort();
        seeds.dedup();
        seeds.truncate(MAX_SEEDS);
        if let Some(cpus) = self.cpus
            && !(cpus > 0.0 && cpus.is_finite())
        {
            return Err(ConfigError::Value { key: "cpus", value: cpus.to_string(), wanted: "above 0" });
        }
        let mem_bytes = match self.mem {
            Some(text) => Some(parse_size(&text).ok_or(ConfigError::Value {
                key: "mem",
                value: text,
                wanted: "a size such as 512M or 4G",
            })?),
            None => None,
        };
        Ok(Config {
            name,
            listen: address("listen", self.listen.as_deref().unwrap_or("0.0.0.0"))?,
            advertise: self.advertise.as_deref().map(|text| address("advertise", text)).transpose()?,
            seeds,
            socket: self.socket.unwrap_or_else(|| DEFAULT_SOCKET.into()),
            run_dir: self.run_dir.unwrap_or_else(|| "/run/migd".into()),
            key: self.key.unwrap_or_else(|| DEFAULT_KEY.into()),
            state_dir,
            cpus: self.cpus,
            mem_bytes,
            speed: self.speed.filter(|speed| *speed > 0),
            balance: self.balance.unwrap_or(true),
            stop_deadline_secs: self.stop_deadline_secs.unwrap_or(10),
            policy: self.policy.into_iter().map(|(key, value)| (key, plain(&value))).collect(),
        })
    }
}

fn plain(value: &toml::Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_string)
}

/// A name that cannot be taken for a number, an address, or one of the words for nodes.
fn is_name(name: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    (1..=MAX_NAME).contains(&name.len())
        && name.bytes().all(fits)
        && !name.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.')
        && !["home", "best", "here", "balance"].contains(&name)
}

/// `IP`, `IP:PORT` or `[IPv6]:PORT`.
pub fn parse_address(text: &str) -> Option<SocketAddr> {
    text.parse::<SocketAddr>()
        .or_else(|_| text.parse::<IpAddr>().map(|ip| SocketAddr::new(ip, DEFAULT_PORT)))
        .ok()
}

/// Bytes, with an optional suffix K, M, G or T (powers of 1024).
pub fn parse_size(text: &str) -> Option<u64> {
    let text = text.trim();
    let text = text.strip_suffix('B').or_else(|| text.strip_suffix("iB")).unwrap_or(text);
    let text = text.strip_suffix('i').unwrap_or(text);
    let (digits, shift) = match text.char_indices().next_back()? {
        (at, 'k' | 'K') => (&text[..at], 10),
        (at, 'm' | 'M') => (&text[..at], 20),
        (at, 'g' | 'G') => (&text[..at], 30),
        (at, 't' | 'T') => (&text[..at], 40),
        _ => (text, 0),
    };
    let number: f64 = digits.trim().parse().ok()?;
    let bytes = number * f64::from(1u32 << 10).powi(shift / 10);
    (number >= 0.0 && bytes < 1e18).then_some(bytes as u64)
}

/// Remembers a member to join at the next start (`mosctl cluster join`).
pub fn record_seed(state_dir: &Path, address: &str) -> io::Result<()> {
    fs::create_dir_all(state_dir)?;
    if recorded_seeds(state_dir).iter().any(|known| known == address) {
        return Ok(());
    }
    let mut file = OpenOptions::new().create(true).append(true).open(state_dir.join(SEEDS_FILE))?;
    writeln!(file, "{address}")
}

/// Forgets all of them (`mosctl cluster leave`).
pub fn forget_seeds(state_dir: &Path) -> io::Result<()> {
    match fs::remove_file(state_dir.join(SEEDS_FILE)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn recorded_seeds(state_dir: &Path) -> Vec<String> {
    let text = fs::read_to_string(state_dir.join(SEEDS_FILE)).unwrap_or_default();
    text.lines().map(str::trim).filter(|l| !l.is_empty()).take(MAX_SEEDS).map(str::to_string).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_override_the_file_which_overrides_the_defaults() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("migd.toml");
        fs::write(
            &path,
            "name = \"filed\"\ncpus = 2\nmem = \"1G\"\njoin = [\"10.0.0.1\"]\n[policy]\nx = 3\n",
        )
        .expect("written");
        let flags = Settings {
            cpus: Some(0.5),
            state_dir: Some(folder.path().into()),
            join: vec!["10.0.0.2:7".into()],
            ..Settings::default()
        };
        record_seed(folder.path(), "10.0.0.3").expect("recorded");
        let config =
            flags.over(Settings::from_file(Some(&path)).expect("reads")).resolve().expect("resolves");
        assert_eq!((config.name.as_str(), config.cpus), ("filed", Some(0.5)));
        assert_eq!(config.mem_bytes, Some(1 << 30));
        assert_eq!(config.listen, "0.0.0.0:7700".parse().expect("an address"));
        assert_eq!(config.seeds, ["10.0.0.1", "10.0.0.2:7", "10.0.0.3"]);
        assert_eq!(config.policy["x"], "3");
    }

    #[test]
    fn wrong_settings_are_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("migd.toml");
        fs::write(&path, "nmae = \"x\"\n").expect("written");
        let error = Settings::from_file(Some(&path)).expect_err("an unknown key");
        assert!(error.to_string().contains("nmae"), "{error}");
        assert!(Settings::from_file(Some(&folder.path().join("none"))).is_err());
        for name in ["", "home", "12", "10.0.0.1", "a b", "x/y"] {
            let settings = Settings { name: Some(name.into()), ..Settings::default() };
            assert!(settings.resolve().is_err(), "{name:?} is no node name");
        }
        let settings =
            Settings { name: Some("n".into()), listen: Some("nowhere".into()), ..Settings::default() };
        assert!(settings.resolve().is_err());
    }

    #[test]
    fn sizes() {
        assert_eq!(parse_size("512M"), Some(512 << 20));
        assert_eq!(parse_size("1.5G"), Some(3 << 29));
        assert_eq!(parse_size("4GiB"), Some(4 << 30));
        assert_eq!(parse_size("17"), Some(17));
        assert_eq!(parse_size("-1"), None);
        assert_eq!(parse_size("G"), None);
        assert_eq!(parse_size("é"), None);
    }
}
