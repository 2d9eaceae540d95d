//! `mosrun`: start a job that may migrate.
//!
//! It registers its own process with the daemon and execs the command: the job is the caller's child,
//! with everything a child inherits. The daemon sees the exec as the end of the connection.
//!
//! Nothing of mosrun is left in the job: no descriptor, no signal disposition or mask, no thread.

use crate::{output, quantity};
use clap::{CommandFactory, Parser};
use migd::api::{ApiError, ErrorKind, JobSpec, Request};
use migd::client::Client;
use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use std::ffi::{CString, OsString};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::process::ExitCode;
use std::time::{Duration, Instant};

mod later;

/// mosrun itself has failed.
const FAILED: u8 = 125;
const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;
/// A daemon that has not answered for so long will not.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// Start a job that may migrate. It starts here, and moves when the balancer finds that worth it
#[derive(Debug, Parser)]
#[command(
    name = "mosrun",
    version,
    disable_help_flag = true,
    trailing_var_arg = true,
    override_usage = "mosrun [OPTIONS] [--] COMMAND [ARG...]",
    after_help = "The exit status is the command's; 128+N if it dies of signal N; 125 if mosrun itself \
                  fails, 126 if the command cannot be executed, 127 if it is not found; 2 if the options \
                  are wrong."
)]
pub struct Args {
    /// Stay home for good; without a command: print this help
    #[arg(short = 'h', long)]
    home: bool,
    /// Print help
    #[arg(long, action = clap::ArgAction::Help)]
    help: Option<bool>,
    /// Start on the best node
    #[arg(short, long, conflicts_with_all = ["home", "on"])]
    best: bool,
    /// Start on this node
    #[arg(short = 'r', long, value_name = "NODE", conflicts_with = "home")]
    on: Option<String>,
    /// Run only on these nodes: names or numbers, and ranges of them
    #[arg(short = 'j', long, value_name = "N1,N2,N5-N7", value_delimiter = ',', conflicts_with = "home")]
    any_of: Vec<String>,
    /// If no daemon takes the job in, run the command plainly, and warn
    #[arg(short = 'F', long)]
    fallback: bool,
    /// Pin it where it starts
    #[arg(short = 'L', long, overrides_with = "unlock")]
    lock: bool,
    /// Let it move (the default)
    #[arg(short = 'l', long, overrides_with = "lock")]
    unlock: bool,
    /// Memory it will need, such as 512M or 2G
    #[arg(short, long, value_name = "SIZE", value_parser = quantity::size)]
    mem: Option<u64>,
    /// It computes
    #[arg(short, long, conflicts_with = "io_bound")]
    cpu_bound: bool,
    /// It mostly reads and writes: it stays home unless moved by hand
    #[arg(short, long)]
    io_bound: bool,
    /// The job's name; its processes answer to job:NAME
    #[arg(short = 'J', long, value_name = "NAME", value_parser = job_name)]
    job: Option<String>,
    /// Longest freeze the balancer may cause, such as 500ms
    #[arg(long, value_name = "DUR", value_parser = quantity::duration)]
    max_downtime: Option<Duration>,
    #[command(flatten)]
    socket: crate::arguments::Socket,
    #[command(flatten)]
    later: later::Later,
    /// The command and its arguments
    #[arg(value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// Such names as can be told from a number and typed without quotes.
fn job_name(text: &str) -> Result<String, String> {
    let fits = |c: char| c.is_alphanumeric() || "-_.+@%".contains(c);
    match text.chars().count() {
        1..=64 if text.chars().all(fits) && !text.chars().all(|c| c.is_ascii_digit()) => Ok(text.into()),
        _ => Err("a job's name is 1 to 64 letters, digits and -_.+@%, and not only digits".into()),
    }
}

/// The whole tool; returns only if the command could not be run.
pub fn main() -> ExitCode {
    let args: Args = crate::arguments::parse();
    if let Some(error) = args.later.refused() {
        return output::fail("mosrun", &error);
    }
    if args.command.is_empty() {
        if args.home {
            let _ = Args::command().print_help();
            return ExitCode::SUCCESS;
        }
        let next = "mosrun [OPTIONS] COMMAND [ARG...]; `mosrun --help` tells more";
        let error = output::error(ErrorKind::Usage, "nothing was started", "there is no command", next);
        return output::fail("mosrun", &error);
    }
    // Kept open until the exec closes it: that end is what the daemon waits for.
    let client = match register(&args) {
        Ok(client) => Some(client),
        Err(error) if args.fallback && matches!(error.kind, ErrorKind::Failed | ErrorKind::NodeDown) => {
            warn(&format!("running plainly, it will not migrate: {}: {}", error.what, error.why));
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

fn warn(text: &str) {
    // Not `eprintln`, which panics if standard error is full.
    let _ = writeln!(std::io::stderr().lock(), "mosrun: {}", output::clean(text));
}

fn register(args: &Args) -> Result<Client, ApiError> {
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
        command: args.command.iter().map(|word| word.to_string_lossy().into_owned()).collect(),
    };
    let mut client = args.socket.connect()?;
    let limit = TimeVal::milliseconds(ANSWER_WITHIN.as_millis() as i64);
    let _ = setsockopt(&client.as_fd(), sockopt::ReceiveTimeout, &limit);
    let _ = setsockopt(&client.as_fd(), sockopt::SendTimeout, &limit);
    let asked = Instant::now();
    match client.call(&Request::Register(spec)) {
        Ok(_) => Ok(client),
        Err(error) if asked.elapsed() >= ANSWER_WITHIN => {
            let why = format!("it has said nothing for {} s", ANSWER_WITHIN.as_secs());
            Err(ApiError { why, ..error })
        }
        Err(error) => Err(error),
    }
}

/// Runs the command in place of this program; gives an exit code if that fails.
fn exec(command: &[OsString]) -> u8 {
    let words: Result<Vec<CString>, _> = command.iter().map(|word| CString::new(word.as_bytes())).collect();
    let (Some(name), Ok(words)) = (command.first(), words) else {
        warn("an argument contains a NUL byte");
        return FAILED;
    };
    checkpoint::sys::stdio::close_again_at_exec();
    checkpoint::sys::sigpipe::restore();
    let errno = match words.first() {
        // execvp(3) takes an empty name for the current directory's.
        Some(first) if first.is_empty() => Errno::ENOENT,
        Some(first) => match nix::unistd::execvp(first, &words) {
            Err(errno) => errno,
        },
        None => Errno::ENOENT,
    };
    // The message to a closed pipe must not change the exit code.
    checkpoint::sys::sigpipe::ignore();
    let (code, next) = match errno {
        Errno::ENOENT => (NOT_FOUND, "check its name, and PATH"),
        Errno::EACCES => (NOT_EXECUTABLE, "check its permissions: `chmod +x`"),
        _ => (NOT_EXECUTABLE, "run it without mosrun to see whether it is mosrun's doing"),
    };
    let what = format!("cannot run {}", name.to_string_lossy());
    output::fail("mosrun", &output::error(ErrorKind::Failed, &what, errno.desc(), next));
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Result<Args, clap::Error> {
        Args::try_parse_from(line.split(' '))
    }

    #[test]
    fn options_end_where_the_command_begins() {
        let args = words("mosrun -b -m 2G -J x grep -h -- --json -L").expect("parses");
        assert!(args.best && !args.home && !args.lock);
        assert_eq!((args.mem, args.job.as_deref()), (Some(2 << 30), Some("x")));
        assert_eq!(args.command, ["grep", "-h", "--", "--json", "-L"]);
        let args = words("mosrun -- -odd -h").expect("parses");
        assert_eq!(args.command, ["-odd", "-h"]);
        let args = words("mosrun -hF ls").expect("parses");
        assert!(args.home && args.fallback);
        let args = words("mosrun -j n1,n2,n5-n7 -r3 ls").expect("parses");
        assert_eq!((args.any_of.len(), args.on.as_deref()), (3, Some("3")));
        assert!(words("mosrun -Ll ls").is_ok_and(|args| args.unlock && !args.lock), "the last word counts");
    }

    #[test]
    fn what_is_wrong_is_not_run() {
        for line in [
            "mosrun --bogus ls",
            "mosrun -x ls",
            "mosrun -b -r n1 ls",
            "mosrun -h -b ls",
            "mosrun -m much ls",
            "mosrun -J 12 ls",
            "mosrun --max-downtime soon ls",
        ] {
            assert!(words(line).is_err(), "{line}");
        }
    }

    #[test]
    fn what_does_not_work_yet_is_refused_and_not_in_the_help() {
        for line in ["mosrun -A 10m ls", "mosrun -N 3 ls", "mosrun -C /x ls", "mosrun -R /x", "mosrun -I /x"]
            .into_iter()
            .chain(["mosrun --spread ls", "mosrun --restart never ls"])
        {
            let error = words(line).expect("parses").later.refused().expect("refused");
            assert!(error.why.contains("not in this version"), "{line}");
            assert_eq!(error.kind.exit_code(), 2);
        }
        assert!(words("mosrun ls").expect("parses").later.refused().is_none());
        let help = Args::command().render_help().to_string();
        assert!(!help.contains("checkpoint") && !help.contains("--restore"), "{help}");
    }
}
