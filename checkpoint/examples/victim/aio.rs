//! Asynchronous I/O contexts (io_setup(2)): idle, with events that nobody has taken, and with requests in flight.

use crate::calls::{PAGE, map, ok};
use crate::{Meeting, fail, same};
use std::fs::{File, OpenOptions};
use std::io::Error;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

const PREAD: u16 = 0;
const PWRITE: u16 = 1;
const POLL: u16 = 5;
/// `IOCB_FLAG_RESFD`.
const NOTIFY: u32 = 1;

/// `struct iocb`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Request {
    data: u64,
    key: u32,
    rw_flags: u32,
    opcode: u16,
    priority: i16,
    fd: i32,
    buffer: u64,
    length: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    notified: i32,
}

/// `struct io_event`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Event {
    data: u64,
    request: u64,
    result: i64,
    result2: i64,
}

/// `struct aio_ring` without its events: id, nr, head, tail.
type Ends = [u32; 4];

#[derive(Clone, Copy)]
struct Context(u64);

impl Context {
    fn new(requests: u32) -> Context {
        let mut id = 0u64;
        // SAFETY: `id` outlives the call.
        ok("io_setup", unsafe { libc::syscall(libc::SYS_io_setup, requests, &raw mut id) });
        Context(id)
    }

    fn takes(self, request: &Request) -> bool {
        let requests = [&raw const *request];
        // SAFETY: an array of one pointer; what a request is about lives until it is through.
        unsafe { libc::syscall(libc::SYS_io_submit, self.0, 1, requests.as_ptr()) == 1 }
    }

    fn submit(self, request: &Request) {
        assert!(self.takes(request), "io_submit: {}", Error::last_os_error());
    }

    /// At least so many, at most those that there is room for.
    fn take(self, least: usize, events: &mut [Event]) -> usize {
        let none = std::ptr::null::<libc::timespec>();
        let (id, most) = (self.0, events.len());
        // SAFETY: `events` has room for as many as are said.
        let got =
            unsafe { libc::syscall(libc::SYS_io_getevents, id, least, most, events.as_mut_ptr(), none) };
        ok("io_getevents", got) as usize
    }

    fn take_one(self) -> Event {
        let mut events = [Event::default()];
        same("one event", self.take(1, &mut events), 1);
        events[0]
    }

    fn is_there(self) -> bool {
        let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: no event is asked for.
        let got = unsafe { libc::syscall(libc::SYS_io_getevents, self.0, 0, 0, 0, &raw const now) };
        got == 0
    }

    fn ends(self) -> Ends {
        // SAFETY: the ring of a context is mapped at its id.
        unsafe { (self.0 as *const Ends).read_volatile() }
    }

    /// As libaio takes an event: from the ring, without the kernel.
    fn take_from_ring(self) -> Event {
        let [_, slots, head, tail] = self.ends();
        assert_ne!(head, tail, "an event waits");
        // SAFETY: the events follow the header of 32 bytes, and `head` is one of them.
        let event = unsafe { (self.0 as *const Event).add(1 + head as usize).read_volatile() };
        // SAFETY: the third word is the head, which is ours to write.
        unsafe { (self.0 as *mut u32).add(2).write_volatile((head + 1) % slots) };
        event
    }

    fn destroy(self) {
        // SAFETY: no pointers but the id.
        ok("io_destroy", unsafe { libc::syscall(libc::SYS_io_destroy, self.0) });
    }
}

/// A read that is through at once.
fn nothing(file: &File, data: u64) -> Request {
    static mut BYTE: [u8; 1] = [0];
    let (buffer, fd) = ((&raw mut BYTE) as u64, file.as_raw_fd());
    Request { data, opcode: PREAD, fd, buffer, length: 1, ..Request::default() }
}

/// Many of these, with the data from `first` on.
fn read_nothing(context: Context, file: &File, count: usize, first: u64) {
    (first..first + count as u64).for_each(|data| context.submit(&nothing(file, data)));
}

fn eventfd() -> File {
    // SAFETY: no pointers; the descriptor is nobody else's.
    unsafe { File::from_raw_fd(ok("eventfd", libc::eventfd(0, 0))) }
}

fn poll(context: Context, of: &File, data: u64) {
    let (fd, buffer) = (of.as_raw_fd(), libc::POLLIN as u64);
    context.submit(&Request { data, opcode: POLL, fd, buffer, ..Request::default() });
}

fn add_one(to: &File) {
    use std::io::Write;
    (&mut &*to).write_all(&1u64.to_ne_bytes()).expect("an eventfd takes it");
}

fn number_of(from: &File) -> u64 {
    use std::io::Read;
    let mut number = [0; 8];
    (&mut &*from).read_exact(&mut number).expect("an eventfd gives it");
    u64::from_ne_bytes(number)
}

