//! The host node's side: `/dev/fuse`, its reader threads, and the answers from home.
//!
//! A request is kept in a table from the moment it is read until its answer is written. The table
//! is what makes three things possible: an answer nobody asked for is dropped, a signal can be
//! matched with the waiting request ([`HostHooks::interrupted`]), and [`HostView::stop`] can answer
//! everything that is still open. It is bounded by the kernel: a thread of the guest has one request
//! in flight, and background requests have their limit ([`init`]).

mod init;

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::thread;
use std::time::Duration;

use checkpoint::sys::{fuse_device, thread_kick};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::MsFlags;
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;

use super::Wire;
use super::abi::{self, InHeader, MAX_FRAME, OutHeader, Reader, Reply, fopen, op};

/// Threads that read the device: one that waits in [`Wire::send`] must not hold up the others.
const READERS: usize = 4;
/// Longest wait for the readers to notice a stop, in steps of 5 ms.
const STOP_STEPS: usize = 400;

/// What the owner of the guest has to do with its file system.
pub trait HostHooks: Send + Sync {
    /// A signal (or a tracer's interrupt) is pending for the thread `tid`, as numbered in the
    /// mounter's PID namespace, whose request on a pipe, a terminal or a FIFO waits at home. Call
    /// [`InterruptReply::interrupted`] when the thread may come out: home then ends the wait, and the
    /// call returns `EINTR` (or the bytes that did arrive). The kernel asks once for each request.
    fn interrupted(&self, tid: i32, reply: InterruptReply) {
        let _ = tid;
        reply.interrupted();
    }
}

/// No special care: an interrupted thread comes out at once.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoHooks;

impl HostHooks for NoHooks {}

/// Permission for one thread to come out of its wait; dropped, the thread goes on waiting.
#[must_use = "the thread waits until interrupted() is called"]
pub struct InterruptReply {
    view: Weak<HostView>,
    unique: u64,
    frame: Vec<u8>,
}

impl InterruptReply {
    /// Lets the thread out. If its request has been answered meanwhile, nothing happens.
    pub fn interrupted(self) {
        let Some(view) = self.view.upgrade() else { return };
        if view.table().requests.contains_key(&self.unique)
            && let Err(error) = view.wire.send(&self.frame)
        {
            tracing::warn!(%error, "the interruption of a waiting guest could not be sent home");
        }
    }
}

struct Request {
    tid: i32,
    opcode: u32,
    /// The file handle, where the request begins with one; else 0.
    handle: u64,
}

#[derive(Default)]
struct Table {
    requests: HashMap<u64, Request>,
    /// Handles that home opened as streams, with the number of opens.
    streams: HashMap<u64, u32>,
}

/// The host node's end of one guest's file system.
pub struct HostView {
    /// Gone after a stop: with the last descriptor of the device the kernel fails what is still to
    /// come, too.
    device: RwLock<Option<Arc<File>>>,
    wire: Arc<dyn Wire>,
    hooks: Arc<dyn HostHooks>,
    table: Mutex<Table>,
    stopping: AtomicBool,
    readers: Mutex<Vec<i32>>,
    weak: Weak<HostView>,
}

impl HostView {
    /// Opens `/dev/fuse`.
    pub fn open_device() -> io::Result<OwnedFd> {
        Ok(nix::fcntl::open("/dev/fuse", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())?)
    }

    /// Mounts the file system behind `device` on the directory `at`, in the caller's mount
    /// namespace. Needs CAP_SYS_ADMIN; the numbers of threads in requests are those of the caller's
    /// PID namespace. Set-user-ID programs are started at home, so the mount gives no such rights.
    pub fn mount(device: BorrowedFd<'_>, at: &Path) -> io::Result<()> {
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
        nix::mount::mount(
            Some("migd"),
            at,
            Some("fuse.migd"),
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
            Some(options.as_str()),
        )?;
        Ok(())
    }

    /// Starts serving. The threads end with [`HostView::stop`], or when the mount goes.
    pub fn start(
        device: OwnedFd,
        wire: Arc<dyn Wire>,
        hooks: Arc<dyn HostHooks>,
    ) -> io::Result<Arc<HostView>> {
        thread_kick::prepare()?;
        let view = Arc::new_cyclic(|weak| HostView {
            device: RwLock::new(Some(Arc::new(File::from(device)))),
            wire,
            hooks,
            table: Mutex::default(),
            stopping: AtomicBool::new(false),
            readers: Mutex::default(),
            weak: weak.clone(),
        });
        for n in 0..READERS {
            let reader = Arc::clone(&view);
            let started = thread::Builder::new().name(format!("fuse-read-{n}")).spawn(move || reader.run());
            if let Err(error) = started {
                view.stop();
                return Err(error);
            }
        }
        Ok(view)
    }

