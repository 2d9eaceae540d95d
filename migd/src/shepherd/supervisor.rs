//! The supervisor of a guest's system calls: what its host node must not answer is told to it by a
//! seccomp filter.
//!
//! ```mermaid
//! stateDiagram-v2
//!   [*] --> Told: the filter says so
//!   Told --> [*]: Continue (a thread made, a file that is not home's)
//!   Told --> Asked: identity, terminal
//!   Asked --> [*]: home's answer
//!   Asked --> Held: home cannot be reached, SIGTTOU is on its way
//!   Held --> Asked: after a while
//!   Told --> Held: retreat
//!   Asked --> Frozen: Supervisor.freeze
//!   Held --> Frozen: Supervisor.freeze
//!   Frozen --> [*]: the call is made at home
//!   Frozen --> Told: the move has failed
//! ```
//!
//! A call that was told waits in the kernel, through signals that do not kill: or those whose action
//! has no `SA_RESTART` would end it with an `EINTR` that fork(2) does not have. So a tracer's interrupt
//! does not end it either, and the guest must be frozen by [`Supervisor::freeze`], which lets its calls
//! go: a freeze that goes on at home repeats them there, natively; a move that fails repeats them
//! here, and they are told again. What each call's fate is stands in `policy`.
//!
//! It makes no call for the guest, and never decides by what it read of the guest's memory alone
//! (another thread may write there): a thread that was meant to be allowed may at worst become a
//! process of the same house.

mod device;
mod filter;
mod install;
mod memory;
mod policy;

pub use install::install;

use super::session::{IdentityQuestion, Reply};
use checkpoint::sys::fd::pidfd_open;
use checkpoint::sys::seccomp::{self, ARCH_X86_64, Answer, Call};
use checkpoint::tracee::{Tracee, TraceeError};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use policy::{Rule, What, When};
use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Calls that may be asked about at the same time; further ones are held for a moment.
const MAX_ASKERS: usize = 64;
/// How often held calls are looked at, ms.
const LOOK_EVERY_MS: u16 = 250;
/// After so long a question that could not be answered is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// After so long a retreat that did not happen is asked for again.
const RETREAT_AGAIN: Duration = Duration::from_secs(5);

/// What the supervisor needs from the host shepherd. Called from several threads at a time; may
/// block for a round trip home.
pub trait SupervisorHooks: Send + Sync {
    /// Who the guest is. An error: home cannot be asked now, and will be again.
    fn identity(&self, question: IdentityQuestion) -> io::Result<i64>;
    /// A request (and its flags of [`super::terminal`]) on an open file of home's: see
    /// [`super::terminal::answer`]. An error: as above.
    fn terminal(&self, handle: u64, request: u64, value: u64, bytes: &[u8]) -> io::Result<Reply>;
    /// Whether this is the PID of a guest of the same house: what is done to it is done here.
    fn is_relative(&self, _pid: i32) -> bool {
        false
    }
    /// The guest wants something that it can have only at home; its thread waits. Asked again every
    /// few seconds while it does.
    fn retreat(&self, reason: String);
}

/// What becomes of a call.
enum Outcome {
    Answer(Answer),
    Retreat(String),
    /// Not now.
    Again,
    /// It does not wait any more.
    Nothing,
}

/// A call that is held.
struct Held {
    call: Call,
    /// To be asked for as a retreat; else the call is looked at anew.
    retreat: Option<String>,
    since: Instant,
}

struct Shared {
    listener: OwnedFd,
    guest: i32,
    pidfd: OwnedFd,
    hooks: Arc<dyn SupervisorHooks>,
    /// By thread: one has one call.
    held: Mutex<HashMap<i32, Held>>,
    waiting: Mutex<Waiting>,
    askers: AtomicUsize,
}

/// Who waits in a call.
#[derive(Default)]
struct Waiting {
    /// Thread, notification: taken and not answered yet.
    calls: HashMap<i32, u64>,
    /// During a freeze: threads that have been interrupted. They cannot run before the freeze is over,
    /// so a call that is taken now was made before.
    interrupted: Option<HashSet<i32>>,
}

/// A running supervisor. Dropping it stops it: filtered calls then fail with `ENOSYS` when the last
/// copy of the listener is closed, so the guest must have ended or be frozen for good by then.
pub struct Supervisor {
    shared: Arc<Shared>,
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Supervisor {
    /// Supervises the process `guest` (as the caller numbers it).
    pub fn start(listener: OwnedFd, guest: i32, hooks: Arc<dyn SupervisorHooks>) -> io::Result<Supervisor> {
        let shared = Arc::new(Shared {
            listener,
            guest,
            pidfd: pidfd_open(guest)?,
            hooks,
            held: Mutex::default(),
            waiting: Mutex::default(),
            askers: AtomicUsize::new(0),
        });
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?);
        let (theirs, stopped) = (Arc::clone(&shared), Arc::clone(&stop));
        let thread =
            thread::Builder::new().name("supervisor".into()).spawn(move || run(&theirs, &stopped))?;
        Ok(Supervisor { shared, stop, thread: Some(thread) })
    }