/// Takes what is there, and compares its data.
fn drain(what: &str, context: Context, first: u64, count: usize) {
    let mut events = vec![Event::default(); count + 10];
    let got = context.take(0, &mut events[..]);
    let found: Vec<u64> = events[..got].iter().map(|event| event.data).collect();
    same(what, found, (first..first + count as u64).collect());
    same(what, events[..got].iter().all(|event| event.result == 0 && event.request != 0), true);
}

/// Writes and reads a file directly, with a notification.
fn direct(context: Context, file: &File) {
    let page = map(0, 1, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1);
    let told = eventfd();
    let (fd, buffer, notified) = (file.as_raw_fd(), page as u64, told.as_raw_fd());
    let request = |data, opcode| Request {
        data,
        opcode,
        fd,
        buffer,
        length: PAGE as u64,
        flags: NOTIFY,
        notified,
        ..Request::default()
    };
    // SAFETY: the page was mapped above.
    unsafe { page.write_bytes(0x5a, PAGE) };
    for opcode in [PWRITE, PREAD] {
        context.submit(&request(77, opcode));
        same("notified", number_of(&told), 1);
        let event = context.take_one();
        same("a direct request", (event.data, event.result), (77, PAGE as i64));
        // SAFETY: the page was mapped above, and nothing is in flight.
        same("what was read", unsafe { (page.read(), page.add(PAGE - 1).read()) }, (0x5a, 0x5a));
        // SAFETY: the same.
        unsafe { page.write_bytes(0, PAGE) };
    }
}

fn direct_file(meeting: &Meeting) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).custom_flags(libc::O_DIRECT);
    options.open(meeting.dir.join("direct")).expect("a file")
}

/// As many reads as a context takes, with the data from `first` on. Each CPU has places of its own.
fn fill_up(context: Context, file: &File, first: u64) -> usize {
    let before = affinity();
    let mut count = 0;
    for cpu in 0..64 {
        let mut one = Affinity::default();
        one[0] = 1 << cpu;
        while set_affinity(&one) && context.takes(&nothing(file, first + count)) {
            count += 1;
        }
    }
    same("its CPUs again", set_affinity(&before), true);
    count as usize
}

type Affinity = [u64; 16];

fn affinity() -> Affinity {
    let mut mask = Affinity::default();
    // SAFETY: the mask has the length that is said.
    let got = unsafe { libc::sched_getaffinity(0, size_of::<Affinity>(), (&raw mut mask).cast()) };
    ok("sched_getaffinity", got);
    mask
}

fn set_affinity(mask: &Affinity) -> bool {
    // SAFETY: the mask has the length that is said.
    unsafe { libc::sched_setaffinity(0, size_of::<Affinity>(), (&raw const *mask).cast()) == 0 }
}

pub fn run(meeting: &Meeting) {
    let null = File::open("/dev/null").expect("/dev/null");
    let file = direct_file(meeting);
    let idle = Context::new(10);
    let waiting = Context::new(10);
    let wrapped = Context::new(1000);
    let gone = Context::new(3);
    let full = Context::new(1);
    let asleep = Context::new(1);
    read_nothing(gone, &null, 2, 0);
    gone.destroy();
    let again = Context::new(70);
    let places = fill_up(full, &null, 0);
    drain("the first time", full, 0, places);
    same("again", fill_up(full, &null, 4000), places);
    read_nothing(waiting, &null, 5, 100);
    for data in 100..102 {
        same("from the ring", waiting.take_from_ring().data, data);
    }
    let slots = wrapped.ends()[1] as usize;
    read_nothing(wrapped, &null, slots - 20, 0);
    drain("before the end", wrapped, 0, slots - 20);
    read_nothing(wrapped, &null, 50, 1000);
    let all = [idle, waiting, wrapped, again, full];
    let before: Vec<Ends> = all.iter().map(|context| context.ends()).collect();
    let rouse = eventfd();
    let sleeper = std::thread::spawn(move || asleep.take_one());
    meeting.pause();
    // A context's number is the kernel's affair.
    for (context, before) in all.iter().zip(&before) {
        same("its ends", &context.ends()[1..], &before[1..]);
    }
    poll(asleep, &rouse, 9);
    add_one(&rouse);
    same("who has slept", sleeper.join().expect("it returns").data, 9);
    same("from the ring, saved", waiting.take_from_ring().data, 102);
    drain("untaken", waiting, 103, 2);
    drain("around the end", wrapped, 1000, 50);
    drain("all places", full, 4000, places);
    same("gone is gone", Context(gone.0).is_there(), gone.0 == again.0);
    for context in all {
        drain("nothing is left", context, 0, 0);
        direct(context, &file);
        read_nothing(context, &null, 3, 7);
        drain("once more", context, 7, 3);
    }
    same("places", fill_up(full, &null, 0), places);
    for context in all {
        context.destroy();
        same("destroyed", context.is_there(), false);
    }
    asleep.destroy();
}

