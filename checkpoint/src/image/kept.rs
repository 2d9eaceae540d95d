//! What of its parent's memory a child can keep: where a dump looks for pages that both share, and
//! where a restore starts from the parent's pages.
//!
//! Only private memory counts. What is shared is made by its file or its object anyway; but for the ring of an
//! asynchronous I/O context, which has no name: only fork gives a child the mapping of its parent's.

use super::{Backing, MmImage, Vma, VmaFlags};

/// What must be the same from the start; all other flags are set when the memory is there.
const FROM_THE_START: VmaFlags =
    VmaFlags::GROWSDOWN.union(VmaFlags::HUGEPAGE).union(VmaFlags::NORESERVE).union(VmaFlags::HUGETLB);

/// What is not kept at all.
const NEVER: VmaFlags = VmaFlags::USERFAULT.union(VmaFlags::IO).union(VmaFlags::PFNMAP);

/// A part of a mapping that both have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kept {
    /// First address.
    pub start: u64,
    /// One past the last.
    pub end: u64,
    /// The child's `PROT_*` and protection key, if they are others than its parent's; huge pages, which are
    /// protected when they are filled, have none yet.
    pub prot: Option<(u32, u8)>,
}

/// The parts of private mappings that `child` can keep of what it gets from `parent` by fork, in
/// rising order.
pub fn kept(parent: &MmImage, child: &MmImage) -> Vec<Kept> {
    let mut out = Vec::new();
    let mut above = parent.vmas.iter().peekable();
    for mine in &child.vmas {
        while above.next_if(|theirs| theirs.end <= mine.start).is_some() {}
        let mut rest = above.clone();
        while let Some(theirs) = rest.next_if(|theirs| theirs.start < mine.end) {
            if alike(theirs, mine) {
                let (start, end) = (theirs.start.max(mine.start), theirs.end.min(mine.end));
                let protected = |vma: &Vma| (vma.prot, vma.pkey);
                let changed = !mine.is_huge() && protected(theirs) != protected(mine);
                out.push(Kept { start, end, prot: changed.then_some(protected(mine)) });
            }
        }
    }
    out
}

fn alike(theirs: &Vma, mine: &Vma) -> bool {
    let private = !theirs.shared && !mine.shared;
    let flags = theirs.flags & FROM_THE_START == mine.flags & FROM_THE_START
        && theirs.page_shift == mine.page_shift
        && !(theirs.flags | mine.flags).intersects(NEVER);
    (private || is_same_ring(theirs, mine)) && flags && same_backing(theirs, mine)
}

fn is_same_ring(theirs: &Vma, mine: &Vma) -> bool {
    let is_ring = matches!(mine.backing, Backing::Aio { .. });
    is_ring && theirs.shared && mine.shared && (theirs.start, theirs.end) == (mine.start, mine.end)
}

fn same_backing(theirs: &Vma, mine: &Vma) -> bool {
    match (&theirs.backing, &mine.backing) {
        (Backing::Anon, Backing::Anon) => true,
        (Backing::File(a), Backing::File(b)) => {
            let place = |vma: &Vma, offset: u64| vma.start.wrapping_sub(offset);
            (&a.path, a.deleted, a.dev, a.ino) == (&b.path, b.deleted, b.dev, b.ino)
                && place(theirs, a.offset) == place(mine, b.offset)
        }
        (Backing::Aio { id: theirs }, Backing::Aio { id: mine }) => theirs == mine,
        _ => false,
    }
}

/// What is left of `vma` without the kept parts, as mappings of their own.
pub fn without(vma: &Vma, kept: &[Kept]) -> Vec<Vma> {
    let mut out = Vec::new();
    let mut at = vma.start;
    let from = kept.partition_point(|part| part.end <= vma.start);
    for part in kept[from..].iter().take_while(|part| part.start < vma.end) {
        if part.start > at {
            out.push(piece(vma, at, part.start));
        }
        at = at.max(part.end);
    }
    if at < vma.end {
        out.push(piece(vma, at, vma.end));
    }
    out
}

