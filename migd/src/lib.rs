//! The node daemon and the shepherds, as a library, so that tools and tests can use their types.
#![forbid(unsafe_code)]

pub mod api;
pub mod client;
pub mod cluster_key;
pub mod config;
pub mod daemon;
pub mod homefs;
pub mod priority;
pub mod protocol;
pub mod shepherd;
