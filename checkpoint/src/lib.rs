//! Freeze, read and rebuild Linux processes.

pub mod cli;
pub mod deputy;
pub mod dump;
pub mod image;
pub mod inventory;
pub mod live;
pub mod proc;
pub mod restore;
pub mod sys;
pub mod tracee;
