//! The ring of an asynchronous I/O context (io_setup(2)), and requests that do nothing but move it on.
//!
//! The kernel keeps the place of the next event to itself (`kioctx.tail`, fs/aio.c): nobody can write it. It moves
//! with each request that is through, so requests that are through at once are submitted: polls of an eventfd that
//! can be read.
//!
//! They also tell what no file of `/proc` does: how many requests are in flight. A context has a fixed number of
//! places for requests. One is taken by every request, from when it is submitted until its event is seen to have been
//! taken from the ring. So places are taken until the kernel has none left (`EAGAIN`): those that were to be had are
//! the free ones, the events that wait are seen in the ring, and the rest is in flight. Then the ring is moved on
//! until it has come round, and what was in it is written into it again: it is as it was. That holds while
//! the process stands still, and if requests end meanwhile as well: their events are found among the others.
//!
//! Tried in vain: io_getevents(2) tells nothing of what is in flight; io_destroy(2) waits for it, and takes the
//! context; a request that is refused gives its place back at once.

use super::{Call, Tracee, TraceeError};
use crate::image::Vma;
use crate::sys::sched;
use std::time::{Duration, Instant};

/// `struct aio_ring` without its events, bytes.
const HEADER_LEN: u64 = 32;
/// `struct io_event`, bytes: data, the request's address, two results.
pub const EVENT_LEN: usize = 32;
/// `AIO_RING_MAGIC`.
const MAGIC: u32 = 0xa10a_10a1;
/// The largest ring that the kernel makes, bytes (ioctx_alloc).
const MAX_RING: u64 = 256 << 20;
/// Events of this ring that a request here is told by, with its address (`aio_data`).
const COOKIE: u64 = 0x6d69_676b_6169_6f21;
/// Of how many requests one call takes.
const AT_ONCE: usize = 512;
/// Offset of the request in the scratch area; the array of its addresses follows.
const ARRAY_AT: u64 = 64;
const _: () = assert!(ARRAY_AT as usize + 8 * AT_ONCE <= Tracee::SCRATCH_LEN);
/// How long requests in flight may take to end: what a disk is to do it has done by then.
const FLIGHT_LIMIT: Duration = Duration::from_millis(200);
/// Bound on the CPUs of a machine (`NR_CPUS`).
const MAX_CPUS: usize = 8192;

/// One event, as the kernel writes it.
pub type Event = [u8; EVENT_LEN];

/// Where a ring is, and how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ring {
    start: u64,
    /// How many events it has room for.
    slots: u32,
}

/// What is in a ring, and what is still to come.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Contents {
    /// The place of the oldest event.
    pub head: u32,
    /// Those that nobody has taken, oldest first.
    pub events: Vec<Event>,
    /// Requests that are in flight, at most: a place that belongs to a CPU where the process may not run looks as one.
    pub in_flight: u32,
}

impl Ring {
    /// That of a mapping, if it can be one.
    pub fn of(vma: &Vma) -> Option<Ring> {
        let length = vma.end.checked_sub(vma.start).filter(|length| (4096..=MAX_RING).contains(length))?;
        length
            .is_multiple_of(4096)
            .then_some(Ring { start: vma.start, slots: ((length - HEADER_LEN) / EVENT_LEN as u64) as u32 })
    }

    /// The context's id: the ring's address.
    pub fn context(self) -> u64 {
        self.start
    }

    /// How many events it has room for.
    pub fn slots(self) -> u32 {
        self.slots
    }

    /// The least number of requests for which io_setup(2) makes a ring of this length. It makes room for twice as many
    /// and two more, and uses the last page up (aio_setup_ring); for less than four times the machine's CPUs, for
    /// these.
    pub fn requests(self) -> u32 {
        let pages = (self.slots + 1) / (4096 / EVENT_LEN as u32);
        (64 * pages).saturating_sub(65).max(1)
    }

    /// How many requests it takes before it has no place left, if none is in it (ioctx_alloc): places are given to CPUs
    /// in batches, and what is left over is not given.
    fn capacity(self, cpus: u32) -> u32 {
        let places = self.slots - 1;
        let batch = (places / (cpus * 4)).max(1);
        places - places % batch
    }

    fn distance(self, from: u32, to: u32) -> u32 {
        ((u64::from(to) + u64::from(self.slots) - u64::from(from)) % u64::from(self.slots)) as u32
    }

    fn before(self, place: u32, count: usize) -> u32 {
        self.distance((count % self.slots as usize) as u32, place)
    }

    fn at(self, place: u32) -> u64 {
        self.start + HEADER_LEN + u64::from(place) * EVENT_LEN as u64
    }

