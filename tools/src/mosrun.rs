//! `mosrun`: start a job that may migrate.
//!
//! It registers its own process with the daemon and execs the command: the job is the caller's child,
//! with everything a child inherits. The daemon sees the exec as the end of the connection.

use crate::output;
use clap::Parser;
use migd::api::{JobSpec, Request};
use migd::client::Client;
use nix::errno::Errno;
use std::ffi::CString;
use std::path::PathBuf;
use std::process::ExitCode;

/// mosrun itself has failed.
const FAILED: u8 = 125;
const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;

/// Start a job that may migrate. It runs here until the balancer finds a better place.
#[derive(Debug, Parser)]
#[command(name = "mosrun", version, disable_help_flag = true, trailing_var_arg = true)]
pub struct Args {
    /// With a command: it stays home. Alone: this help.
    #[arg(short = 'h', long)]
    home: bool,
    /// Print help.
    #[arg(long, action = clap::ArgAction::Help)]
    help: Option<bool>,
    /// Start on the best node.
    #[arg(short, long, conflicts_with_all = ["home", "on"])]
    best: bool,
    /// Start on this node.
    #[arg(short = 'r', long, value_name = "NODE", conflicts_with = "home")]
    on: Option<String>,
    /// Only on these nodes: names or numbers, ranges as N5-N7.
    #[arg(short = 'j', long, value_name = "N1,N2,N5-N7", value_delimiter = ',')]
    any_of: Vec<String>,
    /// Without a daemon, run the command plainly.
    #[arg(short = 'F', long)]
    fallback: bool,
    /// Pin it where it starts.
    #[arg(short = 'L', long, conflicts_with = "unlock")]
    lock: bool,
    /// Let it move (the default).
    #[arg(short = 'l', long)]
    unlock: bool,
    /// Memory it will need.
    #[arg(short, long, value_name = "SIZE", value_parser = output::size)]
    mem: Option<u64>,
    /// It computes.
    #[arg(short, long, conflicts_with = "io_bound")]
    cpu_bound: bool,
    /// It mostly reads and writes: stays unless moved by hand.
    #[arg(short, long)]
    io_bound: bool,
    /// The job's name.
    #[arg(short = 'J', long, value_name = "NAME")]
    job: Option<String>,
    /// Longest freeze the balancer may cause.
    #[arg(long, value_name = "DUR", value_parser = output::duration)]
    max_downtime: Option<std::time::Duration>,
    /// The daemon's socket.
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// The command and its arguments.
    #[arg(allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// The whole tool; returns only if the command could not be run.
pub fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { FAILED } else { 0 });
        }
    };
    if args.command.is_empty() {
        let _ = <Args as clap::CommandFactory>::command().print_help();
        return ExitCode::from(if args.home { 0 } else { FAILED });
    }
    // Kept open over the exec attempt: it is close-on-exec.
    let client = match register(&args) {
        Ok(client) => Some(client),
        Err(error) if args.fallback => {
            eprintln!("mosrun: running plainly, it will not migrate: {}", error.why);
            None
        }
        Err(error) => {
            output::fail("mosrun", &error);
            return ExitCode::from(FAILED);
        }
    };
    let code = exec(&args.command);
    drop(client);
    ExitCode::from(code)
}

fn register(args: &Args) -> Result<Client, migd::api::ApiError> {
    let spec = JobSpec {
        name: args.job.clone(),
        start_on: if args.best { Some("best".into()) } else { args.on.clone() },
        any_of: args.any_of.clone(),
        locked: args.lock,
        mem_bytes: args.mem,
        cpu_bound: args.cpu_bound,
        io_bound: args.io_bound,
        home: args.home,
        max_downtime_ms: args.max_downtime.map(|limit| limit.as_millis() as u64),
        command: args.command.clone(),
    };
    let mut client = Client::connect(args.socket.as_deref())?;
    client.call(&Request::Register(spec))?;
    Ok(client)
}

/// Runs the command in place of this program; gives an exit code if that fails.
fn exec(command: &[String]) -> u8 {
    let words: Result<Vec<CString>, _> = command.iter().map(|word| CString::new(word.as_str())).collect();
    let Ok(words) = words else {
        eprintln!("mosrun: an argument contains a NUL byte");
        return FAILED;
    };
    checkpoint::sys::sigpipe::restore();
    let Err(errno) = nix::unistd::execvp(&words[0], &words);
    eprintln!("mosrun: cannot run {}: {}", command[0], errno.desc());
    match errno {
        Errno::ENOENT => NOT_FOUND,
        _ => NOT_EXECUTABLE,
    }
}
