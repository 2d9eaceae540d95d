//! A guest that runs: signals from home, its questions, its retreat, and calls that were interrupted.

use super::super::session::{IdentityQuestion, Question, Reply, ToHome, ToHost};
use super::super::supervisor::SupervisorHooks;
use super::{Host, Wiring, lock};
use crate::homefs::InterruptReply;
use checkpoint::deputy::{self, SigInfo};
use checkpoint::image::codec;
use checkpoint::sys::ptrace::{self, Stop};
use checkpoint::tracee::{Tracee, TraceeError, restart};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// How long home may take to answer a question.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// How often home hears how the guest is doing.
const STAT_EVERY: Duration = Duration::from_secs(1);

impl Host {
    /// Queues a signal in the guest as if it had been sent to it here, with home's siginfo.
    pub(super) fn pass_signal(&mut self, pid: i32, tid: Option<i32>, info: &[u8]) {
        let guest = self.guests.iter().find(|guest| guest.inside == pid);
        let (Some(guest), Ok(info)) = (guest, SigInfo::try_from(info)) else { return };
        let queue = |mut tracee: Tracee| -> Result<(), TraceeError> {
            tracee.install_stub(&[])?;
            let thread = tid.and_then(|tid| super::super::preflight::index_inside(&tracee, tid));
            deputy::requeue_signal(&mut tracee, thread, &info)?;
            tracee.thaw()
        };
        self.wiring.freezing.store(true, Ordering::Release);
        let result = guest.supervisor.freeze().and_then(queue);
        self.thawed();
        match result {
            // A guest that has just ended needs no signal.
            Ok(()) | Err(TraceeError::Died { .. }) => {}
            Err(error) => tracing::error!(%error, "a signal could not be passed on"),
        }
    }

    /// Sends one guest, or all of them, a plain signal.
    pub(super) fn kill(&mut self, pid: Option<i32>, signal: i32) {
        let Some(house) = &mut self.house else { return };
        for guest in self.guests.iter().filter(|guest| pid.is_none_or(|pid| guest.inside == pid)) {
            let _ = house.kill(guest.inside, signal);
        }
    }

    pub(super) fn put_off(&mut self, message: ToHost) -> Option<ToHost> {
        // A kill is meant for whatever copy there is; a signal stays with the deputy, which home
        // does not let catch any during a move.
        if let ToHost::Kill { pid, signal } = &message {
            self.kill(*pid, *signal);
        }
        Some(message)
    }

    /// A signal waits for a thread that waits in a read or write on a file of home's. FUSE can only
    /// answer EINTR, never "restart": so the thread is taken to an event stop, where its result is
    /// changed to ERESTARTSYS before the kernel looks at the signal's action (kernel/signal.c).
    pub(super) fn repair_interrupted(&mut self, tid: i32, reply: InterruptReply) {
        if let Err(error) = repair(tid, reply) {
            // It has ended, or is being handled by a freeze, which repairs it as well.
            tracing::debug!(tid, %error, "an interrupted call was not repaired");
        }
    }

    pub(super) fn tell_stat(&mut self) {
        if self.last_stat.elapsed() < STAT_EVERY {
            return;
        }
        self.last_stat = Instant::now();
        let mut stopped = Vec::new();
        for guest in &mut self.guests {
            let pid = guest.inside;
            let Some((cpu_ms, rss_bytes, state)) = super::super::preflight::usage(guest.pid) else {
                continue;
            };
            stopped.push((pid, state == 'T', guest.top, cpu_ms, rss_bytes, state));
        }
        for (pid, stops, top, cpu_ms, rss_bytes, state) in stopped {
            self.tell(&ToHome::Stat { pid, cpu_ms, rss_bytes, state });
            // Of children only their parents hear that they stop; by which signal, nobody else can ask.
            let Some(guest) = self.guests.iter_mut().find(|guest| guest.inside == pid && !top) else {
                continue;
            };
            if std::mem::replace(&mut guest.stopped, stops) != stops {
                match stops {
                    true => self.tell(&ToHome::Stopped { pid, signal: libc::SIGSTOP as u8 }),
                    false => self.tell(&ToHome::Continued { pid }),
                }
            }
        }
    }
}

/// What the supervisor of the guest `pid` (its PID at home) needs.
pub(super) fn hooks(wiring: &Arc<Wiring>, pid: i32) -> Arc<dyn SupervisorHooks> {
    Arc::new(Hooks { wiring: Arc::clone(wiring), pid })
}

fn repair(tid: i32, reply: InterruptReply) -> Result<(), nix::errno::Errno> {
    if let Err(errno) = ptrace::seize(tid, ptrace::O_TRACESYSGOOD).and_then(|()| ptrace::interrupt(tid)) {
        reply.interrupted();
        return Err(errno);
    }
    reply.interrupted();
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        match ptrace::wait(tid, false)? {
            Some(Stop::Event | Stop::Group(_)) => break,
            Some(Stop::Gone(_)) => return Ok(()),
            Some(Stop::Signal(signal)) => return ptrace::detach(tid, signal),
            Some(Stop::Syscall | Stop::Clone) => ptrace::cont(tid, 0)?,
            None if Instant::now() > deadline => return Err(nix::errno::Errno::ETIMEDOUT),
            None => std::thread::sleep(Duration::from_micros(50)),
        }
    }
    let mut regs = ptrace::regs(tid)?;
    let interrupted = regs.rax() as i64 == -i64::from(libc::EINTR);
    if interrupted && restart::is_repeatable(regs.orig_rax() as i64) {
        regs.set_rax(-512i64 as u64); // ERESTARTSYS
        ptrace::set_regs(tid, &regs)?;
    }
    ptrace::detach(tid, 0)
}

/// What the supervisor's threads need.
struct Hooks {
    wiring: Arc<Wiring>,
    /// Whose supervisor: its PID at home.
    pid: i32,
}

impl Hooks {
    fn tell(&self, message: &ToHome) -> io::Result<()> {
        let link = self.wiring.link.get().ok_or(io::ErrorKind::NotConnected)?;
        let body = codec::encode(message).map_err(io::Error::other)?;
        link.send(super::Channel::Control, body)
    }

    fn ask(&self, question: Question) -> io::Result<Reply> {
        static SERIAL: AtomicU64 = AtomicU64::new(1);
        let id = SERIAL.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = mpsc::channel();
        lock(&self.wiring.questions).insert(id, sender);
        let asked = self.tell(&ToHome::Ask { pid: self.pid, id, question });
        let reply = asked.and_then(|()| {
            receiver.recv_timeout(ANSWER_LIMIT).map_err(|_| io::Error::from(io::ErrorKind::TimedOut))
        });
        lock(&self.wiring.questions).remove(&id);
        reply
    }
}

impl SupervisorHooks for Hooks {
    fn identity(&self, question: IdentityQuestion) -> io::Result<i64> {
        self.ask(Question::Identity(question)).map(|reply| reply.result)
    }

    fn terminal(&self, handle: u64, request: u64, value: u64, bytes: &[u8]) -> io::Result<Reply> {
        self.ask(Question::Terminal { handle, request, value, bytes: bytes.to_vec() })
    }

    fn is_relative(&self, pid: i32) -> bool {
        lock(&self.wiring.guests).contains(&pid)
    }

    fn retreat(&self, reason: String) {
        let _ = self.tell(&ToHome::Retreat { reason });
    }
}