    /// Freezes the guest, whatever call it waits in. To be used instead of [`Tracee::freeze`], which
    /// would wait in vain for a thread in a call that was told.
    pub fn freeze(&self) -> Result<Tracee, TraceeError> {
        let _guard = Freezing::begin(&self.shared);
        Tracee::freeze_with(self.shared.guest, &mut |tid| self.shared.let_go(tid))
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run(shared: &Arc<Shared>, stop: &EventFd) {
    loop {
        let mut ready = [
            PollFd::new(shared.listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(stop.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut ready, PollTimeout::from(LOOK_EVERY_MS)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return tracing::error!(%error, "the guest's calls are not supervised any more"),
        }
        let [told, stopped] = ready.map(|fd| fd.revents().unwrap_or(PollFlags::empty()));
        if !stopped.is_empty() {
            return;
        }
        if told.contains(PollFlags::POLLIN) {
            match seccomp::receive(shared.listener.as_fd()) {
                Ok(call) => shared.take(call),
                // It was interrupted before it was taken.
                Err(Errno::ENOENT | Errno::EINTR) => {}
                Err(error) => return tracing::error!(%error, "the guest's calls cannot be heard"),
            }
        } else if told.intersects(PollFlags::POLLHUP | PollFlags::POLLERR) {
            // Nobody has the filter any more: the guest has ended.
            return;
        }
        shared.look_at_held();
    }
}

/// As long as it lives, interrupted threads are let go.
struct Freezing<'a>(&'a Shared);

impl Freezing<'_> {
    fn begin(shared: &Shared) -> Freezing<'_> {
        shared.waiting().interrupted = Some(HashSet::new());
        Freezing(shared)
    }
}

impl Drop for Freezing<'_> {
    fn drop(&mut self) {
        self.0.waiting().interrupted = None;
    }
}

impl Shared {
    fn take(self: &Arc<Self>, call: Call) {
        let mut waiting = self.waiting();
        if waiting.interrupted.as_ref().is_some_and(|interrupted| interrupted.contains(&call.tid)) {
            let _ = seccomp::answer(self.listener.as_fd(), call.id, Answer::Repeat);
            return;
        }
        waiting.calls.insert(call.tid, call.id);
        drop(waiting);
        self.tell(call);
    }

    /// The thread has been interrupted by its tracer.
    fn let_go(&self, tid: i32) {
        let mut waiting = self.waiting();
        if let Some(interrupted) = &mut waiting.interrupted {
            interrupted.insert(tid);
        }
        if let Some(id) = waiting.calls.remove(&tid) {
            // ENOENT: it has been answered, or killed.
            let _ = seccomp::answer(self.listener.as_fd(), id, Answer::Repeat);
        }
    }

    fn tell(self: &Arc<Self>, call: Call) {
        // A new call of this thread: the one before is over.
        self.held().remove(&call.tid);
        let rule = policy::rule(call.nr).filter(|_| call.arch == ARCH_X86_64);
        let Some(rule) = rule else {
            return self.settle(call, Outcome::Retreat(format!("the 32-bit system call {}", call.nr)));
        };
        match rule.what {
            What::Retreat => self.settle(call, Outcome::Retreat(reason(rule))),
            What::Clone3 => {
                let outcome = self.clone3(&call, rule);
                self.settle(call, outcome);
            }
            What::OwnThread(arg) => {
                let outcome = self.own_thread(&call, rule, arg);
                self.settle(call, outcome);
            }
            What::Relative => {
                let outcome = match self.hooks.is_relative(call.args[0] as i32) {
                    true => Outcome::Answer(Answer::Continue),
                    false => Outcome::Retreat(reason(rule)),
                };
                self.settle(call, outcome);
            }
            What::ParentPid | What::ProcessGroup | What::Session | What::Ioctl => self.ask(call, rule.what),
        }
    }

    /// In a thread of its own, as it takes a round trip.
    fn ask(self: &Arc<Self>, call: Call, what: What) {
        if self.askers.fetch_add(1, Ordering::AcqRel) >= MAX_ASKERS {
            self.askers.fetch_sub(1, Ordering::AcqRel);
            return self.settle(call, Outcome::Again);
        }
        let shared = Arc::clone(self);
        let asker = thread::Builder::new().name("supervisor-ask".into()).spawn(move || {
            let outcome = shared.answer_of_home(&call, what);
            shared.askers.fetch_sub(1, Ordering::AcqRel);
            shared.settle(call, outcome);
        });
        if asker.is_err() {
            self.askers.fetch_sub(1, Ordering::AcqRel);
            self.settle(call, Outcome::Again);
        }
    }

