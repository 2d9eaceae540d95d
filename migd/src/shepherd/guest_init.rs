//! The house of a guest: namespaces, a root and a PID 1 on the host node, in which the guests
//! of one subtree live.
//!
//! The host shepherd starts `migd shepherd guest-init` (a fresh process with one thread, as it
//! forks) with a socket as standard input and `/dev/fuse` as standard output, and serves the other
//! end of that device itself.
//!
//! ```text
//! host shepherd ── guest-init ── PID 1 of the house ── the guest's leader
//!                  mounts, waits                       (process group of its own)
//! ```
//!
//! | file | what |
//! |---|---|
//! | `house` | the shepherd's handle |
//! | `protocol` | what the two say to each other |
//! | `namespaces`, `mounts` | names, clocks, network; `/`, `/dev`, `/proc` |
//! | `family` | the guests' processes: parents, sessions, groups, zombies |
//! | `files` | their descriptors |
//! | `write_back` | what they write into mapped files goes home |
//! | `init` | PID 1: starts the leader, reaps, reports |
//!
//! It rebuilds no process: the leader it starts has the right PID, files and parent, and runs
//! nothing; [`checkpoint::restore`](checkpoint) fills it from outside.
//!
//! When the shepherd dies, all die: guest-init and PID 1 ask for SIGKILL at their parent's death,
//! PID 1 leaves when its socket closes, and the kernel ends a PID namespace with its PID 1.

mod family;
mod files;
mod house;
mod init;
mod mounts;
mod namespaces;
mod protocol;
mod write_back;

pub use family::join_groups;
pub use house::{GuestHouse, HouseError, HouseEvent};
pub use init::main;
pub use protocol::Setup;
