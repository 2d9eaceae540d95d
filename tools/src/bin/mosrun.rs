//! `mosrun`: everything is in [`tools::mosrun`].
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    tools::mosrun::main()
}
