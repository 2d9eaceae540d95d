//! `migd shepherd guest-init`: makes the house, and is its PID 1.

use super::protocol::{self, Command, Report, Setup, Spawn};
use super::{family, files, mounts, namespaces, write_back};
use anyhow::{Context, Result, bail};
use checkpoint::sys::fork::{Side, fork};
use checkpoint::sys::wait;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{dup2_stdin, dup2_stdout, setsid};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// How long the shepherd may take to send the set-up.
const SETUP_LIMIT: Duration = Duration::from_secs(30);
/// Changes of state taken in one go, so that commands are not kept waiting.
const REAP_BATCH: usize = 256;

/// The whole life of guest-init and of PID 1. Standard input is the shepherd's socket, standard
/// output `/dev/fuse`. Must be called while the process has one thread.
pub fn main() -> Result<()> {
    // Before anything can fail: who started us must not leave us behind.
    set_pdeathsig(Signal::SIGKILL).context("cannot ask to die with the shepherd")?;
    let socket = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let device = std::io::stdout().as_fd().try_clone_to_owned()?;
    let null = File::options().read(true).write(true).open("/dev/null").context("cannot open /dev/null")?;
    dup2_stdin(&null).context("cannot let go of standard input")?;
    dup2_stdout(&null).context("cannot let go of standard output")?;
    drop(null);
    let setup = match protocol::receive(&socket, Some(SETUP_LIMIT)).context("waiting for the set-up")? {
        Some(Command::Setup(setup)) => setup,
        Some(_) => bail!("the shepherd's first message is not the set-up"),
        None => return Ok(()),
    };
    let result = make(device, &setup).and_then(|(side, stage)| match side {
        Side::Parent(init) => Ok(Some(init)),
        Side::Child => Init::start(&socket, &stage, &setup)?.run().map(|()| None),
    });
    match result {
        Ok(None) => Ok(()),
        Ok(Some(init)) => {
            // It has to close when PID 1 ends.
            drop(socket);
            wait::child(init).map(drop).context("waiting for PID 1")
        }
        Err(error) => {
            let _ = protocol::send(&socket, &Report::Error(format!("{error:#}")));
            Err(error)
        }
    }
}

/// Makes the namespaces and mounts, and PID 1.
fn make(device: OwnedFd, setup: &Setup) -> Result<(Side, mounts::Stage)> {
    namespaces::enter(setup)?;
    let stage = mounts::prepare(device.as_fd())?;
    let side = fork(libc::CLONE_NEWPID, None).context("cannot make a PID namespace")?;
    Ok((side, stage))
}

/// PID 1.
struct Init<'a> {
    socket: &'a UnixStream,
    setup: &'a Setup,
    children: SignalFd,
    /// The guests that are its children.
    tops: Vec<i32>,
    /// What the guests' descriptors and mappings are made from.
    objects: files::Objects,
    /// Home forgets an open file when its last user has closed it; `/dev/tty` must stay.
    _terminal: Option<OwnedFd>,
}

