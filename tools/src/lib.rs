//! The tools: thin clients of migd's API, and the lab.

#![forbid(unsafe_code)]

pub mod arguments;
pub mod migrate;
pub mod mosctl;
pub mod moslab;
pub mod mosmon;
pub mod mosps;
pub mod mosrun;
pub mod output;
pub mod quantity;
