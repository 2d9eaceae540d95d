//! Runs one move: feeds home's machine of [`crate::protocol`] and does what it answers.
//!
//! The two parties of a move may each be another node's shepherd or this very process; [`Parties`] is
//! what the three kinds of move have in common.

use super::super::host;
use super::super::session::{SendFigures, StepKind, ToHome};
use super::record::{self, Record};
use super::{Event, Home, MoveError};
use crate::protocol::{Home as Machine, HomeAction, HomeEvent, Order, Outcome};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// The parties of one move, as its kind of move sees them.
pub(super) trait Parties {
    /// Name of the node where it will run.
    fn target_name(&self, home: &Home) -> String;
    /// Tells the target; gives what has happened by the time this returns.
    fn to_target(&mut self, home: &mut Home, order: Order) -> Vec<HomeEvent>;
    /// Tells the source.
    fn to_source(&mut self, home: &mut Home, order: Order) -> Vec<HomeEvent>;
    /// Waits for what happens next.
    fn wait(&mut self, home: &mut Home) -> HomeEvent;
    /// Nothing of the target's is listened to any more.
    fn cut_target(&mut self);
}

/// What a remote party has told, and what came with it.
pub(super) struct Heard {
    pub event: HomeEvent,
    pub error: Option<MoveError>,
    pub figures: Option<SendFigures>,
}

impl Heard {
    fn plain(event: HomeEvent) -> Heard {
        Heard { event, error: None, figures: None }
    }

    fn failed(event: HomeEvent, error: MoveError) -> Heard {
        Heard { event, error: Some(error), figures: None }
    }
}

impl Home {
    /// Conducts a move to its end.
    pub(super) fn conduct(&mut self, epoch: u64, parties: &mut dyn Parties) -> Outcome {
        let mut machine = Machine::default();
        let mut events = VecDeque::from([HomeEvent::Begin]);
        loop {
            let event = match events.pop_front() {
                Some(event) => event,
                None => parties.wait(self),
            };
            let mut outcome = None;
            for action in machine.step(event) {
                match action {
                    HomeAction::ToTarget(order) => events.extend(parties.to_target(self, order)),
                    HomeAction::ToSource(order) => events.extend(parties.to_source(self, order)),
                    HomeAction::Record => {
                        let node = parties.target_name(self);
                        events.push_back(self.record(epoch, node));
                    }
                    HomeAction::AwaitLease => {
                        parties.cut_target();
                        // It hears nothing of us from now on, stops, and throws its copy away.
                        std::thread::sleep(host::SILENCE_LIMIT + host::LEASE_LIMIT);
                        events.push_back(HomeEvent::LeaseExpired);
                    }
                    HomeAction::Finish(end) => outcome = Some(end),
                    HomeAction::Ignore(event) => tracing::debug!(?event, "nothing follows from this"),
                }
            }
            if let Some(outcome) = outcome {
                return outcome;
            }
        }
    }

    fn record(&self, epoch: u64, node: String) -> HomeEvent {
        let (pid, pids) = (self.args.pid, self.pids.clone());
        match record::commit(&self.args.record, &Record { pid, epoch, node, refilling: false, pids }) {
            Ok(()) => HomeEvent::Recorded,
            Err(error) => {
                tracing::error!(%error, "the commit could not be recorded");
                HomeEvent::RecordFailed
            }
        }
    }

    /// Waits for the next step of `epoch` from a remote source or target (by their connections).
    pub(super) fn hear(
        &mut self,
        epoch: u64,
        source: Option<u64>,
        target: Option<u64>,
        deadline: Instant,
    ) -> Heard {
        loop {
            while let Some(event) = self.inbox.pop() {
                match event {
                    Event::Message(from, ToHome::Move(step)) if step.epoch == epoch => {
                        let heard = if Some(from) == target {
                            from_target(step.kind)
                        } else if Some(from) == source {
                            from_source(step.kind)
                        } else {
                            None
                        };
                        if let Some(heard) = heard {
                            return heard;
                        }
                    }
                    Event::Lost(from, why) if Some(from) == target => {
                        let error = MoveError::Node(format!("the link was lost: {why}"));
                        return Heard::failed(HomeEvent::TargetLost, error);
                    }
                    Event::Lost(from, why) if Some(from) == source => {
                        let error = match self.all_have_ended(from) {
                            true => MoveError::Ended,
                            false => MoveError::Node(format!("the link was lost: {why}")),
                        };
                        // Told to the main loop as well: its only copy may have been there.
                        self.put_off.push_back(Event::Lost(from, why));
                        return Heard::failed(HomeEvent::SourceLost, error);
                    }
                    // A guest that waits for an answer cannot be frozen: answered at once.
                    Event::Message(from, ToHome::Ask { pid, id, question }) => {
                        self.answer(from, pid, id, question);
                    }
                    other => self.put_off.push_back(other),
                }
            }
            if Instant::now() >= deadline {
                let error = MoveError::Node("the other node did not answer in time".into());
                return Heard::failed(HomeEvent::TimedOut, error);
            }
            let until = deadline.min(Instant::now() + Duration::from_millis(100));
            if let Err(error) = self.inbox.wait(until, &[]) {
                return Heard::failed(HomeEvent::TimedOut, MoveError::failed(error));
            }
        }
    }
}

impl Home {
    /// Whether a host has told the ends of all guests: it closes its link then.
    fn all_have_ended(&self, host: u64) -> bool {
        let told = |pid: &i32| {
            self.put_off.iter().any(|event| match event {
                Event::Message(from, ToHome::Ended { pid: ended, .. }) => *from == host && ended == pid,
                _ => false,
            })
        };
        !self.pids.is_empty() && self.pids.iter().all(told)
    }
}

fn from_target(kind: StepKind) -> Option<Heard> {
    Some(match kind {
        StepKind::Prepared => Heard::plain(HomeEvent::Prepared),
        StepKind::Ready => Heard::plain(HomeEvent::Ready),
        StepKind::Running => Heard::plain(HomeEvent::Running),
        StepKind::Failed { blockers, why } => Heard::failed(HomeEvent::TargetFailed, refused(blockers, why)),
        _ => return None,
    })
}

fn from_source(kind: StepKind) -> Option<Heard> {
    Some(match kind {
        StepKind::Sent { figures } => Heard { event: HomeEvent::Sent, error: None, figures: Some(figures) },
        StepKind::Failed { blockers, why } => Heard::failed(HomeEvent::SourceFailed, refused(blockers, why)),
        _ => return None,
    })
}

fn refused(blockers: Vec<crate::api::Blocker>, why: String) -> MoveError {
    if blockers.is_empty() { MoveError::Failed(why) } else { MoveError::Blocked(blockers) }
}

/// The message for an order.
pub(super) fn step_of(order: Order, why: &str) -> StepKind {
    match order {
        Order::Prepare => StepKind::Prepare,
        Order::Freeze => StepKind::Freeze,
        Order::Commit => StepKind::Commit,
        Order::Forget => StepKind::Forget,
        Order::Abort => StepKind::Abort { why: why.into() },
    }
}