    fn answer_of_home(&self, call: &Call, what: What) -> Outcome {
        let pid = call.args[0] as i32;
        let question = match what {
            What::ParentPid => IdentityQuestion::ParentPid,
            What::ProcessGroup if call.nr == libc::SYS_getpgrp => IdentityQuestion::ProcessGroup(0),
            What::ProcessGroup => IdentityQuestion::ProcessGroup(pid),
            What::Session => IdentityQuestion::Session(pid),
            _ => {
                let waits = || seccomp::is_waiting(self.listener.as_fd(), call.id);
                return device::request(call, self.pidfd.as_fd(), &*self.hooks, waits);
            }
        };
        match self.hooks.identity(question) {
            Ok(value) if value < 0 => Outcome::Answer(Answer::Error(errno_of(value))),
            Ok(value) => Outcome::Answer(Answer::Value(value)),
            Err(_) => Outcome::Again,
        }
    }

    /// Threads are made here, processes at home.
    fn clone3(&self, call: &Call, rule: &Rule) -> Outcome {
        let mut flags = [0; 8];
        match memory::read(call.tid, call.args[0], &mut flags) {
            Ok(()) if u64::from_le_bytes(flags) & libc::CLONE_THREAD as u64 == 0 => {
                Outcome::Retreat(reason(rule))
            }
            // What cannot be read is an error that the kernel gives.
            _ => Outcome::Answer(Answer::Continue),
        }
    }

    fn own_thread(&self, call: &Call, rule: &Rule, arg: u8) -> Outcome {
        let names_thread = match rule.when {
            When::UnlessOwnProcess(which) => call.args[0] as u32 == which,
            _ => true,
        };
        let wanted = call.args.get(usize::from(arg)).copied().unwrap_or(0) as i32;
        if names_thread && self.has_thread(wanted) {
            return Outcome::Answer(Answer::Continue);
        }
        Outcome::Retreat(format!("{} of another process", rule.name))
    }

    /// Whether the guest has a thread with this TID, as it is numbered inside.
    fn has_thread(&self, inside: i32) -> bool {
        let Ok(tasks) = fs::read_dir(format!("/proc/{}/task", self.guest)) else { return false };
        tasks.flatten().any(|task| {
            let Ok(status) = fs::read_to_string(task.path().join("status")) else { return false };
            let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
            let last = line.and_then(|line| line.split_ascii_whitespace().last()?.parse::<i32>().ok());
            last == Some(inside)
        })
    }

    fn settle(&self, call: Call, outcome: Outcome) {
        let retreat = match outcome {
            Outcome::Nothing => return,
            Outcome::Answer(answer) => {
                // ENOENT: a freeze was quicker, and the call is repeated; or death.
                let _ = seccomp::answer(self.listener.as_fd(), call.id, answer);
                let mut waiting = self.waiting();
                if waiting.calls.get(&call.tid) == Some(&call.id) {
                    waiting.calls.remove(&call.tid);
                }
                return;
            }
            Outcome::Again => None,
            Outcome::Retreat(reason) => {
                self.hooks.retreat(reason.clone());
                Some(reason)
            }
        };
        self.held().insert(call.tid, Held { call, retreat, since: Instant::now() });
    }

    /// Forgets calls that wait no more, and asks again for those that have waited for long.
    fn look_at_held(self: &Arc<Self>) {
        let mut due = Vec::new();
        self.held().retain(|_, held| {
            if !seccomp::is_waiting(self.listener.as_fd(), held.call.id) {
                return false;
            }
            let limit = if held.retreat.is_some() { RETREAT_AGAIN } else { ASK_AGAIN };
            if held.since.elapsed() >= limit {
                held.since = Instant::now();
                due.push((held.call, held.retreat.clone()));
            }
            true
        });
        for (call, retreat) in due {
            match retreat {
                Some(reason) => self.hooks.retreat(reason),
                None => self.tell(call),
            }
        }
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn held(&self) -> MutexGuard<'_, HashMap<i32, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The error of a negative result; what is none counts as `EIO`.
fn errno_of(result: i64) -> Errno {
    match result.checked_neg().and_then(|errno| i32::try_from(errno).ok()).map(Errno::from_raw) {
        None | Some(Errno::UnknownErrno) => Errno::EIO,
        Some(errno) => errno,
    }
}

fn reason(rule: &Rule) -> String {
    match rule.when {
        When::SharedWritable => "mmap of a shared, writable file".into(),
        _ => rule.name.into(),
    }
}
