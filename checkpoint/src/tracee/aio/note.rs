//! What is noted in the stub while a ring is moved, for whoever finds the process when this program was killed
//! ([`recover`](crate::tracee::recover)): the ring, the events that wait, and what was made for it.

use super::cpus::{Cpus, MAX_CPUS};
use super::mover::REQUESTS_LEN;
use super::{EVENT_LEN, Event, MAX_RING, Ring, strange};
use crate::tracee::{Call, Tracee, TraceeError};

/// By this a note is known.
const MAGIC: u64 = 0x6d69_676b_6e6f_7465;
/// Its words: magic, ring, places, tail, descriptor, where the events are kept and how many, bytes of the affinity.
const WORDS: usize = 8;
/// Words and affinity, bytes.
const NOTE_LEN: usize = 8 * WORDS + MAX_CPUS / 8;
const _: () = assert!(REQUESTS_LEN + NOTE_LEN <= Tracee::SCRATCH_LEN);

/// What has to be put back.
pub struct Note {
    pub ring: Ring,
    /// The tail before anything was moved.
    pub tail: u32,
    /// The eventfd.
    pub fd: i32,
    /// What the thread is allowed.
    pub affinity: Vec<u8>,
    /// A mapping with the events, 0 if there are none, and how many.
    kept: (u64, u64),
}

impl Note {
    pub fn of(ring: Ring, tail: u32, fd: i32, cpus: &Cpus) -> Note {
        let mut affinity = cpus.allowed();
        affinity.truncate(MAX_CPUS / 8);
        Note { ring, tail, fd, affinity, kept: (0, 0) }
    }

    fn at(tracee: &Tracee) -> u64 {
        tracee.scratch() + REQUESTS_LEN as u64
    }

    /// Writes it down, with the events.
    pub fn keep(mut self, tracee: &mut Tracee, events: &[Event]) -> Result<Note, TraceeError> {
        if !events.is_empty() {
            let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
            let prot = (libc::PROT_READ | libc::PROT_WRITE) as u64;
            let args = [0, size_of_val(events) as u64, prot, flags, u64::MAX, 0];
            let made = tracee.must(0, "mmap", libc::SYS_mmap, args)? as u64;
            self.kept = (made, events.len() as u64);
            tracee.write_mem(made, events.as_flattened())?;
        }
        let Note { ring, tail, fd, .. } = self;
        let (place, count) = self.kept;
        let length = self.affinity.len() as u64;
        let words = [MAGIC, ring.start, ring.slots.into(), tail.into(), fd as u64, place, count, length];
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.extend_from_slice(&self.affinity);
        tracee.write_mem(Note::at(tracee), &bytes)?;
        Ok(self)
    }

    /// That of an earlier tracer. It is in memory that the program could have written.
    pub fn read(tracee: &Tracee) -> Result<Option<Note>, TraceeError> {
        let mut bytes = [0; NOTE_LEN];
        tracee.read_mem(Note::at(tracee), &mut bytes)?;
        let word = |n: usize| u64::from_le_bytes(bytes[8 * n..8 * n + 8].try_into().expect("eight bytes"));
        let (slots, tail, count, length) = (word(2), word(3), word(6), word(7) as usize);
        let fits = tail < slots && count < slots && slots <= MAX_RING / EVENT_LEN as u64;
        if word(0) != MAGIC || !fits || length > MAX_CPUS / 8 {
            return Ok(None);
        }
        let ring = Ring { start: word(1), slots: slots as u32 };
        let affinity = bytes[8 * WORDS..8 * WORDS + length].to_vec();
        Ok(Some(Note { ring, tail: tail as u32, fd: word(4) as i32, affinity, kept: (word(5), count) }))
    }

    pub fn kept_events(&self, tracee: &Tracee) -> Result<Vec<Event>, TraceeError> {
        let mut bytes = vec![0; self.kept.1 as usize * EVENT_LEN];
        tracee.read_mem(self.kept.0, &mut bytes)?;
        let events: Result<Vec<Event>, _> = bytes.chunks_exact(EVENT_LEN).map(Event::try_from).collect();
        events.map_err(|_| strange(tracee))
    }

    /// All is as it was.
    pub fn remove(&self, tracee: &mut Tracee) -> Result<(), TraceeError> {
        tracee.write_mem(Note::at(tracee), &[0; 8])?;
        let (place, count) = self.kept;
        let args = [place, count * EVENT_LEN as u64, 0, 0, 0, 0];
        if count > 0 {
            tracee.must_all(0, &[Call::must("munmap", libc::SYS_munmap, args)])?;
        }
        Ok(())
    }
}
