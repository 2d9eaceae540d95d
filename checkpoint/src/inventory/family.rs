//! The processes that are carried together, and what must be asked once for all of them: what every
//! process of the machine has is asked of each of it, and must not be asked again for each of ours.

use super::spread;
use crate::image::{Backing, Vma};
use crate::proc::{self, maps, status::Stat};
use crate::sys::kcmp::{self, Shared};
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::OnceLock;

/// Parents before their children; a slice of PIDs for all other purposes.
#[derive(Debug, Default)]
pub struct Family {
    pids: Vec<i32>,
    members: BTreeSet<i32>,
    /// All descendants of the root are carried, those born meanwhile among them.
    grows: bool,
    pipes_outside: OnceLock<BTreeSet<u64>>,
    fifos_outside: OnceLock<BTreeSet<(u64, u64)>>,
    sharers: OnceLock<Sharers>,
    anonymous: OnceLock<BTreeMap<u64, Vec<i32>>>,
    here: OnceLock<[Option<PathBuf>; NAMESPACES.len()]>,
    clocks: OnceLock<(i32, Option<PathBuf>)>,
    mapped_outside: OnceLock<BTreeMap<(u64, u64), i32>>,
    written_outside: OnceLock<BTreeMap<(u64, u64), i32>>,
}

/// Namespaces that must be those of this program (`/proc/PID/ns`, namespaces(7)).
const NAMESPACES: [&str; 7] = ["mnt", "pid", "net", "ipc", "user", "uts", "cgroup"];

/// What is looked for, and what it is called.
pub const SHARED: [(Shared, &str); 3] = [
    (Shared::Memory, "its memory (vfork or clone)"),
    (Shared::Files, "its descriptor table"),
    (Shared::Fs, "its working directory"),
];

/// For each of [`SHARED`] the sets of processes that share it, of more than one.
type Sharers = [Vec<Vec<i32>>; SHARED.len()];

impl Deref for Family {
    type Target = [i32];

    fn deref(&self) -> &[i32] {
        &self.pids
    }
}

impl Family {
    /// The root first.
    pub fn of(pids: Vec<i32>) -> Family {
        Family { members: pids.iter().copied().collect(), pids, ..Family::default() }
    }

    /// The same of a root with all its descendants: who is born after they were counted belongs to them.
    pub fn of_tree(pids: Vec<i32>) -> Family {
        Family { grows: true, ..Family::of(pids) }
    }

    /// Whether a process that was not counted is no stranger: a descendant born meanwhile, or gone by now.
    pub fn is_newcomer(&self, pid: i32) -> bool {
        /// More generations than there are processes.
        const MOST: usize = 1 << 16;
        let parent = |pid: i32| Stat::read(pid).ok()?.number(4).map(|parent| parent as i32);
        let mut ancestors =
            std::iter::successors(Some(pid), |&pid| parent(pid).filter(|&up| up > 1)).take(MOST);
        self.grows && (parent(pid).is_none() || ancestors.any(|pid| self.has(pid)))
    }

    /// Whether a process is one of them.
    pub fn has(&self, pid: i32) -> bool {
        self.members.contains(&pid)
    }

    /// What `look` says of each member from place `first` on, in their order.
    pub fn map<T: Send>(&self, first: usize, look: impl Fn(i32) -> T + Sync) -> Vec<T> {
        spread::over(self.pids.get(first..).unwrap_or_default(), look)
    }

    /// Inode numbers of the pipes that processes outside have an end of, when this is asked first.
    pub fn pipes_outside(&self) -> &BTreeSet<u64> {
        self.pipes_outside.get_or_init(|| {
            let outside = proc::pids().into_iter().filter(|&other| !self.has(other));
            outside.flat_map(pipes_of).collect()
        })
    }

    /// Device and inode number of the FIFOs that processes outside have an end of, when this is asked first.
    pub fn fifos_outside(&self) -> &BTreeSet<(u64, u64)> {
        self.fifos_outside.get_or_init(|| {
            let outside = proc::pids().into_iter().filter(|&other| !self.has(other));
            outside.flat_map(fifos_of).collect()
        })
    }

