//! Rounds over a running process.

use super::attach::{Stray, attach};
use super::convergence::Measured;
use super::identity::{self, Identity};
use super::in_flight;
use super::kinds::{Kind, Untracked, huge_starts, kind};
use super::reader::{Page, Reader};
use super::{Change, LiveError};
use crate::image::Vma;
use crate::inventory::mappings;
use crate::proc;
use crate::sys::pagemap_scan::{IS_PFNZERO, IS_SWAPPED, Part, Region, Scanner};
use crate::sys::userfaultfd::Tracking;
use crate::tracee::TraceeError;
use nix::errno::Errno;
use std::time::{Duration, Instant};

const PAGE: u64 = 4096;
/// Looked at by one call, bytes: the process cannot change its mappings meanwhile. Whole huge pages, or the kernel
/// would split them.
const WINDOW: u64 = 256 << 20;
/// Nothing of a process is above (arch/x86/include/asm/page_64_types.h, `TASK_SIZE_MAX`).
const TOP: u64 = 0x7fff_ffff_f000;
/// Executed programs that a round may run after.
const MAX_RESTARTS: u32 = 16;
/// Mappings that may come in the place of another while one window is looked at.
const MAX_REPLACED: u32 = 8;
/// Ranges that are remembered one by one; if there are more, everything is dirty in the next round.
const MAX_UNSETTLED: usize = 4096;

/// What a round was.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Round {
    /// From 1.
    pub number: u32,
    /// Pages with contents.
    pub data_pages: u64,
    /// Pages that are zero.
    pub zero_pages: u64,
    /// Ranges that were told as gone.
    pub gone_ranges: u64,
    /// Mappings that cannot be tracked.
    pub untracked: Vec<Untracked>,
    /// Ranges whose contents the rounds have told, in rising order: starts and ends.
    pub carried: Vec<(u64, u64)>,
    /// The process has executed another program since the last round.
    pub anew: bool,
    /// How long it took, with whatever was done with the changes.
    pub took: Duration,
}

impl Round {
    /// Pages that were given.
    pub fn pages(&self) -> u64 {
        self.data_pages + self.zero_pages
    }

    /// Pages of mappings that cannot be tracked, whether they are there or not.
    pub fn untracked_pages(&self) -> u64 {
        self.untracked.iter().map(|mapping| (mapping.end - mapping.start) / PAGE).sum()
    }

    /// For [`Rule::judge`](super::convergence::Rule::judge).
    pub fn measured(&self) -> Measured {
        Measured { pages: self.pages(), took: self.took }
    }
}

/// What is done with the pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Look {
    /// The process runs: dirty pages are armed again.
    Arm,
    /// It is frozen: nothing is armed.
    Last,
}

/// All that belongs to the memory of one program.
struct Watch {
    tracking: Tracking,
    scanner: Scanner,
    reader: Reader,
    identity: Identity,
}

/// Tracks one process from outside.
///
/// Its end, by [`Tracker::stop`], a drop, or the death of who has it, leaves nothing in the process.
pub struct Tracker {
    pid: i32,
    watch: Watch,
    stray: Option<Stray>,
    rounds: u32,
    /// The last round has begun anew, and no target has heard of it yet.
    anew: bool,
    /// Ranges that were armed, and could not be read or may be written unseen ([`in_flight`]): dirty, whatever the
    /// page table says.
    unsettled: Vec<(u64, u64)>,
    /// There were too many of them.
    distrust: bool,
}

/// One look at all mappings.
struct Pass<'a, F> {
    pid: i32,
    look: Look,
    watch: &'a mut Watch,
    unsettled: &'a mut Vec<(u64, u64)>,
    /// All pages count as dirty.
    distrust: bool,
    /// Where registering has to stop ([`fences`]), in rising order.
    fences: Vec<(u64, u64)>,
    round: Round,
    each: F,
}

impl Tracker {
    /// Begins to track a process, which must not be frozen by the caller. Nothing is armed yet.
    pub fn start(pid: i32) -> Result<Tracker, LiveError> {
        let (watch, stray) = watch(pid)?;
        Ok(Tracker { pid, watch, stray, rounds: 0, anew: false, unsettled: Vec::new(), distrust: false })
    }

    /// Whose memory it is.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Looks so far, with those at the frozen process.
    pub fn rounds(&self) -> u32 {
        self.rounds
    }

