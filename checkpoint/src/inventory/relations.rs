//! Sessions and process groups of a tree: which of them can be made again.
//!
//! A session is entered by making it or by being born in it (setsid(2)); a group exists only while a
//! process has its number, or is in it (setpgid(2)). So what is left of a session or group whose
//! leader is gone cannot be made again by those who are there.

use super::Blocker;
use crate::image::ProcessImage;

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
}

/// Those of an image.
pub fn of_images(images: &[ProcessImage]) -> Vec<Relation> {
    let mut relations = Vec::new();
    for image in images {
        relations.push(Relation { pid: image.pid, ppid: image.ppid, pgid: image.pgid, sid: image.sid });
        relations.extend(image.zombies.iter().map(|zombie| Relation {
            pid: zombie.pid,
            ppid: image.pid,
            pgid: zombie.pgid,
            sid: zombie.sid,
        }));
    }
    relations
}

/// The session that a process was born into: its parent's, or the one that its parent had before it
/// made its own.
pub fn is_older_than_its_parents_session(child: &Relation, parent: &Relation) -> bool {
    parent.sid == parent.pid && child.sid != parent.sid && child.sid != child.pid
}

/// What cannot be made again; the root comes first.
pub fn blockers(relations: &[Relation], blockers: &mut Vec<Blocker>) {
    let find = |pid: i32| relations.iter().find(|other| other.pid == pid);
    let Some(root) = relations.first() else { return };
    for member in &relations[1..] {
        let Some(parent) = find(member.ppid) else {
            let what = format!("process {} is no descendant of process {}", member.pid, root.pid);
            blockers.push(Blocker { kind: "tree", what });
            continue;
        };
        let before = || find(parent.ppid).filter(|_| parent.pid != root.pid).map(|above| above.sid);
        let born = !is_older_than_its_parents_session(member, parent) || before() == Some(member.sid);
        if member.sid != member.pid && (!born || member.sid != parent.sid && parent.sid != parent.pid) {
            let what = format!("process {} is in session {}, whose leader is gone", member.pid, member.sid);
            blockers.push(Blocker { kind: "tree", what });
        }
        let with_root = member.pgid == root.pgid && member.sid == root.sid;
        let led =
            find(member.pgid).is_some_and(|leader| leader.pgid == leader.pid && leader.sid == member.sid);
        if member.pgid != member.pid && !with_root && !led {
            let what = format!("process {} is in group {}, whose leader is gone", member.pid, member.pgid);
            blockers.push(Blocker { kind: "tree", what });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(relations: &[(i32, i32, i32, i32)]) -> Vec<String> {
        let relation = |&(pid, ppid, pgid, sid)| Relation { pid, ppid, pgid, sid };
        let relations: Vec<Relation> = relations.iter().map(relation).collect();
        let mut found = Vec::new();
        blockers(&relations, &mut found);
        found.into_iter().map(|blocker| blocker.what).collect()
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
        assert!(refused(&[(10, 1, 10, 5), (11, 10, 11, 11), (12, 11, 11, 11)]).is_empty());
        // Born before its parent made a session.
        assert!(refused(&[(10, 1, 10, 5), (11, 10, 11, 11), (12, 11, 10, 5)]).is_empty());
    }

    #[test]
    fn who_has_lost_its_leader() {
        assert!(refused(&[(10, 1, 10, 5), (12, 10, 11, 5)])[0].contains("group 11"));
        assert!(refused(&[(10, 1, 10, 5), (12, 10, 12, 11)])[0].contains("session 11"));
        // A leader in another session is another group's.
        assert_eq!(refused(&[(10, 1, 10, 5), (11, 10, 11, 11), (12, 10, 11, 5)]).len(), 1);
        assert!(refused(&[(10, 1, 10, 10), (12, 10, 5, 5)]).len() == 2);
    }

    #[test]
    fn a_stranger() {
        assert!(refused(&[(10, 1, 10, 5), (12, 99, 10, 5)])[0].contains("no descendant"));
    }
}
