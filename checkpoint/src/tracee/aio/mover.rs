//! Requests that do nothing but move a ring on.

use super::cpus::{Cpus, possible_cpus};
use super::note::Note;
use super::{Event, Ring, strange};
use crate::tracee::{Call, Tracee, TraceeError};
use std::time::{Duration, Instant};

/// By this (`aio_data`) and by its address a request of ours is known in the ring.
const COOKIE: u64 = 0x6d69_676b_6169_6f21;
/// How many requests one call submits.
const AT_ONCE: usize = 512;
/// Offset of the array of addresses in the scratch area; before it is the request.
const ARRAY_AT: u64 = 64;
/// Where they end.
pub const REQUESTS_LEN: usize = ARRAY_AT as usize + 8 * AT_ONCE;
/// How long requests in flight may take to end: what a disk is to do it has done by then.
const FLIGHT_LIMIT: Duration = Duration::from_millis(200);

/// Moves a ring on.
pub struct Mover<'a> {
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
    /// What is noted in the stub for who takes this up.
    note: Option<Note>,
}

impl<'a> Mover<'a> {
    pub fn begin(
        ring: Ring,
        tracee: &'a mut Tracee,
        tail: u32,
        events: Vec<Event>,
    ) -> Result<Mover<'a>, TraceeError> {
        let fd = tracee.must(0, "eventfd", libc::SYS_eventfd2, [1, libc::EFD_CLOEXEC as u64, 0, 0, 0, 0])?;
        let cpus = Cpus::of(tracee.tid(0));
        let mover = Mover { ring, tracee, cpus, fd: fd as i32, tail, events, sent: 0, seen: 0, note: None };
        let scratch = mover.tracee.scratch();
        let array = scratch.to_le_bytes().repeat(AT_ONCE);
        let written = mover.tracee.write_mem(scratch, &request(mover.fd));
        match written.and_then(|()| mover.tracee.write_mem(scratch + ARRAY_AT, &array)) {
            Ok(()) => Ok(mover),
            Err(error) => mover.end().and(Err(error)),
        }
    }

    /// Notes what has to be put back, before anything is moved.
    pub fn note_down(&mut self) -> Result<(), TraceeError> {
        let note = Note::of(self.ring, self.tail, self.fd, &self.cpus);
        self.note = Some(note.keep(self.tracee, &self.events)?);
        Ok(())
    }

    /// Goes on from what another one has noted; `None`: there is no note.
    pub fn take_up(tracee: &'a mut Tracee) -> Result<Option<Mover<'a>>, TraceeError> {
        let Some(note) = Note::read(tracee)? else { return Ok(None) };
        let (ring, ours) = (note.ring, tracee.scratch());
        let (_, tail) = ring.ends(tracee)?.ok_or(strange(tracee))?;
        let new = ring.events(tracee, note.tail, tail)?;
        let mut events = note.kept_events(tracee)?;
        let kept = events.len();
        events.extend(new.iter().filter(|event| !is_ours(event, ours)));
        // Nobody goes round more than once.
        let sent = (new.len() + kept - events.len()) as u64;
        let cpus = Cpus::that_had(tracee.tid(0), note.affinity.clone());
        let (fd, note) = (note.fd, Some(note));
        Ok(Some(Mover { ring, tracee, cpus, fd, tail, events, sent, seen: sent, note }))
    }

    /// Gives back the events that wait.
    pub fn end(self) -> Result<Vec<Event>, TraceeError> {
        self.cpus.give_back();
        if let Some(note) = &self.note {
            note.remove(self.tracee)?;
        }
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
    pub fn count_in_flight(&mut self) -> Result<u32, TraceeError> {
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
    pub fn come_round(&mut self) -> Result<(), TraceeError> {
        let slots = u64::from(self.ring.slots);
        let left = (slots - self.sent % slots) % slots;
        self.move_on(left as u32)?;
        self.write()
    }

    pub fn move_to(&mut self, place: u32) -> Result<(), TraceeError> {
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
    pub fn make_room_for(&mut self, events: &[Event]) -> Result<(), TraceeError> {
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
