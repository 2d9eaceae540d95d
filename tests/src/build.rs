//! The programs under test, built once for all test binaries of a run.

use nix::fcntl::{Flock, FlockArg};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The folder of the programs.
pub fn binaries() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(build)
}

/// One program.
pub fn program(name: &str) -> PathBuf {
    binaries().join(name)
}

fn build() -> PathBuf {
    let test = std::env::current_exe().expect("a test knows where it is");
    // target/PROFILE/deps/TEST
    let folder = test.ancestors().nth(2).expect("cargo puts tests into target/PROFILE/deps").to_path_buf();
    let lock = File::create(folder.join(".systest-build.lock")).expect("the target folder is writable");
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).expect("the build lock");
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // All targets: the same features, so that nothing is built again after `cargo test --workspace`.
    cargo.args(["build", "--workspace", "--all-targets", "--locked", "--quiet"]);
    if folder.ends_with("release") {
        cargo.arg("--release");
    }
    cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
    let status = cargo.status().expect("cargo can be run");
    assert!(status.success(), "the programs under test cannot be built");
    folder
}
