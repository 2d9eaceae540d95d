//! `migd`: the daemon, and (hidden) the shepherds it starts.
#![forbid(unsafe_code)]

use clap::{Parser, Subcommand};
use migd::config::Settings;
use migd::shepherd::{guest_init, home, host};
use std::path::PathBuf;
use std::process::ExitCode;

/// The node daemon: membership, load, migrations
#[derive(Parser)]
#[command(version, disable_version_flag = true, args_conflicts_with_subcommands = true)]
struct Cli {
    /// Settings file (default /etc/migd/migd.toml, if there is one)
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Stay in the foreground, which it always does: for the sake of unit files
    #[arg(long)]
    foreground: bool,
    #[command(flatten)]
    settings: Settings,
    /// Print the version
    #[arg(short = 'V', long, action = clap::ArgAction::Version)]
    version: Option<bool>,
    #[command(subcommand)]
    command: Option<Role>,
}

#[derive(Subcommand)]
enum Role {
    /// One process' shepherd; started by the daemon
    #[command(hide = true, subcommand)]
    Shepherd(Shepherd),
}

#[derive(Subcommand)]
enum Shepherd {
    /// At the home node
    Home(home::HomeArgs),
    /// At the host node
    Host(host::HostArgs),
    /// The guest's place
    GuestInit,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("MIGD_LOG").unwrap_or_else(|_| "info".into()),
        )
        .init();
    migd::priority::raise();
    let result = match cli.command {
        None => migd::daemon::main(cli.settings, cli.config),
        Some(Role::Shepherd(Shepherd::GuestInit)) => guest_init::main(),
        Some(Role::Shepherd(Shepherd::Home(args))) => own_session().and_then(|()| home::main(args)),
        Some(Role::Shepherd(Shepherd::Host(args))) => own_session().and_then(|()| host::main(args)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("migd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Signals to the daemon's process group, such as a terminal's, are not a shepherd's business.
fn own_session() -> anyhow::Result<()> {
    nix::unistd::setsid()?;
    Ok(())
}
