//! `mosctl`: administer a node and its cluster.

mod show;

use crate::migrate::unexpected;
use crate::output;
use clap::{Parser, Subcommand};
use migd::api::{ApiError, ErrorKind, NodeSwitch, Request, Response, Snapshot};
use migd::client::Client;
use migd::cluster_key;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Where the cluster key lies.
const KEY: &str = "/etc/migd/cluster.key";

/// Administer a node and its cluster.
#[derive(Debug, Parser)]
#[command(name = "mosctl", version)]
pub struct Args {
    /// Print JSON.
    #[arg(long, global = true)]
    json: bool,
    /// The daemon's socket.
    #[arg(long, value_name = "PATH", global = true)]
    socket: Option<PathBuf>,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// This node in a few lines.
    Status,
    /// All nodes.
    Nodes,
    /// One node: its name, number and address.
    Whois {
        /// Name, number or address.
        node: String,
    },
    /// What this kernel and host support, and what to do about what is missing.
    Doctor,
    /// Hold a process where it is, or on a node.
    Pin {
        /// PID on its home node, or job:NAME.
        what: String,
        /// Move it there first.
        node: Option<String>,
    },
    /// Let the balancer move it again.
    Unpin {
        /// PID on its home node, or job:NAME.
        what: String,
    },
    /// The balancer's last decision about a process, with its numbers.
    Why {
        /// PID on its home node.
        pid: String,
    },
    /// No process leaves this node by the balancer's choice.
    Stay,
    /// Undo `stay`.
    Nostay,
    /// No local process leaves by the balancer's choice.
    Lstay,
    /// Undo `lstay`.
    Nolstay,
    /// No guest arrives.
    Block,
    /// Undo `block`.
    Noblock,
    /// Send no load information.
    Quiet,
    /// Undo `quiet`.
    Noquiet,
    /// Send all guests home and wait; implies `block`.
    Expel,
    /// Bring all own processes back and wait; implies `lstay`.
    Bring,
    /// The speed this node claims (10000 is the standard node).
    Setspeed {
        /// The new speed.
        speed: u32,
    },
    /// The balancer's settings.
    Policy {
        #[command(subcommand)]
        verb: PolicyVerb,
    },
    /// Past migrations.
    History {
        /// Only those of this long.
        #[arg(long, value_name = "DUR", value_parser = output::duration)]
        since: Option<Duration>,
    },
    /// Keys and membership.
    Cluster {
        #[command(subcommand)]
        verb: ClusterVerb,
    },
}

#[derive(Debug, Subcommand)]
enum PolicyVerb {
    /// All settings.
    Show,
    /// Change one.
    Set {
        /// KEY=VALUE.
        setting: String,
    },
}

#[derive(Debug, Subcommand)]
enum ClusterVerb {
    /// Make a cluster key: copy it to every node, by a safe way.
    Init {
        /// Where to.
        #[arg(long, default_value = KEY)]
        key: PathBuf,
    },
    /// Become a member: install the cluster's key and remember a node to ask.
    Join {
        /// A member's address, HOST:PORT.
        address: String,
        /// The key file, copied here from a member.
        #[arg(long, value_name = "FILE")]
        key: PathBuf,
        /// Where to install it.
        #[arg(long, default_value = KEY)]
        install: PathBuf,
        /// The file of seed addresses.
        #[arg(long, default_value = "/etc/migd/seeds")]
        seeds: PathBuf,
    },
    /// The members as this node sees them.
    Members,
}

/// The whole tool.
pub fn main() -> ExitCode {
    let args = Args::parse();
    output::end("mosctl", run(&args))
}

