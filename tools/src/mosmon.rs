//! `mosmon`: watch the cluster.

use crate::{migrate, mosps, output};
use clap::Parser;
use migd::api::{ApiError, Request, Response, Snapshot};
use migd::client::Client;
use std::path::PathBuf;
use std::process::ExitCode;

mod screen;

/// Watch the cluster.
#[derive(Debug, Parser)]
#[command(name = "mosmon", version)]
pub struct Args {
    /// One snapshot as text.
    #[arg(long)]
    once: bool,
    /// With --once: JSON.
    #[arg(long, requires = "once")]
    json: bool,
    /// The daemon's socket.
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
}

/// The whole tool.
pub fn main() -> ExitCode {
    let args = Args::parse();
    output::end("mosmon", if args.once { once(&args) } else { screen::run(args.socket.as_deref()) })
}

fn once(args: &Args) -> Result<(), ApiError> {
    let mut client = Client::connect(args.socket.as_deref())?;
    let answer = client.call(&Request::Snapshot)?;
    let Response::Snapshot(snapshot) = answer else { return Err(migrate::unexpected(&answer)) };
    if args.json {
        output::json(&snapshot);
    } else {
        text(&snapshot);
    }
    Ok(())
}

fn text(snapshot: &Snapshot) {
    let nodes: Vec<Vec<String>> = snapshot.nodes.iter().map(screen::node_row).collect();
    output::table(&screen::NODE_HEADINGS, &nodes);
    output::line("");
    let headings =
        ["PID", "JOB", "USER", "HOME", "NODE", "STATE", "CPU%", "RSS", "MOVES", "L", "CANTMOVE", "COMMAND"];
    let processes: Vec<Vec<String>> = snapshot.processes.iter().map(mosps::row).collect();
    output::table(&headings, &processes);
    output::line("");
    for migration in &snapshot.migrations {
        output::line(&format!("{:<10} {}", migration.phase, migrate::in_words(migration)));
    }
}
