//! A copy of a process' memory, as a target would have it.

use checkpoint::image::Vma;
use checkpoint::inventory::mappings;
use checkpoint::live::kinds::{Kind, huge_starts, kind};
use checkpoint::live::{Change, LiveError, Round, Tracker};
use checkpoint::sys::pagemap_scan::{IS_FILE, Scanner};
use checkpoint::tracee::{Memory, Tracee};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;

const PAGE: u64 = 4096;

/// Pages by their addresses. What is not in it is fresh memory, or the file's.
#[derive(Default)]
pub struct Model {
    pages: BTreeMap<u64, Vec<u8>>,
}

impl Model {
    pub fn apply(&mut self, change: Change<'_>) {
        match change {
            Change::Anew => self.pages.clear(),
            Change::Mappings(vmas) => {
                let mut gaps = vec![0];
                gaps.extend(vmas.iter().flat_map(|vma| [vma.start, vma.end]));
                gaps.push(u64::MAX);
                gaps.chunks_exact(2)
                    .filter(|gap| gap[0] < gap[1])
                    .for_each(|gap| self.drop_range(gap[0], gap[1]));
            }
            Change::Data { addr, bytes } => {
                assert!(!bytes.is_empty() && bytes.len() % PAGE as usize == 0 && bytes.len() <= 1 << 20);
                for (at, page) in (addr..).step_by(PAGE as usize).zip(bytes.chunks_exact(PAGE as usize)) {
                    self.pages.insert(at, page.to_vec());
                }
            }
            Change::Zero { addr, len } => {
                for at in (addr..addr + len).step_by(PAGE as usize) {
                    self.pages.insert(at, vec![0; PAGE as usize]);
                }
            }
            Change::Gone { addr, len } => self.drop_range(addr, addr + len),
        }
    }

    fn drop_range(&mut self, start: u64, end: u64) {
        let gone: Vec<u64> = self.pages.range(start..end).map(|(&at, _)| at).collect();
        gone.iter().for_each(|at| drop(self.pages.remove(at)));
    }

    pub fn round(&mut self, tracker: &mut Tracker) -> Result<Round, LiveError> {
        tracker.round(|change| {
            self.apply(change);
            Ok(())
        })
    }

    /// Takes the last changes from a frozen process, and compares every byte that it has.
    pub fn compare_frozen(&mut self, tracker: &mut Tracker) -> Result<Round, LiveError> {
        let frozen = Tracee::freeze(tracker.pid())?;
        let last = tracker.last(|change| {
            self.apply(change);
            Ok::<(), LiveError>(())
        });
        let compared = last.map(|round| (round, self.wrong_pages(&frozen)));
        frozen.thaw().expect("goes on");
        let (round, wrong) = compared?;
        assert!(wrong.is_empty(), "{} pages are wrong: {:?}", wrong.len(), &wrong[..wrong.len().min(20)]);
        Ok(round)
    }

    /// Pages of the tracked mappings that differ from the process' own, and pages that nobody has.
    pub fn wrong_pages(&self, frozen: &Tracee) -> Vec<String> {
        let pid = frozen.pid();
        // Not that which was opened before it stood: execve(2) may have come in between.
        let memory = Memory::of(pid).expect("opens");
        let text = fs::read(format!("/proc/{pid}/maps")).expect("maps");
        let vmas = mappings::read_quickly(pid).expect("maps");
        let huge = huge_starts(&text);
        let mut scanner = Scanner::open(pid).expect("pagemap");
        let mut wrong = Vec::new();
        let mut seen = BTreeSet::new();
        for vma in &vmas {
            let kind = kind(vma, huge.contains(&vma.start));
            if !matches!(kind, Kind::Anonymous | Kind::Own) {
                continue;
            }
            let file = (kind == Kind::Own)
                .then(|| File::open(format!("/proc/{pid}/map_files/{:x}-{:x}", vma.start, vma.end)).ok());
            let file = file.flatten();
            let found = scanner.occupied(vma.start, vma.end, true).expect("scans");
            let there = found.iter().flat_map(|region| (region.start..region.end).step_by(PAGE as usize));
            let mut look: BTreeSet<u64> = there.collect();
            look.extend(self.pages.range(vma.start..vma.end).map(|(&at, _)| at));
            for &at in &look {
                let categories = found.iter().find(|r| r.start <= at && at < r.end).map(|r| r.categories);
                let mut real = vec![0; PAGE as usize];
                if let Err(error) = memory.read(at, &mut real) {
                    // Behind the end of a file, where there is nothing.
                    let is_own = categories.is_some_and(|categories| categories & IS_FILE == 0);
                    if is_own || self.pages.contains_key(&at) {
                        wrong.push(format!("{at:x} cannot be read: {error}"));
                    }
                    continue;
                }
                let told = self.pages.get(&at).cloned();
                let told = told.unwrap_or_else(|| untold(vma, file.as_ref(), at));
                if told != real {
                    let whose = if self.pages.contains_key(&at) { "told" } else { "not told" };
                    wrong.push(format!("{at:x} {whose} {kind:?} categories {categories:?}"));
                }
            }
            seen.extend(look);
        }
        let besides = self.pages.keys().filter(|at| !seen.contains(at));
        wrong.extend(besides.map(|at| format!("{at:x} is of no mapping")));
        wrong
    }

    pub fn pages(&self) -> usize {
        self.pages.len()
    }
}

/// What is there of which nothing was told.
fn untold(vma: &Vma, file: Option<&File>, at: u64) -> Vec<u8> {
    let mut bytes = vec![0; PAGE as usize];
    if let (Some(file), checkpoint::image::Backing::File(mapped)) = (file, &vma.backing) {
        let offset = mapped.offset + (at - vma.start);
        let mut filled = 0;
        while let Ok(n @ 1..) = file.read_at(&mut bytes[filled..], offset + filled as u64) {
            filled += n;
        }
    }
    bytes
}
