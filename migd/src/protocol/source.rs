//! The side where the process runs when a move begins.

use super::Order;

/// What has happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceEvent {
    /// From home.
    Order(Order),
    /// Frozen, and everything sent.
    Sent,
    /// It could not be frozen or sent.
    SendFailed,
    /// Home is silent, or the link is gone.
    LinkLost,
    /// Home has not come back in time.
    LeaseExpired,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceAction {
    /// Freeze it and send its image; then [`SourceEvent::Sent`] or [`SourceEvent::SendFailed`].
    FreezeAndSend,
    /// Let it run on.
    Thaw,
    /// Tell home that everything is sent.
    TellSent,
    /// Tell home that it could not be.
    TellFailed,
    /// Stop it where it is.
    Suspend,
    /// Throw the copy away.
    Discard,
    /// It has no meaning now; for the log.
    Ignore(SourceEvent),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Running,
    Sending,
    /// Frozen until home has decided.
    Waiting,
    /// Ran when home was lost.
    Suspended,
    /// Was frozen when home was lost: it may run elsewhere.
    InDoubt,
    Gone,
}

/// The source's machine.
#[derive(Debug, Clone)]
pub struct Source {
    state: State,
}

impl Default for Source {
    fn default() -> Self {
        Source { state: State::Running }
    }
}

impl Source {
    /// Takes an event; gives what to do, in order.
    pub fn step(&mut self, event: SourceEvent) -> Vec<SourceAction> {
        use SourceAction::{Discard, FreezeAndSend, Suspend, TellFailed, TellSent, Thaw};
        use SourceEvent as E;
        use State::{Gone, InDoubt, Running, Sending, Suspended, Waiting};
        let (next, actions) = match (self.state, event) {
            (Running, E::Order(Order::Freeze)) => (Sending, vec![FreezeAndSend]),
            (Sending, E::Sent) => (Waiting, vec![TellSent]),
            (Sending, E::SendFailed) => (Running, vec![Thaw, TellFailed]),
            (Sending | Waiting, E::Order(Order::Abort)) => (Running, vec![Thaw]),
            (Waiting, E::Order(Order::Forget)) => (Gone, vec![Discard]),
            (Running, E::LinkLost) => (Suspended, vec![Suspend]),
            (Sending | Waiting, E::LinkLost) => (InDoubt, Vec::new()),
            (Suspended | InDoubt, E::LeaseExpired) => (Gone, vec![Discard]),
            (state, event) => (state, vec![SourceAction::Ignore(event)]),
        };
        self.state = next;
        actions
    }
}