    /// Head and tail. `None`: it is not as the kernel makes one.
    pub fn ends(self, tracee: &Tracee) -> Result<Option<(u32, u32)>, TraceeError> {
        let mut header = [0; HEADER_LEN as usize];
        tracee.read_mem(self.start, &mut header)?;
        let word = |n: usize| u32::from_le_bytes(header[4 * n..4 * n + 4].try_into().expect("four bytes"));
        // id, nr, head, tail, magic
        let (slots, head, tail) = (word(1), word(2), word(3));
        let fits = word(4) == MAGIC && slots == self.slots && head < slots && tail < slots;
        Ok(fits.then_some((head, tail)))
    }

    fn set_head(self, tracee: &Tracee, head: u32) -> Result<(), TraceeError> {
        tracee.write_mem(self.start + 8, &head.to_le_bytes())
    }

    /// The events from one place to another.
    fn events(self, tracee: &Tracee, from: u32, to: u32) -> Result<Vec<Event>, TraceeError> {
        let parts = if from <= to { [(from, to), (0, 0)] } else { [(from, self.slots), (0, to)] };
        let mut out = Vec::new();
        for (from, to) in parts {
            let mut bytes = vec![0; (to - from) as usize * EVENT_LEN];
            tracee.read_mem(self.at(from), &mut bytes)?;
            out.extend(
                bytes.chunks_exact(EVENT_LEN).map(|event| Event::try_from(event).expect("its length")),
            );
        }
        Ok(out)
    }

    fn write_events(self, tracee: &Tracee, from: u32, events: &[Event]) -> Result<(), TraceeError> {
        let (first, second) = events.split_at(events.len().min((self.slots - from) as usize));
        tracee.write_mem(self.at(from), first.as_flattened())?;
        tracee.write_mem(self.at(0), second.as_flattened())
    }

    /// What is in it. Requests in flight are given a moment to end. The process must stand still, and the context be
    /// its own; both are as they were afterwards.
    pub fn look(self, tracee: &mut Tracee) -> Result<Contents, TraceeError> {
        let (head, tail) = self.ends(tracee)?.ok_or(strange(tracee))?;
        let events = self.events(tracee, head, tail)?;
        let mut mover = Mover::begin(self, tracee, tail, events)?;
        let counted = mover.count_in_flight();
        let back = mover.come_round();
        let events = mover.end()?;
        back?;
        Ok(Contents { head, events, in_flight: counted? })
    }

    /// Brings a new ring to where the events are to be, and writes them.
    pub fn fill(self, tracee: &mut Tracee, contents: &Contents) -> Result<(), TraceeError> {
        let (_, tail) = self.ends(tracee)?.ok_or(strange(tracee))?;
        let mut mover = Mover::begin(self, tracee, tail, Vec::new())?;
        let filled = mover.move_to(contents.head).and_then(|()| mover.make_room_for(&contents.events));
        mover.end()?;
        filled
    }
}

fn strange(tracee: &Tracee) -> TraceeError {
    let what = "the ring of an asynchronous I/O context is not as the kernel makes it";
    TraceeError::Unfit { pid: tracee.pid(), what }
}

/// Moves a ring on.
struct Mover<'a> {
    ring: Ring,
    tracee: &'a mut Tracee,
    cpus: Cpus,
    /// An eventfd of the process.
    fd: i32,
    /// The tail as seen last.
    tail: u32,
    /// Events that are nobody else's to take, oldest first.
    events: Vec<Event>,
    /// Requests of ours that were submitted, and whose events were seen.
    sent: u64,
    seen: u64,
}

