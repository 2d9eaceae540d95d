//! `mosctl`: administer a node and its cluster.

mod cluster;
mod show;

use crate::output::unexpected;
use crate::{arguments, output, quantity};
use clap::{Parser, Subcommand};
use migd::api::{ApiError, ErrorKind, NodeSwitch, Request, Response, Snapshot};
use migd::client::Client;
use std::process::ExitCode;
use std::time::Duration;

/// Administer a node and its cluster
#[derive(Debug, Parser)]
#[command(name = "mosctl", version)]
pub struct Args {
    #[command(flatten)]
    common: arguments::Common,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// This node in a few lines
    Status,
    /// All nodes
    Nodes,
    /// One node: its name, number and address
    Whois {
        /// Name, number or address
        node: String,
    },
    /// What this kernel and host support, and what to do about what is missing
    Doctor,
    /// Hold a process where it is, or on a node
    Pin {
        /// PID on its home node, or job:NAME
        what: String,
        /// Move it there first
        node: Option<String>,
    },
    /// Let the balancer move it again
    Unpin {
        /// PID on its home node, or job:NAME
        what: String,
    },
    /// The balancer's last decision about a process, with its numbers
    Why {
        /// PID on its home node
        pid: String,
    },
    /// No process leaves this node by the balancer's choice
    Stay,
    /// Undo `stay`
    Nostay,
    /// No local process leaves by the balancer's choice
    Lstay,
    /// Undo `lstay`
    Nolstay,
    /// No guest arrives
    Block,
    /// Undo `block`
    Noblock,
    /// Send no load information
    Quiet,
    /// Undo `quiet`
    Noquiet,
    /// Send all guests home and wait; implies `block`
    Expel,
    /// Bring all own processes back and wait; implies `lstay`
    Bring,
    /// The speed this node claims (10000 is the standard node)
    Setspeed {
        /// The new speed
        speed: u32,
    },
    /// The balancer's settings
    Policy {
        #[command(subcommand)]
        verb: PolicyVerb,
    },
    /// Past migrations
    History {
        /// Only those of this long
        #[arg(long, value_name = "DUR", value_parser = quantity::duration)]
        since: Option<Duration>,
    },
    /// Keys and membership
    Cluster {
        #[command(subcommand)]
        verb: cluster::Verb,
    },
}

#[derive(Debug, Subcommand)]
enum PolicyVerb {
    /// All settings
    Show,
    /// Change one
    Set {
        /// KEY=VALUE
        setting: String,
    },
}

/// The whole tool.
pub fn main() -> ExitCode {
    let args: Args = arguments::parse();
    output::end("mosctl", run(&args))
}

fn run(args: &Args) -> Result<(), ApiError> {
    if let Verb::Cluster { verb } = &args.verb
        && let Some(result) = cluster::without_daemon(verb, args.common.json)
    {
        return result;
    }
    let json = args.common.json;
    let mut client = args.common.socket.connect()?;
    if let Some(switch) = switch(&args.verb) {
        return done(client.call(&Request::NodeSwitch { switch })?, json);
    }
    match &args.verb {
        Verb::Status => show::status(&mut client, json),
        Verb::Nodes | Verb::Cluster { .. } => show::nodes(&snapshot(&mut client)?, json),
        Verb::Whois { node } => show::whois(&snapshot(&mut client)?, node, json),
        Verb::Doctor => show::doctor(&mut client, json),
        Verb::Why { pid } => show::why(&mut client, pid, json),
        Verb::Pin { what, node } => {
            let request = Request::Pin { what: what.clone(), node: node.clone() };
            done(client.call(&request)?, json)
        }
        Verb::Unpin { what } => done(client.call(&Request::Unpin { what: what.clone() })?, json),
        Verb::Expel => done(client.call(&Request::Expel)?, json),
        Verb::Bring => done(client.call(&Request::Bring)?, json),
        Verb::Setspeed { speed } => done(client.call(&Request::SetSpeed { speed: *speed })?, json),
        Verb::Policy { verb: PolicyVerb::Show } => show::policy(&mut client, json),
        Verb::Policy { verb: PolicyVerb::Set { setting } } => {
            let (key, value) = setting.split_once('=').ok_or_else(|| {
                output::error(
                    ErrorKind::Usage,
                    "nothing was set",
                    "it must be KEY=VALUE",
                    "see `mosctl policy show`",
                )
            })?;
            done(client.call(&Request::PolicySet { key: key.into(), value: value.into() })?, json)
        }
        Verb::History { since } => show::history(&mut client, *since, json),
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

/// An answer that says only that it was done (or what was moved for it)
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
