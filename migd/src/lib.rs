//! The node daemon and the shepherds, as a library, so that tools and tests can use their types.

pub mod api;
pub mod homefs;
pub mod shepherd;
