//! The command line as every tool takes it: where the daemon is, `--json`, and what is said about a
//! command line that was not understood.

use clap::Parser;
use clap::error::ErrorKind as ClapError;
use migd::api::{ApiError, ErrorKind};
use migd::client::Client;
use std::path::PathBuf;

/// How to reach the daemon, and how to print.
#[derive(Debug, Clone, clap::Args)]
pub struct Common {
    /// Print JSON
    #[arg(long, global = true)]
    pub json: bool,
    #[command(flatten)]
    pub socket: Socket,
}

/// How to reach the daemon.
#[derive(Debug, Clone, clap::Args)]
pub struct Socket {
    /// The daemon's socket [default: $MIGD_SOCKET, else /run/migd/migd.sock]
    #[arg(long, value_name = "PATH", global = true)]
    pub socket: Option<PathBuf>,
}

impl Socket {
    /// Connects to it.
    pub fn connect(&self) -> Result<Client, ApiError> {
        Client::connect(self.socket.as_deref())
    }
}

/// The arguments; or ends the program with the help, the version, or exit 2 and why.
pub fn parse<A: Parser>() -> A {
    let error = match A::try_parse() {
        Ok(args) => return args,
        Err(error) => error,
    };
    let tool = A::command().get_name().to_string();
    match error.kind() {
        ClapError::DisplayHelp | ClapError::DisplayVersion => {
            // `print` is clap's own way to honour NO_COLOR and terminals.
            let code = i32::from(error.print().is_err());
            std::process::exit(code)
        }
        _ => {
            crate::output::fail(&tool, &misunderstood(&tool, &error.to_string()));
            std::process::exit(ErrorKind::Usage.exit_code())
        }
    }
}

/// clap's message in our three parts.
fn misunderstood(tool: &str, message: &str) -> ApiError {
    let mut lines = message.lines().map(str::trim).filter(|line| !line.is_empty());
    let first = lines.next().unwrap_or_default();
    let mut why = first.strip_prefix("error: ").unwrap_or(first).to_string();
    let mut usage = None;
    for line in lines {
        if let Some(found) = line.strip_prefix("Usage: ") {
            usage = Some(found.to_string());
        } else if usage.is_none() && !line.starts_with("For more information") {
            why.push(' ');
            why.push_str(line);
        }
    }
    let next = match usage {
        Some(usage) => format!("usage: {usage}; `{tool} --help` tells more"),
        None => format!("`{tool} --help` tells what can be said"),
    };
    crate::output::error(ErrorKind::Usage, "the command line was not understood", &why, &next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Parser)]
    #[command(name = "probe")]
    struct Probe {
        #[command(flatten)]
        _common: Common,
        _what: String,
    }

    #[test]
    fn what_clap_says_becomes_three_parts() {
        for words in [&["probe"][..], &["probe", "--jsno", "x"], &["probe", "a", "b"]] {
            let message = Probe::try_parse_from(words).expect_err("wrong").to_string();
            let error = misunderstood("probe", &message);
            assert!(!error.why.is_empty() && !error.why.starts_with("error:"), "{error:?}");
            assert!(error.next.contains("usage: probe"), "{error:?}");
            assert_eq!(error.kind.exit_code(), 2);
        }
    }
}
