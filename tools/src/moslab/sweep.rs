//! Removing what a lab has left, with or without its keeper's help.

use super::cgroup::{self, CpuController};
use super::identity::ProcessId;
use super::place::{self, Place};
use super::state::LabState;
use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill as send};
use nix::unistd::Pid;
use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a killed process may take to be gone.
const DEATH_PATIENCE: Duration = Duration::from_secs(10);

/// Kills a process if it still is that one, and waits until it is gone.
pub fn kill(process: ProcessId) {
    let until = Instant::now() + DEATH_PATIENCE;
    if !process.alive() {
        return;
    }
    // It may end by itself in between.
    let _ = send(Pid::from_raw(process.pid), Signal::SIGKILL);
    while process.alive() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Ends what is left of a lab whose keeper is gone, or does not answer.
pub fn sweep(place: &Place) -> Result<()> {
    let state = LabState::load(place).unwrap_or_default();
    let mut groups = Vec::new();
    if let Some(state) = &state {
        kill(state.keeper);
        state.nodes.iter().filter_map(|node| node.init).for_each(kill);
        groups.extend(state.cgroups.iter().cloned());
    }
    // Made before the state said so, or the state is lost.
    groups.extend(CpuController::find().map(|cpu| cpu.lab_dir(place.name())));
    for group in groups.iter().filter(|group| group.exists()) {
        for pid in cgroup::members(group) {
            ProcessId::of(pid).into_iter().for_each(kill);
        }
        cgroup::remove(group)?;
    }
    remove_files(place)
}

/// Removes the lab's folders.
pub fn remove_files(place: &Place) -> Result<()> {
    remove_tree(&place.files_dir())?;
    remove_tree(&place.run_dir())
}

fn remove_tree(dir: &Path) -> Result<()> {
    detach_mounts(dir)?;
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("{} cannot be removed", dir.display()))
        }
        _ => Ok(()),
    }
}

/// A lab mounts nothing outside its nodes. Should something be mounted under its folders all the
/// same, removing them would reach through into whatever that is: no file is touched before it is off.
fn detach_mounts(dir: &Path) -> Result<()> {
    for mount_point in mounts_under(dir)? {
        umount2(&mount_point, MntFlags::MNT_DETACH)
            .with_context(|| format!("{} is a mount and cannot be detached", mount_point.display()))?;
    }
    if let Some(mount_point) = mounts_under(dir)?.first() {
        bail!("{} is still a mount; nothing under it was removed", mount_point.display());
    }
    Ok(())
}

/// Mount points in or under a folder, the deepest first.
fn mounts_under(dir: &Path) -> Result<Vec<PathBuf>> {
    let mounts = fs::read("/proc/self/mountinfo").context("the mounts cannot be read")?;
    let points = mounts.split(|byte| *byte == b'\n').filter_map(|line| line.split(|b| *b == b' ').nth(4));
    let mut found: Vec<PathBuf> =
        points.map(|point| PathBuf::from(unescape(point))).filter(|point| point.starts_with(dir)).collect();
    found.reverse();
    Ok(found)
}

/// Blanks and the like are `\ooo` in mountinfo (proc_pid_mountinfo(5)).
fn unescape(text: &[u8]) -> OsString {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((first, after)) = rest.split_first() {
        let octal = after.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if *first == b'\\' => {
                plain.push(byte);
                rest = &after[3..];
            }
            _ => {
                plain.push(*first);
                rest = after;
            }
        }
    }
    OsString::from_vec(plain)
}

/// Whether a lab has left anything.
pub fn anything_left(place: &Place) -> bool {
    place.run_dir().exists()
        || place.files_dir().exists()
        || CpuController::find().is_some_and(|cpu| cpu.lab_dir(place.name()).exists())
}

/// Takes the lock and sweeps; used by `up` before and `down` after.
pub fn sweep_locked(place: &Place) -> Result<()> {
    let _lock = place::lock()?;
    sweep(place)?;
    place::remove_empty_parents();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_read_as_the_kernel_writes_them() {
        assert_eq!(unescape(b"/a\\040b\\134c"), OsString::from("/a b\\c"));
        assert_eq!(unescape(b"/a\\04"), OsString::from("/a\\04"));
        let proc = mounts_under(Path::new("/proc")).expect("mountinfo is readable");
        assert!(proc.contains(&PathBuf::from("/proc")));
    }
}
