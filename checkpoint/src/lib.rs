//! Freeze, read and rebuild Linux processes.

pub mod deputy;
pub mod image;
pub mod sys;
pub mod tracee;
