//! What a guest sees under `/`: home's tree through FUSE, and over it a `/dev` and a `/proc` of the
//! house's own.
//!
//! The FUSE mount is made by a process of the *shepherd's* PID namespace: the kernel numbers the
//! threads in FUSE requests as that namespace does (`fuse_conn_init`, fs/fuse/inode.c), and the
//! shepherd has to know them. The rest is done by the house's PID 1, as `/proc` belongs to its PID
//! namespace.
//!
//! Not there: `/dev/ptmx` and devices other than the few that are the same everywhere.

use super::protocol::Setup;
use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use std::ffi::OsStr;
use std::fs;
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::{Component, Path, PathBuf};

/// Directories of any Linux system that may be hidden in our own mount namespace to build in.
const STAGES: [&str; 4] = ["/mnt", "/tmp", "/run", "/var"];
/// Devices that are the same on every node: name, major, minor (Documentation/admin-guide/devices.txt).
const DEVICES: [(&str, u64, u64); 5] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9)];
/// Files of `/proc` through which root could reach the whole host: hidden.
const HIDDEN: [&str; 7] = ["kcore", "keys", "key-users", "kmsg", "kpagecount", "kpageflags", "timer_list"];
/// Parts of `/proc` that are made read-only.
const READ_ONLY: [&str; 6] = ["sys", "sysrq-trigger", "irq", "bus", "fs", "acpi"];

/// Where the house is built before it is entered.
#[derive(Debug, Clone)]
pub struct Stage {
    root: PathBuf,
    dev: PathBuf,
}

const NONE: Option<&str> = None;

/// Mounts home's tree in this process' own mount namespace.
pub fn prepare(device: BorrowedFd<'_>) -> Result<Stage> {
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)
        .context("cannot make the mounts private")?;
    let at = STAGES.iter().map(Path::new).find(|path| path.is_dir());
    let at = at.context("none of /mnt, /tmp, /run and /var is a directory")?;
    tmpfs(at, "size=64k,mode=700")?;
    let stage = Stage { root: at.join("root"), dev: at.join("dev") };
    fs::create_dir(&stage.root).context("cannot make the root's directory")?;
    fs::create_dir(&stage.dev).context("cannot make the devices' directory")?;
    mount_home(device, &stage.root)?;
    Ok(stage)
}

/// Puts `/dev` and `/proc` into home's tree and makes it this process' root; nothing of the host's
/// own tree is left. For PID 1 of the house.
pub fn enter(stage: &Stage, setup: &Setup) -> Result<()> {
    fill_dev(stage, setup)?;
    mount(Some(&stage.dev), &stage.root.join("dev"), NONE, MsFlags::MS_MOVE, NONE)
        .context("cannot put /dev into home's tree")?;
    let proc = stage.root.join("proc");
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), &proc, Some("proc"), flags, NONE).context("cannot mount /proc in home's tree")?;
    number_threads(&proc, setup)?;
    close_proc(&proc, &stage.root.join("dev/null"))?;
    std::env::set_current_dir(&stage.root).context("cannot enter home's tree")?;
    // With both the same the old root ends up on top of the new one (pivot_root(2)).
    nix::unistd::pivot_root(".", ".").context("cannot make home's tree the root")?;
    umount2(".", MntFlags::MNT_DETACH).context("cannot let go of the host's tree")?;
    std::env::set_current_dir("/").context("cannot enter the new root")?;
    Ok(())
}

/// The options are those of `homefs::HostView::mount`, which serves the other end of `device`.
fn mount_home(device: BorrowedFd<'_>, at: &Path) -> Result<()> {
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("migd"), at, Some("fuse.migd"), flags, Some(options.as_str()))
        .context("cannot mount home's file system")
}

fn tmpfs(at: &Path, options: &str) -> Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount(Some("migd"), at, Some("tmpfs"), flags, Some(options))
        .with_context(|| format!("cannot mount a tmpfs on {}", at.display()))
}

fn bind(from: &Path, to: &Path) -> Result<()> {
    mount(Some(from), to, NONE, MsFlags::MS_BIND, NONE)
        .with_context(|| format!("cannot bind {} to {}", from.display(), to.display()))
}

