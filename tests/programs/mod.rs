//! Real programs that no one here wrote, each at a real piece of work: the list of them, and how one is moved at
//! random moments and compared with itself unmoved. The tests of `migckpt` and those of `migrate` both use it.

mod list;
mod run;

pub use run::{Attempt, Ended, Moments, Place, Program, run};
