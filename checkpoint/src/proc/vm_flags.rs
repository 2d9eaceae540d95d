//! What flags of mappings mean, without `smaps`: for that the kernel goes through the page tables of each mapping,
//! and writes out twenty lines that nobody wants.
//!
//! The numbers of the flags are the kernel's own and change with it. What the words mean is learned from
//! this program's own mappings, of which both are read: the same word is the same text, as that is made of
//! nothing else (`show_smap_vma_flags`, fs/proc/task_mmu.c). A process with a word that none of ours has is read
//! the long way.

use super::maps;
use crate::image::{Backing, Vma};
use crate::sys::bpf::{
    self,
    mappings::{self, Mapping},
};
use std::collections::BTreeMap;
use std::sync::OnceLock;

/// What `smaps` says of a mapping with a word.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Meaning {
    text: Vec<u8>,
    pkey: u8,
}

type Meanings = BTreeMap<u64, Meaning>;

static KNOWN: OnceLock<Meanings> = OnceLock::new();

/// Learns what the words mean, if the kernel lets itself be looked at.
pub fn prepare() {
    if bpf::prepare() {
        KNOWN.get_or_init(learn);
    }
}

/// Gives mappings that `maps` has told the flags that they have. `false`: they could not be told, and the
/// mappings are of no use.
pub fn complete(tid: i32, vmas: &mut [Vma]) -> bool {
    let Some(all) = mappings::look(tid) else { return false };
    let known = KNOWN.get_or_init(learn);
    let mut all = all.iter();
    vmas.iter_mut().filter(|vma| vma.backing != Backing::Vsyscall).all(|vma| {
        let mapping = all.next().filter(|mapping| (mapping.start, mapping.end) == (vma.start, vma.end));
        let Some(meaning) = mapping.and_then(|mapping| known.get(&mapping.flags)) else { return false };
        maps::apply_flags(vma, &meaning.text);
        vma.pkey = meaning.pkey;
        // Another protection: it was changed between the two looks.
        maps::protection(&meaning.text) == (vma.prot, vma.shared)
    })
}

/// Words by the first address of a mapping and the one past its last.
fn words_by_place(all: Vec<Mapping>) -> BTreeMap<(u64, u64), u64> {
    all.into_iter().map(|one| ((one.start, one.end), one.flags)).collect()
}

/// What the words of our own mappings mean.
fn learn() -> Meanings {
    let pid = std::process::id() as i32;
    let samples = mappings::Samples::map();
    let (before, smaps, after) = (mappings::look(pid), super::read(pid, "smaps"), mappings::look(pid));
    drop(samples);
    let (Some(before), Ok(smaps), Some(after)) = (before, smaps, after) else { return Meanings::new() };
    let (before, after) = (words_by_place(before), words_by_place(after));
    let mut known = Meanings::new();
    for (start, end, text, pkey) in maps::texts_of_flags(&smaps) {
        // How large their pages are the flags do not tell.
        let has_huge_pages = text.split(|&byte| byte == b' ').any(|flag| flag == b"ht");
        let word = before.get(&(start, end)).filter(|word| after.get(&(start, end)) == Some(word));
        if let (Some(&word), false) = (word, has_huge_pages) {
            known.insert(word, Meaning { text: text.to_vec(), pkey });
        }
    }
    known
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_as_smaps() {
        if !crate::sys::bpf::prepare() {
            return;
        }
        // Of a program that does nothing meanwhile.
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("it starts");
        let pid = child.id() as i32;
        std::thread::sleep(std::time::Duration::from_millis(200));
        let mut vmas = maps::parse(&crate::proc::read(pid, "maps").expect("maps"));
        let complete = complete(pid, &mut vmas);
        let smaps = maps::parse(&crate::proc::read(pid, "smaps").expect("smaps"));
        child.kill().expect("it is ours");
        child.wait().expect("it is ours");
        assert!(complete, "an ordinary program has nothing that we have not");
        assert_eq!(vmas, smaps);
    }

    #[test]
    fn what_is_not_known_is_told() {
        crate::sys::bpf::prepare();
        assert!(!complete(i32::MAX, &mut []));
    }
}
