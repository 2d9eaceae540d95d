//! `mosps`: who is where.

use crate::{migrate, output};
use clap::Parser;
use migd::api::{ApiError, ProcessInfo, Request, Response, Snapshot};
use migd::client::Client;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Who is where: a row per process of a job.
#[derive(Debug, Parser)]
#[command(name = "mosps", version)]
pub struct Args {
    /// Everybody's processes, not only your own.
    #[arg(short = 'a', long)]
    all: bool,
    /// Only this job's.
    #[arg(short = 'J', long, value_name = "JOB")]
    job: Option<String>,
    /// Again every so many seconds.
    #[arg(long, value_name = "SECS")]
    watch: Option<f64>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// The daemon's socket.
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
}

/// The whole tool.
pub fn main() -> ExitCode {
    let args = Args::parse();
    output::end("mosps", run(&args))
}

fn run(args: &Args) -> Result<(), ApiError> {
    let mut client = Client::connect(args.socket.as_deref())?;
    loop {
        let answer = client.call(&Request::Snapshot)?;
        let Response::Snapshot(snapshot) = answer else { return Err(migrate::unexpected(&answer)) };
        print(args, &snapshot);
        match args.watch {
            Some(seconds) => std::thread::sleep(Duration::from_secs_f64(seconds.clamp(0.1, 3600.0))),
            None => return Ok(()),
        }
    }
}

fn print(args: &Args, snapshot: &Snapshot) {
    let me = nix::unistd::getuid().as_raw();
    let wanted = |process: &&ProcessInfo| {
        (args.all || me == 0 || process.uid == me) && args.job.as_ref().is_none_or(|job| *job == process.job)
    };
    let processes: Vec<&ProcessInfo> = snapshot.processes.iter().filter(wanted).collect();
    if args.json {
        return output::json(&processes);
    }
    let headings =
        ["PID", "JOB", "USER", "HOME", "NODE", "STATE", "CPU%", "RSS", "MOVES", "L", "CANTMOVE", "COMMAND"];
    let rows: Vec<Vec<String>> = processes.into_iter().map(row).collect();
    output::table(&headings, &rows);
}

/// One process as the cells of a row.
pub fn row(process: &ProcessInfo) -> Vec<String> {
    vec![
        process.pid.to_string(),
        process.job.clone(),
        process.user.clone(),
        process.home.clone(),
        process.node.clone(),
        process.state.clone(),
        format!("{:.0}", process.cpu_pct),
        output::bytes(process.rss_bytes),
        process.migrations.to_string(),
        if process.locked { "L" } else { "-" }.into(),
        process.cantmove.clone().unwrap_or_else(|| "-".into()).chars().take(40).collect(),
        process.command.chars().take(60).collect(),
    ]
}
