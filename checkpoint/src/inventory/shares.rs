//! What processes of a tree share with each other, as threads do (clone(2)), and who can make each of
//! them so that it shares it again: only who has a thing can bear somebody who shares it.

use super::family::sort_sharers;
use super::relations::{self, Birth, Relation};
use super::{Blocker, tree};
use crate::image::ProcessImage;
use crate::image::shares::SharesImage;
use crate::proc::{self, status::Stat};
use crate::sys::kcmp::Shared;
use std::collections::BTreeMap;

/// One living process of a tree, as far as it matters here.
#[derive(Debug, Clone, Copy)]
struct Member {
    pid: i32,
    ppid: i32,
    sid: i32,
    exit_signal: i32,
    /// Which thread of its parent's has it as a child.
    parent_tid: i32,
    shares: SharesImage,
}

/// What each of the processes shares with the first of those that share it, by their PIDs here.
pub fn of_family(pids: &[i32]) -> Vec<SharesImage> {
    let mut found = vec![SharesImage::default(); pids.len()];
    if pids.len() < 2 {
        return found;
    }
    let places: BTreeMap<i32, usize> = pids.iter().zip(0..).map(|(&pid, at)| (pid, at)).collect();
    let memory = sort_sharers(pids, Shared::Memory);
    // Without the memory nobody can share the actions: handlers are addresses.
    let handlers = memory.iter().flat_map(|set| sort_sharers(set, Shared::Handlers)).collect();
    let files = sort_sharers(pids, Shared::Files);
    let fs = sort_sharers(pids, Shared::Fs);
    type Field = fn(&mut SharesImage) -> &mut i32;
    let kinds: [(Vec<Vec<i32>>, Field); 4] = [
        (memory, |shares| &mut shares.memory),
        (files, |shares| &mut shares.files),
        (fs, |shares| &mut shares.fs),
        (handlers, |shares| &mut shares.handlers),
    ];
    for (sets, field) in kinds {
        for set in sets {
            let mut sharers: Vec<usize> = set.iter().filter_map(|pid| places.get(pid).copied()).collect();
            sharers.sort_unstable();
            let Some((&first, others)) = sharers.split_first() else { continue };
            for &other in others {
                *field(&mut found[other]) = pids[first];
            }
        }
    }
    found
}

/// Whether one that `maker` bears can have all of `shares`.
fn can_give(maker: &Member, shares: &SharesImage) -> bool {
    let theirs = maker.shares.each();
    shares
        .each()
        .iter()
        .zip(theirs)
        .all(|(&(with, ..), (makers, ..))| with == 0 || with == maker.pid || with == makers)
}

/// How each of the living is born, given how its session and group want it; `None`: nobody who could bear
/// it has all that it shares.
fn plan(members: &[Member], births: &[Birth]) -> Vec<Option<Birth>> {
    let places: BTreeMap<i32, usize> = members.iter().zip(0..).map(|(one, at)| (one.pid, at)).collect();
    let of = |pid: i32| places.get(&pid).map(|&at| &members[at]);
    let one = |(at, (member, &birth)): (usize, (&Member, &Birth))| {
        if at == 0 || member.shares.is_empty() {
            return Some(birth);
        }
        let maker = match birth {
            Birth::Early | Birth::Late => of(member.ppid),
            Birth::Sibling(sibling) => of(sibling),
            _ => None,
        };
        if maker.is_some_and(|maker| can_give(maker, &member.shares)) {
            return Some(birth);
        }
        // CLONE_PARENT makes it a child of its maker's parent, and takes the maker's signal (clone(2)).
        let fits = |sibling: &&Member| {
            sibling.ppid == member.ppid
                && sibling.sid == member.sid
                && sibling.exit_signal == member.exit_signal
                && sibling.parent_tid == member.parent_tid
                && can_give(sibling, &member.shares)
        };
        let sibling = members[1..at].iter().find(fits)?;
        matches!(birth, Birth::Late | Birth::Early | Birth::Sibling(_)).then_some(Birth::Sibling(sibling.pid))
    };
    members.iter().zip(births).enumerate().map(one).collect()
}

fn of_images(images: &[ProcessImage]) -> Vec<Member> {
    let one = |image: &ProcessImage| Member {
        pid: image.pid,
        ppid: image.ppid,
        sid: image.sid,
        exit_signal: image.exit_signal,
        parent_tid: image.parent_tid,
        shares: image.shares,
    };
    images.iter().map(one).collect()
}

