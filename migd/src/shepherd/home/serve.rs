//! Serving a guest that runs elsewhere: what it asks, what it tells, and the deputy's signals.

use super::super::session::{IdentityQuestion, Question, Reply, ToHome, ToHost};
use super::peer::Host;
use super::{Home, Member, Place};
use crate::shepherd::control::HomeEvent;
use crate::shepherd::{preflight, terminal};
use checkpoint::deputy::{Deputy, End, SigInfo, signal_number};
use std::collections::BTreeSet;
use std::os::fd::AsFd;

impl Home {
    /// Handles a message outside a move; `true`: the shepherd's work is done.
    pub(super) fn serve(&mut self, connection: u64, message: ToHome) -> anyhow::Result<bool> {
        let Place::Away(away) = &mut self.place else { return Ok(false) };
        if away.host.number != connection {
            // An earlier host: fenced.
            return Ok(false);
        }
        match message {
            ToHome::Ask { pid, id, question } => self.answer(connection, pid, id, question),
            ToHome::Retreat { reason } => self.control.send(&HomeEvent::Retreat { reason }),
            ToHome::Stopped { pid, signal } => {
                if let Some(member) = away.member(pid) {
                    member.stop_deputy(signal)?;
                }
            }
            ToHome::Continued { pid } => {
                if let Some(member) = away.member(pid) {
                    member.continue_deputy();
                }
            }
            ToHome::Stat { pid, cpu_ms, rss_bytes, state } => {
                self.control.send(&HomeEvent::GuestStat { pid, cpu_ms, rss_bytes, state });
            }
            ToHome::Ended { pid, status } => return self.guest_ended(pid, status),
            ToHome::Move(step) => tracing::debug!(epoch = step.epoch, "a step of no move under way"),
        }
        Ok(false)
    }

    /// A guest has ended: so does its deputy, in the same way.
    fn guest_ended(&mut self, pid: i32, status: i32) -> anyhow::Result<bool> {
        let Place::Away(away) = &mut self.place else { return Ok(true) };
        let detail = format!("it ended on {}", away.host.name);
        if let Some(at) = away.members.iter().position(|member| member.deputy.pid() == pid) {
            let last = away.members.len() == 1;
            if last && let Some(view) = &self.view {
                // Before its parent can hear of the end, what it had open is closed.
                view.disconnect(away.host.view_connection);
                view.release_all();
            }
            end_deputy(away.members.remove(at).deputy, status);
        }
        Ok(self.none_left(&detail))
    }

    /// A link is gone; `true`: the shepherd's work is done.
    pub(super) fn host_lost(&mut self, connection: u64, why: &str) -> bool {
        let current = matches!(&self.place, Place::Away(away) if away.host.number == connection);
        if !current {
            return false;
        }
        let Place::Away(away) = std::mem::replace(&mut self.place, Place::Gone) else { return false };
        // The only copy was there. Its parent must learn of it: a death that no program gives itself.
        let detail = format!("{}, where it ran, was lost: {why}", away.host.name);
        tracing::error!(pid = self.args.pid, %detail);
        // Children first: nobody can wait for one that seems to live.
        for member in away.members.into_iter().rev() {
            member.deputy.kill_and_reap();
        }
        self.gone("lost", &detail);
        true
    }

    /// Answers a guest's question.
    pub(super) fn answer(&mut self, connection: u64, pid: i32, id: u64, question: Question) {
        let known = matches!(&self.place, Place::Away(away) if away.family.contains(&pid));
        // During a move the place is not there to be asked; a PID that is not the job's tells nothing
        // that ps does not.
        let reply = match question {
            _ if matches!(self.place, Place::Away(_)) && !known => {
                Reply { result: -i64::from(libc::ESRCH), bytes: Vec::new() }
            }
            Question::Identity(question) => Reply { result: identity(pid, question), bytes: Vec::new() },
            Question::Terminal { handle, request, value, bytes } => {
                let file = self.view.as_ref().and_then(|view| view.handle_file(handle));
                match file {
                    Some(file) => terminal::answer(file.as_fd(), pid, request, value, &bytes),
                    None => Reply { result: -i64::from(libc::EBADF), bytes: Vec::new() },
                }
            }
        };
        if let Some(host) = self.host_of(connection) {
            host.answer(id, reply);
        }
    }

