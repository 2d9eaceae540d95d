//! Rounds as a stream: one section each.
//!
//! ```text
//! 0..4    b"MGLV"
//! 4       version (1)
//! 5       1: the process has executed another program, nothing told before counts; else 0
//! 6       1: the last look at the frozen process; else 0
//! 7       0
//! 8..12   number of the round, from 1
//! 12..16  length of the mappings, bytes
//! 16..20  CRC32C of bytes 0..16 and of the mappings
//! 20..    the mappings, by the codec
//! ```
//!
//! Pages follow in the frames of an image ([`crate::image::stream`]), compressed and checksummed as there, with its *end*
//! frame: *data*, *zero*, and *same* for ranges that hold no page of the process' own any more.

use super::Change;
use crate::image::Vma;
use crate::image::codec;
use crate::image::stream::{Item, Options, StreamError, StreamReader, StreamStats, StreamWriter};
use std::io::{self, Read, Write};

const MAGIC: &[u8; 4] = b"MGLV";
const VERSION: u8 = 1;
const HEADER: usize = 20;
/// Bound on mappings (`vm.max_map_count` is 65,530 unless somebody has raised it).
const MAX_MAPPINGS: usize = 1 << 20;

/// What a section begins with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Head {
    /// From 1.
    pub number: u32,
    /// The process has executed another program since the last one.
    pub anew: bool,
    /// The process is frozen, and nothing comes after it.
    pub last: bool,
}

/// Writes one section.
pub struct SectionWriter<W: Write> {
    out: Option<W>,
    head: Head,
    options: Options,
    pages: Option<StreamWriter<W>>,
}

impl<W: Write> SectionWriter<W> {
    /// Nothing is written before the mappings are known.
    pub fn new(out: W, number: u32, last: bool, options: Options) -> SectionWriter<W> {
        SectionWriter { out: Some(out), head: Head { number, anew: false, last }, options, pages: None }
    }

    /// Writes one change, in the order of the tracker.
    pub fn change(&mut self, change: &Change<'_>) -> Result<(), StreamError> {
        match change {
            Change::Anew => self.head.anew = true,
            Change::Mappings(vmas) => {
                let mut out = self.out.take().ok_or_else(misplaced)?;
                out.write_all(&header(&self.head, vmas)?)?;
                self.pages = Some(StreamWriter::new(out, self.options)?);
            }
            Change::Data { addr, bytes } => self.pages()?.data(*addr, bytes)?,
            Change::Zero { addr, len } => self.pages()?.zero(*addr, *len)?,
            Change::Gone { addr, len } => self.pages()?.same(*addr, *len)?,
        }
        Ok(())
    }

    fn pages(&mut self) -> Result<&mut StreamWriter<W>, StreamError> {
        self.pages.as_mut().ok_or_else(misplaced)
    }

    /// Ends it, flushes, and tells what it was.
    pub fn finish(self) -> Result<StreamStats, StreamError> {
        Ok(self.pages.ok_or_else(misplaced)?.finish()?.1)
    }
}

fn misplaced() -> StreamError {
    io::Error::new(io::ErrorKind::InvalidInput, "a round has its mappings once, and first").into()
}

fn header(head: &Head, vmas: &[Vma]) -> Result<Vec<u8>, StreamError> {
    let body = codec::encode(&vmas)?;
    let mut bytes = Vec::with_capacity(HEADER + body.len());
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&[VERSION, head.anew.into(), head.last.into(), 0]);
    bytes.extend_from_slice(&head.number.to_le_bytes());
    bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
    let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes), &body);
    bytes.extend_from_slice(&crc.to_le_bytes());
    bytes.extend_from_slice(&body);
    Ok(bytes)
}

/// Reads sections. Nothing in them is trusted.
pub struct RoundReader<R: Read> {
    input: R,
    number: u32,
    ended: bool,
}

impl<R: Read> RoundReader<R> {
    /// Starts reading.
    pub fn new(input: R) -> RoundReader<R> {
        RoundReader { input, number: 0, ended: false }
    }

