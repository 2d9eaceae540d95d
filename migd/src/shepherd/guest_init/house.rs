//! The host shepherd's handle of a house.

use super::protocol::{self, Command, Member, Report, Setup, Spawn};
use checkpoint::image::ProcessImage;
use checkpoint::image::objects::ObjectKey;
use checkpoint::sys::{ptrace, wait};
use std::collections::{HashMap, VecDeque};
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

/// How long making the house may take: its mounts ask home a few things.
const START_LIMIT: Duration = Duration::from_secs(30);
/// How long starting the leader may take: each of its files is opened at home.
const SPAWN_LIMIT: Duration = Duration::from_secs(60);
/// How long the house may take to end before it is killed, and again to be gone then.
const END_LIMIT: Duration = Duration::from_secs(3);
/// Events that may wait while a command is answered.
const MAX_WAITING: usize = 1024;

/// Why a house could not be made or used. After any of these the guest, if there was one, is to be
/// given up: drop the house.
#[derive(Debug, thiserror::Error)]
pub enum HouseError {
    /// guest-init could not be started.
    #[error("cannot start guest-init")]
    Start(#[source] io::Error),
    /// guest-init cannot be talked to.
    #[error("cannot talk to guest-init")]
    Talk(#[source] io::Error),
    /// guest-init cannot do what was asked for, and why.
    #[error("{0}")]
    Refused(String),
    /// It has ended.
    #[error("guest-init has ended")]
    Ended,
    /// It says something that has no place here.
    #[error("guest-init answered out of turn")]
    OutOfTurn,
    /// A process that should be there is not.
    #[error("the process that guest-init has made (PID {0} inside) is not to be found in /proc")]
    NoProcess(i32),
}

/// What happens in a house.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HouseEvent {
    /// A guest whose parent is the house's PID 1 has ended, with this raw wait status.
    Ended {
        /// Its PID in the house.
        pid: i32,
        /// As of waitpid(2).
        status: i32,
    },
    /// It has been stopped by this signal.
    Stopped {
        /// Its PID in the house.
        pid: i32,
        /// Signal number.
        signal: u8,
    },
    /// It goes on.
    Continued {
        /// Its PID in the house.
        pid: i32,
    },
    /// The house's PID 1 has ended, and everything with it.
    Gone,
}

/// A house and its PID 1. Dropping it ends everything in it.
///
/// Start it from the thread that lives longest and traces the guest: guest-init dies with the
/// *thread* that started it (`PR_SET_PDEATHSIG`, prctl(2)), and at the end traced threads are
/// reaped by their tracer only.
pub struct GuestHouse {
    child: Child,
    socket: UnixStream,
    init: i32,
    guests: Vec<i32>,
    waiting: VecDeque<HouseEvent>,
    gone: bool,
}

impl GuestHouse {
    /// Makes a house: `exe` is the `migd` program, `device` is `/dev/fuse`, whose other end must be
    /// served already.
    pub fn start(exe: &Path, device: OwnedFd, setup: &Setup) -> Result<GuestHouse, HouseError> {
        let (socket, theirs) = UnixStream::pair().map_err(HouseError::Start)?;
        let child = std::process::Command::new(exe)
            .args(["shepherd", "guest-init"])
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::from(device))
            .spawn()
            .map_err(HouseError::Start)?;
        let mut house =
            GuestHouse { child, socket, init: 0, guests: Vec::new(), waiting: VecDeque::new(), gone: false };
        house.command(&Command::Setup(setup.clone()))?;
        match house.answer(START_LIMIT)? {
            Report::Ready => {}
            Report::Error(text) => return Err(HouseError::Refused(text)),
            _ => return Err(HouseError::OutOfTurn),
        }
        house.init = find_child(house.child.id() as i32, 1).ok_or(HouseError::NoProcess(1))?;
        Ok(house)
    }

    /// PID of the house's PID 1 as the caller sees it.
    pub fn init(&self) -> i32 {
        self.init
    }

    /// Starts the guests' leaders (parents come before their children) with their PIDs and their
    /// descriptors, running nothing; their PIDs as the caller sees them.
    pub fn spawn(&mut self, images: &[ProcessImage]) -> Result<Vec<i32>, HouseError> {
        let members = images.iter().map(Member::of).collect();
        self.command(&Command::Spawn(Spawn { members }))?;
        match self.answer(SPAWN_LIMIT)? {
            Report::Spawned => {}
            Report::Error(text) => return Err(HouseError::Refused(text)),
            _ => return Err(HouseError::OutOfTurn),
        }
        let mut known: HashMap<i32, i32> = HashMap::new();
        for image in images {
            let parent = known.get(&image.ppid).copied().unwrap_or(self.init);
            let guest = find_child(parent, image.pid).ok_or(HouseError::NoProcess(image.pid))?;
            known.insert(image.pid, guest);
            self.guests.push(guest);
        }
        Ok(self.guests.clone())
    }

