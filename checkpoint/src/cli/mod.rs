//! The commands of `migckpt`: a thin shell around the engine, one file a verb.
//!
//! What is carried is decided by [`crate::inventory`] with [`Rules::Standalone`](crate::inventory::Rules):
//! an image must stand on its own. Exit codes are those of all tools: 0 done, 1 failed, 2 usage,
//! 3 not permitted, 4 not migratable.

mod dump;
mod inspect;
mod interrupt;
mod place;
mod recover;
mod restore;
mod verify;
mod view;

use clap::{Parser, Subcommand};
use std::fmt::{self, Write as _};
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

/// Save a running process into an image, bring it back, and look at images.
#[derive(Debug, Parser)]
#[command(name = "migckpt", version, arg_required_else_help = true, subcommand_required = true)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Save a process; ends it unless told to leave it
    Dump(dump::DumpArguments),
    /// Bring a saved process back and wait for it
    Restore(restore::RestoreArguments),
    /// Let a process go that stands still because a migckpt that was saving it was killed
    Recover(recover::RecoverArguments),
    /// Show what an image holds, or what a live process has and why it could not be saved
    Inspect(inspect::InspectArguments),
    /// Read an image to its end and check every frame of it
    Verify(verify::VerifyArguments),
}

/// Runs the command line; gives the exit status.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match arguments.verb {
        Verb::Dump(arguments) => dump::run(&arguments).map(|()| ExitCode::SUCCESS),
        Verb::Restore(arguments) => restore::run(&arguments),
        Verb::Recover(arguments) => recover::run(&arguments).map(|()| ExitCode::SUCCESS),
        Verb::Inspect(arguments) => inspect::run(&arguments).map(|()| ExitCode::SUCCESS),
        Verb::Verify(arguments) => verify::run(&arguments).map(|()| ExitCode::SUCCESS),
    };
    match result {
        Ok(status) => status,
        Err(failure) => {
            let _ = write!(std::io::stderr().lock(), "{failure}");
            ExitCode::from(failure.exit)
        }
    }
}

/// A failure in the three parts a user needs.
#[derive(Debug)]
struct Failure {
    exit: u8,
    what: String,
    why: Vec<String>,
    next: String,
}

/// Failed.
const FAILED: u8 = 1;
/// Wrong usage.
const USAGE: u8 = 2;
/// Not permitted.
const REFUSED: u8 = 3;
/// Not migratable.
const NOT_MIGRATABLE: u8 = 4;
/// Ended by the user (128 + SIGINT, as shells have it).
const INTERRUPTED: u8 = 130;

impl Failure {
    fn new(exit: u8, what: impl Into<String>, why: impl fmt::Display, next: impl Into<String>) -> Failure {
        Failure { exit, what: what.into(), why: vec![why.to_string()], next: next.into() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(out, "migckpt: {}", self.what)?;
        for why in &self.why {
            writeln!(out, "  why:  {}", printable(why))?;
        }
        writeln!(out, "  next: {}", self.next)
    }
}

/// Control characters of a file's name must not reach the terminal.
fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for letter in text.chars() {
        if letter.is_control() {
            let _ = write!(out, "{}", letter.escape_default());
        } else {
            out.push(letter);
        }
    }
    out
}

/// Where an image is: a directory, or the standard streams.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Location {
    Stream,
    Directory(PathBuf),
}

impl Location {
    fn of(text: &std::path::Path) -> Location {
        match text.as_os_str() == "-" {
            true => Location::Stream,
            false => Location::Directory(text.to_path_buf()),
        }
    }

    fn name(&self) -> String {
        match self {
            Location::Stream => "the standard input".into(),
            Location::Directory(path) => path.display().to_string(),
        }
    }
}

/// Prints a line on stdout; a closed pipe is the reader's choice.
fn line(text: &str) {
    let _ = writeln!(std::io::stdout().lock(), "{}", printable(text));
}

/// Prints one JSON document on stdout.
fn json(value: &impl serde::Serialize) {
    if let Ok(text) = serde_json::to_string(value) {
        let _ = writeln!(std::io::stdout().lock(), "{text}");
    }
}

/// Bytes in words.
fn bytes(n: u64) -> String {
    let units = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
    match units.iter().find(|(_, shift)| n >> shift > 0) {
        Some((unit, shift)) => format!("{:.1} {unit}", n as f64 / (1u64 << shift) as f64),
        None => format!("{n} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn a_failure_has_three_parts_and_no_control_characters() {
        let failure = Failure::new(FAILED, "cannot", "the file \u{1b}[2J", "try again");
        let text = failure.to_string();
        assert_eq!(text, "migckpt: cannot\n  why:  the file \\u{1b}[2J\n  next: try again\n");
    }
}
