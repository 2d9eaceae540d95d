//! Saved by `migckpt dump`, brought back by `migckpt restore`: the victims (examples/victim) check
//! themselves, real programs are compared with an undisturbed run, and what fails leaves nothing.

mod harness;
mod programs;
mod refusals;
mod traceless;
mod trees;
mod victims;
