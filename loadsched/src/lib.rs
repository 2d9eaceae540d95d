//! The load-balancing policy: who should move where, and why.
//!
//! Pure: the cluster as it is known, the time and the settings come in, decisions with reasons and all
//! their numbers go out. No clock, no I/O, no threads; the daemon and the simulator run the same code.
//!
//! * **Cost of a node** (opportunity cost; Amir, Awerbuch, Barak, Borgstrom, Keren, TPDS 2000): the
//!   sum over its resources of `n^(used ÷ capacity)`, `n` the number of nodes. A process costs a
//!   node what it adds: its *marginal cost*. See [`cost`].
//! * **Move** when the marginal cost at the target is at most `hysteresis` (one half, as in that
//!   paper) of what it is where the process runs, and when the time it will gain over its remaining
//!   life, about its age so far (Harchol-Balter, Downey 1997), exceeds `gain_factor` × the predicted
//!   cost of moving.
//! * **Against thrash**: a minimum stay, few arrivals at a time, and load figures that are old are
//!   corrected by the moves that they do not show yet ([`recent`]).
//! * **Ushering**: a node short of memory gives up the smallest process that clears the deficit.
//!
//! CPU use is not normalised by the greatest load as in the paper: with few nodes the curve is then so
//! flat that the halving rule stops long before the load is even (8 jobs on three nodes: 6, 1, 1).

#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod cost;
pub mod load;
pub mod recent;
mod scheduler;
pub mod settings;

pub use scheduler::{Action, Decision, NodeView, ProcView, Scheduler};
pub use settings::Settings;