impl<'a> Init<'a> {
    fn start(socket: &'a UnixStream, stage: &mounts::Stage, setup: &'a Setup) -> Result<Init<'a>> {
        set_pdeathsig(Signal::SIGKILL).context("cannot ask to die with guest-init")?;
        // The guest's group then has a parent in its session but outside of it: it is not orphaned,
        // and SIGTSTP stops it (setpgid(2), "orphaned process group").
        setsid().context("cannot make a session")?;
        mounts::enter(stage, setup)?;
        nix::sys::stat::umask(nix::sys::stat::Mode::empty());
        files::raise_limit()?;
        let mut set = SigSet::empty();
        set.add(Signal::SIGCHLD);
        sigprocmask(SigmaskHow::SIG_BLOCK, Some(&set), None).context("cannot block SIGCHLD")?;
        let children = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .context("cannot listen for SIGCHLD")?;
        let terminal = setup.terminal.as_ref().and_then(|_| {
            let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
            nix::fcntl::open("/dev/tty", flags, nix::sys::stat::Mode::empty())
                .inspect_err(|error| tracing::warn!(%error, "the guest's terminal cannot be opened"))
                .ok()
        });
        Ok(Init {
            socket,
            setup,
            children,
            tops: Vec::new(),
            objects: files::Objects::new(),
            _terminal: terminal,
        })
    }

    fn run(mut self) -> Result<()> {
        self.report(&Report::Ready)?;
        let mut more = false;
        loop {
            let limit = if more { PollTimeout::ZERO } else { PollTimeout::NONE };
            let mut ready = [
                PollFd::new(self.socket.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.children.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut ready, limit) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno).context("poll"),
            }
            let [command, child] = ready.map(|fd| fd.any().unwrap_or(true));
            if child || more {
                // One reading takes one signal; SIGCHLD does not queue, so there is only one.
                let _ = self.children.read_signal();
                more = self.reap()?;
            }
            if command && !self.obey()? {
                return Ok(());
            }
        }
    }

    fn report(&self, report: &Report) -> Result<()> {
        protocol::send(self.socket, report).context("cannot report to the shepherd")
    }

    /// Does one command; `false`: it is time to go.
    fn obey(&mut self) -> Result<bool> {
        match protocol::receive(self.socket, Some(Duration::ZERO)) {
            Ok(Some(Command::Objects(keys))) => {
                let report = match protocol::receive_files(self.socket, keys.len()) {
                    Ok(files) => {
                        let numbers = files.iter().map(AsRawFd::as_raw_fd).collect();
                        self.objects = keys.into_iter().zip(files).collect();
                        Report::Objects(numbers)
                    }
                    Err(error) => Report::Error(format!("cannot receive the guests' memory: {error}")),
                };
                self.report(&report)?;
            }
            Ok(Some(Command::LetGo)) => self.objects.clear(),
            Ok(Some(Command::WriteBack)) => {
                if let Err(error) = write_back::start() {
                    // They are written back all the same, later.
                    tracing::warn!(%error, "what is written into mapped files may be seen late at home");
                }
            }
            Ok(Some(Command::Spawn(spawn))) => {
                let report = match self.spawn(&spawn) {
                    Ok(()) => Report::Spawned,
                    Err(error) => Report::Error(format!("{error:#}")),
                };
                self.report(&report)?;
            }
            Ok(Some(Command::Kill { pid, signal })) if pid > 1 => {
                // It may have ended just now.
                let _ = wait::kill(pid, signal);
            }
            Ok(Some(Command::Kill { .. })) => {}
            Ok(Some(Command::Setup(_))) => self.report(&Report::Error("the house stands already".into()))?,
            Ok(Some(Command::Quit) | None) => return Ok(false),
            Err(error) if error.kind() == std::io::ErrorKind::TimedOut => {}
            Err(error) => return Err(error).context("cannot hear the shepherd"),
        }
        Ok(true)
    }

    fn spawn(&mut self, wanted: &Spawn) -> Result<()> {
        if !self.tops.is_empty() {
            bail!("there are guests in this house already");
        }
        self.tops = family::make(&wanted.members, self.setup, &self.objects)?;
        Ok(())
    }

    /// Takes what children have to tell; `true`: there may be more.
    fn reap(&mut self) -> Result<bool> {
        for _ in 0..REAP_BATCH {
            match wait::any_child(libc::WUNTRACED | libc::WCONTINUED | libc::__WALL) {
                Ok(Some((pid, status))) if self.tops.contains(&pid) => self.tell(pid, status)?,
                Ok(Some(_)) | Err(Errno::EINTR) => {}
                Ok(None) | Err(Errno::ECHILD) => return Ok(false),
                Err(errno) => return Err(errno).context("waitpid"),
            }
        }
        Ok(true)
    }

    fn tell(&mut self, pid: i32, status: i32) -> Result<()> {
        if libc::WIFSTOPPED(status) {
            return self.report(&Report::Stopped { pid, signal: libc::WSTOPSIG(status) as u8 });
        }
        if libc::WIFCONTINUED(status) {
            return self.report(&Report::Continued { pid });
        }
        self.tops.retain(|top| *top != pid);
        self.report(&Report::Ended { pid, status })
    }
}
