//! `migckpt inspect`: an image, or a live process (without stopping it).

use super::place;
use super::view::{FileView, ImageView, LiveView, MappingView, Totals};
use super::{FAILED, Failure, Location, USAGE, bytes, json, line};
use crate::image::ProcessImage;
use crate::image::stream::{Item, StreamError, StreamReader};
use crate::inventory::{self, Rules};
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub struct InspectArguments {
    /// The image's directory; - is the standard input
    #[arg(value_name = "DIR|-", required_unless_present = "pid", conflicts_with = "pid")]
    image: Option<PathBuf>,
    /// A live process instead of an image
    #[arg(long, value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pid: Option<i32>,
    /// Print everything as JSON
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: &InspectArguments) -> Result<(), Failure> {
    match (&arguments.image, arguments.pid) {
        (_, Some(pid)) => live(pid, arguments.json),
        (Some(path), None) => image(&Location::of(path), arguments.json),
        (None, None) => {
            Err(Failure::new(USAGE, "nothing to inspect", "neither an image nor --pid", "name one of them"))
        }
    }
}

fn image(location: &Location, as_json: bool) -> Result<(), Failure> {
    let (images, totals) = read_whole(location)?;
    let view = ImageView::of(&images, totals);
    if as_json {
        json(&view);
    } else {
        show_image(&view);
    }
    Ok(())
}

/// Reads an image to its end, so that what is shown is known to be whole.
pub fn read_whole(location: &Location) -> Result<(Vec<ProcessImage>, Totals), Failure> {
    let (input, file_bytes) = place::open(location)?;
    read(input).map(|(images, totals)| (images, Totals { file_bytes, ..totals })).map_err(|error| {
        let next = "the image cannot be used; take another one";
        Failure::new(FAILED, format!("cannot read the image {}", location.name()), error, next)
    })
}

fn read(input: Box<dyn std::io::Read>) -> Result<(Vec<ProcessImage>, Totals), StreamError> {
    let mut stream = StreamReader::new(input)?;
    let images = stream.states()?;
    let mut totals = Totals { frames: images.len() as u64, ..Totals::default() };
    loop {
        totals.frames += 1;
        match stream.next()? {
            Item::State(_) | Item::Process(_) | Item::Object(_) => {}
            Item::Data { bytes, .. } => totals.data_bytes += bytes.len() as u64,
            Item::Zero { len, .. } => totals.zero_bytes += len,
            Item::Same { len, .. } => totals.shared_bytes += len,
            Item::End => break,
        }
    }
    totals.memory_bytes = totals.data_bytes + totals.zero_bytes + totals.shared_bytes;
    Ok((images, totals))
}

fn show_image(view: &ImageView) {
    line(&format!("process {} ({}), group {}, session {}", view.pid, view.comm, view.pgid, view.sid));
    line(&format!("  program    {}", view.exe));
    line(&format!("  directory  {}{}", view.cwd, if view.cwd_deleted { " (removed)" } else { "" }));
    line(&format!("  user       uid {} gid {}", view.uids[0], view.gids[0]));
    line(&format!("  read on    {}, kernel {}", view.host, view.kernel));
    let t = &view.totals;
    let shared = match t.shared_bytes {
        0 => String::new(),
        shared => format!(", {} of children as their parents'", bytes(shared)),
    };
    line(&format!(
        "  memory     {} in {} mappings ({} data, {} zero{shared})",
        bytes(t.memory_bytes),
        view.mappings.len(),
        bytes(t.data_bytes),
        bytes(t.zero_bytes)
    ));
    if let Some(size) = t.file_bytes {
        line(&format!("  image      {} in {} frames", bytes(size), t.frames));
    }
    if let Some(signal) = view.stopped_by {
        line(&format!("  stopped    by signal {signal}"));
    }
    line(&format!(
        "  signals    {} handled, {} ignored, {} pending",
        view.signals_handled.len(),
        view.signals_ignored.len(),
        view.signals_pending
    ));
    line(&format!("  timers     {} interval, {} POSIX", view.interval_timers, view.posix_timers));
    line(&format!("threads ({}):", view.threads.len()));
    for thread in &view.threads {
        line(&format!("  {:>8}  {:<15}  at {}", thread.tid, thread.comm, thread.instruction));
    }
    show_files(&view.files);
    if !view.descendants.is_empty() {
        line(&format!("descendants ({}):", view.descendants.len()));
    }
    for member in &view.descendants {
        let ended = if member.ended { "  (ended)" } else { "" };
        line(&format!(
            "  {:>8}  {:<15}  child of {}, group {}, session {}{ended}",
            member.pid, member.comm, member.ppid, member.pgid, member.sid
        ));
    }
}

fn show_files(files: &[FileView]) {
    line(&format!("files ({}):", files.len()));
    for file in files {
        let numbers: Vec<String> = file.fds.iter().map(i32::to_string).collect();
        line(&format!("  {:>8}  {:<9}  {}  {}", numbers.join(","), file.kind, file.path, file.detail));
    }
}

fn live(pid: i32, as_json: bool) -> Result<(), Failure> {
    let found = inventory::inspect(pid, Rules::Standalone)
        .map_err(|error| super::dump::not_looked_at(pid, &error))?;
    let view = LiveView::of(pid, &found);
    if as_json {
        json(&view);
        return Ok(());
    }
    line(&format!(
        "process {pid}: {} threads, {} of memory to save in {} mappings",
        view.threads,
        bytes(view.bytes),
        view.mappings.len()
    ));
    show_files(&view.files);
    show_notable(&view.mappings);
    if view.blockers.is_empty() {
        line("it can be saved");
    } else {
        line("it cannot be saved:");
        for blocker in &view.blockers {
            line(&format!("  {}", blocker.what));
        }
    }
    Ok(())
}

/// Shared mappings: what people ask about.
fn show_notable(mappings: &[MappingView]) {
    for mapping in mappings.iter().filter(|mapping| mapping.shared) {
        line(&format!("shared    {}-{}  {}", mapping.start, mapping.end, mapping.path));
    }
}
