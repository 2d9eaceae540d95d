//! `moslab exec`: a command in a node, as a login there would run it.
//!
//! This process enters the node's namespaces and starts [`super::login`] there, in its own process
//! group, so that the terminal's Ctrl-C and Ctrl-Z reach the command by themselves. It passes on the
//! signals that somebody sends to itself, stops when the command stops, and ends as the command ends.

use super::binaries::own_program;
use super::identity::ProcessId;
use super::place::Place;
use super::state::LabState;
use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{SigSet, Signal, kill, raise};
use nix::sys::signalfd::SignalFd;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::ffi::{OsStr, OsString};
use std::fs::File;

/// Passed on to the command if a process sent them to us.
const PASSED: [Signal; 6] =
    [Signal::SIGTERM, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGUSR2];

/// Runs the command and returns its exit status, 128+N if signal N ended it. `unlimited`: not counted
/// against the node's share of the CPUs.
pub fn exec(place: &Place, node: &str, user: &str, unlimited: bool, command: &[OsString]) -> Result<u8> {
    if !nix::unistd::geteuid().is_root() {
        bail!("only root can enter a node: run moslab as root");
    }
    let state = LabState::of_running(place)?;
    let (node, init) = state.running_node(node)?;
    let group = match state.cgroups.first() {
        Some(lab) if !unlimited => Some(lab.join(&node.name)),
        _ => None,
    };
    let mut watched: SigSet = PASSED.into_iter().collect();
    for signal in [Signal::SIGCHLD, Signal::SIGTSTP, Signal::SIGCONT] {
        watched.add(signal);
    }
    watched.thread_block()?;
    let signals = SignalFd::new(&watched)?;
    enter(init)?;
    let child = own_program()
        .args(["__login", user])
        .args(group.iter().flat_map(|group| [OsStr::new("--group"), group.as_os_str()]))
        .arg("--")
        .args(command)
        .spawn()
        .with_context(|| format!("nothing can be started in {}", node.name))?;
    follow(Pid::from_raw(child.id() as i32), &signals)
}

/// Enters the namespaces of the node with this PID 1; processes started from now on are in it whole.
fn enter(init: ProcessId) -> Result<()> {
    let kinds = [
        ("net", CloneFlags::CLONE_NEWNET),
        ("uts", CloneFlags::CLONE_NEWUTS),
        ("ipc", CloneFlags::CLONE_NEWIPC),
        ("pid", CloneFlags::CLONE_NEWPID),
        // The last: after it /proc is the node's.
        ("mnt", CloneFlags::CLONE_NEWNS),
    ];
    let open = |(kind, flag): (&str, CloneFlags)| {
        File::open(format!("/proc/{}/ns/{kind}", init.pid)).map(|file| (file, flag))
    };
    let files = kinds.into_iter().map(open).collect::<std::io::Result<Vec<_>>>();
    let files = files.context("the node has just gone")?;
    if !init.alive() {
        bail!("the node has just gone");
    }
    for (file, flag) in files {
        setns(file, flag).context("the node's namespaces cannot be entered")?;
    }
    Ok(())
}

fn follow(child: Pid, signals: &SignalFd) -> Result<u8> {
    loop {
        let info = match signals.read_signal() {
            Ok(Some(info)) => info,
            Ok(None) | Err(Errno::EINTR) => continue,
            Err(errno) => return Err(errno).context("signals cannot be read"),
        };
        match Signal::try_from(info.ssi_signo as i32) {
            Ok(Signal::SIGCHLD) => {
                if let Some(status) = look_at(child)? {
                    return Ok(status);
                }
            }
            // The command has stopped by the same key press; we follow when we hear of it.
            Ok(Signal::SIGTSTP) => {}
            Ok(Signal::SIGCONT) => {
                let _ = kill(child, Signal::SIGCONT);
            }
            // From the terminal (SI_KERNEL) the command has it already.
            Ok(signal) if info.ssi_code <= 0 => {
                let _ = kill(child, signal);
            }
            _ => {}
        }
    }
}

/// What has become of the command; its exit status if it has ended.
fn look_at(child: Pid) -> Result<Option<u8>> {
    let flags = WaitPidFlag::WNOHANG | WaitPidFlag::WUNTRACED;
    match waitpid(child, Some(flags)).context("the command cannot be waited for")? {
        WaitStatus::Exited(_, status) => Ok(Some(status as u8)),
        WaitStatus::Signaled(_, signal, _) => Ok(Some(128 + signal as i32 as u8)),
        WaitStatus::Stopped(..) => {
            // Our caller's shell watches us, not the command.
            raise(Signal::SIGSTOP)?;
            Ok(None)
        }
        _ => Ok(None),
    }
}
