//! `migrate`: move a process by hand.

use crate::output;
use clap::Parser;
use migd::api::{ApiError, ErrorKind, MigrateRequest, MigrationInfo, Request, Response};
use migd::client::Client;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Move a process by hand. It goes on where it was if anything fails.
#[derive(Debug, Parser)]
#[command(name = "migrate", version)]
pub struct Args {
    /// PID on its home node, or job:NAME.
    what: String,
    /// A node's name, number or address; home, best or balance.
    to: String,
    /// List what would stop it and what it would cost; move nothing.
    #[arg(long)]
    explain: bool,
    /// Do everything but commit.
    #[arg(long)]
    dry_run: bool,
    /// Freeze it for the whole transfer (in this version every move does).
    #[arg(long, conflicts_with = "live")]
    stop: bool,
    /// Copy while it runs (not in this version: it is stopped and copied).
    #[arg(long)]
    live: bool,
    /// Wait until it has moved (the default).
    #[arg(long, conflicts_with = "no_wait")]
    wait: bool,
    /// Return at once.
    #[arg(long)]
    no_wait: bool,
    /// Give up after this time.
    #[arg(long, value_name = "DUR", value_parser = output::duration)]
    timeout: Option<Duration>,
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
    output::end("migrate", run(&args))
}

fn run(args: &Args) -> Result<(), ApiError> {
    let mut client = Client::connect(args.socket.as_deref())?;
    if args.explain {
        return explain(args, &mut client);
    }
    if args.live {
        eprintln!("migrate: this version stops the process and copies it; it does not pre-copy");
    }
    let request = Request::Migrate(MigrateRequest {
        what: args.what.clone(),
        to: args.to.clone(),
        dry_run: args.dry_run,
        stop: args.stop,
        no_wait: args.no_wait,
        timeout_ms: args.timeout.map(|limit| limit.as_millis() as u64),
        progress: false,
    });
    match client.call(&request)? {
        Response::Migrated { reports } => {
            if args.json {
                output::json(&reports);
            } else {
                reports.iter().for_each(|report| output::line(&in_words(report)));
            }
            match reports.iter().find_map(|report| report.error.clone()) {
                Some(why) => Err(output::error(
                    ErrorKind::Failed,
                    "not everything was moved",
                    &why,
                    "see `mosctl history`",
                )),
                None => Ok(()),
            }
        }
        Response::Done => {
            if args.json {
                output::json(&Vec::<MigrationInfo>::new());
            }
            Ok(())
        }
        other => Err(unexpected(&other)),
    }
}

fn explain(args: &Args, client: &mut Client) -> Result<(), ApiError> {
    let answer = client.call(&Request::Explain { what: args.what.clone(), to: args.to.clone() })?;
    let Response::Explain(found) = answer else { return Err(unexpected(&answer)) };
    if args.json {
        output::json(&found);
    } else if found.blockers.is_empty() {
        output::line(&format!(
            "process {} can move to {}: about {}, {} ms in all, frozen for {} ms",
            found.pid,
            found.to,
            output::bytes(found.predicted_bytes),
            found.predicted_ms,
            found.predicted_freeze_ms
        ));
    } else {
        output::line(&format!("process {} cannot move to {}:", found.pid, found.to));
        for blocker in &found.blockers {
            output::line(&format!("  {:<10} {}", blocker.kind, blocker.what));
        }
    }
    if found.blockers.is_empty() {
        return Ok(());
    }
    let mut error = output::error(
        ErrorKind::NotMigratable,
        &format!("process {} cannot move", found.pid),
        "what blocks it is listed above",
        "close what is named, or wait until the process has",
    );
    error.blockers = found.blockers;
    Err(error)
}

/// The one line of a move.
pub fn in_words(report: &MigrationInfo) -> String {
    let ratio = report.bytes as f64 / report.wire_bytes.max(1) as f64;
    format!(
        "process {} {} -> {}: {} in {} pages, {} round{}, total {:.0} ms, frozen {:.1} ms, ratio {:.1}",
        report.pid,
        report.from,
        report.to,
        output::bytes(report.bytes),
        report.pages,
        report.rounds,
        if report.rounds == 1 { "" } else { "s" },
        report.total_ms,
        report.freeze_ms,
        ratio
    )
}

/// The daemon answered something else.
pub fn unexpected(response: &Response) -> ApiError {
    output::error(
        ErrorKind::Failed,
        "the daemon gave an answer that does not belong to the question",
        &format!("{response:?}").chars().take(200).collect::<String>(),
        "are the tools and the daemon of the same version? see `mosctl status`",
    )
}