    /// A frame from home: the answer to a request, or a notification. Frames that are neither are
    /// refused with `InvalidData`, and an answer that comes too late is dropped.
    pub fn deliver(&self, frame: &[u8]) -> io::Result<()> {
        let Some((header, body)) = OutHeader::parse(frame) else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "home sent a frame that is no FUSE reply",
            ));
        };
        if header.unique == 0 {
            return match header.error {
                // Only wake-ups: the other notifications would let home write this host's memory of
                // files, which nothing needs as nothing is cached.
                abi::NOTIFY_POLL if body.len() == 8 => self.write(frame),
                code => Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("home sent the notification {code}, which is not one of a home file system"),
                )),
            };
        }
        let Some(request) =
            self.take(header.unique, |table, request| note_open(table, request, &header, body))
        else {
            return Ok(());
        };
        // A status outside this range is refused by the kernel without ending the request
        // (fuse_dev_do_write), which would leave its thread waiting for ever.
        if header.error > 0 || header.error <= -512 || (header.error != 0 && !body.is_empty()) {
            return self.write(&abi::bare_reply(header.unique, -libc::EIO));
        }
        if header.error == -libc::EPIPE && request.opcode == op::WRITE {
            // As pipe_write() does; the thread waits for this very answer, so its number is its own.
            if let Err(error) = thread_kick::signal_thread(request.tid, Signal::SIGPIPE) {
                tracing::warn!(%error, tid = request.tid, "SIGPIPE could not be sent to a writing guest");
            }
        }
        self.write(frame)
    }

    /// Ends the service: every request still waiting is answered `ENOTCONN`, the readers end, the
    /// device is closed, and the guest's further calls fail.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.fail_all();
        for _ in 0..STOP_STEPS {
            let readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner).clone();
            if readers.is_empty() {
                break;
            }
            for tid in readers {
                let _ = thread_kick::kick(tid);
            }
            thread::sleep(Duration::from_millis(5));
        }
        self.fail_all();
        *self.device.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn fail_all(&self) {
        let waiting: Vec<u64> = self.table().requests.drain().map(|(unique, _)| unique).collect();
        for unique in waiting {
            let _ = self.write(&abi::bare_reply(unique, -libc::ENOTCONN));
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, unique: u64, note: impl FnOnce(&mut Table, &Request)) -> Option<Request> {
        let mut table = self.table();
        let request = table.requests.remove(&unique)?;
        note(&mut table, &request);
        Some(request)
    }

    /// Writes one whole frame to the device.
    fn write(&self, frame: &[u8]) -> io::Result<()> {
        let Some(device) = self.device() else { return Ok(()) };
        // The device takes a frame whole or not at all (fuse_dev_do_write): there is no rest to write.
        match (&*device).write_all(frame) {
            Ok(()) => Ok(()),
            Err(error) => match error.raw_os_error() {
                // The request was aborted, the poller has gone, or the mount has.
                Some(libc::ENOENT | libc::ENODEV | libc::ENOTCONN | libc::EPERM) => Ok(()),
                // The kernel has ended the request with EIO (fuse_dev_do_write).
                _ => Err(error),
            },
        }
    }

    fn device(&self) -> Option<Arc<File>> {
        self.device.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn run(self: Arc<Self>) {
        let Some(device) = self.device() else { return };
        let tid = nix::unistd::gettid().as_raw();
        self.readers.lock().unwrap_or_else(PoisonError::into_inner).push(tid);
        if let Err(error) = thread_kick::accept() {
            tracing::warn!(%error, "a reader of the home file system cannot be interrupted");
        }
        let mut buffer = vec![0u8; MAX_FRAME];
        let mut reply = Reply::default();
        while !self.stopping.load(Ordering::SeqCst) {
            match (&*device).read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => self.request(&buffer[..n], &mut reply),
                Err(error) => match Errno::from_raw(error.raw_os_error().unwrap_or(0)) {
                    // ENOENT: the request was aborted while it was read.
                    Errno::EINTR | Errno::EAGAIN | Errno::ENOENT => {}
                    Errno::ENODEV | Errno::ECONNABORTED => break,
                    Errno::EPERM => thread::sleep(Duration::from_millis(1)), // not mounted yet
                    errno => {
                        tracing::error!(%errno, "reading /dev/fuse failed; this guest's files are gone");
                        break;
                    }
                },
            }
        }
        drop(device);
        self.readers.lock().unwrap_or_else(PoisonError::into_inner).retain(|r| *r != tid);
    }

    fn request(&self, frame: &[u8], reply: &mut Reply) {
        let Some((header, body)) = InHeader::parse(frame) else {
            tracing::error!(len = frame.len(), "the kernel's FUSE request has a bad length");
            return;
        };
        let sent = match header.opcode {
            op::INIT => {
                self.answer(&header, reply, |out| init::reply(&header, body, out));
                if let Some(device) = self.device()
                    && let Err(error) = init::raise_read_ahead(device.as_fd())
                {
                    tracing::debug!(%error, "the read-ahead of a guest's files stays as it is");
                }
                return;
            }
            op::DESTROY => return self.answer(&header, reply, |_| Ok(())),
            op::IOCTL => return self.answer(&header, reply, |out| ioctl(body, out)),
            op::INTERRUPT => return self.interrupt(frame, body),
            op::FORGET | op::BATCH_FORGET => self.wire.send(frame),
            _ => self.forward(&header, frame, body),
        };
        if let Err(error) = sent {
            tracing::debug!(%error, opcode = header.opcode, "home cannot be reached");
            if self.take(header.unique, |_, _| ()).is_some() {
                let _ = self.write(&abi::bare_reply(header.unique, -libc::ENOTCONN));
            }
        }
    }

    fn forward(&self, header: &InHeader, frame: &[u8], body: &[u8]) -> io::Result<()> {
        let handle = match header.opcode {
            op::READ | op::WRITE | op::RELEASE => Reader(body).u64().unwrap_or(0),
            _ => 0,
        };
        let request = Request { tid: header.pid as i32, opcode: header.opcode, handle };
        let mut table = self.table();
        if header.opcode == op::RELEASE
            && let Some(opens) = table.streams.get_mut(&handle)
        {
            *opens -= 1;
            if *opens == 0 {
                table.streams.remove(&handle);
            }
        }
        table.requests.insert(header.unique, request);
        drop(table);
        if self.stopping.load(Ordering::SeqCst) {
            return Err(Errno::ENOTCONN.into());
        }
        self.wire.send(frame)
    }

    /// The kernel says that the thread of a request in flight has a signal pending. Ordinary
    /// requests are soon answered and are left alone.
    fn interrupt(&self, frame: &[u8], body: &[u8]) {
        let Ok(unique) = Reader(body).u64() else { return };
        let tid = {
            let table = self.table();
            let Some(request) = table.requests.get(&unique) else { return };
            let waits = match request.opcode {
                op::READ | op::WRITE => table.streams.contains_key(&request.handle),
                op::OPEN => true, // perhaps of a FIFO without its other end
                _ => false,
            };
            if !waits {
                return;
            }
            request.tid
        };
        let reply = InterruptReply { view: self.weak.clone(), unique, frame: frame.to_vec() };
        self.hooks.interrupted(tid, reply);
    }

    fn answer(&self, header: &InHeader, reply: &mut Reply, make: impl FnOnce(&mut Reply) -> abi::Answer<()>) {
        reply.clear();
        let error = make(reply).err().map_or(0, |errno| -(errno as i32));
        if let Err(error) = self.write(reply.finish(header.unique, error)) {
            tracing::error!(%error, opcode = header.opcode, "an answer to the kernel was refused");
        }
    }
}

