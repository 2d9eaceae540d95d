//! Freeze, read and rebuild Linux processes.

pub mod image;
