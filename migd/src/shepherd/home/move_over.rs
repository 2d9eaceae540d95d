//! From one host node to another: home is the arbiter, and the image passes through it.

use super::super::control::TargetNode;
use super::super::session::{SendFigures, StepKind};
use super::peer::Host;
use super::record::{self, Record};
use super::{Away, Freeze, Home, MoveError, Place, STEP_LIMIT};
use crate::shepherd::control::MoveFigures;
use std::time::Instant;

impl Home {
    pub(super) fn move_over(
        &mut self,
        id: u64,
        mut away: Box<Away>,
        node: &TargetNode,
        dry_run: bool,
        deadline: Instant,
    ) -> (Place, Result<MoveFigures, MoveError>) {
        self.progress(id, "preparing", 0, 0);
        let epoch = self.next_epoch();
        let target = match self.prepare_over(node, epoch, deadline) {
            Ok(target) => target,
            Err(error) => return (Place::Away(away), Err(error)),
        };
        let hold = self.view.as_ref().map(|view| view.hold());
        let freeze = Freeze(Instant::now());
        let result = self.transfer_over(id, &away.host, &target, epoch, dry_run, deadline);
        away.host.end_relay(&target);
        match result {
            Ok(sent) => {
                let figures = freeze.figures(sent);
                let _ = away.host.step(epoch, StepKind::Forget);
                if let Some(view) = &self.view {
                    view.disconnect(away.host.view_connection);
                }
                drop(hold);
                // The source ends by itself when it has read that.
                let old = std::mem::replace(&mut away.host, target);
                self.retire(old);
                (Place::Away(away), Ok(figures))
            }
            Err(error) => {
                target.abort(epoch, &error.to_string());
                target.link.close();
                if let Some(view) = &self.view {
                    view.disconnect(target.view_connection);
                }
                away.host.abort(epoch, &error.to_string());
                (Place::Away(away), Err(error))
            }
        }
    }

    fn prepare_over(&mut self, node: &TargetNode, epoch: u64, deadline: Instant) -> Result<Host, MoveError> {
        let view = self.view.clone().ok_or_else(|| MoveError::Failed("there is no home view".into()))?;
        self.connections += 1;
        let target = Host::connect(node, self.connections, &self.key, &view, self.sender.clone())?;
        let terminal = self.terminal(&view);
        target.welcome(self.welcome(terminal)?)?;
        target.step(epoch, StepKind::Prepare)?;
        let limit = deadline.min(Instant::now() + STEP_LIMIT);
        let prepared = self
            .await_step(target.number, epoch, limit, |step| matches!(step, StepKind::Prepared).then_some(()));
        match prepared {
            Ok(()) => Ok(target),
            Err(error) => {
                target.abort(epoch, &error.to_string());
                target.link.close();
                view.disconnect(target.view_connection);
                Err(error)
            }
        }
    }

    fn transfer_over(
        &mut self,
        id: u64,
        source: &Host,
        target: &Host,
        epoch: u64,
        dry_run: bool,
        deadline: Instant,
    ) -> Result<SendFigures, MoveError> {
        self.progress(id, "freezing", 0, 0);
        source.relay_image_to(target);
        source.step(epoch, StepKind::Freeze)?;
        let sent = self.await_step(source.number, epoch, deadline, |step| match step {
            StepKind::Sent { figures } => Some(figures),
            _ => None,
        })?;
        self.progress(id, "copying", sent.bytes, sent.wire_bytes);
        let limit = deadline.min(Instant::now() + STEP_LIMIT);
        self.await_step(target.number, epoch, limit, |step| matches!(step, StepKind::Ready).then_some(()))?;
        if dry_run {
            return Err(MoveError::Failed("a dry run: everything was done but the commit".into()));
        }
        self.progress(id, "committing", sent.bytes, sent.wire_bytes);
        let node = target.name.clone();
        record::commit(&Record { pid: self.args.pid, epoch, node })
            .map_err(|error| MoveError::Failed(format!("the commit could not be recorded: {error}")))?;
        target.step(epoch, StepKind::Commit)?;
        let limit = Instant::now() + STEP_LIMIT;
        let running = self
            .await_step(target.number, epoch, limit, |step| matches!(step, StepKind::Running).then_some(()));
        if running.is_err() {
            // As in move_out: the target is fenced by our silence, and throws its copy away.
            target.link.close();
            std::thread::sleep(super::super::host::LEASE_LIMIT);
            let node = source.name.clone();
            let _ = record::commit(&Record { pid: self.args.pid, epoch: self.next_epoch(), node });
        }
        running.map(|()| sent)
    }
}
