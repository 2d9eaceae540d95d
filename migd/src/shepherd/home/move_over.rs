//! From one host node to another: home is the arbiter, and the image passes through it.

use super::super::control::TargetNode;
use super::super::session::SendFigures;
use super::conduct::{Parties, step_of};
use super::peer::Host;
use super::record::{self, Record};
use super::{Away, Freeze, Home, MoveError, Place, STEP_LIMIT};
use crate::protocol::{HomeEvent, Order, Outcome};
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
        let target = match self.prepare_over(node) {
            Ok(target) => target,
            Err(error) => return (Place::Away(away), Err(error)),
        };
        // What the old place closes, the new one is still to open.
        let hold = self.view.as_ref().map(|view| view.hold());
        let mut parties = Over {
            id,
            epoch,
            source: &away.host,
            target: &target,
            deadline,
            dry_run,
            freeze: None,
            figures: None,
            sent: SendFigures::default(),
            why: None,
        };
        self.pids = away.pids();
        let outcome = self.conduct(epoch, &mut parties);
        let (why, figures) = (parties.why.take(), parties.figures.take());
        away.host.end_relay(&target);
        let result = match outcome {
            Outcome::Moved => {
                if let Some(view) = &self.view {
                    view.disconnect(away.host.view_connection);
                }
                // The source ends by itself when it has read that it is forgotten.
                let old = std::mem::replace(&mut away.host, target);
                self.retire(old);
                Ok(figures.unwrap_or_default())
            }
            Outcome::Failed | Outcome::Lost => {
                target.link.close();
                if let Some(view) = &self.view {
                    view.disconnect(target.view_connection);
                }
                let node = away.host.name.clone();
                let pids = away.pids();
                let back = Record { pid: self.args.pid, epoch, node, refilling: false, pids };
                if let Err(error) = record::commit(&self.args.record, &back) {
                    // Read by nobody but the daemon, and only if this shepherd dies.
                    tracing::warn!(%error, "the record could not be set right");
                }
                match (why, figures) {
                    (None, Some(figures)) if dry_run => Ok(figures),
                    (why, _) => Err(why.unwrap_or(MoveError::Failed("the move was given up".into()))),
                }
            }
        };
        drop(hold);
        // A source that was lost is told to the main loop by its link.
        (Place::Away(away), result)
    }

    fn prepare_over(&mut self, node: &TargetNode) -> Result<Host, MoveError> {
        let view = self.view.clone().ok_or_else(|| MoveError::Failed("there is no home view".into()))?;
        self.connections += 1;
        let target = Host::connect(node, self.connections, &self.key, &view, self.sender.clone())?;
        let terminal = self.terminal(&view);
        target.welcome(self.welcome(terminal)?)?;
        Ok(target)
    }
}

/// The parties of a move between two hosts.
struct Over<'a> {
    id: u64,
    epoch: u64,
    source: &'a Host,
    target: &'a Host,
    deadline: Instant,
    dry_run: bool,
    freeze: Option<Freeze>,
    figures: Option<MoveFigures>,
    sent: SendFigures,
    why: Option<MoveError>,
}

impl Over<'_> {
    fn tell(&mut self, host: &Host, order: Order, lost: HomeEvent) -> Vec<HomeEvent> {
        let why = self.why.as_ref().map_or("a dry run".to_string(), ToString::to_string);
        match host.step(self.epoch, step_of(order, &why)) {
            Ok(()) => Vec::new(),
            Err(error) => {
                self.why.get_or_insert(error);
                vec![lost]
            }
        }
    }
}

impl Parties for Over<'_> {
    fn target_name(&self, _: &Home) -> String {
        self.target.name.clone()
    }

    fn to_target(&mut self, home: &mut Home, order: Order) -> Vec<HomeEvent> {
        if order == Order::Commit {
            home.progress(self.id, "committing", self.sent.bytes, self.sent.wire_bytes);
        }
        let target = self.target;
        self.tell(target, order, HomeEvent::TargetLost)
    }

    fn to_source(&mut self, home: &mut Home, order: Order) -> Vec<HomeEvent> {
        if order == Order::Freeze {
            home.progress(self.id, "freezing", 0, 0);
            self.freeze = Some(Freeze(Instant::now()));
            self.source.relay_image_to(self.target);
        }
        if order == Order::Forget {
            home.silence(self.source);
        }
        let source = self.source;
        self.tell(source, order, HomeEvent::SourceLost)
    }

    fn wait(&mut self, home: &mut Home) -> HomeEvent {
        // While the image flows there is no step for long.
        let copying = self.freeze.is_some() && self.sent.wire_bytes == 0;
        let limit = if copying { self.deadline } else { self.deadline.min(Instant::now() + STEP_LIMIT) };
        let heard = home.hear(self.epoch, Some(self.source.number), Some(self.target.number), limit);
        if let Some(error) = heard.error {
            self.why.get_or_insert(error);
        }
        if let Some(sent) = heard.figures {
            self.sent = sent;
            home.progress(self.id, "copying", sent.bytes, sent.wire_bytes);
        }
        match heard.event {
            HomeEvent::Ready if self.dry_run => {
                self.figures = self.freeze.map(|freeze| freeze.figures(self.sent));
                HomeEvent::TimedOut
            }
            HomeEvent::Running => {
                self.figures = self.freeze.map(|freeze| freeze.figures(self.sent));
                HomeEvent::Running
            }
            event => event,
        }
    }

    fn cut_target(&mut self) {
        self.target.link.close();
    }
}
