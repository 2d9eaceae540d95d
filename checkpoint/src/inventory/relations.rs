//! Sessions and process groups of a tree: how they can be made again.
//!
//! A session is entered by making it or by being born in it (setsid(2)); a group exists only while a
//! process has its number, or is in it (setpgid(2)). What is left of a session or group whose leader
//! is gone is made with a temporary process that has the leader's number: it makes the session or
//! group, bears its members (`CLONE_PARENT` makes them children of its own parent) or waits until they
//! have joined it, and ends.

use super::Blocker;
use crate::image::ProcessImage;
use std::collections::BTreeMap;

/// One process of a tree, living or ended and not waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Relation {
    /// PID.
    pub pid: i32,
    /// Its parent's PID; of the root it does not matter.
    pub ppid: i32,
    /// Its process group.
    pub pgid: i32,
    /// Its session.
    pub sid: i32,
    /// It has ended, and its parent has not waited for it.
    pub ended: bool,
}

/// Those of an image, each process followed by its zombies.
pub fn of_images(images: &[ProcessImage]) -> Vec<Relation> {
    let mut relations = Vec::new();
    for image in images {
        let (pid, ppid, pgid, sid) = (image.pid, image.ppid, image.pgid, image.sid);
        relations.push(Relation { pid, ppid, pgid, sid, ended: false });
        relations.extend(image.zombies.iter().map(|zombie| Relation {
            pid: zombie.pid,
            ppid: image.pid,
            pgid: zombie.pgid,
            sid: zombie.sid,
            ended: true,
        }));
    }
    relations
}

/// The session that a process was born into: its parent's, or the one that its parent had before it
/// made its own.
pub fn is_older_than_its_parents_session(child: &Relation, parent: &Relation) -> bool {
    parent.sid == parent.pid && child.sid != parent.sid && child.sid != child.pid
}

/// How a process comes into the session that it needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Birth {
    /// It is the root.
    Root,
    /// Its parent bears it before it makes its own session.
    Early,
    /// Its parent bears it in the session that it is in itself.
    Late,
    /// Its sibling with this PID bears it, as soon as it has made its session.
    Sibling(i32),
    /// A temporary process with this number bears it, a child of its parent that makes the session.
    Lost(i32),
    /// It cannot come into it.
    Never,
    /// Its parent is not in the tree, or comes after it.
    Stranger,
}

/// How each of them is born; the root comes first, parents before their children.
pub fn births(relations: &[Relation]) -> Vec<Birth> {
    let places: BTreeMap<i32, usize> = relations.iter().zip(0..).map(|(one, at)| (one.pid, at)).collect();
    let parent = |at: usize| {
        let found = places.get(&relations[at].ppid).copied();
        found.filter(|&up| at > 0 && up < at && !relations[up].ended)
    };
    // The session that each must be born into; `None`: any, as it makes its own.
    let mut needs: Vec<Option<i32>> = vec![None; relations.len()];
    for (at, one) in relations.iter().enumerate().rev() {
        if one.sid != one.pid {
            needs[at] = Some(one.sid);
        }
        if let (Some(up), Some(need)) = (parent(at), needs[at])
            && relations[up].sid == relations[up].pid
            && need != relations[up].pid
        {
            needs[up] = Some(need);
        }
    }
    let mut born: Vec<i32> = Vec::with_capacity(relations.len());
    let mut through: BTreeMap<i32, i32> = BTreeMap::new();
    let mut births = Vec::with_capacity(relations.len());
    for (at, one) in relations.iter().enumerate() {
        let (birth, session) = match (at, parent(at), needs[at]) {
            (0, ..) => (Birth::Root, one.sid),
            (_, None, _) => (Birth::Stranger, one.sid),
            (_, Some(up), None) => (Birth::Late, relations[up].sid),
            (_, Some(up), Some(need)) => {
                let above = &relations[up];
                let leader = places.get(&need).map(|&place| (place, relations[place]));
                let birth = match leader {
                    _ if need == above.sid => Birth::Late,
                    _ if up > 0 && need == born[up] => Birth::Early,
                    Some((place, leader)) if !leader.ended => {
                        let sibling = leader.ppid == one.ppid && leader.sid == need && place < at;
                        if sibling { Birth::Sibling(need) } else { Birth::Never }
                    }
                    _ if need == relations[0].sid => Birth::Never,
                    Some((_, zombie)) if zombie.ppid != one.ppid || zombie.sid != need => Birth::Never,
                    // It can have one parent only.
                    _ if *through.entry(need).or_insert(one.ppid) == one.ppid => Birth::Lost(need),
                    _ => Birth::Never,
                };
                (birth, need)
            }
        };
        births.push(birth);
        born.push(session);
    }
    births
}

/// Groups whose leader is gone: the group, and who of them bears the temporary leader, by its place.
pub fn lost_groups(relations: &[Relation]) -> Vec<(i32, usize)> {
    let mut lost: BTreeMap<i32, usize> = BTreeMap::new();
    let Some(root) = relations.first() else { return Vec::new() };
    for (at, one) in relations.iter().enumerate().skip(1) {
        let with_root = one.pgid == root.pgid && one.sid == root.sid;
        // A session that is made has its leader's group.
        let with_session = one.sid == one.pgid && one.sid != root.sid;
        let led = with_session || relations.iter().any(|other| other.pid == one.pgid);
        if !with_root && !led {
            lost.entry(one.pgid).or_insert(at);
        }
    }
    lost.into_iter().collect()
}

