//! `moslab`: a whole cluster on one machine. Everything is in [`tools::moslab`].

#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    tools::moslab::cli::main()
}
