//! A whole cluster on one machine, for trying it out, for tests and for benchmarks.
//!
//! Each node is a set of namespaces with a small init as PID 1 ([`node`]): its own network with an
//! address on the lab's bridge ([`net`]), its own host name, process numbers, `/proc`, `/run`, `/tmp`,
//! `/home` and `/srv` ([`mounts`]), its share of the CPUs ([`cgroup`]), and its own `migd`.
//! One process a lab, the [`keeper`], owns all of it: the bridge lives in the keeper's network
//! namespace, the nodes are its children, and orders (kill, partition, restart, down) reach it over a
//! socket ([`control`]). When the keeper ends, for whatever reason, every node ends; what it can no
//! longer clean up (files, control groups) the next `up` or `down` of that name sweeps away ([`sweep`]).
//!
//! Nothing is changed on the machine itself: no link, route, address, mount or account outside the
//! namespaces, and no file outside [`place`]. The nodes share the machine's other files as they are.
//! It is not a sandbox: root in a node is root of the machine.

pub mod bench;
pub mod binaries;
pub mod cgroup;
pub mod cli;
pub mod control;
pub mod daemon;
pub mod demo;
pub mod exec;
pub mod identity;
pub mod keeper;
pub mod lifecycle;
pub mod login;
pub mod mounts;
pub mod net;
pub mod node;
pub mod place;
pub mod state;
pub mod sweep;
