//! Home's side of one move.

use super::Order;

/// What has happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HomeEvent {
    /// The move was ordered.
    Begin,
    /// The target has made a place.
    Prepared,
    /// The source has sent everything.
    Sent,
    /// The target has rebuilt the process; it stands still.
    Ready,
    /// The commit is on disk.
    Recorded,
    /// It could not be written.
    RecordFailed,
    /// The target runs.
    Running,
    /// The target cannot go on.
    TargetFailed,
    /// The source cannot send; it runs on.
    SourceFailed,
    /// The target's link is gone.
    TargetLost,
    /// The source's link is gone.
    SourceLost,
    /// A step took too long, or the user gave up.
    TimedOut,
    /// A target that was lost has surely thrown its copy away by now.
    LeaseExpired,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HomeAction {
    /// Tell the target.
    ToTarget(Order),
    /// Tell the source.
    ToSource(Order),
    /// Write the commit to disk.
    Record,
    /// Cut the target off, and wait for its lease.
    AwaitLease,
    /// The move is over.
    Finish(Outcome),
    /// It came too late, or has no meaning now; for the log.
    Ignore(HomeEvent),
}

/// How a move ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It runs at the target.
    Moved,
    /// It runs at the source, as before.
    Failed,
    /// The node with its only copy was lost.
    Lost,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Idle,
    Preparing,
    Copying { sent: bool, ready: bool },
    Recording { source_lost: bool },
    Committing { source_lost: bool },
    Fencing { source_lost: bool },
    Over,
}

/// Home's machine.
#[derive(Debug, Clone)]
pub struct Home {
    state: State,
}

impl Default for Home {
    fn default() -> Self {
        Home { state: State::Idle }
    }
}

impl Home {
    /// Takes an event; gives what to do, in order.
    pub fn step(&mut self, event: HomeEvent) -> Vec<HomeAction> {
        use HomeAction::{AwaitLease, Finish, Record, ToSource, ToTarget};
        use HomeEvent as E;
        use State::{Committing, Copying, Fencing, Idle, Over, Preparing, Recording};
        let abort_both = || vec![ToTarget(Order::Abort), ToSource(Order::Abort), Finish(Outcome::Failed)];
        let (next, actions) = match (self.state, event) {
            (Idle, E::Begin) => (Preparing, vec![ToTarget(Order::Prepare)]),
            (Preparing, E::Prepared) => {
                (Copying { sent: false, ready: false }, vec![ToSource(Order::Freeze)])
            }
            (Preparing, E::TargetFailed | E::TargetLost | E::TimedOut) => {
                (Over, vec![ToTarget(Order::Abort), Finish(Outcome::Failed)])
            }
            (Preparing | Copying { .. }, E::SourceLost) => {
                (Over, vec![ToTarget(Order::Abort), Finish(Outcome::Lost)])
            }
            (Copying { ready: true, .. }, E::Sent) | (Copying { sent: true, .. }, E::Ready) => {
                (Recording { source_lost: false }, vec![Record])
            }
            (Copying { ready, .. }, E::Sent) => (Copying { sent: true, ready }, Vec::new()),
            (Copying { sent, .. }, E::Ready) => (Copying { sent, ready: true }, Vec::new()),
            (Copying { .. }, E::TargetFailed | E::TargetLost | E::SourceFailed | E::TimedOut) => {
                (Over, abort_both())
            }
            (Recording { source_lost }, E::Recorded) => {
                (Committing { source_lost }, vec![ToTarget(Order::Commit)])
            }
            // Nothing was promised to the target yet.
            (
                Recording { source_lost: false },
                E::RecordFailed | E::TargetLost | E::TargetFailed | E::TimedOut,
            ) => (Over, abort_both()),
            (
                Recording { source_lost: true },
                E::RecordFailed | E::TargetLost | E::TargetFailed | E::TimedOut,
            ) => (Over, vec![ToTarget(Order::Abort), Finish(Outcome::Lost)]),
            (Recording { .. }, E::SourceLost) => (Recording { source_lost: true }, Vec::new()),
            (Committing { .. }, E::Running) => (Over, vec![ToSource(Order::Forget), Finish(Outcome::Moved)]),
            (Committing { .. }, E::SourceLost) => (Committing { source_lost: true }, Vec::new()),
            // It may run there or not: nobody here can know.
            (Committing { source_lost }, E::TargetLost | E::TargetFailed | E::TimedOut) => {
                (Fencing { source_lost }, vec![AwaitLease])
            }
            (Fencing { source_lost: false }, E::LeaseExpired) => {
                (Over, vec![ToSource(Order::Abort), Finish(Outcome::Failed)])
            }
            (Fencing { source_lost: true }, E::LeaseExpired) => (Over, vec![Finish(Outcome::Lost)]),
            (Fencing { .. }, E::SourceLost) => (Fencing { source_lost: true }, Vec::new()),
            (state, event) => (state, vec![HomeAction::Ignore(event)]),
        };
        self.state = next;
        actions
    }

    /// Whether the move has ended.
    pub fn is_over(&self) -> bool {
        self.state == State::Over
    }
}