    /// Gives the house files that the guests' descriptors and mappings are to be made from, before
    /// [`GuestHouse::spawn`]; the numbers under which its PID 1 has them.
    pub fn give(&mut self, files: &[(ObjectKey, BorrowedFd<'_>)]) -> Result<Vec<i32>, HouseError> {
        if files.is_empty() {
            return Ok(Vec::new());
        }
        self.command(&Command::Objects(files.iter().map(|(key, _)| *key).collect()))?;
        let files: Vec<BorrowedFd<'_>> = files.iter().map(|(_, file)| *file).collect();
        protocol::send_files(&self.socket, &files).map_err(HouseError::Talk)?;
        match self.answer(SPAWN_LIMIT)? {
            Report::Objects(numbers) if numbers.len() == files.len() => Ok(numbers),
            Report::Error(text) => Err(HouseError::Refused(text)),
            _ => Err(HouseError::OutOfTurn),
        }
    }

    /// The guests have what they need of those files.
    pub fn let_go(&mut self) -> Result<(), HouseError> {
        self.command(&Command::LetGo)
    }

    /// The guests are built, and write into mapped files: that is to be at home soon.
    pub fn write_back(&mut self) -> Result<(), HouseError> {
        self.command(&Command::WriteBack)
    }

    /// Becomes readable when something has happened. Ask [`GuestHouse::next_event`] until it has no
    /// more before waiting.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// The next event, if there is one now. After [`HouseEvent::Gone`] there is none any more.
    pub fn next_event(&mut self) -> Result<Option<HouseEvent>, HouseError> {
        if let Some(event) = self.waiting.pop_front() {
            return Ok(Some(event));
        }
        if self.gone
            || !protocol::wait_readable(&self.socket, Some(Duration::ZERO)).map_err(HouseError::Talk)?
        {
            return Ok(None);
        }
        match protocol::receive(&self.socket, None).map_err(HouseError::Talk)? {
            None => {
                self.gone = true;
                Ok(Some(HouseEvent::Gone))
            }
            Some(report) => event_of(&report).map(Some).ok_or(match report {
                Report::Error(text) => HouseError::Refused(text),
                _ => HouseError::OutOfTurn,
            }),
        }
    }

    /// Sends a guest (by its PID in the house) a signal, as kill(2) of PID 1 would.
    pub fn kill(&mut self, pid: i32, signal: i32) -> Result<(), HouseError> {
        self.command(&Command::Kill { pid, signal })
    }

    /// Ends everything in the house in order. Dropping does the same by force.
    pub fn quit(mut self) -> Result<(), HouseError> {
        let told = self.command(&Command::Quit);
        self.wait_end(END_LIMIT);
        told
    }

    fn command(&mut self, command: &Command) -> Result<(), HouseError> {
        protocol::send(&self.socket, command).map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe => HouseError::Ended,
            _ => HouseError::Talk(error),
        })
    }

    /// The answer to a command; events on the way to it wait.
    fn answer(&mut self, limit: Duration) -> Result<Report, HouseError> {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let report: Report = protocol::receive(&self.socket, Some(left))
                .map_err(HouseError::Talk)?
                .ok_or(HouseError::Ended)?;
            match event_of(&report) {
                Some(event) if self.waiting.len() < MAX_WAITING => self.waiting.push_back(event),
                Some(_) => return Err(HouseError::OutOfTurn),
                None => return Ok(report),
            }
        }
    }

    /// Waits for the end of guest-init; `false`: it has not ended. A guest whose tracer is this
    /// thread ends only when its threads are reaped here (ptrace(2), "Death under ptrace").
    fn wait_end(&mut self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return true;
            }
            self.reap_traced();
            std::thread::sleep(Duration::from_millis(1));
        }
        false
    }

    fn reap_traced(&self) {
        for guest in &self.guests {
            let Ok(tasks) = fs::read_dir(format!("/proc/{guest}/task")) else { continue };
            for tid in tasks.filter_map(|task| task.ok()?.file_name().to_str()?.parse().ok()) {
                // ECHILD: not traced by us, or not dead.
                let _ = ptrace::wait(tid, false);
            }
        }
    }
}

impl Drop for GuestHouse {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(None)) {
            return;
        }
        // Its PID cannot have been given away: its parent waits for it and nobody has reaped that.
        if self.init > 0 {
            let _ = wait::kill(self.init, libc::SIGKILL);
            if self.wait_end(END_LIMIT) {
                return;
            }
        }
        let _ = self.child.kill();
        if !self.wait_end(END_LIMIT) {
            tracing::error!(pid = self.child.id(), "guest-init does not end; it is left behind");
        }
    }
}

fn event_of(report: &Report) -> Option<HouseEvent> {
    match *report {
        Report::Ended { pid, status } => Some(HouseEvent::Ended { pid, status }),
        Report::Stopped { pid, signal } => Some(HouseEvent::Stopped { pid, signal }),
        Report::Continued { pid } => Some(HouseEvent::Continued { pid }),
        Report::Ready | Report::Objects(_) | Report::Spawned | Report::Error(_) => None,
    }
}

/// The child of `parent` that has the PID `inside` in its own PID namespace.
fn find_child(parent: i32, inside: i32) -> Option<i32> {
    let children = match fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")) {
        Ok(children) => children.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).collect(),
        // A kernel without CONFIG_PROC_CHILDREN.
        Err(_) => all_processes(),
    };
    children.into_iter().find(|&child| {
        status_numbers(child, "PPid:").as_deref() == Some(&[parent])
            && status_numbers(child, "NSpid:").and_then(|pids| pids.last().copied()) == Some(inside)
    })
}

fn all_processes() -> Vec<i32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect()
}

/// The numbers of one line of `/proc/PID/status`.
fn status_numbers(pid: i32, key: &str) -> Option<Vec<i32>> {
    let status = fs::read(format!("/proc/{pid}/status")).ok()?;
    let status = String::from_utf8_lossy(&status);
    let line = status.lines().find_map(|line| line.strip_prefix(key))?;
    line.split_ascii_whitespace().map(|number| number.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_is_found_by_its_number() {
        let mut child = std::process::Command::new("sleep").arg("10").spawn().expect("starts");
        let pid = child.id() as i32;
        // The test runs in a thread: its process has more than one.
        let parent = std::process::id() as i32;
        let ppid = status_numbers(pid, "PPid:").expect("a parent");
        assert_eq!(ppid, [parent]);
        assert_eq!(status_numbers(pid, "NSpid:").expect("numbers").last(), Some(&pid));
        child.kill().expect("killed");
        child.wait().expect("waited");
    }
}
