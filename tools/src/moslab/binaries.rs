//! Where the commands are, and building them when cargo runs us from their source.

use super::place::INSIDE;
use anyhow::{Context, Result, bail};
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

/// This very program, also if its file has been replaced since, or is not visible where we are.
pub fn own_program() -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg0("moslab");
    command
}

/// The folder of the commands: where this one is. Under `cargo run`, which builds one program only,
/// the others are built first.
pub fn folder() -> Result<PathBuf> {
    let own = fs::read_link("/proc/self/exe").context("/proc does not show where this program is")?;
    let folder = own.parent().context("this program is in no folder")?.to_path_buf();
    if folder.starts_with(INSIDE) {
        bail!("this is a node of a lab already; labs do not nest");
    }
    if let Some(cargo) = std::env::var_os("CARGO") {
        let mut build = Command::new(cargo);
        build.args(["build", "--workspace", "--bins", "--locked"]);
        if folder.ends_with("release") {
            build.arg("--release");
        }
        build.current_dir(env!("CARGO_MANIFEST_DIR"));
        let status = build.status().context("cargo cannot be run to build the other commands")?;
        if !status.success() {
            bail!("building the other commands failed; cargo has said why");
        }
    }
    if !folder.join("migd").exists() {
        bail!(
            "migd is not beside {}; build everything first: `cargo build --release --workspace --bins`",
            own.display()
        );
    }
    Ok(folder)
}
