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
//! What has to be put back if this program is killed meanwhile is noted in the stub ([`note`]).
//!
//! Tried in vain: io_getevents(2) tells nothing of what is in flight; io_destroy(2) waits for it, and takes the
//! context; a request that is refused gives its place back at once.

mod cpus;
mod mover;
mod note;

use super::{Tracee, TraceeError};
use crate::image::Vma;
use mover::Mover;

/// `struct aio_ring` without its events, bytes.
const HEADER_LEN: u64 = 32;
/// `struct io_event`, bytes: data, the request's address, two results.
pub const EVENT_LEN: usize = 32;
/// `AIO_RING_MAGIC`.
const MAGIC: u32 = 0xa10a_10a1;
/// The largest ring that the kernel makes, bytes (ioctx_alloc).
const MAX_RING: u64 = 256 << 20;
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
        let counted = mover.note_down().and_then(|()| mover.count_in_flight());
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

/// Goes on where a tracer was killed while it looked at a ring of this process.
pub fn put_back(tracee: &mut Tracee) -> Result<(), TraceeError> {
    let Some(mut mover) = Mover::take_up(tracee)? else { return Ok(()) };
    let back = mover.come_round();
    mover.end()?;
    back
}

fn strange(tracee: &Tracee) -> TraceeError {
    let what = "the ring of an asynchronous I/O context is not as the kernel makes it";
    TraceeError::Unfit { pid: tracee.pid(), what }
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
}
