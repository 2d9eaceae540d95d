//! `migd`: the daemon, and (hidden) the shepherds it starts.
#![forbid(unsafe_code)]

use clap::{Parser, Subcommand};
use migd::shepherd::{guest_init, home, host};

#[derive(Parser)]
#[command(version, about = "The node daemon")]
struct Cli {
    #[command(subcommand)]
    command: Option<Role>,
}

#[derive(Subcommand)]
enum Role {
    /// One process' shepherd; started by the daemon.
    #[command(hide = true, subcommand)]
    Shepherd(Shepherd),
}

#[derive(Subcommand)]
enum Shepherd {
    /// At the home node.
    Home(home::HomeArgs),
    /// At the host node.
    Host(host::HostArgs),
    /// The guest's place.
    GuestInit,
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("MIGD_LOG").unwrap_or_else(|_| "info".into()),
        )
        .init();
    match cli.command {
        Some(Role::Shepherd(Shepherd::Home(args))) => home::main(args),
        Some(Role::Shepherd(Shepherd::Host(args))) => host::main(args),
        Some(Role::Shepherd(Shepherd::GuestInit)) => guest_init::main(),
        None => anyhow::bail!("the daemon is not here yet"),
    }
}
