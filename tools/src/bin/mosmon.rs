//! `mosmon`: everything is in [`tools::mosmon`].
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    tools::mosmon::main()
}