/// Requests that are in flight for as long as nobody writes, beside events that wait.
pub fn in_flight(meeting: &Meeting) {
    let null = File::open("/dev/null").expect("/dev/null");
    let (context, slow) = (Context::new(10), eventfd());
    read_nothing(context, &null, 120, 0);
    drain("before", context, 0, 120);
    poll(context, &slow, 500);
    read_nothing(context, &null, 13, 200);
    let before = context.ends();
    meeting.pause();
    same("its ends", context.ends(), before);
    drain("as before", context, 200, 13);
    add_one(&slow);
    same("in flight", context.take_one().data, 500);
    std::fs::write(meeting.dir.join("idle"), b"").expect("tells that nothing is in flight");
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while !meeting.dir.join("end").exists() && std::time::Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
    context.destroy();
}

/// Direct requests, one after the other and several at a time, from before a save until after it.
pub fn busy(meeting: &Meeting) {
    const AT_ONCE: u64 = 8;
    let (file, context) = (direct_file(meeting), Context::new(64));
    let length = PAGE * AT_ONCE as usize;
    let pages = map(
        0,
        length / PAGE,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        -1,
    );
    std::fs::write(meeting.dir.join("ready"), b"").expect("tells that it is ready");
    let mut round = 0u64;
    while !meeting.dir.join("go").exists() {
        for data in round * AT_ONCE..(round + 1) * AT_ONCE {
            let place = data % AT_ONCE * PAGE as u64;
            let (fd, buffer) = (file.as_raw_fd(), pages as u64 + place);
            let (length, offset) = (PAGE as u64, place as i64);
            context.submit(&Request {
                data,
                opcode: PWRITE,
                fd,
                buffer,
                length,
                offset,
                ..Request::default()
            });
        }
        let mut found: Vec<u64> = (0..AT_ONCE).map(|_| context.take_one()).map(|event| event.data).collect();
        found.sort_unstable();
        if found != (round * AT_ONCE..(round + 1) * AT_ONCE).collect::<Vec<u64>>() {
            fail(&format!("round {round}: {found:?}"));
            break;
        }
        round += 1;
    }
    drain("nothing is left", context, 0, 0);
    context.destroy();
}

/// A request that its thread waits for in io_submit(2).
pub fn submitting(meeting: &Meeting) {
    let (context, slow) = (Context::new(10), eventfd());
    let writer = slow.try_clone().expect("a copy");
    let waiting = std::thread::spawn(move || {
        let mut number = 0u64;
        let (fd, buffer) = (slow.as_raw_fd(), (&raw mut number) as u64);
        context.submit(&Request { data: 3, opcode: PREAD, fd, buffer, length: 8, ..Request::default() });
        (context.take_one().result, number)
    });
    std::thread::sleep(Duration::from_millis(100));
    meeting.pause();
    add_one(&writer);
    same("what was read", waiting.join().expect("it returns"), (8, 1));
    context.destroy();
}

/// A child has the mapping of its parent's context, and not the context.
pub fn family(meeting: &Meeting) {
    let null = File::open("/dev/null").expect("/dev/null");
    let context = Context::new(10);
    read_nothing(context, &null, 6, 0);
    drain("before", context, 0, 6);
    read_nothing(context, &null, 4, 10);
    let (turn, turned) = (eventfd(), eventfd());
    // SAFETY: one thread only.
    let child = ok("fork", unsafe { libc::fork() });
    if child == 0 {
        let own = Context::new(10);
        read_nothing(own, &null, 2, 50);
        number_of(&turn);
        same("the parent's context", context.is_there(), false);
        same("the parent's ring", (context.ends()[2], context.ends()[3]), (6, 11));
        drain("the child's own", own, 50, 2);
        own.destroy();
        add_one(&turned);
        std::process::exit(crate::FAILURES.load(std::sync::atomic::Ordering::SeqCst) as i32);
    }
    meeting.pause();
    same("the parent's ends", (context.ends()[2], context.ends()[3]), (6, 10));
    read_nothing(context, &null, 1, 14);
    add_one(&turn);
    number_of(&turned);
    drain("the parent's", context, 10, 5);
    let mut status = 0;
    // SAFETY: `status` outlives the call.
    ok("waitpid", unsafe { libc::waitpid(child, &raw mut status, 0) });
    same("the child's end", status, 0);
    context.destroy();
}
