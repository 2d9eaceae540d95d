//! How long a program takes from its start to its end, as its parent sees it.

use anyhow::{Context, Result, bail};
use std::process::{Command, Stdio};
use std::time::Instant;

/// Starts that are timed; the first ones warm the caches.
const STARTS: usize = 40;
const WARM_UP: usize = 5;

/// `moslab __start-time COMMAND…`
#[derive(Debug, clap::Args)]
pub struct StartTime {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    command: Vec<String>,
}

/// Prints the median of many starts, milliseconds.
pub fn start_time(arguments: &StartTime) -> Result<u8> {
    let (program, rest) = arguments.command.split_first().context("no command")?;
    let mut times = Vec::with_capacity(STARTS);
    for run in 0..WARM_UP + STARTS {
        let started = Instant::now();
        let status = Command::new(program).args(rest).stdin(Stdio::null()).status()?;
        if !status.success() {
            bail!("it ended with {status}");
        }
        if run >= WARM_UP {
            times.push(started.elapsed().as_secs_f64() * 1e3);
        }
    }
    times.sort_by(f64::total_cmp);
    println!("{}", times[times.len() / 2]);
    Ok(0)
}
