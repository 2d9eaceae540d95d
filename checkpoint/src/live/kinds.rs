//! What can be tracked, and how its page table has to be read.

use crate::image::{Backing, Vma};

/// What a mapping is to the tracker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Ordinary private anonymous memory: the kernel tells cheaply what is gone.
    Anonymous,
    /// Private pages of a file mapping, or huge pages (hugetlb): all pages are asked for to find what is gone.
    Own,
    /// Nothing of it is carried as memory: the vDSO, what belongs to a file, a device.
    Left,
    /// It cannot be tracked.
    Untracked(&'static str),
}

/// A mapping that counts as dirty as a whole in each round: the final dump carries it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Untracked {
    /// First address.
    pub start: u64,
    /// One past the last.
    pub end: u64,
    /// Why.
    pub why: &'static str,
}

/// A page of shared memory is dirty in the page table of who wrote to it, and in no other (write(2) to a memfd leaves
/// no trace in any): one process' tracker cannot vouch for it.
const SHARED: &str = "shared memory: others may write to it unseen";

/// Of one mapping. `huge`: it is anonymous memory of huge pages (hugetlb).
pub fn kind(vma: &Vma, huge: bool) -> Kind {
    match &vma.backing {
        Backing::Anon if huge => Kind::Own,
        Backing::Anon => Kind::Anonymous,
        Backing::SharedAnon { .. } | Backing::Object { .. } => Kind::Untracked(SHARED),
        Backing::File(file) if file.path.starts_with(b"/dev/") && !file.path.starts_with(b"/dev/shm/") => {
            Kind::Left
        }
        // A name that leads to it somewhere else too does not.
        Backing::File(file) if vma.shared && file.deleted => Kind::Untracked(SHARED),
        Backing::File(_) if vma.shared => Kind::Left,
        Backing::File(_) => Kind::Own,
        Backing::Vdso | Backing::Vvar | Backing::Vsyscall | Backing::Aio { .. } => Kind::Left,
    }
}

/// Where in the text of `maps` anonymous huge pages begin; `smaps`, which says it, takes ten times as long.
pub fn huge_starts(maps: &[u8]) -> Vec<u64> {
    const NAME: &[u8] = b"/anon_hugepage (deleted)";
    let line_of = |at: usize| {
        let begin = maps[..at].iter().rposition(|&byte| byte == b'\n').map_or(0, |newline| newline + 1);
        &maps[begin..at]
    };
    let start = |line: &[u8]| {
        let text = std::str::from_utf8(line).ok()?;
        u64::from_str_radix(text.split_once('-')?.0, 16).ok()
    };
    memchr::memmem::find_iter(maps, NAME).filter_map(|at| start(line_of(at))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn huge_pages_are_found_by_their_name() {
        let maps =
            b"1000-2000 rw-p 0 00:00 0 \n200000-400000 rw-p 00000000 00:11 7   /anon_hugepage (deleted)\n\
                     600000-800000 rw-s 00000000 00:11 8   /anon_hugepage (deleted)\n";
        assert_eq!(huge_starts(maps), [0x20_0000, 0x60_0000]);
        assert!(huge_starts(b"/anon_hugepage (deleted)").is_empty());
    }

    #[test]
    fn each_mapping_has_its_kind() {
        let text = b"1000-2000 rw-p 00000000 00:00 0   [heap]\n2000-3000 r-xp 00000000 fe:01 7   /no/such\n\
                     3000-4000 rw-s 00000000 00:01 9   /dev/zero (deleted)\n4000-5000 rw-s 0 fe:01 8   /no/file\n\
                     5000-6000 rw-s 0 00:05 8   /dev/mem\n6000-7000 r-xp 0 00:00 0   [vdso]\n\
                     7000-8000 rw-s 0 00:01 3   /memfd:x (deleted)\n";
        let vmas = crate::inventory::mappings::of_text(std::process::id() as i32, text).expect("parses");
        let kinds: Vec<Kind> = vmas.iter().map(|vma| kind(vma, false)).collect();
        let shared = Kind::Untracked(SHARED);
        // `/no/file` is not there: it counts as deleted.
        assert_eq!(kinds, [Kind::Anonymous, Kind::Own, shared, shared, Kind::Left, Kind::Left, shared]);
        assert_eq!(kind(&vmas[0], true), Kind::Own);
    }
}
