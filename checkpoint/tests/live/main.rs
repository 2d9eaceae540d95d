//! Tracking of running processes, judged by a copy that is made of nothing but what the tracker tells.
//!
//! `LIVE_ROUNDS` and `LIVE_SEED` make it longer, or others.

#[path = "../roundtrip/harness.rs"]
#[allow(dead_code)]
mod harness;
#[path = "../roundtrip/huge_pool.rs"]
#[allow(dead_code)]
mod huge_pool;
mod model;
mod sending;
mod traces;
mod victims;
