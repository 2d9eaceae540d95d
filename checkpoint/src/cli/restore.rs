//! `migckpt restore`: bring a process back, and wait for it as if it had been started here.

use super::interrupt::Held;
use super::{FAILED, Failure, Location, NOT_MIGRATABLE, REFUSED, json, line, place};
use crate::dump::tree;
use crate::image::ProcessImage;
use crate::image::stream::{StreamError, StreamReader};
use crate::restore::RestoreError;
use crate::restore::clocks::Clocks;
use crate::restore::standalone::{Standalone, rebuild};
use crate::sys::wait;
use crate::tracee::TraceeError;
use nix::errno::Errno;
use nix::unistd::{Pid, getpgid, getpgrp};
use std::path::PathBuf;
use std::process::ExitCode;

/// Bring a saved process back under its own PIDs, wait for it, and take its exit status (128+N when it
/// dies of signal N).
///
/// A terminal, and pipes to other processes, at its standard input, output and error are replaced by
/// those of this command. Signals sent to this command are passed on. A process that was stopped
/// stays stopped.
#[derive(Debug, clap::Args)]
pub struct RestoreArguments {
    /// The image's directory; - is the standard input (the process then reads /dev/null)
    #[arg(value_name = "DIR|-")]
    image: PathBuf,
    /// Do not wait: leave it running in a session of its own
    #[arg(long)]
    detach: bool,
    /// Take mapped programs and libraries by their names, even if they are not the files that were
    /// mapped (an image of another machine with the same packages)
    #[arg(long)]
    other_files: bool,
    /// Restore it on a CPU that lacks instructions which the first one had; if it uses one of them, it dies
    /// of SIGILL
    #[arg(long)]
    other_cpu: bool,
    /// Rebuild everything, then end it before it runs: whether the image can be restored here
    #[arg(long, conflicts_with = "detach")]
    dry_run: bool,
    /// With --detach: print what was done as JSON
    #[arg(long, requires = "detach")]
    json: bool,
}

pub fn run(arguments: &RestoreArguments) -> Result<ExitCode, Failure> {
    let location = Location::of(&arguments.image);
    let (input, _) = place::open(&location)?;
    let unreadable = |error: StreamError| {
        let what = format!("cannot read the image {}", location.name());
        Failure::new(FAILED, what, error, "the image cannot be used; take another one")
    };
    let mut stream = StreamReader::new(input).map_err(unreadable)?;
    let images = stream.states().map_err(unreadable)?;
    let image = &images[0];
    let blockers = tree::blockers(&images);
    if !blockers.is_empty() {
        return Err(Failure {
            exit: NOT_MIGRATABLE,
            what: format!("process {} cannot be restored from this image", image.pid),
            why: blockers.iter().map(ToString::to_string).collect(),
            next: "save the process again without what is named above".into(),
        });
    }
    if location == Location::Stream && std::path::Path::new(&format!("/proc/{}", image.pid)).exists() {
        place::take_in(stream.input()).map_err(|error| unreadable(error.into()))?;
    }
    let how = Standalone {
        detach: arguments.detach,
        no_input: location == Location::Stream,
        other_files: arguments.other_files,
        other_cpu: arguments.other_cpu,
    };
    let signals =
        Held::hold().map_err(|errno| Failure::new(FAILED, "cannot hold signals back", errno, "try again"))?;
    let restored = rebuild(&images, &mut stream, how).map_err(|error| failure(image, &error))?;
    if arguments.dry_run {
        // Dropped, they are ended.
        drop(restored);
        line(&format!("process {} can be restored", image.pid));
        return Ok(ExitCode::SUCCESS);
    }
    let clocks = restored.clocks();
    let pid = restored.release().map_err(|error| failure(image, &error))?;
    tell_jump(image, clocks);
    tell_stopped(image);
    if arguments.detach {
        if arguments.json {
            json(&serde_json::json!({
                "pid": pid,
                "threads": image.threads.len(),
                "processes": images.len(),
            }));
        } else {
            line(&format!("process {pid} restored"));
        }
        return Ok(ExitCode::SUCCESS);
    }
    wait_for(pid, &signals)
}

