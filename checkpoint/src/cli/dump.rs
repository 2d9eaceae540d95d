//! `migckpt dump`: look, freeze, save, and end or let go.
//!
//! The process is ended only when its image is complete and on the disk; whatever fails before leaves
//! it running as it was.

use super::interrupt::Interrupt;
use super::place::{self, Sink};
use super::{FAILED, Failure, INTERRUPTED, Location, NOT_MIGRATABLE, REFUSED, USAGE, bytes};
use crate::dump::tree::{self, FrozenTree};
use crate::dump::{DumpError, Run, objects};
use crate::image::ProcessImage;
use crate::image::stream::{Compress, Options, StreamError, StreamStats, StreamWriter};
use crate::inventory::{self, Blocker, Inventory, InventoryError, Rules};
use crate::sys::ptrace::{self, Stop};
use crate::tracee::{Recovered, TraceeError, recover, stub};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::BTreeSet;
use std::io::Write;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

#[derive(Debug, clap::Args)]
pub struct DumpArguments {
    /// The process to save
    #[arg(value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pid: i32,
    /// Directory for the image, made if it is not there; - is the standard output
    #[arg(long, value_name = "DIR|-")]
    to: PathBuf,
    /// Let the process go on afterwards
    #[arg(long, conflicts_with = "leave_stopped")]
    leave_running: bool,
    /// Leave the process stopped afterwards, as by SIGSTOP
    #[arg(long)]
    leave_stopped: bool,
    /// With all its descendants; without this, a process that has children is refused
    #[arg(long)]
    tree: bool,
    /// Compression: auto (where it pays), off, or a level of zstd
    #[arg(long, value_name = "HOW", default_value = "auto", value_parser = compression)]
    compress: Compress,
    /// Print what was done as JSON
    #[arg(long)]
    json: bool,
}

fn compression(text: &str) -> Result<Compress, String> {
    match text {
        "auto" => Ok(Compress::Auto),
        "off" => Ok(Compress::Off),
        level => match level.parse() {
            Ok(level) if (1..=19).contains(&level) => Ok(Compress::Level(level)),
            _ => Err("use auto, off, or a level from 1 to 19".into()),
        },
    }
}

