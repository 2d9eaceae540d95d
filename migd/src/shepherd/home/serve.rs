//! Serving a guest that runs elsewhere: what it asks, what it tells, and the deputy's signals.

use super::super::session::{IdentityQuestion, Question, Reply, ToHome, ToHost};
use super::peer::Host;
use super::{Away, Home, Place};
use crate::shepherd::control::HomeEvent;
use crate::shepherd::{preflight, terminal};
use checkpoint::deputy::{End, SigInfo, signal_number};
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
            ToHome::Ask { id, question } => self.answer(connection, id, question),
            ToHome::Retreat { reason } => self.control.send(&HomeEvent::Retreat { reason }),
            ToHome::Stopped { signal } => away.stop_deputy(signal)?,
            ToHome::Continued => {}
            ToHome::Stat { cpu_ms, rss_bytes, state } => {
                self.control.send(&HomeEvent::GuestStat { cpu_ms, rss_bytes, state });
            }
            ToHome::Ended { status } => return self.guest_ended(status),
            ToHome::Move(step) => tracing::debug!(epoch = step.epoch, "a step of no move under way"),
        }
        Ok(false)
    }

    fn guest_ended(&mut self, status: i32) -> anyhow::Result<bool> {
        let Place::Away(away) = std::mem::replace(&mut self.place, Place::Gone) else { return Ok(true) };
        let Away { host, deputy, .. } = *away;
        if let Some(view) = self.view.take() {
            view.disconnect(host.view_connection);
            view.release_all();
        }
        host.link.close();
        match End::from_status(status) {
            Some(end) => deputy.end(end)?,
            None => deputy.kill(libc::SIGKILL),
        }
        self.gone("exited", &format!("it ended on {}", host.name));
        Ok(true)
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
        away.deputy.kill(libc::SIGKILL);
        self.gone("lost", &detail);
        true
    }

    /// Answers a guest's question.
    pub(super) fn answer(&mut self, connection: u64, id: u64, question: Question) {
        let reply = match question {
            Question::Identity(question) => {
                Reply { result: identity(self.args.pid, question), bytes: Vec::new() }
            }
            Question::Terminal { handle, request, value, bytes } => {
                let file = self.view.as_ref().and_then(|view| view.handle_file(handle));
                match file {
                    Some(file) => terminal::answer(file.as_fd(), self.args.pid, request, value, &bytes),
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

    /// The guest has closed a file of the deputy's for good.
    pub(super) fn handle_closed(&mut self, handle: u64) {
        let fds: Vec<i32> =
            self.carried.fds.iter().filter(|&(_, &of)| of == handle).map(|(&fd, _)| fd).collect();
        let Place::Away(away) = &mut self.place else { return };
        for fd in &fds {
            self.carried.fds.remove(fd);
        }
        if let Err(error) = away.deputy.close_fds(&fds) {
            tracing::warn!(%error, "the deputy's descriptors could not be closed");
        }
    }

    /// Takes leave of a host that has nothing of ours any more.
    pub(super) fn retire(&self, host: Host) {
        host.link.close();
    }
}

impl Away {
    /// Passes a signal that the deputy has caught on to the guest.
    pub(super) fn pass_signal(&mut self, info: &SigInfo) -> anyhow::Result<()> {
        let message = match signal_number(info) {
            // Continuing is an act of the kernel, not only a signal.
            libc::SIGCONT => ToHost::Kill { signal: libc::SIGCONT },
            _ => ToHost::Signal { tid: None, info: info.to_vec() },
        };
        if self.host.tell(&message).is_ok() {
            self.deputy.resume()?;
        }
        Ok(())
    }

    /// The deputy was stopped: by somebody at home, or by us for its guest.
    pub(super) fn stopped(&mut self, signal: u8) {
        if self.stopping != Some(signal) {
            let _ = self.host.tell(&ToHost::Kill { signal: libc::SIGSTOP });
            self.stopping = Some(signal);
        }
    }

    fn stop_deputy(&mut self, signal: u8) -> anyhow::Result<()> {
        if self.stopping.is_none() {
            self.stopping = Some(signal);
            self.deputy.stop(signal)?;
        }
        Ok(())
    }
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
