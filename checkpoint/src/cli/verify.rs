//! `migckpt verify`: every frame, checksum and total of an image.

use super::{Location, bytes, inspect, json, line};
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub struct VerifyArguments {
    /// The image's directory; - is the standard input
    #[arg(value_name = "DIR|-")]
    image: PathBuf,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: &VerifyArguments) -> Result<(), super::Failure> {
    let location = Location::of(&arguments.image);
    let (images, totals) = inspect::read_whole(&location)?;
    if arguments.json {
        let (pid, processes) = (images[0].pid, images.len());
        json(&serde_json::json!({ "pid": pid, "processes": processes, "whole": true, "totals": totals }));
    } else {
        line(&format!(
            "{} is whole: process {}{}, {} of memory in {} frames",
            location.name(),
            images[0].pid,
            match images.len() {
                1 => String::new(),
                n => format!(" and {} descendants", n - 1),
            },
            bytes(totals.memory_bytes),
            totals.frames
        ));
    }
    Ok(())
}
