//! For whom home acts: the ids of the job, and its deputy.
//!
//! The ids in a request come from another machine. A member of the cluster that has been taken over
//! could name any, so once the deputy is known, ids that are not the job's are replaced by the job's:
//! a host can do at home what the job's user could, and no more.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};

#[derive(Debug, Default)]
struct State {
    groups: Vec<u32>,
    /// The ids a request may name, effective one first; empty: any.
    uids: Vec<u32>,
    gids: Vec<u32>,
    deputy: Option<i32>,
    /// The deputies of its descendants, and itself.
    family: Vec<i32>,
}

/// See the module.
#[derive(Debug)]
pub struct Identity {
    state: RwLock<State>,
    /// Counts changes of the groups; 0 is "never set".
    version: AtomicU64,
}

impl Identity {
    /// With the job's supplementary groups.
    pub fn new(groups: Vec<u32>) -> Identity {
        Identity { state: RwLock::new(State { groups, ..State::default() }), version: AtomicU64::new(1) }
    }

    /// Takes over ids and groups of the process `pid`.
    pub fn set_deputy(&self, pid: i32) -> io::Result<()> {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let ids = |name: &str| -> Vec<u32> {
            let line = status.lines().find_map(|l| l.strip_prefix(name)).unwrap_or_default();
            line.split_ascii_whitespace().filter_map(|w| w.parse().ok()).collect()
        };
        let (mut uids, mut gids, groups) = (ids("Uid:"), ids("Gid:"), ids("Groups:"));
        if uids.len() < 4 || gids.len() < 4 {
            let what = format!("/proc/{pid}/status has no user and group ids");
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        // Real, effective, saved, file system: the last is what files are opened with.
        uids.rotate_right(1);
        gids.rotate_right(1);
        gids.extend_from_slice(&groups);
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        *state = State { groups, uids, gids, deputy: Some(pid), family: vec![pid] };
        self.version.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    /// Requests may name these ids too.
    pub fn allow(&self, uids: &[u32], gids: &[u32]) {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let State { uids: own_uids, gids: own_gids, .. } = &mut *state;
        for (own, more) in [(own_uids, uids), (own_gids, gids)] {
            // No deputy known yet: everything is allowed anyway.
            if !own.is_empty() {
                let fresh: Vec<u32> = more.iter().copied().filter(|id| !own.contains(id)).collect();
                own.extend(fresh);
            }
        }
    }

    /// The deputies of the subtree.
    pub fn set_family(&self, pids: Vec<i32>) {
        self.state.write().unwrap_or_else(PoisonError::into_inner).family = pids;
    }

    /// The deputy's process id, if it is known.
    pub fn deputy(&self) -> Option<i32> {
        self.state.read().unwrap_or_else(PoisonError::into_inner).deputy
    }

    /// The deputies of the subtree; empty if none is known.
    pub fn family(&self) -> Vec<i32> {
        self.state.read().unwrap_or_else(PoisonError::into_inner).family.clone()
    }

    /// The ids to act under for a request that names these.
    pub fn squash(&self, uid: u32, gid: u32) -> (u32, u32) {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        let root = state.uids.contains(&0);
        let pick = |id: u32, allowed: &[u32]| match allowed.first() {
            Some(first) if !root && !allowed.contains(&id) => *first,
            _ => id,
        };
        (pick(uid, &state.uids), pick(gid, &state.gids))
    }

    /// Calls `set` with the groups if they have changed since `seen`.
    pub fn refresh_groups(&self, seen: &mut u64, set: impl FnOnce(&[u32])) {
        let version = self.version.load(Ordering::SeqCst);
        if *seen != version {
            set(&self.state.read().unwrap_or_else(PoisonError::into_inner).groups);
            *seen = version;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strangers_become_the_job() {
        let identity = Identity::new(vec![]);
        assert_eq!(identity.squash(77, 78), (77, 78), "no deputy known yet");
        *identity.state.write().expect("fresh") =
            State { uids: vec![1000, 1000], gids: vec![100, 100, 27], ..State::default() };
        assert_eq!(identity.squash(0, 0), (1000, 100));
        assert_eq!(identity.squash(1000, 27), (1000, 27));
        identity.allow(&[1001, 1000], &[101]);
        assert_eq!(identity.squash(1001, 101), (1001, 101), "a child with other ids");
        assert_eq!(identity.squash(1002, 102), (1000, 100));
        *identity.state.write().expect("fresh") = State { uids: vec![0], gids: vec![0], ..State::default() };
        assert_eq!(identity.squash(33, 33), (33, 33), "root may be anybody");
    }
}
