//! `mosctl cluster`: the cluster's key, and a member to ask.

use crate::output;
use migd::api::{ApiError, ErrorKind};
use migd::cluster_key::{self, ClusterKey, DEFAULT_KEY};
use migd::config;
use std::path::{Path, PathBuf};

/// See the module.
#[derive(Debug, clap::Subcommand)]
pub enum Verb {
    /// Make a cluster key: copy it to every node, by a safe way
    Init {
        /// Where to
        #[arg(long, value_name = "FILE", default_value = DEFAULT_KEY)]
        key: PathBuf,
    },
    /// Become a member: install the cluster's key and remember a member to ask
    Join {
        /// A member's IP address, with its port unless that is 7700
        address: String,
        /// The key file, copied here from a member
        #[arg(long, value_name = "FILE")]
        key: PathBuf,
        /// Where to install it
        #[arg(long, value_name = "FILE", default_value = DEFAULT_KEY)]
        install: PathBuf,
        /// The daemon's state directory
        #[arg(long, value_name = "DIR", default_value = "/var/lib/migd")]
        state_dir: PathBuf,
    },
    /// The members as this node sees them
    Members,
}

/// Verbs that need no daemon; `None`: this one does.
pub fn without_daemon(verb: &Verb, json: bool) -> Option<Result<(), ApiError>> {
    match verb {
        Verb::Init { key } => Some(init(key, json)),
        Verb::Join { address, key, install, state_dir } => Some(join(address, key, install, state_dir, json)),
        Verb::Members => None,
    }
}

fn failed(what: &str, why: &dyn std::fmt::Display, next: &str) -> ApiError {
    output::error(ErrorKind::Failed, what, &why.to_string(), next)
}

fn init(key: &Path, json: bool) -> Result<(), ApiError> {
    cluster_key::create(key).map_err(|why| {
        failed("no cluster key was made", &why, "name another file with --key, or be root for the usual one")
    })?;
    if json {
        output::json(&serde_json::json!({ "key": key }));
    } else {
        output::line(&format!("made {}, readable by you alone", key.display()));
        output::line("copy it to every other node by a safe way (scp), and there:");
        output::line("  mosctl cluster join ADDRESS-OF-THIS-NODE --key COPY");
    }
    Ok(())
}

fn join(address: &str, key: &Path, install: &Path, state_dir: &Path, json: bool) -> Result<(), ApiError> {
    let what = "this node has not joined";
    let Some(member) = config::parse_address(address) else {
        let why = format!("`{address}` is not an IP address, with or without a port");
        return Err(output::error(ErrorKind::Usage, what, &why, "name it as 10.0.0.1 or 10.0.0.1:7700"));
    };
    if !same_contents(key, install) {
        cluster_key::install(key, install)
            .map_err(|why| failed(what, &why, "copy the key file from a member, and be root"))?;
    }
    ClusterKey::load(install).map_err(|why| failed(what, &why, "copy the key file from a member again"))?;
    config::record_seed(state_dir, &member.to_string()).map_err(|why| {
        let why = format!("{member} cannot be remembered in {}: {why}", state_dir.display());
        failed(what, &why, "be root, or name the daemon's state directory with --state-dir")
    })?;
    if json {
        output::json(&serde_json::json!({ "key": install, "member": member }));
    } else {
        output::line(&format!("{} will ask {member}; (re)start it now: systemctl restart migd", "migd"));
    }
    Ok(())
}

/// The key is in its place already: joining twice is no mistake.
fn same_contents(key: &Path, install: &Path) -> bool {
    match (std::fs::read(key), std::fs::read(install)) {
        (Ok(new), Ok(old)) => new == old,
        _ => false,
    }
}
