//! The side where the process is to run.

use super::Order;

/// What has happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TargetEvent {
    /// From home.
    Order(Order),
    /// The place is ready.
    PlaceMade,
    /// The image is there and the process rebuilt.
    Built,
    /// The place or the process could not be made.
    BuildFailed,
    /// Home is silent, or the link is gone.
    LinkLost,
    /// Home has not come back in time.
    LeaseExpired,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TargetAction {
    /// Make a place; then [`TargetEvent::PlaceMade`] or [`TargetEvent::BuildFailed`].
    MakePlace,
    /// Tell home that the image may come.
    TellPrepared,
    /// Tell home that the process stands ready.
    TellReady,
    /// Let it run.
    Release,
    /// Tell home that it runs.
    TellRunning,
    /// Tell home that it cannot be.
    TellFailed,
    /// Stop it where it is.
    Suspend,
    /// Throw the copy away.
    Discard,
    /// It has no meaning now; for the log.
    Ignore(TargetEvent),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Idle,
    Preparing,
    Receiving,
    Ready,
    Running,
    Suspended,
    Gone,
}

/// The target's machine.
#[derive(Debug, Clone)]
pub struct Target {
    state: State,
}

impl Default for Target {
    fn default() -> Self {
        Target { state: State::Idle }
    }
}

impl Target {
    /// Takes an event; gives what to do, in order.
    pub fn step(&mut self, event: TargetEvent) -> Vec<TargetAction> {
        use State::{Gone, Idle, Preparing, Ready, Receiving, Running, Suspended};
        use TargetAction::{
            Discard, MakePlace, Release, Suspend, TellFailed, TellPrepared, TellReady, TellRunning,
        };
        use TargetEvent as E;
        let (next, actions) = match (self.state, event) {
            (Idle, E::Order(Order::Prepare)) => (Preparing, vec![MakePlace]),
            (Preparing, E::PlaceMade) => (Receiving, vec![TellPrepared]),
            (Receiving, E::Built) => (Ready, vec![TellReady]),
            (Preparing | Receiving, E::BuildFailed) => (Gone, vec![TellFailed, Discard]),
            (Ready, E::Order(Order::Commit)) => (Running, vec![Release, TellRunning]),
            // Before the commit our copy is not the process.
            (Idle | Preparing | Receiving | Ready, E::Order(Order::Abort) | E::LinkLost) => {
                (Gone, vec![Discard])
            }
            (Running, E::LinkLost) => (Suspended, vec![Suspend]),
            (Suspended, E::LeaseExpired) => (Gone, vec![Discard]),
            (state, event) => (state, vec![TargetAction::Ignore(event)]),
        };
        self.state = next;
        actions
    }

    /// Whether the guest runs here.
    pub fn is_running(&self) -> bool {
        self.state == State::Running
    }
}
