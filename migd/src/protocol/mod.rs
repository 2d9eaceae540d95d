//! Who decides who runs: one move as three state machines, with no I/O and no clock in them.
//!
//! Home is the arbiter. A shell feeds each machine what has happened and does what it answers; time
//! outs and lost links are events like others. The simulation in this module's tests drives the same
//! machines with delays, cuts and crashes at every step.
//!
//! ```mermaid
//! stateDiagram-v2
//!   state Home {
//!     [*] --> Preparing: begin / prepare the target
//!     Preparing --> Copying: prepared / freeze the source
//!     Copying --> Recording: sent and ready / record
//!     Recording --> Committing: recorded / commit to the target
//!     Committing --> [*]: running / forget to the source
//!     Committing --> Fencing: target lost
//!     Fencing --> [*]: lease expired / abort to the source
//!     Preparing --> [*]: failure / abort
//!     Copying --> [*]: failure / abort to both
//!     Recording --> [*]: failure / abort to both
//!   }
//! ```
//!
//! **One runner.** The target runs only after the commit; the source is told to forget only after the
//! target has said that it runs. A target that loses home before the commit throws its copy away;
//! one that loses it after stops its guest at once and throws it away when its lease is over. Home, whose
//! own limits are longer, waits until that is surely so before it lets a frozen source run on.
//!
//! What a shell owes the machines: a host hears `LinkLost` after a silence shorter than home's limit;
//! home's `LeaseExpired` comes after its own `TargetLost` and later than the host's `LeaseExpired` by
//! more than the clocks can drift; nothing from a link is delivered after it was told lost.

mod home;
mod source;
mod target;

#[cfg(test)]
mod sim;

pub use home::{Home, HomeAction, HomeEvent, Outcome};
pub use source::{Source, SourceAction, SourceEvent};
pub use target::{Target, TargetAction, TargetEvent};

/// What home tells a party.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Target: make a place.
    Prepare,
    /// Source: freeze and send.
    Freeze,
    /// Target: let it run.
    Commit,
    /// Source: it runs elsewhere; throw the copy away.
    Forget,
    /// Either: the move is off.
    Abort,
}
