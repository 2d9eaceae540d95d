//! `migckpt recover`: a process whose tracer was killed while it was frozen.

use super::{FAILED, Failure, NOT_MIGRATABLE, REFUSED, line};
use crate::tracee::{Recovered, TraceeError, recover};
use nix::errno::Errno;

#[derive(Debug, clap::Args)]
pub struct RecoverArguments {
    /// The process
    #[arg(value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pid: i32,
}

pub fn run(arguments: &RecoverArguments) -> Result<(), Failure> {
    let pid = arguments.pid;
    let what = format!("process {pid} was not let go");
    match recover(pid) {
        Ok(Recovered::Thawed) => line(&format!("process {pid} goes on where it was")),
        Ok(Recovered::Untouched) => line(&format!("process {pid} needs nothing")),
        Ok(Recovered::Parked) => {
            let why = "it stands for a guest that runs on another node";
            return Err(Failure::new(NOT_MIGRATABLE, what, why, "bring it home: migrate PID home"));
        }
        Err(error) => {
            let (exit, next) = match &error {
                TraceeError::Died { .. } => (FAILED, "ps lists the processes there are"),
                TraceeError::Kernel { errno: Errno::EPERM | Errno::EACCES, .. } => {
                    (REFUSED, "become the superuser")
                }
                TraceeError::Traced { .. } => (FAILED, "it is being saved, or debugged: wait for that"),
                _ => (FAILED, "try again"),
            };
            return Err(Failure::new(exit, what, error, next));
        }
    }
    Ok(())
}