    /// By which number the root is known ([`proc::face`]), and its time namespace.
    pub fn clocks_of_root(&self) -> Option<(i32, Option<PathBuf>)> {
        let root = *self.first()?;
        let found = self.clocks.get_or_init(|| {
            let face = proc::face(root);
            (face, fs::read_link(format!("/proc/{face}/ns/time")).ok())
        });
        Some(found.clone())
    }

    /// The namespaces that this program is in, by their names in [`NAMESPACES`].
    pub fn namespaces_here(&self) -> impl Iterator<Item = (&'static str, &Option<PathBuf>)> {
        let here = |name: &str| fs::read_link(format!("/proc/self/ns/{name}")).ok();
        NAMESPACES.into_iter().zip(self.here.get_or_init(|| NAMESPACES.map(here)))
    }

    /// Who maps shared anonymous memory, by its number; of all processes of the machine.
    pub fn anonymous_memory(&self) -> &BTreeMap<u64, Vec<i32>> {
        self.anonymous.get_or_init(|| {
            let mut found: BTreeMap<u64, Vec<i32>> = BTreeMap::new();
            for pid in proc::pids() {
                // Who has ended maps nothing.
                let Ok(text) = proc::read(pid, "maps") else { continue };
                let is_shown = |word: &[u8]| word == b"/dev/zero" || word == b"/anon_hug";
                if !text.windows(9).any(is_shown) {
                    continue;
                }
                let ids: BTreeSet<u64> = maps::parse(&text).iter().filter_map(Vma::anonymous_id).collect();
                ids.into_iter().for_each(|id| found.entry(id).or_default().push(pid));
            }
            found
        })
    }

    /// Who outside maps files, by device and inode number as `maps` tells them, when this is asked first.
    pub fn files_mapped_outside(&self) -> &BTreeMap<(u64, u64), i32> {
        self.mapped_outside.get_or_init(|| self.each_outside(files_mapped_by))
    }

    /// Who outside, but for this program, has regular files open to be written, by device and inode number as
    /// stat(2) tells them, when this is asked first.
    pub fn files_written_outside(&self) -> &BTreeMap<(u64, u64), i32> {
        self.written_outside.get_or_init(|| self.each_outside(files_written_by))
    }

    fn each_outside(&self, files_of: fn(i32) -> Vec<(u64, u64)>) -> BTreeMap<(u64, u64), i32> {
        let us = std::process::id() as i32;
        let outside = proc::pids().into_iter().filter(|&other| !self.has(other) && other != us);
        outside.flat_map(|other| files_of(other).into_iter().map(move |id| (id, other))).collect()
    }

    /// Who shares something with `pid`: the place in [`SHARED`], and the other process.
    pub fn sharing_with(&self, pid: i32) -> Vec<(usize, i32)> {
        if self.len() <= 1 {
            // One look at each is less than sorting them.
            let others: Vec<i32> = proc::pids().into_iter().filter(|&other| other != pid).collect();
            let shares =
                |&(what, other): &(usize, i32)| kcmp::shared(pid, other, SHARED[what].0).unwrap_or(false);
            return others
                .iter()
                .flat_map(|&other| (0..SHARED.len()).map(move |what| (what, other)))
                .filter(shares)
                .collect();
        }
        let sharers = self.sharers.get_or_init(|| SHARED.map(|(what, _)| sharers_of(what)));
        let mut found = Vec::new();
        for (what, sets) in sharers.iter().enumerate() {
            let set = sets.iter().find(|set| set.contains(&pid));
            found
                .extend(set.into_iter().flatten().filter(|&&other| other != pid).map(|&other| (what, other)));
        }
        found
    }
}

fn pipes_of(pid: i32) -> Vec<u64> {
    let Ok(dir) = fs::read_dir(format!("/proc/{pid}/fd")) else { return Vec::new() };
    let number = |entry: fs::DirEntry| {
        let link = fs::read_link(entry.path()).ok()?;
        link.to_str()?.strip_prefix("pipe:[")?.strip_suffix(']')?.parse().ok()
    };
    dir.flatten().filter_map(number).collect()
}