fn fill_dev(stage: &Stage, setup: &Setup) -> Result<()> {
    let dev = &stage.dev;
    tmpfs(dev, "size=256k,mode=755")?;
    for (name, major, minor) in DEVICES {
        device(&dev.join(name), major, minor)?;
    }
    for (name, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ] {
        symlink(target, dev.join(name)).with_context(|| format!("cannot make /dev/{name}"))?;
    }
    let shm = stage.root.join("dev/shm");
    if shm.is_dir() {
        fs::create_dir(dev.join("shm")).context("cannot make /dev/shm")?;
        bind(&shm, &dev.join("shm"))?;
    }
    match &setup.terminal {
        Some((path, handle)) => bind_terminal(stage, path, &setup.handle_path(*handle)),
        // Without a controlling terminal opening it must say ENXIO, as at home.
        None => device(&dev.join("tty"), 5, 0),
    }
}

fn device(at: &Path, major: u64, minor: u64) -> Result<()> {
    mknod(at, SFlag::S_IFCHR, Mode::empty(), makedev(major, minor))
        .and_then(|()| {
            nix::sys::stat::fchmodat(
                nix::fcntl::AT_FDCWD,
                at,
                Mode::from_bits_retain(0o666),
                nix::sys::stat::FchmodatFlags::FollowSymlink,
            )
        })
        .with_context(|| format!("cannot make the device {}", at.display()))
}

/// Home's terminal under its own name and as `/dev/tty`.
fn bind_terminal(stage: &Stage, path: &[u8], source: &Path) -> Result<()> {
    let source = stage.root.join(source.strip_prefix("/").unwrap_or(source));
    let mut places = vec![stage.dev.join("tty")];
    places.extend(inside_dev(path).filter(|name| name != Path::new("tty")).map(|name| stage.dev.join(name)));
    for place in places {
        if let Some(parent) = place.parent() {
            fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
        }
        fs::File::create(&place).with_context(|| format!("cannot make {}", place.display()))?;
        bind(&source, &place)?;
    }
    Ok(())
}

/// The part after `/dev/` of a plain path below `/dev`.
fn inside_dev(path: &[u8]) -> Option<PathBuf> {
    let rest = Path::new(OsStr::from_bytes(path)).strip_prefix("/dev").ok()?;
    let plain = rest.components().all(|part| matches!(part, Component::Normal(_)));
    (plain && rest.components().next().is_some()).then(|| rest.to_path_buf())
}

/// Lets TIDs made by the guest itself come from a range that home does not use.
fn number_threads(proc: &Path, setup: &Setup) -> Result<()> {
    let limit = proc.join("sys/kernel/pid_max");
    // Before 6.14 the limit is one for the whole machine and cannot be written from here.
    if fs::write(&limit, setup.pid_max.to_string()).is_err() {
        let text = fs::read_to_string(&limit).context("cannot read pid_max")?;
        let got: i32 = text.trim().parse().context("pid_max is not a number")?;
        if got <= setup.tid_base {
            bail!(
                "this kernel's largest PID ({got}) leaves no numbers for the guest's new threads (from {} on); \
                 raise kernel.pid_max on this node",
                setup.tid_base
            );
        }
    }
    let next = proc.join("sys/kernel/ns_last_pid");
    fs::write(&next, setup.tid_base.to_string())
        .with_context(|| format!("cannot set {} (CONFIG_CHECKPOINT_RESTORE)", next.display()))
}

fn close_proc(proc: &Path, null: &Path) -> Result<()> {
    for name in READ_ONLY {
        let path = proc.join(name);
        if !exists(&path)? {
            continue;
        }
        bind(&path, &path)?;
        let flags = MsFlags::MS_BIND
            | MsFlags::MS_REMOUNT
            | MsFlags::MS_RDONLY
            | MsFlags::MS_NOSUID
            | MsFlags::MS_NODEV
            | MsFlags::MS_NOEXEC;
        mount(NONE, &path, NONE, flags, NONE)
            .with_context(|| format!("cannot make {} read-only", path.display()))?;
    }
    for name in HIDDEN {
        let path = proc.join(name);
        if exists(&path)? {
            bind(null, &path)?;
        }
    }
    Ok(())
}

fn exists(path: &Path) -> Result<bool> {
    match fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).with_context(|| format!("cannot look at {}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_names_below_dev_are_made() {
        assert_eq!(inside_dev(b"/dev/pts/3"), Some(PathBuf::from("pts/3")));
        for bad in [&b"/dev/../etc/passwd"[..], b"/dev", b"/dev/", b"/tmp/x", b"dev/pts/3", b""] {
            assert_eq!(inside_dev(bad), None);
        }
    }
}
