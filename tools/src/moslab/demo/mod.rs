//! The main job.
use anyhow::Result;
/// Options of `moslab demo`.
#[derive(Debug, clap::Args)]
pub struct DemoArgs {}
/// Runs it.
pub fn main(_: &DemoArgs) -> Result<u8> {
    Ok(0)
}