fn tell_jump(image: &ProcessImage, clocks: Clocks) {
    if let Clocks::Jump(ns) = clocks {
        eprintln!(
            "migckpt: the clocks of process {} that count from boot have jumped by {}.{:03} s: for them to go \
             on takes a time namespace (CAP_SYS_ADMIN, CONFIG_TIME_NS)",
            image.pid,
            ns / 1_000_000_000,
            ns / 1_000_000 % 1000
        );
    }
}

fn tell_stopped(image: &ProcessImage) {
    if image.signals.stopped_by.is_some() {
        eprintln!(
            "migckpt: process {} is stopped, as it was; kill -CONT {} continues it",
            image.pid, image.pid
        );
    }
}

/// Waits for its end; passes signals on meanwhile.
fn wait_for(pid: i32, signals: &Held) -> Result<ExitCode, Failure> {
    let lost = |errno: Errno| {
        Failure::new(FAILED, format!("cannot wait for process {pid}"), errno, "it runs on by itself")
    };
    loop {
        match wait::any_child(libc::__WALL).map_err(lost)? {
            Some((ended, status)) if ended == pid => return Ok(exit_status(status)),
            Some(_) => continue,
            None => {}
        }
        let Some((signal, from_terminal)) = signals.next().map_err(lost)? else { continue };
        // The terminal has sent it to every process of the group.
        let same_group = getpgid(Some(Pid::from_raw(pid))) == Ok(getpgrp());
        if !(from_terminal && same_group) {
            let _ = wait::kill(pid, signal);
        }
    }
}

fn exit_status(status: i32) -> ExitCode {
    if libc::WIFEXITED(status) {
        ExitCode::from(libc::WEXITSTATUS(status) as u8)
    } else {
        ExitCode::from(128u8.wrapping_add(libc::WTERMSIG(status) as u8))
    }
}

fn failure(image: &ProcessImage, error: &RestoreError) -> Failure {
    let what = format!("process {} was not restored; the image is as it was", image.pid);
    let (exit, next) = match error {
        RestoreError::Taken { .. } => (NOT_MIGRATABLE, "end what has the number, or wait for its end"),
        RestoreError::Fork { errno: Errno::EPERM, .. } => {
            (REFUSED, "become the superuser (CAP_CHECKPOINT_RESTORE and CAP_SYS_PTRACE)")
        }
        RestoreError::Fork { errno: Errno::EINVAL, .. } => {
            (NOT_MIGRATABLE, "raise kernel.pid_max above that number")
        }
        RestoreError::Tracee(TraceeError::Inside {
            operation: "making a thread",
            errno: Errno::EEXIST,
            ..
        }) => (NOT_MIGRATABLE, "a TID of it is in use; try again later"),
        RestoreError::Tracee(TraceeError::Kernel { errno: Errno::EPERM, .. }) => {
            (REFUSED, "become the superuser, and see kernel.yama.ptrace_scope")
        }
        RestoreError::Clocks { errno: Errno::EPERM, .. } => (REFUSED, "become the superuser (CAP_SYS_ADMIN)"),
        RestoreError::Clocks { .. } => {
            (NOT_MIGRATABLE, "restore it on a kernel with time namespaces (CONFIG_TIME_NS)")
        }
        RestoreError::HugePages { .. } => {
            (FAILED, "free some or reserve more (vm.nr_hugepages, hugetlbpage.rst), then try again")
        }
        RestoreError::Unfit(_) => (NOT_MIGRATABLE, "restore it where what is named above is as it was"),
        RestoreError::Stream(_) => (FAILED, "the image cannot be used; take another one"),
        RestoreError::File { .. } | RestoreError::Child(_) => {
            (FAILED, "put back what is named above, then try again")
        }
        _ => (FAILED, "try again; migckpt inspect tells what the image holds"),
    };
    Failure::new(exit, what, error, next)
}
