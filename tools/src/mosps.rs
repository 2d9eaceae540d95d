//! `mosps`: who is where.

use crate::{arguments, output, quantity};
use clap::Parser;
use migd::api::{ApiError, ProcessInfo, Request, Response, Snapshot};
use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

/// Headings of [`row`]; those that begin with a space stand over numbers.
pub const HEADINGS: [&str; 13] = [
    " PID", "JOB", "USER", "HOME", "NODE", "STATE", " CPU%", " RSS", " MOVES", "L", " FREEZE", "CANTMOVE",
    "COMMAND",
];
const SHORTEST_WATCH: Duration = Duration::from_millis(100);

/// Who is where: a row per process of a job
///
/// A node knows the processes whose home it is, and its guests.
#[derive(Debug, Parser)]
#[command(name = "mosps", version)]
pub struct Args {
    /// Everybody's processes, not only your own (root sees all)
    #[arg(short = 'a', long)]
    all: bool,
    /// Only this job's: its name or number
    #[arg(short = 'J', long, value_name = "JOB")]
    job: Option<String>,
    /// Again every so many seconds, until interrupted
    #[arg(long, value_name = "SECS", value_parser = quantity::duration)]
    watch: Option<Duration>,
    #[command(flatten)]
    common: arguments::Common,
}

/// The whole tool.
pub fn main() -> ExitCode {
    let args: Args = arguments::parse();
    output::end("mosps", run(&args))
}

fn run(args: &Args) -> Result<(), ApiError> {
    let mut client = args.common.socket.connect()?;
    let Some(period) = args.watch else {
        return match client.call(&Request::Snapshot)? {
            Response::Snapshot(snapshot) => {
                print(args, &snapshot);
                Ok(())
            }
            other => Err(output::unexpected(&other)),
        };
    };
    let interval_ms = period.max(SHORTEST_WATCH).as_millis() as u64;
    let clear = !args.common.json && std::io::stdout().is_terminal();
    let last = client.stream(&Request::Watch { interval_ms }, |answer| {
        if let Response::Snapshot(snapshot) = answer {
            if clear {
                // Home, and erase below: no flicker, as clearing first would.
                output::raw("\x1b[H\x1b[J");
            }
            print(args, snapshot);
        }
        true
    })?;
    match last {
        Some(other) => Err(output::unexpected(&other)),
        None => Ok(()),
    }
}

fn print(args: &Args, snapshot: &Snapshot) {
    let me = nix::unistd::getuid().as_raw();
    let job = args.job.as_deref().map(|job| job.strip_prefix("job:").unwrap_or(job));
    let wanted = |process: &&ProcessInfo| {
        (args.all || me == 0 || process.uid == me) && job.is_none_or(|job| *job == process.job)
    };
    let processes: Vec<&ProcessInfo> = snapshot.processes.iter().filter(wanted).collect();
    if args.common.json {
        return output::json(&processes);
    }
    let rows: Vec<Vec<String>> = processes.into_iter().map(row).collect();
    output::raw(&output::table(&HEADINGS, &rows));
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
        quantity::bytes_short(process.rss_bytes),
        process.migrations.to_string(),
        if process.locked { "L" } else { "-" }.into(),
        process.last_freeze_ms.map_or_else(|| "-".into(), quantity::millis),
        shortened(process.cantmove.as_deref().unwrap_or("-"), 40),
        shortened(&process.command, 60),
    ]
}

/// At most `most` characters, with a mark where something is missing.
pub fn shortened(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        None => text.to_string(),
        Some(_) => text.chars().take(most.saturating_sub(1)).chain(['…']).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_has_a_cell_a_heading() {
        let process = ProcessInfo { command: "x".repeat(100), ..ProcessInfo::default() };
        let row = row(&process);
        assert_eq!(row.len(), HEADINGS.len());
        assert_eq!(row[12].chars().count(), 60);
        assert!(row[12].ends_with('…'));
    }
}
