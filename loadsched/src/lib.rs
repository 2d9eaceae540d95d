//! Who should run where: the policy, pure.
//!
//! A [`Cluster`] goes in, [`Decision`]s with their reasons and numbers come out. There is no clock, no
//! I/O and no thread here: ages and random numbers are part of the input, so that the daemon and a
//! simulator of ten thousand nodes run the same code.
//!
//! * Cost of a node: the opportunity cost of Amir, Awerbuch, Barak, Borgstrom and Keren (IEEE TPDS 2000),
//!   Σ over CPU and memory of base^(used ÷ capacity): the fuller a resource, the dearer its next part.
//! * A move must at least halve the process' marginal cost (hysteresis), and what it gains over its
//!   expected remaining life must exceed a multiple of what the move costs. A process that has used so
//!   much CPU time is expected to use as much again (Harchol-Balter, Downey, ACM TOCS 1997).
//! * Against thrash: a minimum residency, a bound on arrivals, and whatever is under way counts as load
//!   already. A node that is short of memory sends away the smallest process that helps (ushering).
//!
//! It does not predict, learn, or look beyond what it is shown.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod average;
mod cost;
mod decide;
mod settings;
mod view;

pub use average::Average;
pub use decide::{Action, Decision, decide, place};
pub use settings::{Settings, SettingsError};
pub use view::{Cluster, Node, Process, UnderWay};