    /// Reads the next section whole, and calls `each` with its changes. What was told of a section that ends in an
    /// error must not be used.
    pub fn next<E: From<StreamError>>(
        &mut self,
        mut each: impl FnMut(Change<'_>) -> Result<(), E>,
    ) -> Result<Head, E> {
        let (head, vmas) = self.head()?;
        if head.anew {
            each(Change::Anew)?;
        }
        each(Change::Mappings(&vmas))?;
        let mut pages = StreamReader::of_pages(&mut self.input)?;
        loop {
            match pages.next()? {
                Item::Data { addr, bytes } => each(Change::Data { addr, bytes })?,
                Item::Zero { addr, len } => each(Change::Zero { addr, len })?,
                Item::Same { addr, len } => each(Change::Gone { addr, len })?,
                Item::End => break,
                Item::State(_) | Item::Process(_) | Item::Object(_) => {
                    return Err(self.damaged("something else among the pages").into());
                }
            }
        }
        (self.number, self.ended) = (head.number, head.last);
        Ok(head)
    }

    fn damaged(&self, what: &'static str) -> StreamError {
        StreamError::Damaged { frame: self.number.into(), what }
    }

    fn head(&mut self) -> Result<(Head, Vec<Vma>), StreamError> {
        if self.ended {
            return Err(self.damaged("nothing comes after the last look"));
        }
        let mut header = [0; HEADER];
        self.input.read_exact(&mut header)?;
        if &header[..4] != MAGIC {
            return Err(self.damaged("not a round"));
        }
        if header[4] != VERSION {
            return Err(StreamError::Version(header[4]));
        }
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"));
        let (number, length, crc) = (word(8), word(12) as usize, word(16));
        if header[5] > 1 || header[6] > 1 || header[7] != 0 || Some(number) != self.number.checked_add(1) {
            return Err(self.damaged("rounds are missing or out of order"));
        }
        if length > codec::LIMIT {
            return Err(self.damaged("mappings over the limit"));
        }
        let mut body = Vec::new();
        // Grows with what really comes: a lying length allocates nothing.
        (&mut self.input).take(length as u64).read_to_end(&mut body)?;
        if body.len() != length || crc32c::crc32c_append(crc32c::crc32c(&header[..16]), &body) != crc {
            return Err(self.damaged("wrong checksum"));
        }
        let vmas: Vec<Vma> = codec::decode(&body)?;
        let rises = vmas.iter().all(|vma| vma.start < vma.end)
            && vmas.windows(2).all(|pair| pair[0].end <= pair[1].start);
        if !rises || vmas.len() > MAX_MAPPINGS {
            return Err(self.damaged("mappings that cannot be"));
        }
        Ok((Head { number, anew: header[5] == 1, last: header[6] == 1 }, vmas))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proc::maps;
    use proptest::prelude::*;

    const MAPS: &[u8] = b"1000-9000 rw-p 00000000 00:00 0 \n20000-30000 rw-p 00000000 00:00 0 \n";

    fn told(change: &Change<'_>) -> String {
        match change {
            Change::Data { addr, bytes } => format!("data {addr:x} {} {}", bytes.len(), bytes[0]),
            other => format!("{other:x?}"),
        }
    }

    /// Two rounds, and what was told.
    fn sample() -> (Vec<u8>, Vec<String>) {
        let (mut out, mut all) = (Vec::new(), Vec::new());
        let vmas = maps::parse(MAPS);
        for (number, last) in [(1, false), (2, true)] {
            let mut section = SectionWriter::new(&mut out, number, last, Options::default());
            let page = [number as u8; 8192];
            let changes = [
                Change::Anew,
                Change::Mappings(&vmas),
                Change::Gone { addr: 0x1000, len: 0x2000 },
                Change::Data { addr: 0x3000, bytes: &page },
                Change::Zero { addr: 0x20000, len: 0x1000 },
            ];
            for change in &changes[usize::from(last)..] {
                section.change(change).expect("written");
                all.push(told(change));
            }
            section.finish().expect("ends");
        }
        (out, all)
    }

    fn read(bytes: &[u8]) -> Result<Vec<String>, StreamError> {
        let mut reader = RoundReader::new(bytes);
        let mut all = Vec::new();
        while !reader.ended {
            reader.next(|change| {
                all.push(told(&change));
                Ok::<(), StreamError>(())
            })?;
        }
        Ok(all)
    }

    #[test]
    fn what_was_written_is_read() {
        let (bytes, all) = sample();
        assert_eq!(read(&bytes).expect("whole"), all);
    }

    #[test]
    fn every_cut_and_every_changed_byte_is_an_error() {
        let (bytes, _) = sample();
        for at in 0..bytes.len() {
            assert!(read(&bytes[..at]).is_err(), "cut at {at}");
            let mut changed = bytes.clone();
            changed[at] ^= 0x41;
            assert!(read(&changed).is_err(), "changed at {at}");
        }
    }

    #[test]
    fn a_round_twice_or_left_out_is_an_error() {
        let (bytes, _) = sample();
        let first = bytes.len() / 2 + HEADER;
        let begins: Vec<usize> = memchr::memmem::find_iter(&bytes, MAGIC).collect();
        assert!(begins.len() == 2 && begins[1] < first);
        assert!(read(&bytes[begins[1]..]).is_err());
        assert!(read(&[&bytes[..begins[1]], &bytes[..]].concat()).is_err());
    }

    #[test]
    fn mappings_come_first() {
        let mut section = SectionWriter::new(Vec::new(), 1, false, Options::default());
        assert!(section.change(&Change::Zero { addr: 0, len: 4096 }).is_err());
        section.change(&Change::Mappings(&[])).expect("written");
        assert!(section.change(&Change::Mappings(&[])).is_err());
    }

    proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(read(&[&MAGIC[..], &bytes].concat()).is_err());
        }
    }
}