fn run(args: &Args) -> Result<(), ApiError> {
    if let Verb::Cluster { verb } = &args.verb
        && let Some(result) = cluster(verb)
    {
        return result;
    }
    let mut client = Client::connect(args.socket.as_deref())?;
    if let Some(switch) = switch(&args.verb) {
        return done(client.call(&Request::NodeSwitch { switch })?, args.json);
    }
    match &args.verb {
        Verb::Status => show::status(&mut client, args.json),
        Verb::Nodes | Verb::Cluster { .. } => show::nodes(&snapshot(&mut client)?, args.json),
        Verb::Whois { node } => show::whois(&snapshot(&mut client)?, node, args.json),
        Verb::Doctor => show::doctor(&mut client, args.json),
        Verb::Why { pid } => show::why(&mut client, pid, args.json),
        Verb::Pin { what, node } => {
            let request = Request::Pin { what: what.clone(), node: node.clone() };
            done(client.call(&request)?, args.json)
        }
        Verb::Unpin { what } => done(client.call(&Request::Unpin { what: what.clone() })?, args.json),
        Verb::Expel => done(client.call(&Request::Expel)?, args.json),
        Verb::Bring => done(client.call(&Request::Bring)?, args.json),
        Verb::Setspeed { speed } => done(client.call(&Request::SetSpeed { speed: *speed })?, args.json),
        Verb::Policy { verb: PolicyVerb::Show } => show::policy(&mut client, args.json),
        Verb::Policy { verb: PolicyVerb::Set { setting } } => {
            let (key, value) = setting.split_once('=').ok_or_else(|| {
                output::error(
                    ErrorKind::Usage,
                    "nothing was set",
                    "it must be KEY=VALUE",
                    "see `mosctl policy show`",
                )
            })?;
            done(client.call(&Request::PolicySet { key: key.into(), value: value.into() })?, args.json)
        }
        Verb::History { since } => show::history(&mut client, *since, args.json),
        _ => Ok(()),
    }
}

fn switch(verb: &Verb) -> Option<NodeSwitch> {
    Some(match verb {
        Verb::Stay => NodeSwitch::Stay,
        Verb::Nostay => NodeSwitch::Nostay,
        Verb::Lstay => NodeSwitch::Lstay,
        Verb::Nolstay => NodeSwitch::Nolstay,
        Verb::Block => NodeSwitch::Block,
        Verb::Noblock => NodeSwitch::Noblock,
        Verb::Quiet => NodeSwitch::Quiet,
        Verb::Noquiet => NodeSwitch::Noquiet,
        _ => return None,
    })
}

fn snapshot(client: &mut Client) -> Result<Snapshot, ApiError> {
    match client.call(&Request::Snapshot)? {
        Response::Snapshot(snapshot) => Ok(snapshot),
        other => Err(unexpected(&other)),
    }
}

/// An answer that says only that it was done (or what was moved for it).
fn done(response: Response, json: bool) -> Result<(), ApiError> {
    match response {
        Response::Done => {
            if json {
                output::json(&serde_json::json!({ "done": true }));
            }
            Ok(())
        }
        Response::Migrated { reports } => {
            if json {
                output::json(&reports);
            } else {
                reports.iter().for_each(|report| output::line(&crate::migrate::in_words(report)));
            }
            Ok(())
        }
        other => Err(unexpected(&other)),
    }
}

/// Verbs that need no daemon; `None`: this one does.
fn cluster(verb: &ClusterVerb) -> Option<Result<(), ApiError>> {
    let refuse = |what: &str, error: &dyn std::fmt::Display, next: &str| {
        output::error(ErrorKind::Failed, what, &error.to_string(), next)
    };
    match verb {
        ClusterVerb::Init { key } => {
            let made = cluster_key::create(key).map_err(|e| {
                refuse("no cluster key was made", &e, "remove the old key only if no node uses it")
            });
            if made.is_ok() {
                output::line(&format!("made {}; copy it to every node, e.g. with scp", key.display()));
            }
            Some(made)
        }
        ClusterVerb::Join { address, key, install, seeds } => {
            let joined = cluster_key::install(key, install)
                .map_err(|e| refuse("the key was not installed", &e, "copy the key file from a member again"))
                .and_then(|()| {
                    add_seed(seeds, address)
                        .map_err(|e| refuse("the member's address was not kept", &e, "are you root?"))
                });
            if joined.is_ok() {
                output::line("joined; start the daemon now: systemctl start migd");
            }
            Some(joined)
        }
        ClusterVerb::Members => None,
    }
}

fn add_seed(seeds: &std::path::Path, address: &str) -> std::io::Result<()> {
    use std::io::Write;
    let known = std::fs::read_to_string(seeds).unwrap_or_default();
    if known.lines().any(|line| line.trim() == address) {
        return Ok(());
    }
    let mut file = std::fs::OpenOptions::new().create(true).append(true).open(seeds)?;
    writeln!(file, "{address}")
}
