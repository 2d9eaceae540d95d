//! Saved by `migckpt dump`, brought back by `migckpt restore`: the victims (examples/victim) check
//! themselves, real programs are compared with an undisturbed run, and what fails leaves nothing.

mod aio;
mod clocks;
mod harness;
mod hostile;
mod huge_pages;
mod huge_pool;
mod inet;
mod nameless;
mod objects;
mod open_files;
mod other_cpus;
mod pipes;
mod programs;
mod refusals;
mod reports;
mod scale;
mod shared_memory;
mod shares;
mod sockets;
mod terminals;
mod traceless;
mod trees;
mod trees_edges;
mod trees_leaders;
mod trees_memory;
mod vdso;
mod victims;
mod waits;
mod watching;
