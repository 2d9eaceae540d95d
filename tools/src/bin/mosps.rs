//! `mosps`: everything is in [`tools::mosps`].
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    tools::mosps::main()
}
