//! `migrate`: everything is in [`tools::migrate`].
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    tools::migrate::main()
}
