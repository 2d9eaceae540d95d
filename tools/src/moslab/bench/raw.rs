//! The raw copy: one TCP stream from warm memory into fresh memory.

use super::victim::{Kind, fill};
use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Child;
use std::time::Instant;

/// Where the receiver listens.
pub const PORT: u16 = 7799;
/// How much is read or written at a time.
const CHUNK: usize = 1 << 20;
/// Largest copy, bytes: it is all in memory, twice.
const MAX_BYTES: u64 = 64 << 30;

/// `moslab __raw-send ADDRESS BYTES KIND`
#[derive(Debug, clap::Args)]
pub struct RawSend {
    address: String,
    bytes: u64,
    kind: Kind,
}

/// `moslab __raw-receive ADDRESS BYTES`
#[derive(Debug, clap::Args)]
pub struct RawReceive {
    address: String,
    bytes: u64,
}

/// Sends that many bytes, and prints how long it took until the other side had them all, milliseconds.
pub fn raw_send(arguments: &RawSend) -> Result<u8> {
    let memory = fill(checked(arguments.bytes)?, arguments.kind);
    let mut stream = TcpStream::connect(&arguments.address)
        .with_context(|| format!("{} cannot be reached", arguments.address))?;
    let started = Instant::now();
    for chunk in memory.chunks(CHUNK) {
        stream.write_all(chunk)?;
    }
    stream.read_exact(&mut [0])?;
    println!("{}", started.elapsed().as_secs_f64() * 1e3);
    Ok(0)
}

/// Receives that many bytes into memory that nobody has touched.
pub fn raw_receive(arguments: &RawReceive) -> Result<u8> {
    let listener = TcpListener::bind(&arguments.address)?;
    println!("listening");
    let (mut stream, _) = listener.accept()?;
    let mut memory = vec![0u8; checked(arguments.bytes)?];
    for chunk in memory.chunks_mut(CHUNK) {
        stream.read_exact(chunk)?;
    }
    stream.write_all(&[1])?;
    Ok(0)
}

fn checked(bytes: u64) -> Result<usize> {
    if bytes > MAX_BYTES {
        bail!("{bytes} bytes are more than {MAX_BYTES}");
    }
    Ok(bytes as usize)
}

/// Waits until the receiver can be reached.
pub fn await_listening(receiver: &mut Child) -> Result<()> {
    let said = receiver.stdout.take().context("the receiver has no output")?;
    let mut line = String::new();
    BufReader::new(said).read_line(&mut line)?;
    if line.trim() != "listening" {
        bail!("the receiver does not listen");
    }
    Ok(())
}