fn piece(vma: &Vma, start: u64, end: u64) -> Vma {
    let mut piece = Vma { start, end, ..vma.clone() };
    if let Backing::File(file) = &mut piece.backing {
        file.offset = file.offset.wrapping_add(start - vma.start);
    }
    piece
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{MappedFile, PAGE_SHIFT};

    fn anon(start: u64, end: u64) -> Vma {
        Vma {
            start,
            end,
            prot: 3,
            backing: Backing::Anon,
            shared: false,
            flags: VmaFlags::empty(),
            name: None,
            pkey: 0,
            page_shift: PAGE_SHIFT,
        }
    }

    fn file(start: u64, end: u64, offset: u64) -> Vma {
        let path = b"/lib".to_vec();
        let file = MappedFile { path, deleted: false, dev: 1, ino: 2, offset, may_write: false };
        Vma { backing: Backing::File(file), ..anon(start, end) }
    }

    fn mm(vmas: Vec<Vma>) -> MmImage {
        MmImage { vmas, pkeys: 1, ..MmImage::default() }
    }

    fn ranges(parent: Vec<Vma>, child: Vec<Vma>) -> Vec<(u64, u64)> {
        kept(&mm(parent), &mm(child)).iter().map(|part| (part.start, part.end)).collect()
    }

    #[test]
    fn what_overlaps_and_is_alike() {
        let parent = vec![anon(0x1000, 0x5000), file(0x6000, 0x9000, 0x1000)];
        assert_eq!(ranges(parent.clone(), parent.clone()), [(0x1000, 0x5000), (0x6000, 0x9000)]);
        // A heap that has grown, and a file of which the end is unmapped.
        let child = vec![anon(0x1000, 0x6000), file(0x7000, 0x8000, 0x2000)];
        assert_eq!(ranges(parent.clone(), child), [(0x1000, 0x5000), (0x7000, 0x8000)]);
        // The same file elsewhere in it, and other memory at the place.
        assert!(ranges(parent.clone(), vec![file(0x6000, 0x9000, 0)]).is_empty());
        assert!(ranges(parent.clone(), vec![anon(0x6000, 0x9000)]).is_empty());
        let shared = Vma { shared: true, ..anon(0x1000, 0x5000) };
        assert!(ranges(parent, vec![shared]).is_empty());
    }

    #[test]
    fn two_of_the_parents_in_one_of_the_childs() {
        let read_only = Vma { prot: 1, ..anon(0x3000, 0x4000) };
        let parent = vec![anon(0x1000, 0x3000), read_only, anon(0x5000, 0x6000)];
        let both = kept(&mm(parent), &mm(vec![anon(0x2000, 0x7000)]));
        assert_eq!(both.len(), 3);
        assert_eq!(both[1], Kept { start: 0x3000, end: 0x4000, prot: Some((3, 0)) });
        let rest = without(&anon(0x2000, 0x7000), &both);
        let rest: Vec<(u64, u64)> = rest.iter().map(|vma| (vma.start, vma.end)).collect();
        assert_eq!(rest, [(0x4000, 0x5000), (0x6000, 0x7000)]);
    }

    #[test]
    fn huge_pages_are_kept_as_they_are() {
        let huge = |page_shift, prot| {
            let vma = anon(0x4000_0000, 0x8000_0000);
            Vma { page_shift, prot, flags: VmaFlags::HUGETLB, ..vma }
        };
        let both = kept(&mm(vec![huge(21, 3)]), &mm(vec![huge(21, 1)]));
        assert_eq!(both, [Kept { start: 0x4000_0000, end: 0x8000_0000, prot: None }]);
        assert!(kept(&mm(vec![huge(21, 3)]), &mm(vec![huge(30, 3)])).is_empty());
    }

    #[test]
    fn a_file_goes_on_where_it_was_cut() {
        let whole = file(0x6000, 0x9000, 0x1000);
        let part = Kept { start: 0x6000, end: 0x7000, prot: None };
        let rest = without(&whole, &[part]);
        assert_eq!(rest, [file(0x7000, 0x9000, 0x2000)]);
    }
}
