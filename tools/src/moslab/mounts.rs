//! What a node sees of the machine's files: all as they are, but its own `/tmp`, `/home`, `/srv`,
//! `/run`, `/dev/shm` and `/proc`, its own names (`/etc/hosts`, `/etc/hostname`), and its own
//! daemon's folders.
//!
//! Everything here happens in the node's mount namespace and ends with it. Mount points that do not
//! exist on the machine are not made: the daemon's folders are under [`INSIDE`] in any case, and
//! cover `/etc/migd` and `/var/lib/migd` only where a real installation has them.

use super::node::NodeConfig;
use super::place::INSIDE;
use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Folders that are a node's own, and their modes.
pub const PRIVATE: [(&str, u32); 3] = [("tmp", 0o1777), ("home", 0o755), ("srv", 0o755)];
/// The commands a node has on its PATH, where they are built.
const COMMANDS: [&str; 9] =
    ["migd", "mosrun", "migrate", "mosps", "mosctl", "mosmon", "moslab", "migckpt", "victim"];

const NONE: Option<&str> = None;

/// Builds the node's view. To be called as PID 1 of the node, in its own mount namespace.
pub fn build(config: &NodeConfig) -> Result<()> {
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)
        .context("the node's mounts cannot be made private")?;
    let stage = config.dir.join("stage");
    stage_run(config, &stage)?;
    for (name, _) in PRIVATE {
        bind(&config.dir.join(name), &Path::new("/").join(name))?;
    }
    bind_if_there(&config.dir.join("state"), Path::new("/var/lib/migd"))?;
    bind_if_there(&config.dir.join("etc"), Path::new("/etc/migd"))?;
    for file in ["hostname", "hosts", "passwd", "group"] {
        bind_if_there(&config.dir.join("names").join(file), &Path::new("/etc").join(file))?;
    }
    tmpfs(Path::new("/dev/shm"), "mode=1777").or_else(if_missing("/dev/shm"))?;
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), NONE)
        .context("the node's own /proc cannot be mounted (is this a container without that right?)")?;
    mount(Some(&stage), "/run", NONE, MsFlags::MS_MOVE, NONE)
        .context("the node's /run cannot be put in place")
}

/// The node's `/run`, built aside because its sources may lie under what will be covered.
fn stage_run(config: &NodeConfig, stage: &Path) -> Result<()> {
    fs::create_dir_all(stage)?;
    tmpfs(stage, "mode=755")?;
    for (folder, mode) in [("lock", 0o1777), ("migd", 0o755), ("user", 0o755)] {
        make_dir(&stage.join(folder), mode)?;
    }
    let own = stage.join(INSIDE.trim_start_matches("/run/"));
    for folder in ["bin", "state", "etc"] {
        make_dir(&own.join(folder), 0o755)?;
    }
    bind(&config.dir.join("state"), &own.join("state"))?;
    bind(&config.dir.join("etc"), &own.join("etc"))?;
    for command in COMMANDS {
        let (built, seen) = (config.binaries.join(command), own.join("bin").join(command));
        if built.exists() {
            fs::write(&seen, b"")?;
            bind(&built, &seen)?;
        }
    }
    Ok(())
}

/// The node's folders on disk; they outlive a restart of the node.
pub fn make_folders(dir: &Path) -> Result<()> {
    make_dir(dir, 0o700)?;
    for (name, mode) in PRIVATE {
        make_dir(&dir.join(name), mode)?;
    }
    make_dir(&dir.join("state"), 0o700)?;
    make_dir(&dir.join("etc"), 0o755)?;
    make_dir(&dir.join("names"), 0o755)
}

fn make_dir(path: &Path, mode: u32) -> Result<()> {
    fs::create_dir_all(path)
        .and_then(|()| fs::set_permissions(path, Permissions::from_mode(mode)))
        .with_context(|| format!("{} cannot be made", path.display()))
}

fn bind(from: &Path, to: &Path) -> Result<()> {
    mount(Some(from), to, NONE, MsFlags::MS_BIND, NONE)
        .with_context(|| format!("{} cannot be mounted on {} (does it exist?)", from.display(), to.display()))
}

fn bind_if_there(from: &Path, to: &Path) -> Result<()> {
    if from.exists() && to.exists() { bind(from, to) } else { Ok(()) }
}

fn tmpfs(to: &Path, options: &str) -> Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("tmpfs"), to, Some("tmpfs"), flags, Some(options))
        .with_context(|| format!("a tmpfs cannot be mounted on {}", to.display()))
}

fn if_missing(path: &'static str) -> impl FnOnce(anyhow::Error) -> Result<()> {
    move |error| if Path::new(path).exists() { Err(error) } else { Ok(()) }
}