fn fifos_of(pid: i32) -> Vec<(u64, u64)> {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let Ok(dir) = fs::read_dir(format!("/proc/{pid}/fd")) else { return Vec::new() };
    let identity = |entry: fs::DirEntry| {
        // Most of what is open has no name that is a path, and need not be asked more.
        fs::read_link(entry.path()).ok().filter(|link| link.is_absolute())?;
        let meta = fs::metadata(entry.path()).ok()?;
        meta.file_type().is_fifo().then(|| (meta.dev(), meta.ino()))
    };
    dir.flatten().filter_map(identity).collect()
}

fn files_mapped_by(pid: i32) -> Vec<(u64, u64)> {
    let Ok(text) = proc::read(pid, "maps") else { return Vec::new() };
    let identity = |vma: &Vma| match &vma.backing {
        Backing::File(file) => Some((file.dev, file.ino)),
        _ => None,
    };
    maps::parse(&text).iter().filter_map(identity).collect()
}

fn files_written_by(pid: i32) -> Vec<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    let Ok(dir) = fs::read_dir(format!("/proc/{pid}/fd")) else { return Vec::new() };
    let identity = |entry: fs::DirEntry| {
        fs::read_link(entry.path()).ok().filter(|link| link.is_absolute())?;
        let meta = fs::metadata(entry.path()).ok().filter(fs::Metadata::is_file)?;
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", entry.file_name().to_str()?)).ok()?;
        let flags = proc::number(&info, "flags", 8)? as i32;
        (flags & libc::O_ACCMODE != libc::O_RDONLY).then(|| (meta.dev(), meta.ino()))
    };
    dir.flatten().filter_map(identity).collect()
}

/// All processes of the machine, those that share it together. kcmp(2) tells an order, so that each
/// finds its place among n others in log n looks.
fn sharers_of(what: Shared) -> Vec<Vec<i32>> {
    sort_sharers(&proc::pids(), what)
}

/// The same of these processes alone.
pub fn sort_sharers(pids: &[i32], what: Shared) -> Vec<Vec<i32>> {
    let mut sets: Vec<Vec<i32>> = Vec::new();
    for &pid in pids {
        // Who ends meanwhile is left out, and so is who was to be compared with it.
        let _ = insert(&mut sets, pid, what);
    }
    sets.retain(|set| set.len() > 1);
    sets
}

fn insert(sets: &mut Vec<Vec<i32>>, pid: i32, what: Shared) -> Option<()> {
    let (mut low, mut high) = (0, sets.len());
    while low < high {
        let middle = low + (high - low) / 2;
        match kcmp::order(pid, sets[middle][0], what) {
            Ok(Ordering::Equal) => {
                sets[middle].push(pid);
                return Some(());
            }
            Ok(Ordering::Less) => high = middle,
            Ok(Ordering::Greater) => low = middle + 1,
            Err(_) => {
                kcmp::order(pid, pid, what).ok()?;
                // Not this one: who stands for the set has ended.
                sets[middle].remove(0);
                if sets[middle].is_empty() {
                    sets.remove(middle);
                    high -= 1;
                }
            }
        }
    }
    sets.insert(low, vec![pid]);
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sorting_finds_who_looking_at_each_finds() {
        // Threads of one process share everything: here a process and itself under another number.
        let us = std::process::id() as i32;
        let other = proc::tids(us).expect("threads").into_iter().find(|&tid| tid != us);
        let mut sets = Vec::new();
        for pid in [Some(us), other].into_iter().flatten() {
            insert(&mut sets, pid, Shared::Memory).expect("is there");
        }
        assert_eq!(sets.len(), 1);
        // PID 0 is nobody: neither it nor who is compared with it gets in the way.
        assert_eq!(insert(&mut sets, 0, Shared::Memory), None);
        let mut sets = vec![vec![0, us]];
        insert(&mut sets, us, Shared::Memory).expect("is there");
        assert_eq!(sets, [[us, us]]);
    }

    #[test]
    fn pipes_of_others_are_found() {
        let (reading, _writing) = nix::unistd::pipe().expect("a pipe");
        let ino = nix::sys::stat::fstat(&reading).expect("stat").st_ino;
        assert!(Family::of(vec![1]).pipes_outside().contains(&ino));
        assert!(!Family::of(vec![std::process::id() as i32]).pipes_outside().contains(&ino));
    }
}
