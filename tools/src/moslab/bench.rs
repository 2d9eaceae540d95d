//! The benchmark.
use anyhow::Result;
/// Options of `moslab bench`.
#[derive(Debug, clap::Args)]
pub struct BenchArgs {}
/// Runs it.
pub fn main(_: &BenchArgs) -> Result<u8> {
    Ok(0)
}
/// Sends.
#[derive(Debug, clap::Args)]
pub struct RawSend {}
/// Receives.
#[derive(Debug, clap::Args)]
pub struct RawReceive {}
/// Sends.
pub fn raw_send(_: &RawSend) -> Result<u8> {
    Ok(0)
}
/// Receives.
pub fn raw_receive(_: &RawReceive) -> Result<u8> {
    Ok(0)
}