/// What cannot be made again; the root comes first. `in_use` tells whether a process outside has a
/// number.
pub fn blockers(relations: &[Relation], in_use: &dyn Fn(i32) -> bool, blockers: &mut Vec<Blocker>) {
    let Some(root) = relations.first() else { return };
    let mut block = |what: String| blockers.push(Blocker { kind: "tree", what });
    let known = |pid: i32| relations.iter().any(|other| other.pid == pid);
    for (one, birth) in relations.iter().zip(births(relations)) {
        let Relation { pid, sid, .. } = *one;
        match birth {
            Birth::Stranger => block(format!("process {pid} is no descendant of process {}", root.pid)),
            Birth::Lost(number) if !known(number) && in_use(number) => block(format!(
                "process {pid} is in the session of process {number}, which does not belong to the tree"
            )),
            Birth::Never => {
                block(format!("process {pid} is in session {sid}, into which it cannot be born again"));
            }
            _ => {}
        }
        let with_root = one.pgid == root.pgid && one.sid == root.sid;
        let elsewhere = |other: &Relation| other.pid == one.pgid && other.sid != one.sid;
        if !with_root && one.pgid != pid && relations.iter().any(elsewhere) {
            block(format!("process {pid} is in group {}, whose leader is in another session", one.pgid));
        }
    }
    for (group, at) in lost_groups(relations) {
        if in_use(group) {
            block(format!(
                "process {} is in the group of process {group}, which does not belong to the tree",
                relations[at].pid
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(relations: &[(i32, i32, i32, i32)]) -> Vec<Relation> {
        let relation = |&(pid, ppid, pgid, sid)| Relation { pid, ppid, pgid, sid, ended: false };
        relations.iter().map(relation).collect()
    }

    fn refused(relations: &[(i32, i32, i32, i32)]) -> Vec<String> {
        let mut found = Vec::new();
        blockers(&tree(relations), &|pid| pid == 5, &mut found);
        found.into_iter().map(|blocker| blocker.what).collect()
    }

    fn born(relations: &[(i32, i32, i32, i32)]) -> Vec<Birth> {
        births(&tree(relations)).split_off(1)
    }

    #[test]
    fn a_shell_with_jobs() {
        // An ordinary script, and one with groups of its own.
        assert!(refused(&[(10, 1, 10, 5), (11, 10, 10, 5), (12, 10, 10, 5)]).is_empty());
        assert!(refused(&[(10, 1, 10, 10), (11, 10, 11, 10), (12, 10, 11, 10)]).is_empty());
        // The root is in somebody else's group.
        assert!(refused(&[(10, 1, 7, 5), (11, 10, 7, 5)]).is_empty());
    }

    #[test]
    fn a_daemon_of_its_own_session() {
        let daemon = [(10, 1, 10, 5), (11, 10, 11, 11), (12, 11, 11, 11)];
        assert!(refused(&daemon).is_empty());
        assert_eq!(born(&daemon), [Birth::Late, Birth::Late]);
        // Born before its parent made a session, and before the parent of that did.
        let early = [(10, 1, 10, 5), (11, 10, 11, 11), (12, 11, 10, 5)];
        assert_eq!(born(&early), [Birth::Late, Birth::Early]);
        let earlier = [(10, 1, 10, 5), (11, 10, 11, 11), (12, 11, 12, 12), (13, 12, 11, 11), (14, 12, 10, 5)];
        assert_eq!(born(&earlier)[3], Birth::Never, "in one session only it can have been born");
        let both = [(10, 1, 10, 5), (11, 10, 11, 11), (12, 11, 12, 12), (14, 12, 10, 5)];
        assert_eq!(born(&both), [Birth::Late, Birth::Early, Birth::Early]);
    }

    #[test]
    fn who_has_lost_its_leader() {
        let group = [(10, 1, 10, 5), (12, 10, 11, 5)];
        assert!(refused(&group).is_empty());
        assert_eq!(lost_groups(&tree(&group)), [(11, 1)]);
        let session = [(10, 1, 10, 5), (12, 10, 12, 11), (13, 10, 11, 11)];
        assert!(refused(&session).is_empty());
        assert_eq!(born(&session), [Birth::Lost(11), Birth::Lost(11)]);
        assert_eq!(lost_groups(&tree(&session)), []);
        // With two parents it cannot be made.
        let two = [(10, 1, 10, 5), (11, 10, 10, 5), (12, 10, 7, 7), (13, 11, 7, 7)];
        assert_eq!(born(&two)[2], Birth::Never);
        assert_eq!(refused(&two).len(), 1);
        // A leader in another session is another group's.
        assert_eq!(refused(&[(10, 1, 10, 5), (11, 10, 11, 11), (12, 10, 11, 5)]).len(), 1);
        // Those whose leader lives outside.
        assert_eq!(refused(&[(10, 1, 10, 10), (12, 10, 5, 5)]).len(), 1);
        assert_eq!(refused(&[(10, 1, 10, 10), (12, 10, 5, 10)]).len(), 1);
    }

    #[test]
    fn adopted_by_a_subreaper() {
        // 12 was a child of 11's, whose child it was is gone.
        let orphan = [(10, 1, 10, 5), (11, 10, 11, 11), (12, 10, 11, 11)];
        assert_eq!(born(&orphan), [Birth::Late, Birth::Sibling(11)]);
        // The leader is a zombie of the same parent's, or of another's.
        let mut zombie = tree(&orphan);
        zombie[1].ended = true;
        assert_eq!(births(&zombie)[2], Birth::Lost(11));
        let mut other = tree(&[(10, 1, 10, 5), (9, 10, 10, 5), (11, 9, 11, 11), (12, 10, 11, 11)]);
        other[2].ended = true;
        assert_eq!(births(&other)[3], Birth::Never);
    }

    #[test]
    fn a_stranger() {
        assert!(refused(&[(10, 1, 10, 5), (12, 99, 10, 5)])[0].contains("no descendant"));
    }
}
