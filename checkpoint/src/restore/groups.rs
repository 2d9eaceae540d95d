//! Process groups: joined when all processes are there, the leaders first.

use super::RestoreError;
use super::family::Family;
use crate::inventory::relations::{self, Relation};
use crate::tracee::Tracee;
use nix::unistd::{Pid, getpgid, getsid};

/// Puts each process into its group, and sees that all are in the sessions and groups that the image
/// says. The root stays where it is, and with it who was in its group.
pub(super) fn join(family: &mut Family<'_>) -> Result<(), RestoreError> {
    if family.births.is_empty() {
        return Ok(());
    }
    let relations = relations::of_images(family.images);
    let Some(&root) = relations.first() else { return Ok(()) };
    let joins = |one: &Relation| one.sid != one.pid && (one.pgid, one.sid) != (root.pgid, root.sid);
    // A group may have the number of one that has left it: it makes the group first.
    let leads = |one: &Relation| relations.iter().any(|other| other.pgid == one.pid && joins(other));
    for leader in relations[1..].iter().filter(|one| one.sid != one.pid && leads(one)) {
        set_group(family, leader.pid, 0)?;
    }
    for (group, member) in relations::lost_groups(&relations) {
        family.lost_group(relations[member].pid, group)?;
    }
    for left in [false, true] {
        for one in relations[1..].iter().filter(|one| joins(one) && one.pgid != one.pid && leads(one) == left)
        {
            set_group(family, one.pid, one.pgid)?;
        }
    }
    check(family)
}

fn set_group(family: &mut Family<'_>, pid: i32, group: i32) -> Result<(), RestoreError> {
    let tracee = match family.place_of(pid) {
        Some(who) => family.members[who].as_mut().map(|member| &mut member.tracee),
        None => family.births.passing.iter_mut().find(|one| one.pid == pid).map(|one| &mut one.tracee),
    };
    let Some(tracee): Option<&mut Tracee> = tracee else {
        return Err(RestoreError::Unfit(format!("process {pid} is not there to join its group")));
    };
    let args = [0, group as u64, 0, 0, 0, 0];
    tracee.must(0, "joining its process group", libc::SYS_setpgid, args)?;
    Ok(())
}

fn check(family: &Family<'_>) -> Result<(), RestoreError> {
    let unfit =
        |what: &str, pid: i32| RestoreError::Unfit(format!("process {pid} could not be put into its {what}"));
    // By the numbers of this PID namespace: leaders by those of their tasks.
    let outer = |pid: i32| match family.place_of(pid) {
        Some(who) => family.members[who].as_ref().map(|member| member.tracee.pid()),
        None => family.births.passing.iter().find(|one| one.pid == pid).map(|one| one.tracee.pid()),
    };
    let Some(root) = family.images.first() else { return Ok(()) };
    let Some(here) = outer(root.pid).map(Pid::from_raw) else { return Ok(()) };
    let at_root = (getsid(Some(here)), getpgid(Some(here)));
    for image in &family.images[1..] {
        let Some(task) = outer(image.pid).map(Pid::from_raw) else { return Err(unfit("place", image.pid)) };
        let session = match outer(image.sid) {
            _ if image.sid == root.sid => Some(at_root.0),
            found => found.map(|pid| Ok(Pid::from_raw(pid))),
        };
        if session.is_some_and(|session| getsid(Some(task)) != session) {
            return Err(unfit("session", image.pid));
        }
        let group = match outer(image.pgid) {
            _ if (image.pgid, image.sid) == (root.pgid, root.sid) => Some(at_root.1),
            found => found.map(|pid| Ok(Pid::from_raw(pid))),
        };
        if group.is_some_and(|group| getpgid(Some(task)) != group) {
            return Err(unfit("process group", image.pid));
        }
    }
    Ok(())
}
