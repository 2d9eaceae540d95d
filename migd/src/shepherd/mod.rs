//! The shepherds: one small process per process that is away from home, on either side.

pub mod control;
pub mod control_socket;
pub mod guest_init;
pub mod home;
pub mod host;
pub mod inbox;
pub mod link;
pub mod preflight;
pub mod session;
pub mod supervisor;
pub mod terminal;
