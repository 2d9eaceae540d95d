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
    let (image, totals) = inspect::read_whole(&location)?;
    if arguments.json {
        json(&serde_json::json!({ "pid": image.pid, "whole": true, "totals": totals }));
    } else {
        line(&format!(
            "{} is whole: process {}, {} of memory in {} frames",
            location.name(),
            image.pid,
            bytes(totals.memory_bytes),
            totals.frames
        ));
    }
    Ok(())
}