/// The device number of the home file system that the process `pid` sees, as its mappings have it (proc(5)).
pub fn device_of(pid: i32) -> io::Result<u64> {
    let mounts = std::fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
    let device = mounts.lines().find_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let (major, minor) = mount.split(' ').nth(2)?.split_once(':')?;
        let device = libc::makedev(major.parse().ok()?, minor.parse().ok()?);
        file_system.starts_with("fuse.migd ").then_some(device)
    });
    let nothing = || format!("process {pid} sees no home file system");
    device.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, nothing()))
}

/// Remembers the handles that home opened as streams.
fn note_open(table: &mut Table, request: &Request, header: &OutHeader, body: &[u8]) {
    let at = match request.opcode {
        op::OPEN => 0,
        op::CREATE => abi::ENTRY,
        _ => return,
    };
    if header.error != 0 {
        return;
    }
    let mut r = Reader(body.get(at..).unwrap_or_default());
    if let (Ok(handle), Ok(flags)) = (r.u64(), r.u32())
        && flags & fopen::STREAM != 0
    {
        *table.streams.entry(handle).or_default() += 1;
    }
}

/// The one ioctl there is: which home handle is this? Others are `ENOTTY`, as on any plain file.
fn ioctl(body: &[u8], out: &mut Reply) -> abi::Answer<()> {
    let mut r = Reader(body);
    let handle = r.u64()?;
    let _flags = r.u32()?;
    if r.u32()? != fuse_device::HANDLE_OF {
        return Err(Errno::ENOTTY);
    }
    out.bytes(&[0; 16]); // fuse_ioctl_out: result 0, nothing to retry
    out.u64(handle);
    Ok(())
}
