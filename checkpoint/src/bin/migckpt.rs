//! `migckpt`: the checkpoint engine on its own, without a daemon.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    checkpoint::cli::main()
}