impl<'a> Mover<'a> {
    fn begin(
        ring: Ring,
        tracee: &'a mut Tracee,
        tail: u32,
        events: Vec<Event>,
    ) -> Result<Mover<'a>, TraceeError> {
        let fd = tracee.must(0, "eventfd", libc::SYS_eventfd2, [1, libc::EFD_CLOEXEC as u64, 0, 0, 0, 0])?;
        let cpus = Cpus::of(tracee.tid(0));
        let mover = Mover { ring, tracee, cpus, fd: fd as i32, tail, events, sent: 0, seen: 0 };
        let scratch = mover.tracee.scratch();
        let array = scratch.to_le_bytes().repeat(AT_ONCE);
        let written = mover.tracee.write_mem(scratch, &request(mover.fd));
        match written.and_then(|()| mover.tracee.write_mem(scratch + ARRAY_AT, &array)) {
            Ok(()) => Ok(mover),
            Err(error) => mover.end().and(Err(error)),
        }
    }

    /// Gives back the events that wait.
    fn end(self) -> Result<Vec<Event>, TraceeError> {
        self.cpus.give_back();
        self.tracee.must(0, "closing an eventfd", libc::SYS_close, [self.fd as u64, 0, 0, 0, 0, 0])?;
        Ok(self.events)
    }

    /// Submits so many requests at most, and gives how many places there were for them.
    fn submit(&mut self, count: u32) -> Result<u32, TraceeError> {
        let array = self.tracee.scratch() + ARRAY_AT;
        let call = |count: usize| {
            let args = [self.ring.context(), count as u64, array, 0, 0, 0];
            Call::may("io_submit", libc::SYS_io_submit, args)
        };
        let (whole, rest) = (count as usize / AT_ONCE, count as usize % AT_ONCE);
        let mut calls = vec![call(AT_ONCE); whole];
        calls.extend((rest > 0).then(|| call(rest)));
        let replies = self.tracee.batch(0, &calls)?;
        let taken = replies.iter().map(|reply| reply.value.max(0) as u32).sum();
        self.sent += u64::from(taken);
        self.look_at_new()?;
        Ok(taken)
    }

    /// Takes notice of what has come into the ring.
    fn look_at_new(&mut self) -> Result<(), TraceeError> {
        let (_, tail) = self.ring.ends(self.tracee)?.ok_or(strange(self.tracee))?;
        let ours = self.tracee.scratch();
        let new = self.ring.events(self.tracee, self.tail, tail)?;
        let before = self.events.len();
        self.events.extend(new.iter().filter(|event| !is_ours(event, ours)));
        self.seen += (new.len() + before - self.events.len()) as u64;
        self.tail = tail;
        match self.seen == self.sent {
            true => Ok(()),
            false => Err(strange(self.tracee)),
        }
    }

    /// Lets the kernel think that what is not to be kept was taken.
    fn forget_ours(&mut self) -> Result<(), TraceeError> {
        let head = self.ring.before(self.tail, self.events.len());
        self.ring.set_head(self.tracee, head)
    }

    /// Takes all places, and gives how many there were too few.
    fn count_in_flight(&mut self) -> Result<u32, TraceeError> {
        let capacity = u64::from(self.ring.capacity(possible_cpus()));
        let missing = |mover: &Self| capacity.checked_sub(mover.sent + mover.events.len() as u64);
        let mut round = self.cpus.round();
        loop {
            match missing(self) {
                Some(0) => return Ok(0),
                Some(places) => self.submit(places as u32)?,
                None => return Err(strange(self.tracee)),
            };
            if !round.next(&mut self.cpus) {
                break;
            }
        }
        let deadline = Instant::now() + FLIGHT_LIMIT;
        loop {
            self.look_at_new()?;
            let missing = missing(self).ok_or(strange(self.tracee))? as u32;
            if missing == 0 || Instant::now() > deadline {
                return Ok(missing);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Moves on until the tail is where it was, but for what has come meanwhile, and writes the events.
    fn come_round(&mut self) -> Result<(), TraceeError> {
        let slots = u64::from(self.ring.slots);
        let left = (slots - self.sent % slots) % slots;
        self.move_on(left as u32)?;
        self.write()
    }

    fn move_to(&mut self, place: u32) -> Result<(), TraceeError> {
        self.move_on(self.ring.distance(self.tail, place))
    }

    fn move_on(&mut self, mut left: u32) -> Result<(), TraceeError> {
        let mut round = self.cpus.round();
        while left > 0 {
            self.forget_ours()?;
            match self.submit(left)? {
                0 if !round.next(&mut self.cpus) => return Err(strange(self.tracee)),
                taken => left -= taken,
            }
        }
        self.forget_ours()
    }

    /// Makes as many events as these, and makes them these.
    fn make_room_for(&mut self, events: &[Event]) -> Result<(), TraceeError> {
        let mut round = self.cpus.round();
        let mut left = events.len() as u32;
        while left > 0 {
            left -= self.submit(left)?;
            if left > 0 && !round.next(&mut self.cpus) {
                let what = "an asynchronous I/O context holds more events than this machine has places for";
                return Err(TraceeError::Unfit { pid: self.tracee.pid(), what });
            }
        }
        self.events = events.to_vec();
        self.write()
    }

    fn write(&mut self) -> Result<(), TraceeError> {
        let head = self.ring.before(self.tail, self.events.len());
        self.ring.write_events(self.tracee, head, &self.events)?;
        self.ring.set_head(self.tracee, head)
    }
}

/// `struct iocb`: a poll of an eventfd.
fn request(fd: i32) -> [u8; 64] {
    const POLL: u16 = 5;
    let mut iocb = [0; 64];
    iocb[..8].copy_from_slice(&COOKIE.to_le_bytes());
    iocb[16..18].copy_from_slice(&POLL.to_le_bytes());
    iocb[20..24].copy_from_slice(&fd.to_le_bytes());
    iocb[24..32].copy_from_slice(&(libc::POLLIN as u64).to_le_bytes());
    iocb
}

fn is_ours(event: &Event, request: u64) -> bool {
    event[..8] == COOKIE.to_le_bytes() && event[8..16] == request.to_le_bytes()
}

/// Where a thread runs: each CPU has places of its own (`kioctx_cpu`).
struct Cpus {
    tid: i32,
    /// What it was allowed before, once that was changed.
    before: Option<Vec<u8>>,
}

/// Each CPU once.
struct Round {
    next: usize,
}

impl Cpus {
    fn of(tid: i32) -> Cpus {
        Cpus { tid, before: None }
    }

    fn round(&self) -> Round {
        Round { next: 0 }
    }

    fn go_to(&mut self, cpu: usize) -> bool {
        if self.before.is_none() {
            self.before = sched::affinity(self.tid).ok();
        }
        let mut one = vec![0; MAX_CPUS / 8];
        one[cpu / 8] = 1 << (cpu % 8);
        self.before.is_some() && sched::set_affinity(self.tid, &one).is_ok()
    }

    /// A thread that was allowed all CPUs of its control group is to have those that this gets later, too.
    fn give_back(&self) {
        let Some(before) = &self.before else { return };
        let all = sched::set_affinity(self.tid, &[u8::MAX; MAX_CPUS / 8]);
        if all.is_err() || sched::affinity(self.tid).as_ref() != Ok(before) {
            let _ = sched::set_affinity(self.tid, before);
        }
    }
}

impl Round {
    /// Goes to the next CPU where the thread may run. False: it was on all.
    fn next(&mut self, cpus: &mut Cpus) -> bool {
        let last = possible_range().min(MAX_CPUS);
        while self.next < last {
            self.next += 1;
            if cpus.go_to(self.next - 1) {
                return true;
            }
        }
        false
    }
}

/// `/sys/devices/system/cpu/possible`: ranges, as "0-3,8-11".
fn possible() -> Vec<(u32, u32)> {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/possible").unwrap_or_default();
    parse_ranges(text.trim())
}

fn parse_ranges(text: &str) -> Vec<(u32, u32)> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some((first.parse().ok()?, last.parse().ok()?))
    };
    text.split(',').filter_map(range).filter(|&(first, last): &(u32, u32)| first <= last).collect()
}

