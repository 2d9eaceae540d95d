//! The harness of the whole-system tests: labs that clean up after themselves, terminals, and jobs
//! that check themselves.
//!
//! A test that cannot run here (no root, no namespaces) says so through [`skip`] and is counted as
//! skipped by `.ci/run`; it never passes silently.

#![forbid(unsafe_code)]

pub mod build;
pub mod lab;
pub mod pty;
pub mod worker;

use std::io::Write;

/// The environment variable that names the file in which skips are collected.
pub const SKIPS_ENV: &str = "SYSTEST_SKIPS";

/// Records that a test did not run, and why.
pub fn skip(test: &str, reason: &str) {
    let line = format!("skipped {test}: {reason}\n");
    eprint!("{line}");
    if let Some(path) = std::env::var_os(SKIPS_ENV)
        && let Ok(mut file) = std::fs::OpenOptions::new().create(true).append(true).open(path)
    {
        // The message above has been printed in any case.
        let _ = file.write_all(line.as_bytes());
    }
}

/// Starts a test: false, and a recorded skip, if this machine cannot run labs.
pub fn can_run_labs(test: &str) -> bool {
    if !nix::unistd::geteuid().is_root() {
        skip(test, "needs root (namespaces, links, control groups)");
        return false;
    }
    let mut ip = std::process::Command::new("ip");
    ip.arg("-V").env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
    if !ip.output().is_ok_and(|output| output.status.success()) {
        skip(test, "needs the package iproute2");
        return false;
    }
    true
}

/// `true` only if labs can run; records the skip with the calling test's name otherwise.
#[macro_export]
macro_rules! require_labs {
    () => {{
        let thread = std::thread::current();
        if !$crate::can_run_labs(thread.name().unwrap_or("a test")) {
            return;
        }
    }};
}