    /// One round: calls `each` with what has changed since the last one; all that there is, in the first.
    ///
    /// An error of `each` ends it, and the tracker: what was not told is not told again.
    pub fn round<E: From<LiveError>>(
        &mut self,
        each: impl FnMut(Change<'_>) -> Result<(), E>,
    ) -> Result<Round, E> {
        let began = Instant::now();
        self.follow()?;
        if let Some(stray) = self.stray.take() {
            self.stray = stray.sweep(self.pid, &self.watch.tracking);
        }
        self.pass(Look::Arm, began, each)
    }

    /// The last look, at a process that the caller has frozen: what has changed since the last round.
    pub fn last<E: From<LiveError>>(
        &mut self,
        each: impl FnMut(Change<'_>) -> Result<(), E>,
    ) -> Result<Round, E> {
        let began = Instant::now();
        if Identity::of(self.pid)? != self.watch.identity {
            // Nothing can be made in a frozen process, and nothing is needed: all of it is new.
            let watch = &mut self.watch;
            watch.scanner = open_scanner(self.pid)?;
            watch.reader = Reader::of(proc::face(self.pid)).map_err(LiveError::from)?;
            (self.anew, self.distrust) = (true, true);
        }
        self.pass(Look::Last, began, each)
    }

    /// Begins anew if the process has executed another program.
    fn follow(&mut self) -> Result<(), LiveError> {
        for _ in 0..MAX_RESTARTS {
            if Identity::of(self.pid)? == self.watch.identity {
                return Ok(());
            }
            match watch(self.pid) {
                Ok((watch, stray)) => (self.watch, self.stray) = (watch, stray),
                // In the middle of the next execve(2), which ends threads.
                Err(LiveError::Ended { .. } | LiveError::Tracee(TraceeError::Died { .. }))
                    if identity::lives(self.pid) => {}
                Err(error) => return Err(error),
            }
            self.unsettled.clear();
            self.anew = true;
        }
        Err(LiveError::Restless { pid: self.pid })
    }

    fn pass<E: From<LiveError>>(
        &mut self,
        look: Look,
        began: Instant,
        mut each: impl FnMut(Change<'_>) -> Result<(), E>,
    ) -> Result<Round, E> {
        let text = identity::read(self.pid, "maps")?;
        let vmas = mappings::of_text(self.pid, &text).map_err(LiveError::proc("maps", self.pid))?;
        self.rounds += 1;
        let round = Round { number: self.rounds, anew: self.anew, ..Round::default() };
        if std::mem::take(&mut self.anew) {
            each(Change::Anew)?;
        }
        each(Change::Mappings(&vmas))?;
        let dirty = merged(std::mem::take(&mut self.unsettled));
        let distrust = std::mem::take(&mut self.distrust);
        let huge = huge_starts(&text);
        let kind_of = |vma: &Vma| kind(vma, huge.binary_search(&vma.start).is_ok());
        let fences = fences(&vmas, kind_of);
        let (pid, watch, unsettled) = (self.pid, &mut self.watch, &mut self.unsettled);
        let mut pass = Pass { pid, look, watch, unsettled, distrust, fences, round, each };
        for (start, end) in dirty {
            pass.unsettled_before(start, end)?;
        }
        for vma in &vmas {
            pass.mapping(vma, kind_of(vma))?;
        }
        let mut round = pass.round;
        if self.unsettled.len() > MAX_UNSETTLED {
            self.unsettled.clear();
            self.distrust = true;
        }
        round.took = began.elapsed();
        Ok(round)
    }

    /// Ends it while the process runs on: disarms bit by bit, so that the process does not have to wait for the
    /// kernel to do it in one go (30 ms a GiB).
    pub fn stop(mut self) {
        if let Some(stray) = self.stray.take() {
            stray.sweep(self.pid, &self.watch.tracking);
        }
        let maps = proc::read(proc::face(self.pid), "maps").unwrap_or_default();
        for vma in proc::maps::parse(&maps) {
            for start in (vma.start..vma.end).step_by(WINDOW as usize) {
                // What is not registered needs nothing; and the end of the descriptor does all that is left.
                let _ = self.watch.tracking.disarm(start, vma.end.min(start + WINDOW));
            }
        }
    }
}

fn watch(pid: i32) -> Result<(Watch, Option<Stray>), LiveError> {
    // Before: a program that is executed meanwhile is noticed in the next round.
    let identity = Identity::of(pid)?;
    let (tracking, stray) = attach(pid)?;
    let stray = stray.and_then(|stray| stray.sweep(pid, &tracking));
    let (scanner, reader) = (open_scanner(pid)?, Reader::of(proc::face(pid))?);
    Ok((Watch { tracking, scanner, reader, identity }, stray))
}

/// Mappings that are not registered.
///
/// What is between two of them is registered in one go, with the room that is free: the process changes its mappings
/// meanwhile, and to register a part of one makes two of it, which mremap(2) refuses to move together.
fn fences(vmas: &[Vma], kind_of: impl Fn(&Vma) -> Kind) -> Vec<(u64, u64)> {
    let left = vmas.iter().filter(|vma| kind_of(vma) == Kind::Left);
    left.map(|vma| (vma.start, vma.end)).collect()
}

/// Ranges in rising order, those that touch as one.
fn merged(mut ranges: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    ranges.sort_unstable();
    ranges.dedup_by(|next, before| {
        let touches = next.0 <= before.1;
        if touches {
            before.1 = before.1.max(next.1);
        }
        touches
    });
    ranges
}

fn open_scanner(pid: i32) -> Result<Scanner, LiveError> {
    Scanner::open(proc::face(pid)).map_err(LiveError::proc("pagemap", pid))
}

/// What came of an attempt to register.
enum Registered {
    Yes,
    /// Nothing is mapped there any more.
    Unmapped,
    No(&'static str),
}

impl<E: From<LiveError>, F: FnMut(Change<'_>) -> Result<(), E>> Pass<'_, F> {
    fn mapping(&mut self, vma: &Vma, kind: Kind) -> Result<(), E> {
        match kind {
            // `[vsyscall]`, which is above all that a process can have.
            _ if vma.start >= TOP => Ok(()),
            Kind::Anonymous => self.windows(vma.start, vma.end, false),
            Kind::Own => self.windows(vma.start, vma.end, true),
            Kind::Left => self.gone(vma.start, vma.end),
            Kind::Untracked(why) => self.untracked(vma.start, vma.end, why),
        }
    }

    fn carried(&mut self, start: u64, end: u64) {
        match self.round.carried.last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            _ if start < end => self.round.carried.push((start, end)),
            _ => {}
        }
    }

    fn untracked(&mut self, start: u64, end: u64, why: &'static str) -> Result<(), E> {
        self.round.untracked.push(Untracked { start, end, why });
        self.gone(start, end)
    }

    fn gone(&mut self, addr: u64, end: u64) -> Result<(), E> {
        self.round.gone_ranges += 1;
        (self.each)(Change::Gone { addr, len: end - addr })
    }

    /// Looks at a mapping, a window at a time; registers it first if it is new.
    fn windows(&mut self, start: u64, end: u64, own: bool) -> Result<(), E> {
        let mut at = start;
        // Once something of it was new, all of it counts as new: before Linux 6.13 pages that were moved by mremap(2)
        // look armed.
        let mut fresh = self.distrust;
        let mut replaced = 0;
        while at < end {
            let part = Part { start: at, end: end.min((at + WINDOW) / WINDOW * WINDOW), own };
            let looked = match (self.look, own) {
                (Look::Arm, _) => self.arm(part, fresh),
                (Look::Last, false) if !fresh => self.last_of_anonymous(part),
                (Look::Last, _) => self.all_of(part, fresh),
            };
            match looked {
                Ok(until) => (at, replaced) = (until, 0),
                Err(Failure::Each(error)) => return Err(error),
                Err(Failure::Scan(Errno::EPERM)) if self.look == Look::Last => fresh = true,
                Err(Failure::Scan(Errno::EPERM)) if replaced < MAX_REPLACED => {
                    fresh = true;
                    replaced += 1;
                    match self.register(at, end)? {
                        Registered::Yes => {}
                        Registered::Unmapped => at = part.end,
                        Registered::No(why) => {
                            self.carried(start, at);
                            return self.untracked(at, end, why);
                        }
                    }
                }
                // Always another mapping there: it stays unregistered, and so is all new in the next round.
                Err(Failure::Scan(Errno::EPERM)) => (at, replaced) = (part.end, 0),
                Err(Failure::Scan(Errno::EOPNOTSUPP)) => {
                    self.carried(start, at);
                    return self.untracked(at, end, "pages larger than the kernel can track");
                }
                // The memory is gone, as the next round finds.
                Err(Failure::Scan(Errno::ESRCH)) => return Ok(()),
                Err(Failure::Scan(errno)) => return Err(self.failed("PAGEMAP_SCAN", at, errno)),
            }
        }
        self.carried(start, end);
        Ok(())
    }

    fn failed(&self, operation: &'static str, addr: u64, errno: Errno) -> E {
        match errno {
            Errno::ESRCH => LiveError::Ended { pid: self.pid },
            errno => LiveError::Kernel { operation, addr, pid: self.pid, errno },
        }
        .into()
    }

    /// Registers a mapping, with all that is between the fences around it.
    fn register(&mut self, start: u64, end: u64) -> Result<Registered, E> {
        let after = self.fences.partition_point(|fence| fence.0 <= start);
        let from = if after == 0 { PAGE } else { self.fences[after - 1].1 };
        let to = self.fences.get(after).map_or(TOP, |fence| fence.0.min(TOP));
        if self.watch.tracking.register(from, to).is_ok() {
            return Ok(Registered::Yes);
        }
        match self.watch.tracking.register(start, end) {
            Ok(()) => Ok(Registered::Yes),
            // The memory is gone: another program runs, as the next round finds, or none.
            Err(Errno::EINVAL | Errno::ENOMEM | Errno::ESRCH) => Ok(Registered::Unmapped),
            Err(Errno::EBUSY) => Ok(Registered::No("registered with the program's own userfaultfd")),
            Err(Errno::EPERM) => Ok(Registered::No("shared memory that it may not write to")),
            Err(errno) => Err(self.failed("UFFDIO_REGISTER", start, errno)),
        }
    }

    /// Dirty pages of a part, armed again, and what of it is gone.
    fn arm(&mut self, part: Part, fresh: bool) -> Result<u64, Failure<E>> {
        let scanner = &mut self.watch.scanner;
        let (found, until) = if fresh { scanner.arm_all(part)? } else { scanner.rearm(part)? };
        let dirty = found.to_vec();
        let looked = Part { end: until, ..part };
        if part.own {
            self.all_of_looked(looked, false)?;
        } else {
            self.gone_of_anonymous(looked)?;
        }
        if !dirty.is_empty() {
            self.note_in_flight(looked);
        }
        self.give(&dirty)?;
        Ok(until)
    }

    /// After pages were armed, and before they are read.
    fn note_in_flight(&mut self, part: Part) {
        let ranges = in_flight::ranges(proc::face(self.pid)).into_iter();
        let inside = ranges.map(|(start, end)| (start.max(part.start), end.min(part.end)));
        let room = (MAX_UNSETTLED + 1).saturating_sub(self.unsettled.len());
        self.unsettled.extend(inside.filter(|(start, end)| start < end).take(room));
    }

    /// What of armed anonymous memory is not there.
    fn gone_of_anonymous(&mut self, part: Part) -> Result<(), Failure<E>> {
        let mut at = part.start;
        while at < part.end {
            let (found, until) = match self.watch.scanner.absent(Part { start: at, ..part }) {
                Ok((found, until)) => (found.to_vec(), until),
                // Replaced meanwhile: new in the next round.
                Err(Errno::EPERM) => return Ok(()),
                Err(errno) => return Err(Failure::Scan(errno)),
            };
            for region in found.iter().filter(|region| !region.is_there()) {
                self.gone(region.start, region.end).map_err(Failure::Each)?;
            }
            at = until;
        }
        Ok(())
    }

    /// Of frozen anonymous memory: dirty pages, and what is gone.
    fn last_of_anonymous(&mut self, part: Part) -> Result<u64, Failure<E>> {
        let (found, until) = self.watch.scanner.written_or_absent(part)?;
        let found = found.to_vec();
        for region in found.iter().filter(|region| !region.is_there()) {
            self.gone(region.start, region.end).map_err(Failure::Each)?;
        }
        let dirty: Vec<Region> = found.into_iter().filter(Region::is_there).collect();
        self.give(&dirty)?;
        Ok(until)
    }

    /// Of a frozen process: dirty pages and what is gone, where only a look at all pages tells.
    fn all_of(&mut self, part: Part, fresh: bool) -> Result<u64, Failure<E>> {
        if !fresh {
            // Tells too whether it is registered.
            let (found, until) = self.watch.scanner.written(part)?;
            let (dirty, looked) = (found.to_vec(), Part { end: until, ..part });
            self.all_of_looked(looked, false)?;
            self.give(&dirty)?;
            return Ok(until);
        }
        self.all_of_looked(part, true)?;
        Ok(part.end)
    }

    /// All pages that there are: what is between them is gone. `fresh`: they are dirty. Else only what is in swap is:
    /// a page of a file that was dropped and one that was swapped out look the same (`pte_marker`).
    fn all_of_looked(&mut self, part: Part, fresh: bool) -> Result<(), Failure<E>> {
        let (mut at, mut told) = (part.start, part.start);
        while at < part.end {
            let (found, until) = self.watch.scanner.present(Part { start: at, ..part })?;
            let found = found.to_vec();
            for region in &found {
                if region.start > told {
                    self.gone(told, region.start).map_err(Failure::Each)?;
                }
                told = region.end;
            }
            let is_dirty = |region: &&Region| fresh || region.categories & IS_SWAPPED != 0;
            let dirty: Vec<Region> = found.iter().filter(is_dirty).copied().collect();
            self.give(&dirty)?;
            at = until;
        }
        if told < part.end {
            self.gone(told, part.end).map_err(Failure::Each)?;
        }
        Ok(())
    }

    /// What the last round has armed and not settled.
    fn unsettled_before(&mut self, start: u64, end: u64) -> Result<(), E> {
        let mut at = start;
        while at < end {
            let part = Part { start: at, end: end.min(at + WINDOW), own: false };
            let found = match self.look {
                Look::Arm => self.watch.scanner.arm_all(part),
                Look::Last => self.watch.scanner.present(part),
            };
            // Not registered any more: it is new as a whole, or unmapped.
            let Ok((found, until)) = found else { return Ok(()) };
            let found = found.to_vec();
            if self.look == Look::Arm {
                self.note_in_flight(Part { end: until, ..part });
            }
            self.give(&found).map_err(|failure| match failure {
                Failure::Each(error) => error,
                Failure::Scan(errno) => self.failed("PAGEMAP_SCAN", at, errno),
            })?;
            at = until;
        }
        Ok(())
    }

    /// Reads pages and tells their contents.
    fn give(&mut self, dirty: &[Region]) -> Result<(), Failure<E>> {
        let Pass { pid, look, watch, unsettled, round, each, .. } = self;
        let mut page = |page: Page<'_>| match page {
            Page::Data(addr, bytes) => {
                round.data_pages += bytes.len() as u64 / PAGE;
                each(Change::Data { addr, bytes })
            }
            Page::Unread(addr, errno) if *look == Look::Last => {
                Err(LiveError::Unreadable { addr, pid: *pid, errno }.into())
            }
            Page::Unread(addr, _) => {
                if unsettled.len() <= MAX_UNSETTLED {
                    unsettled.push((addr, addr + PAGE));
                }
                Ok(())
            }
        };
        let mut zeros = Vec::new();
        for region in dirty {
            match region.categories & IS_PFNZERO {
                0 => watch.reader.add(region.start, region.end, &mut page).map_err(Failure::Each)?,
                _ => zeros.push(*region),
            }
        }
        watch.reader.flush(&mut page).map_err(Failure::Each)?;
        for Region { start, end, .. } in zeros {
            self.round.zero_pages += (end - start) / PAGE;
            (self.each)(Change::Zero { addr: start, len: end - start }).map_err(Failure::Each)?;
        }
        Ok(())
    }
}

/// Why a part could not be looked at.
enum Failure<E> {
    Scan(Errno),
    Each(E),
}

impl<E> From<Errno> for Failure<E> {
    fn from(errno: Errno) -> Failure<E> {
        Failure::Scan(errno)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::live::kinds::Untracked;

    #[test]
    fn ranges_that_touch_are_one() {
        assert_eq!(merged(vec![(5, 7), (1, 3), (3, 4), (6, 9), (1, 2)]), [(1, 4), (5, 9)]);
        assert!(merged(Vec::new()).is_empty());
    }

    #[test]
    fn a_round_tells_what_is_untracked() {
        let untracked = vec![Untracked { start: 0x1000, end: 0x4000, why: "" }];
        assert_eq!(Round { untracked, ..Round::default() }.untracked_pages(), 3);
    }
}
