//! `migrate`: move a process by hand.
//!
//! The daemon does it; a client that goes away (Ctrl-C) does not undo a move that has begun.

use crate::output::unexpected;
use crate::{arguments, output, quantity};
use clap::Parser;
use migd::api::{ApiError, ErrorKind, Explanation, MigrateRequest, MigrationInfo, Request, Response};
use migd::client::Client;
use std::process::ExitCode;
use std::time::Duration;

/// Move a process by hand. It goes on where it was if anything fails
#[derive(Debug, Parser)]
#[command(
    name = "migrate",
    version,
    after_help = "Exit codes: 0 moved, 1 failed, 2 usage, 3 refused by policy or permission, 4 not \
                  migratable (the reason is printed), 5 node down or unreachable. Unless it is 0, the \
                  process runs on where it was."
)]
pub struct Args {
    /// PID on its home node, or job:NAME
    what: String,
    /// A node's name, number or address; home, best, here or balance
    to: String,
    /// List everything that would stop it, and what it would cost; move nothing
    #[arg(long, conflicts_with_all = ["dry_run", "no_wait"])]
    explain: bool,
    /// Do everything but commit: it is frozen and copied, and goes on where it is
    #[arg(long)]
    dry_run: bool,
    /// Freeze it for the whole transfer (in this version every move does)
    #[arg(long, conflicts_with = "live")]
    stop: bool,
    /// Copy while it runs, as far as this version can: it stops and copies, in one round
    #[arg(long)]
    live: bool,
    /// Wait until it has moved (the default)
    #[arg(long, conflicts_with = "no_wait")]
    wait: bool,
    /// Return as soon as the move has begun
    #[arg(long)]
    no_wait: bool,
    /// Give up after this time, such as 30s
    #[arg(long, value_name = "DUR", value_parser = quantity::duration)]
    timeout: Option<Duration>,
    #[command(flatten)]
    common: arguments::Common,
}

/// The whole tool.
pub fn main() -> ExitCode {
    let args: Args = arguments::parse();
    output::end("migrate", run(&args))
}

fn run(args: &Args) -> Result<(), ApiError> {
    let mut client = args.common.socket.connect()?;
    if args.explain {
        return explain(args, &mut client);
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
    let reports = match client.call(&request)? {
        Response::Migrated { reports } => reports,
        Response::Done => Vec::new(),
        other => return Err(unexpected(&other)),
    };
    if args.common.json {
        output::json(&reports);
    } else if args.no_wait {
        output::line(&format!("{} is asked to move to {}; see `mosps`", args.what, args.to));
    } else if reports.is_empty() {
        output::line(&format!("{} stays: it is where it should be", args.what));
    } else {
        let dry = if args.dry_run { "dry run: " } else { "" };
        reports.iter().for_each(|report| output::line(&format!("{dry}{}", in_words(report))));
    }
    match reports.iter().find_map(|report| report.error.as_deref().map(|why| (report, why))) {
        None => Ok(()),
        Some((report, why)) => {
            let what = format!("process {} was not moved to {}", report.pid, report.to);
            let next = "it runs on where it was; see `mosctl history`";
            Err(output::error(ErrorKind::Failed, &what, why, next))
        }
    }
}

fn explain(args: &Args, client: &mut Client) -> Result<(), ApiError> {
    let answer = client.call(&Request::Explain { what: args.what.clone(), to: args.to.clone() })?;
    let Response::Explain(found) = answer else { return Err(unexpected(&answer)) };
    if args.common.json {
        output::json(&found);
    } else {
        explained(&found).iter().for_each(|line| output::line(line));
    }
    if found.blockers.is_empty() {
        return Ok(());
    }
    let what = format!("process {} cannot move to {}", found.pid, found.to);
    let why = match found.blockers.len() {
        1 => "one thing blocks it, listed above".to_string(),
        n => format!("{n} things block it, listed above"),
    };
    let next = "close what is named, or wait until the process has; nothing was stopped";
    Err(output::error(ErrorKind::NotMigratable, &what, &why, next))
}

/// What `--explain` says, line by line.
pub fn explained(found: &Explanation) -> Vec<String> {
    let who = match found.pids.len() {
        0 | 1 => format!("process {}", found.pid),
        n => format!("process {} with its {} descendants", found.pid, n - 1),
    };
    let cost = format!(
        "{} to carry, {} in all, frozen for {}",
        quantity::bytes(found.predicted_bytes),
        quantity::millis(found.predicted_ms as f64),
        quantity::millis(found.predicted_freeze_ms as f64)
    );
    if found.blockers.is_empty() {
        return vec![format!("{who} can move to {}: predicted {cost}", found.to)];
    }
    let mut lines = vec![format!("{who} cannot move to {}:", found.to)];
    lines.extend(found.blockers.iter().map(|blocker| format!("  {:<10} {}", blocker.kind, blocker.what)));
    lines.push(format!("  without that: predicted {cost}"));
    lines
}

/// How much smaller it was on the wire.
pub fn ratio(report: &MigrationInfo) -> f64 {
    if report.wire_bytes == 0 { 1.0 } else { report.bytes as f64 / report.wire_bytes as f64 }
}

/// The one line of a move.
pub fn in_words(report: &MigrationInfo) -> String {
    let MigrationInfo { pid, from, to, pages, rounds, .. } = report;
    let others = match report.pids.iter().filter(|other| *other != pid).count() {
        0 => String::new(),
        n => format!(" and {n} of its subtree"),
    };
    if let Some(why) = &report.error {
        return format!("process {pid} {from} -> {to}: {}: {why}", report.phase);
    }
    if from == to {
        return format!("process {pid} is on {to} already");
    }
    format!(
        "process {pid}{others} {from} -> {to}: {} in {pages} pages, {rounds} round{}, total {}, frozen {}, ratio {:.1}",
        quantity::bytes(report.bytes),
        if *rounds == 1 { "" } else { "s" },
        quantity::millis(report.total_ms),
        quantity::millis(report.freeze_ms),
        ratio(report)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_has_all_figures() {
        let report = MigrationInfo {
            pid: 7,
            from: "a".into(),
            to: "b".into(),
            bytes: 3 << 20,
            wire_bytes: 1 << 20,
            pages: 768,
            rounds: 1,
            total_ms: 1250.0,
            freeze_ms: 45.5,
            ..MigrationInfo::default()
        };
        let wanted =
            "process 7 a -> b: 3.0 MiB in 768 pages, 1 round, total 1.25 s, frozen 45.5 ms, ratio 3.0";
        assert_eq!(in_words(&report), wanted);
        let tree = MigrationInfo { pids: vec![7, 8, 9], ..report.clone() };
        assert!(in_words(&tree).starts_with("process 7 and 2 of its subtree a -> b: "));
        let failed = MigrationInfo { error: Some("no".into()), phase: "failed".into(), ..report.clone() };
        assert_eq!(in_words(&failed), "process 7 a -> b: failed: no");
        let there = MigrationInfo { to: "a".into(), ..report };
        assert_eq!(in_words(&there), "process 7 is on a already");
    }
}