    fn host_of(&self, connection: u64) -> Option<&Host> {
        match &self.place {
            Place::Away(away) if away.host.number == connection => Some(&away.host),
            _ => None,
        }
    }

    /// The guests have closed a file of the deputies' for good.
    pub(super) fn handle_closed(&mut self, handle: u64) {
        let Place::Away(away) = &mut self.place else { return };
        for member in &mut away.members {
            let fds: Vec<i32> =
                member.carried.fds.iter().filter(|&(_, &of)| of == handle).map(|(&fd, _)| fd).collect();
            for fd in &fds {
                member.carried.fds.remove(fd);
            }
            if let Err(error) = member.deputy.close_fds(&fds) {
                tracing::warn!(%error, "a deputy's descriptors could not be closed");
            }
        }
    }

    /// Takes leave of a host that has nothing of ours any more.
    pub(super) fn retire(&self, host: Host) {
        host.link.close();
    }
}

impl Member {
    /// Passes a signal that the deputy has caught on to the guest.
    pub(super) fn pass_signal(&mut self, host: &Host, info: &SigInfo) -> anyhow::Result<()> {
        let pid = self.deputy.pid();
        let message = match signal_number(info) {
            // Continuing is an act of the kernel, not only a signal.
            libc::SIGCONT => ToHost::Kill { pid: Some(pid), signal: libc::SIGCONT },
            _ => ToHost::Signal { pid, tid: None, info: info.to_vec() },
        };
        if host.tell(&message).is_ok() {
            self.deputy.resume()?;
        }
        Ok(())
    }

    /// The deputy was stopped: by somebody at home, or by us for its guest.
    pub(super) fn stopped(&mut self, host: &Host, signal: u8) {
        if self.stopping != Some(signal) {
            let pid = Some(self.deputy.pid());
            let _ = host.tell(&ToHost::Kill { pid, signal: libc::SIGSTOP });
            self.stopping = Some(signal);
        }
    }

    /// The guest goes on: if not because its deputy does, the deputy does because of that.
    pub(super) fn continue_deputy(&mut self) {
        if self.stopping.take().is_some() {
            self.continued = true;
            self.deputy.kill(libc::SIGCONT);
        }
    }

    /// Whether a signal is but that which let the deputy go on after its guest.
    pub(super) fn is_own(&mut self, info: &SigInfo) -> bool {
        signal_number(info) == libc::SIGCONT && std::mem::take(&mut self.continued)
    }

    fn stop_deputy(&mut self, signal: u8) -> anyhow::Result<()> {
        if self.stopping.is_none() {
            self.stopping = Some(signal);
            self.deputy.stop(signal)?;
        }
        Ok(())
    }
}

/// Ends a deputy as its guest has ended. Best effort: one that cannot be ended so is killed.
pub(super) fn end_deputy(deputy: Deputy, status: i32) {
    let pid = deputy.pid();
    match End::from_status(status) {
        Some(end) => {
            if let Err(error) = deputy.end(end) {
                tracing::warn!(pid, %error, "a deputy could not be ended as its guest");
                let _ = checkpoint::sys::wait::kill(pid, libc::SIGKILL);
            }
        }
        None => deputy.kill_and_reap(),
    }
}

/// Whether a signal is the kernel's own word of what a child of the subtree has done at home: the host's
/// kernel has said the same to the guest.
pub(super) fn is_echo(info: &SigInfo, family: &BTreeSet<i32>) -> bool {
    let word = |at: usize| i32::from_le_bytes(info[at..at + 4].try_into().expect("four bytes"));
    // siginfo_t: si_signo, si_errno, si_code, padding, si_pid. A code of the kernel's is positive.
    signal_number(info) == libc::SIGCHLD && word(8) > 0 && family.contains(&word(16))
}

fn identity(pid: i32, question: IdentityQuestion) -> i64 {
    match question {
        IdentityQuestion::ParentPid => preflight::parent(pid).map_or(0, i64::from),
        IdentityQuestion::ProcessGroup(0) => preflight::process_group(pid).map_or(0, i64::from),
        IdentityQuestion::Session(0) => preflight::session(pid).map_or(0, i64::from),
        IdentityQuestion::ProcessGroup(other) => {
            preflight::process_group(other).map_or(-i64::from(libc::ESRCH), i64::from)
        }
        IdentityQuestion::Session(other) => {
            preflight::session(other).map_or(-i64::from(libc::ESRCH), i64::from)
        }
    }
}