/// How a dump can fail; the process runs on in each case.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Tracee(#[from] TraceeError),
    #[error(transparent)]
    Dump(#[from] DumpError),
    #[error("writing the image: {0}")]
    Stream(#[from] StreamError),
    #[error("writing the image: {0}")]
    Commit(#[from] std::io::Error),
    #[error("it cannot be carried")]
    Blocked(Vec<Blocker>),
    #[error("a signal asked this program to end")]
    Interrupted,
}

/// What was done, for people and for programs.
#[derive(Debug, serde::Serialize)]
struct Report {
    pid: i32,
    processes: usize,
    to: String,
    bytes: u64,
    pages: u64,
    zero_pages: u64,
    shared_pages: u64,
    image_bytes: u64,
    freeze_ms: f64,
    total_ms: f64,
    left: &'static str,
}

pub fn run(arguments: &DumpArguments) -> Result<(), Failure> {
    let begun = Instant::now();
    let pid = arguments.pid;
    if pid == std::process::id() as i32 {
        let next = "name another process";
        return Err(Failure::new(USAGE, "cannot save this program itself", "it would stop itself", next));
    }
    let location = Location::of(&arguments.to);
    let (found, blockers) = look_again(arguments).map_err(|error| not_looked_at(pid, &error))?;
    if !blockers.is_empty() {
        return Err(blocked(pid, &blockers));
    }
    let interrupt = Interrupt::hold()
        .map_err(|errno| Failure::new(FAILED, "cannot hold signals back", errno, "try again"))?;
    let interrupt = Rc::new(interrupt);
    let (mut frozen, mut tries) = (Instant::now(), 0);
    let (stats, processes) = loop {
        let sink = Sink::create(&location, &interrupt)?;
        match save(arguments, &found, sink, &interrupt) {
            // A connection that nobody has accepted yet, a child just born: it runs on, and is asked again.
            Err(Error::Blocked(_)) if tries < 3 && !interrupt.came() => {
                tries += 1;
                std::thread::sleep(Duration::from_millis(20 * tries));
                frozen = Instant::now();
            }
            other => break other.map_err(|error| failure(pid, &error))?,
        }
    };
    let report = Report {
        pid,
        processes,
        to: arguments.to.display().to_string(),
        bytes: stats.raw_bytes,
        pages: stats.pages,
        zero_pages: stats.zero_pages,
        shared_pages: stats.shared_pages,
        image_bytes: stats.wire_bytes,
        freeze_ms: millis(frozen.elapsed()),
        total_ms: millis(begun.elapsed()),
        left: left(arguments),
    };
    tell(arguments, &location, &report);
    Ok(())
}

fn left(arguments: &DumpArguments) -> &'static str {
    match (arguments.leave_running, arguments.leave_stopped) {
        (true, _) => "running",
        (_, true) => "stopped",
        _ => "ended",
    }
}

fn millis(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

/// What was found of each process.
type Family = Vec<(i32, Inventory)>;

/// A family that starts and ends processes is never seen at one moment: a pipe to a child that is not in
/// the list yet looks like one to a stranger. So what is in the way is asked for again, and counts if
/// it is there each time. What then stands still is asked once more.
fn look_again(arguments: &DumpArguments) -> Result<(Family, Vec<Blocker>), InventoryError> {
    let mut found = look(arguments)?;
    let mut blockers = blockers_of(arguments.pid, &found);
    for pause in [5, 20, 50] {
        if blockers.is_empty() {
            break;
        }
        std::thread::sleep(Duration::from_millis(pause));
        found = look(arguments)?;
        let now: BTreeSet<String> = blockers_of(arguments.pid, &found).into_iter().map(|b| b.what).collect();
        let before = blockers.len();
        blockers.retain(|blocker| now.contains(&blocker.what));
        if blockers.len() == before {
            // Nothing has passed: it is in the way for good.
            break;
        }
    }
    Ok((found, blockers))
}

/// The process, and with `--tree` its descendants.
fn look(arguments: &DumpArguments) -> Result<Family, InventoryError> {
    match arguments.tree {
        true => inventory::inspect_tree(arguments.pid, inventory::Rules::Standalone),
        false => Ok(vec![(arguments.pid, inventory::inspect_quickly(arguments.pid, Rules::Standalone)?)]),
    }
}

/// Of all of them; of a descendant with its PID.
fn blockers_of(root: i32, found: &[(i32, Inventory)]) -> Vec<Blocker> {
    let of_one = |(pid, inventory): &(i32, Inventory)| {
        let name = if *pid == root { String::new() } else { format!("process {pid}: ") };
        let named =
            |blocker: &Blocker| Blocker { what: format!("{name}{}", blocker.what), ..blocker.clone() };
        inventory.blockers.iter().map(named).collect::<Vec<Blocker>>()
    };
    found.iter().flat_map(of_one).collect()
}

fn save(
    arguments: &DumpArguments,
    found: &[(i32, Inventory)],
    sink: Sink,
    interrupt: &Interrupt,
) -> Result<(StreamStats, usize), Error> {
    for (pid, inventory) in found.iter().map(|(pid, inventory)| (*pid, inventory)) {
        // What has no mapping like a stub's need not be looked at again.
        if !inventory.vmas.iter().any(stub::may_be_code) {
            continue;
        }
        // A stub without a tracer was left by a program like this one that was killed.
        let found = match recover(pid) {
            // A descendant that ended since it was looked at has nothing to be saved.
            Err(TraceeError::Died { .. }) if pid != arguments.pid => continue,
            found => found?,
        };
        if found == Recovered::Parked {
            let what = format!("process {pid} stands for a guest that runs on another node");
            return Err(Error::Blocked(vec![Blocker { kind: "kernel", what }]));
        }
    }
    let mut frozen = FrozenTree::freeze(arguments.pid)?;
    if frozen.has_children() && !arguments.tree {
        frozen.thaw()?;
        let what = "it has just made a child process".to_string();
        return Err(Error::Blocked(vec![Blocker { kind: "tree", what }]));
    }
    match write(&mut frozen, arguments, sink, interrupt) {
        Ok((stats, images)) => {
            let processes = frozen.pids().len();
            let_go(frozen, arguments)?;
            // Nobody waits for that in a freeze.
            drop(images);
            Ok((stats, processes))
        }
        Err(error) => {
            // They run on whatever becomes of this; the first error is the one to tell.
            let _ = frozen.thaw();
            Err(if interrupt.came() { Error::Interrupted } else { error })
        }
    }
}

fn write(
    frozen: &mut FrozenTree,
    arguments: &DumpArguments,
    sink: Sink,
    interrupt: &Interrupt,
) -> Result<(StreamStats, Vec<ProcessImage>), Error> {
    let mut images = frozen.read()?;
    let blockers = tree::blockers(&images);
    if !blockers.is_empty() {
        return Err(Error::Blocked(blockers));
    }
    let objects = objects::collect(&frozen.pids(), &mut images, Rules::Standalone)?;
    let unreachable = objects::unreachable(&images, &objects);
    if !unreachable.is_empty() {
        return Err(Error::Blocked(unreachable));
    }
    let mut stream = StreamWriter::new(sink, Options { compress: arguments.compress })?;
    let vdso = images[0].mm.vdso.clone();
    for image in images.iter_mut().skip(1).filter(|image| image.mm.vdso == vdso) {
        // Once is enough.
        image.mm.vdso.clear();
    }
    for image in &images {
        stream.state(image)?;
    }
    for object in &objects {
        stream.object(&object.image)?;
        object.for_each_run(|offset, bytes| match interrupt.came() {
            true => Err(Error::Interrupted),
            false => Ok(stream.data(offset, bytes)?),
        })?;
    }
    for index in 0..images.len() {
        if index > 0 || !objects.is_empty() {
            stream.process(index)?;
        }
        frozen.for_each_run(&images, index, |run| {
            if interrupt.came() {
                return Err(Error::Interrupted);
            }
            match run {
                Run::Data { addr, bytes } => stream.data(addr, bytes)?,
                Run::Zero { addr, len } => stream.zero(addr, len)?,
                Run::Same { addr, len } => stream.same(addr, len)?,
            }
            Ok::<(), Error>(())
        })?;
    }
    let (sink, stats) = stream.finish()?;
    sink.commit()?;
    Ok((stats, images))
}

/// The image is safe: what becomes of the processes.
fn let_go(mut frozen: FrozenTree, arguments: &DumpArguments) -> Result<(), TraceeError> {
    if arguments.leave_running {
        return frozen.thaw();
    }
    let signal = if arguments.leave_stopped { Signal::SIGSTOP } else { Signal::SIGKILL };
    for pid in frozen.pids() {
        // Traced, so the number still is this process; it is delivered when the threads are let go.
        kill(Pid::from_raw(pid), signal).map_err(|errno| TraceeError::kernel("kill", pid, errno))?;
    }
    if arguments.leave_stopped {
        return frozen.thaw();
    }
    let connections = frozen.take_connections();
    wait_for_end(&frozen.into_tids());
    connections.abort();
    Ok(())
}

/// Reaps what the tracer must reap, so that the parent sees the end at once.
fn wait_for_end(tids: &[i32]) {
    const LIMIT: Duration = Duration::from_secs(5);
    let deadline = Instant::now() + LIMIT;
    for &tid in tids.iter().rev() {
        while Instant::now() < deadline {
            match ptrace::wait(tid, false) {
                Ok(Some(Stop::Gone(_))) | Err(_) => break,
                Ok(_) => std::thread::sleep(Duration::from_micros(200)),
            }
        }
    }
}

fn tell(arguments: &DumpArguments, location: &Location, report: &Report) {
    let text = if arguments.json {
        serde_json::to_string(report).unwrap_or_default()
    } else {
        format!(
            "process {}{} saved to {}: {} in {} pages ({} zero{}), image {}, frozen {:.1} ms, {}",
            report.pid,
            match report.processes {
                1 => String::new(),
                n => format!(" and {} descendants", n - 1),
            },
            super::printable(&report.to),
            bytes(report.bytes),
            report.pages,
            report.zero_pages,
            match report.shared_pages {
                0 => String::new(),
                n => format!(", {n} its parent's"),
            },
            bytes(report.image_bytes),
            report.freeze_ms,
            report.left
        )
    };
    // With the image on stdout, that is no place for words.
    let _ = match location {
        Location::Stream => writeln!(std::io::stderr().lock(), "{text}"),
        Location::Directory(_) => writeln!(std::io::stdout().lock(), "{text}"),
    };
}

/// A process that could not even be looked at.
pub fn not_looked_at(pid: i32, error: &InventoryError) -> Failure {
    let what = format!("cannot look at process {pid}");
    match error {
        InventoryError::Gone(_) => Failure::new(FAILED, what, error, "ps lists the processes there are"),
        InventoryError::Io { source, .. } => {
            let next = "become the superuser: another user's process cannot be read";
            Failure::new(place::exit_of(source), what, source, next)
        }
    }
}

fn blocked(pid: i32, blockers: &[Blocker]) -> Failure {
    Failure {
        exit: NOT_MIGRATABLE,
        what: format!("process {pid} cannot be saved; it was not stopped"),
        why: named(blockers),
        // Its pipes to them are named too, and are none to save when they come along.
        next: match blockers.iter().any(|blocker| blocker.what.contains("child process")) {
            true => "save it with them: --tree".into(),
            false => "end what is named above, then try again".into(),
        },
    }
}

/// Of a large family many things may be said many times; a screenful is enough to act on.
fn named(blockers: &[Blocker]) -> Vec<String> {
    const MOST: usize = 16;
    let mut lines: Vec<String> = blockers.iter().take(MOST).map(Blocker::to_string).collect();
    if blockers.len() > MOST {
        lines.push(format!("and {} more of the kind", blockers.len() - MOST));
    }
    lines
}

fn failure(pid: i32, error: &Error) -> Failure {
    let what = format!("process {pid} was not saved; it runs on as before");
    match error {
        Error::Blocked(blockers) => Failure { what, ..blocked(pid, blockers) },
        Error::Interrupted => Failure::new(INTERRUPTED, what, error, "start the command again"),
        Error::Tracee(TraceeError::Died { .. }) => {
            let what = format!("process {pid} was not saved");
            Failure::new(FAILED, what, "it ended while it was being saved", "nothing is left to do")
        }
        Error::Tracee(TraceeError::Kernel { errno: nix::errno::Errno::EPERM, .. }) => {
            let next = "become the superuser, and see kernel.yama.ptrace_scope";
            Failure::new(REFUSED, what, error, next)
        }
        Error::Tracee(TraceeError::Traced { .. }) => {
            Failure::new(NOT_MIGRATABLE, what, error, "end the debugger, then try again")
        }
        Error::Tracee(TraceeError::WontStop { .. }) => {
            Failure::new(NOT_MIGRATABLE, what, error, "try again when the wait is over")
        }
        Error::Stream(_) | Error::Commit(_) => {
            Failure::new(FAILED, what, error, "see that there is room where --to points, then try again")
        }
        _ => Failure::new(FAILED, what, error, "try again; migckpt inspect --pid PID tells what it has"),
    }
}
