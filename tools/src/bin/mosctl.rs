//! `mosctl`: everything is in [`tools::mosctl`].
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    tools::mosctl::main()
}
