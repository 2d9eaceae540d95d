//! `mosmon`: watch the cluster.
//!
//! [`monitor`] is what is shown and what keys do, without a terminal or a daemon; [`view`] draws it;
//! [`feed`] talks to the daemon; [`screen`] owns the terminal.

use crate::{arguments, migrate, mosps, output, quantity};
use clap::Parser;
use migd::api::{ApiError, NodeInfo, Request, Response, Snapshot};
use std::process::ExitCode;

mod feed;
mod monitor;
mod screen;
mod view;

/// Watch the cluster: nodes, processes, migrations
#[derive(Debug, Parser)]
#[command(name = "mosmon", version)]
pub struct Args {
    /// Print one snapshot as text and end
    #[arg(long)]
    once: bool,
    #[command(flatten)]
    common: arguments::Common,
}

/// The whole tool.
pub fn main() -> ExitCode {
    let args: Args = arguments::parse();
    // JSON is for programs: one document, not a screen.
    let result = if args.once || args.common.json { once(&args) } else { screen::run(&args.common.socket) };
    output::end("mosmon", result)
}

fn once(args: &Args) -> Result<(), ApiError> {
    let mut client = args.common.socket.connect()?;
    let answer = client.call(&Request::Snapshot)?;
    let Response::Snapshot(snapshot) = answer else { return Err(output::unexpected(&answer)) };
    if args.common.json {
        output::json(&snapshot);
    } else {
        output::raw(&text(&snapshot));
    }
    Ok(())
}

/// A snapshot as text.
fn text(snapshot: &Snapshot) -> String {
    let headings =
        [" #", "NODE", "STATE", " LOAD", " SPEED", " CPUS", " CPU%", " MEM USED", " OF", " OUT", " IN"];
    let nodes: Vec<Vec<String>> = snapshot.nodes.iter().map(node_row).collect();
    let mut text = output::table(&headings, &nodes);
    let processes: Vec<Vec<String>> = snapshot.processes.iter().map(mosps::row).collect();
    text.push('\n');
    text.push_str(&output::table(&mosps::HEADINGS, &processes));
    if !snapshot.migrations.is_empty() {
        text.push('\n');
    }
    for migration in &snapshot.migrations {
        let line = output::clean(&migrate::in_words(migration));
        text.push_str(&format!("{:<10} {line}\n", output::clean(&migration.phase)));
    }
    text
}

fn node_row(node: &NodeInfo) -> Vec<String> {
    vec![
        node.number.to_string(),
        node.name.clone(),
        node.state.clone(),
        format!("{:.2}", node.load),
        node.speed.to_string(),
        format!("{:.2}", node.cpus),
        format!("{:.0}", node.cpu_pct),
        quantity::bytes_short(node.mem_total_bytes.saturating_sub(node.mem_available_bytes)),
        quantity::bytes_short(node.mem_total_bytes),
        node.guests_out.to_string(),
        node.guests_in.to_string(),
    ]
}