/// What the kernel counts (num_possible_cpus).
fn possible_cpus() -> u32 {
    possible().iter().map(|(first, last)| last - first + 1).sum::<u32>().max(1)
}

/// One more than the highest number of a CPU.
fn possible_range() -> usize {
    possible().iter().map(|&(_, last)| last as usize + 1).max().unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{Backing, PAGE_SHIFT, VmaFlags};

    fn ring(pages: u64) -> Ring {
        let vma = Vma {
            start: 0x10000,
            end: 0x10000 + pages * 4096,
            prot: 3,
            backing: Backing::Aio { id: 1 },
            shared: true,
            flags: VmaFlags::empty(),
            name: None,
            pkey: 0,
            page_shift: PAGE_SHIFT,
        };
        Ring::of(&vma).expect("one")
    }

    #[test]
    fn what_is_asked_for_a_length() {
        // As aio_setup_ring rounds.
        let pages = |requests: u64| (HEADER_LEN + EVENT_LEN as u64 * (2 * requests + 2)).div_ceil(4096);
        for n in 1..300 {
            let requests = u64::from(ring(n).requests());
            assert_eq!(pages(requests), n);
            assert!(requests == 1 || pages(requests - 1) == n - 1);
        }
    }

    #[test]
    fn places_go_round() {
        let ring = ring(1);
        assert_eq!((ring.slots, ring.capacity(2), ring.capacity(1000)), (127, 120, 126));
        assert_eq!((ring.distance(5, 3), ring.distance(3, 5), ring.before(2, 4)), (125, 2, 125));
    }

    #[test]
    fn ranges_of_cpus() {
        assert_eq!(parse_ranges("0-3,8,10-11"), [(0, 3), (8, 8), (10, 11)]);
        assert!(parse_ranges("").is_empty() && parse_ranges("3-1,x,-").is_empty());
    }
}