/// How each process of an image is born, given how its session and group want it.
pub fn births(images: &[ProcessImage], births: &[Birth]) -> Vec<Birth> {
    let planned = plan(&of_images(images), births);
    planned.into_iter().map(|birth| birth.unwrap_or(Birth::Never)).collect()
}

/// What of an image's processes cannot be shared again.
pub fn in_image(images: &[ProcessImage], blockers: &mut Vec<Blocker>) {
    if images.iter().all(|image| image.shares.is_empty()) {
        return;
    }
    name(&of_images(images), &of_the_living(&relations::of_images(images)), blockers);
}

/// The same of processes that run.
pub fn alive(family: &[i32], relations: &[Relation], blockers: &mut Vec<Blocker>) {
    let relations: Vec<Relation> = relations.iter().filter(|one| !one.ended).copied().collect();
    let faces: Vec<i32> = relations.iter().map(|one| proc::face(one.pid)).collect();
    let mut shares = of_family(&faces);
    for field in
        shares.iter_mut().flat_map(|one| [&mut one.memory, &mut one.files, &mut one.fs, &mut one.handlers])
    {
        *field = relations.iter().zip(&faces).find(|&(_, face)| face == field).map_or(0, |(one, _)| one.pid);
    }
    if shares.iter().all(SharesImage::is_empty) {
        return;
    }
    let mut parents: BTreeMap<i32, i32> = BTreeMap::new();
    for &parent in family {
        parents.extend(tree::children_of_threads(parent).into_iter().map(|(tid, child)| (child, tid)));
    }
    let members: Vec<Member> = relations
        .iter()
        .zip(shares)
        .map(|(one, shares)| Member {
            pid: one.pid,
            ppid: one.ppid,
            sid: one.sid,
            exit_signal: Stat::read(one.pid).ok().and_then(|stat| stat.number(38)).unwrap_or(0) as i32,
            parent_tid: parents.get(&one.pid).copied().unwrap_or(0),
            shares,
        })
        .collect();
    name(&members, &relations::births(&relations), blockers);
}

/// How those that live are born.
fn of_the_living(relations: &[Relation]) -> Vec<Birth> {
    let births = relations::births(relations);
    relations.iter().zip(births).filter(|(one, _)| !one.ended).map(|(_, birth)| birth).collect()
}

fn name(members: &[Member], births: &[Birth], blockers: &mut Vec<Blocker>) {
    for (member, birth) in members.iter().zip(plan(members, births)) {
        let (None, Some((with, _, what))) = (birth, member.shares.each().into_iter().find(|one| one.0 != 0))
        else {
            continue;
        };
        let what = format!(
            "process {} shares {what} with process {with}, and neither its parent nor a sibling has all that \
             it shares",
            member.pid
        );
        blockers.push(Blocker { kind: "tree", what });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(pid: i32, ppid: i32, files: i32) -> Member {
        let shares = SharesImage { files, ..SharesImage::default() };
        Member { pid, ppid, sid: 1, exit_signal: 17, parent_tid: ppid, shares }
    }

    #[test]
    fn who_bears_whom() {
        use Birth::{Late, Root, Sibling};
        let births = [Root, Late, Late, Late];
        // The parent has it; or shares it with the one that has it.
        let chain = [member(1, 0, 0), member(2, 1, 1), member(3, 2, 1), member(4, 3, 1)];
        assert_eq!(plan(&chain, &births), births.map(Some));
        // A sibling has it.
        let siblings = [member(1, 0, 0), member(2, 1, 0), member(3, 1, 2), member(4, 1, 2)];
        assert_eq!(plan(&siblings, &births), [Root, Late, Sibling(2), Sibling(2)].map(Some));
        // One that tells of its end by another signal cannot bear it.
        let mut other = siblings;
        other[1].exit_signal = 0;
        assert_eq!(plan(&other, &births)[2], None);
        // Who has it is neither.
        let far = [member(1, 0, 0), member(2, 1, 0), member(3, 1, 0), member(4, 3, 2)];
        assert_eq!(plan(&far, &births)[3], None);
        let mut blockers = Vec::new();
        name(&far, &births, &mut blockers);
        assert!(blockers[0].what.starts_with("process 4 shares its descriptor table with process 2"));
    }

    #[test]
    fn nobody_shares_by_fork() {
        assert_eq!(of_family(&[std::process::id() as i32, 1]), [SharesImage::default(); 2]);
    }
}
