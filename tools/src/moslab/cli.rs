//! The command line of `moslab`.

use super::control::{self, Order};
use super::keeper::{self, Options};
use super::lifecycle::{self, Interrupted, Wishes};
use super::place::Place;
use super::state::{LabState, NodeState};
use super::{bench, daemon, demo, exec, login, node};
use anyhow::Result;
use clap::{Args, Parser, Subcommand};
use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

/// A whole cluster on one machine: every node has its own network, host name, files and daemon
#[derive(Debug, Parser)]
#[command(name = "moslab", version, disable_version_flag = true)]
struct Cli {
    /// Print version
    #[arg(short = 'V', long, action = clap::ArgAction::Version)]
    version: Option<bool>,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Args)]
struct Lab {
    /// Which lab; several can be up side by side
    #[arg(long, value_name = "LAB", default_value = "lab")]
    name: String,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Start a lab; returns when every node sees every other
    Up {
        #[command(flatten)]
        lab: Lab,
        /// How many nodes
        #[arg(short = 'n', long, default_value_t = 3)]
        nodes: u32,
        /// CPUs each node may use (default: an equal share; 0: no limit)
        #[arg(long, value_name = "F")]
        cpus_per_node: Option<f64>,
        /// Rate of each node's link, as `tc` takes it: 1gbit, 100mbit
        #[arg(long, value_name = "RATE")]
        bandwidth: Option<String>,
        /// Print the lab's state as JSON
        #[arg(long)]
        json: bool,
    },
    /// Run a command on a node, as a login there would (without a command: a login shell)
    Exec {
        #[command(flatten)]
        lab: Lab,
        /// As which user of the node
        #[arg(short, long, value_name = "NAME", default_value = "root")]
        user: String,
        /// Not held to the node's share of the CPUs
        #[arg(long)]
        unlimited: bool,
        /// node1, node2, …
        node: String,
        /// The command and its arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<OsString>,
    },
    /// Kill everything in a node at once, as a power cut would
    Kill {
        #[command(flatten)]
        lab: Lab,
        /// Which node
        node: String,
    },
    /// Cut nodes off from the rest (not from each other), without any error, as a cut wire would
    Partition {
        #[command(flatten)]
        lab: Lab,
        /// Which nodes
        #[arg(required = true)]
        nodes: Vec<String>,
    },
    /// Undo all partitions
    Heal {
        #[command(flatten)]
        lab: Lab,
    },
    /// Bring a node up again with its files; one that runs is killed first
    Restart {
        #[command(flatten)]
        lab: Lab,
        /// Only its daemon: killed and started, everything else in the node stays
        #[arg(long)]
        daemon: bool,
        /// Which node
        node: String,
    },
    /// Show a lab's nodes
    Status {
        #[command(flatten)]
        lab: Lab,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Print what a node's daemon has said
    Logs {
        #[command(flatten)]
        lab: Lab,
        /// Which node
        node: String,
    },
    /// End a lab; nothing of it is left
    Down {
        #[command(flatten)]
        lab: Lab,
    },
    /// The benchmark: moves of several sizes, each against a raw copy of the same bytes
    Bench(bench::BenchArgs),
    /// The main job, told step by step: real programs start here, move while they run, and end as if they never had
    Demo(demo::DemoArgs),
    #[command(name = "__keeper", hide = true)]
    Keeper { name: String, options: String },
    #[command(name = "__node-init", hide = true)]
    NodeInit { config: PathBuf },
    #[command(name = "__node-pid1", hide = true)]
    NodePid1 { config: PathBuf },
    #[command(name = "__login", hide = true)]
    Login {
        user: String,
        #[arg(long)]
        group: Option<PathBuf>,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<OsString>,
    },
    #[command(name = "__raw-send", hide = true)]
    RawSend(bench::RawSend),
    #[command(name = "__raw-receive", hide = true)]
    RawReceive(bench::RawReceive),
    #[command(name = "__start-time", hide = true)]
    StartTime(bench::StartTime),
    #[command(name = "__victim", hide = true)]
    Victim(bench::Victim),
}

/// The program.
pub fn main() -> ExitCode {
    match run(Cli::parse().verb) {
        Ok(code) => ExitCode::from(code),
        Err(error) if error.is::<Interrupted>() => {
            eprintln!("moslab: {error}");
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("moslab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(verb: Verb) -> Result<u8> {
    match verb {
        Verb::Up { lab, nodes, cpus_per_node, bandwidth, json } => {
            up(&Place::new(&lab.name)?, &Wishes { nodes, cpus_per_node, bandwidth }, json)
        }
        Verb::Exec { lab, user, unlimited, node, command } => {
            exec::exec(&Place::new(&lab.name)?, &node, &user, unlimited, &command)
        }
        Verb::Kill { lab, node } => order(&lab, Order::Kill { node }),
        Verb::Partition { lab, nodes } => order(&lab, Order::Partition { nodes }),
        Verb::Heal { lab } => order(&lab, Order::Heal),
        Verb::Restart { lab, daemon, node } => order(&lab, Order::Restart { node, daemon_only: daemon }),
        Verb::Status { lab, json } => status(&Place::new(&lab.name)?, json),
        Verb::Logs { lab, node } => logs(&Place::new(&lab.name)?, &node),
        Verb::Down { lab } => down(&Place::new(&lab.name)?),
        Verb::Bench(arguments) => bench::main(&arguments),
        Verb::Demo(arguments) => demo::main(&arguments),
        Verb::Keeper { name, options } => {
            let options: Options = serde_json::from_str(&options)?;
            keeper::main(Place::new(&name)?, options)
        }
        Verb::NodeInit { config } => node::init(&config),
        Verb::NodePid1 { config } => node::pid1(&config),
        Verb::Login { user, group, command } => login::login(&user, group.as_deref(), &command),
        Verb::RawSend(arguments) => bench::raw_send(&arguments),
        Verb::RawReceive(arguments) => bench::raw_receive(&arguments),
        Verb::StartTime(arguments) => bench::start_time(&arguments),
        Verb::Victim(arguments) => bench::victim(&arguments),
    }
}

fn order(lab: &Lab, order: Order) -> Result<u8> {
    control::order(&Place::new(&lab.name)?, &order)?;
    Ok(0)
}

fn up(place: &Place, wishes: &Wishes, json: bool) -> Result<u8> {
    let signals = lifecycle::catch_ending_signals()?;
    let started = lifecycle::up(place, wishes, Some(&signals))?;
    for note in &started.notes {
        eprintln!("moslab: note: {note}");
    }
    started.release()?;
    status(place, json)
}

fn status(place: &Place, json: bool) -> Result<u8> {
    let state = LabState::of_running(place)?;
    let mut out = std::io::stdout().lock();
    if json {
        writeln!(out, "{}", serde_json::to_string_pretty(&state)?)?;
        return Ok(0);
    }
    writeln!(out, "{:8} {:14} {:6} {:10} daemon", "node", "address", "state", "link")?;
    for node in &state.nodes {
        let (up, link, daemon) = describe(node);
        writeln!(out, "{:8} {:14} {up:6} {link:10} {daemon}", node.name, node.address)?;
    }
    Ok(0)
}

fn describe(node: &NodeState) -> (&'static str, String, String) {
    let link = if node.island == 0 { "ok".to_string() } else { format!("island {}", node.island) };
    match node.init.filter(|init| init.alive()) {
        None => ("down", link, "-".to_string()),
        Some(init) => match daemon::snapshot(init.pid) {
            Ok(seen) => {
                let up = seen.nodes.iter().filter(|n| n.state == "up").count();
                ("up", link, format!("sees {up} of {} nodes up", seen.nodes.len()))
            }
            Err(error) => ("up", link, format!("silent: {error}")),
        },
    }
}

fn logs(place: &Place, node: &str) -> Result<u8> {
    let state = LabState::of_running(place)?;
    let mut log = std::fs::File::open(place.node_log(&state.node(node)?.name))?;
    std::io::copy(&mut log, &mut std::io::stdout().lock())?;
    Ok(0)
}

fn down(place: &Place) -> Result<u8> {
    if !lifecycle::down(place)? {
        eprintln!("moslab: there is no lab {:?}; nothing to do", place.name());
    }
    Ok(0)
}
