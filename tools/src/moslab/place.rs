//! Where a lab lives on disk, and what its parts are called.
//!
//! State that means nothing after a reboot is under `/run/moslab/LAB`, the nodes' files and logs are
//! under `/var/lib/moslab/LAB`. Both go with the lab.

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Parent of every lab's state.
const RUN: &str = "/run/moslab";
/// Parent of every lab's files.
const FILES: &str = "/var/lib/moslab";
/// Longest name of a lab; it becomes part of paths and of a control group's name.
const MAX_NAME: usize = 32;
/// Most nodes of one lab: they share one /24, and a bridge is one collision domain.
pub const MAX_NODES: u32 = 64;
/// Where a node's own things appear inside it (its `/run` is its own).
pub const INSIDE: &str = "/run/mos";
/// Port of every node's daemon.
pub const PORT: u16 = 7700;

/// One lab's name and the paths that follow from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    name: String,
}

impl Place {
    /// Checks the name: lower case letters, digits and dashes.
    pub fn new(name: &str) -> Result<Place> {
        let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(fits) || name.starts_with('-') {
            bail!(
                "{name:?} cannot name a lab: use up to {MAX_NAME} lower case letters, digits and dashes, as in `--name lab2`"
            );
        }
        Ok(Place { name: name.to_string() })
    }

    /// The lab's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// State that goes with the keeper.
    pub fn run_dir(&self) -> PathBuf {
        Path::new(RUN).join(&self.name)
    }

    /// The nodes' files and logs.
    pub fn files_dir(&self) -> PathBuf {
        Path::new(FILES).join(&self.name)
    }

    /// What is known about the lab, JSON.
    pub fn state_file(&self) -> PathBuf {
        self.run_dir().join("state.json")
    }

    /// Where the keeper takes orders.
    pub fn control_socket(&self) -> PathBuf {
        self.run_dir().join("keeper.sock")
    }

    /// The keeper's messages.
    pub fn keeper_log(&self) -> PathBuf {
        self.files_dir().join("keeper.log")
    }

    /// One node's files.
    pub fn node_dir(&self, node: &str) -> PathBuf {
        self.files_dir().join(node)
    }

    /// One node's daemon's messages.
    pub fn node_log(&self, node: &str) -> PathBuf {
        self.files_dir().join(format!("{node}.log"))
    }

    /// What a node's init is told.
    pub fn node_config(&self, node: &str) -> PathBuf {
        self.run_dir().join(format!("{node}.json"))
    }

    /// The address of node `number` (from 1): `10.77.X.number`, X from the lab's name.
    ///
    /// Labs never meet, so equal X would do no harm; different ones make logs easier to read.
    pub fn address(&self, number: u32) -> Ipv4Addr {
        let mixed = self.name.bytes().fold(0u32, |sum, b| sum.wrapping_mul(31).wrapping_add(b.into()));
        Ipv4Addr::new(10, 77, (mixed % 250) as u8, number.min(254) as u8)
    }
}

/// The name of node `number`.
pub fn node_name(number: u32) -> String {
    format!("node{number}")
}

/// Excludes other `up`s and `down`s while one claims or removes a lab's folders.
///
/// The lock is on the parent folder itself, so no lock file is left behind.
pub fn lock() -> Result<Flock<File>> {
    // Bounded: another `down` may remove the folder between our opening and our locking it.
    for _ in 0..100 {
        fs::create_dir_all(RUN).with_context(|| format!("{RUN} cannot be made; moslab needs root"))?;
        let Ok(folder) = File::open(RUN) else { continue };
        let folder = Flock::lock(folder, FlockArg::LockExclusive)
            .map_err(|(_, errno)| errno)
            .with_context(|| format!("{RUN} cannot be locked"))?;
        let same = |a: &fs::Metadata, b: &fs::Metadata| a.ino() == b.ino() && a.dev() == b.dev();
        if let (Ok(held), Ok(named)) = (folder.metadata(), fs::metadata(RUN))
            && same(&held, &named)
        {
            return Ok(folder);
        }
    }
    bail!("{RUN} keeps vanishing while it is being locked; is something removing it?")
}

/// Removes the parents of all labs if no lab is left. Call it with the lock held.
pub fn remove_empty_parents() {
    // Not empty, or not there: both are fine.
    let _ = fs::remove_dir(FILES);
    let _ = fs::remove_dir(RUN);
}

/// Names of the labs that have left or keep anything here.
pub fn existing() -> Vec<String> {
    let mut names: Vec<String> = [RUN, FILES]
        .iter()
        .filter_map(|parent| fs::read_dir(parent).ok())
        .flat_map(|entries| entries.flatten())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names.dedup();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_escape_are_refused() {
        for bad in ["", "..", "a/b", "-x", "A", "a b", &"x".repeat(40)] {
            assert!(Place::new(bad).is_err(), "{bad:?}");
        }
        assert!(Place::new("lab-2").is_ok());
    }

    #[test]
    fn addresses_stay_in_the_labs_network() {
        let place = Place::new("lab").expect("a good name");
        assert_eq!(place.address(3).octets()[..2], [10, 77]);
        assert_eq!(place.address(3).octets()[3], 3);
    }
}
