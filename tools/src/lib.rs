//! The tools: thin clients of migd's API, and the lab.

#![forbid(unsafe_code)]

pub mod moslab;
