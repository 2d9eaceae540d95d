//! The stream of an image: state and pages, framed, checksummed and compressed where it pays.
//!
//! ```text
//! 0..4    b"MGCK"
//! 4       version (5)
//! 5       kind: 0 state, 1 data, 2 zero, 3 end, 4 process, 5 same, 6 object
//! 6       flags: bit 0 = the body is zstd-compressed
//! 7       0
//! 8..16   sequence number, from 0
//! 16..24  address (data, zero, same); else 0
//! 24..28  length of the body in the stream, bytes
//! 28..32  CRC32C of bytes 0..28 and of the body
//! ```
//!
//! The states of all processes come first, each parent before its children. What follows is memory of
//! the first, until a *process* frame names another one by its place (as the address). Objects come between
//! the states and the memory: after an *object* frame, addresses are offsets into that object, until the
//! first *process* frame.
//! The body of *state* and *object* is the codec's, of *data* whole pages, of *zero* and *same* a length
//! (u64), of *end* the totals. What is *same* is as the memory of the process' parent at that address.
//! Pages of zeros inside data become *zero* frames. Little-endian throughout.

mod judge;

use super::objects::{MAX_OBJECTS, ObjectImage};
use super::{MAX_VDSO, ProcessImage, codec};
use judge::{Judge, SAMPLE, Verdict};
use std::io::{self, Read, Write};
use std::time::Instant;

const MAGIC: &[u8; 4] = b"MGCK";
const VERSION: u8 = 7;
const HEADER: usize = 32;
const COMPRESSED: u8 = 1;
/// Largest body of a data frame, bytes.
pub const CHUNK: usize = 1 << 20;
const PAGE: usize = 4096;
/// Frames up to this length are gathered before they are written, bytes.
const SMALL: usize = 32 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Kind {
    State = 0,
    Data = 1,
    Zero = 2,
    End = 3,
    Process = 4,
    Same = 5,
    Object = 6,
}

/// Why a stream could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The other end of it failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The state does not encode or decode.
    #[error(transparent)]
    Codec(#[from] codec::CodecError),
    /// It is truncated, corrupt, or no image at all.
    #[error("the image is damaged at frame {frame}: {what}")]
    Damaged {
        /// Number of the frame, from 0.
        frame: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// Written by another version.
    #[error("the image has format version {0}; this program reads version {VERSION}")]
    Version(u8),
}

/// How to write.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Compress {
    /// zstd level 1 where it pays, measured on the data and the destination as they come.
    #[default]
    Auto,
    /// Never.
    Off,
    /// Always, at this level.
    Level(i32),
}

/// Options of a writer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Options {
    /// Compression.
    pub compress: Compress,
}

/// What was written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StreamStats {
    /// Bytes of memory, zeros included.
    pub raw_bytes: u64,
    /// Bytes of the stream.
    pub wire_bytes: u64,
    /// Pages, zeros included.
    pub pages: u64,
    /// Of them pages of zeros.
    pub zero_pages: u64,
    /// Of them pages that are their parent's, and not in the stream again.
    pub shared_pages: u64,
}

/// Writes a stream.
pub struct StreamWriter<W: Write> {
    out: W,
    options: Options,
    compressor: zstd::bulk::Compressor<'static>,
    compressed: Vec<u8>,
    /// Frames that are written together.
    small: Vec<u8>,
    judge: Judge,
    sequence: u64,
    stats: StreamStats,
}

impl<W: Write> StreamWriter<W> {
    /// Starts a stream.
    pub fn new(out: W, options: Options) -> Result<StreamWriter<W>, StreamError> {
        let level = match options.compress {
            Compress::Level(level) => level,
            _ => 1,
        };
        Ok(StreamWriter {
            out,
            options,
            compressor: zstd::bulk::Compressor::new(level)?,
            compressed: vec![0; zstd::zstd_safe::compress_bound(CHUNK)],
            sequence: 0,
            small: Vec::with_capacity(2 * SMALL + HEADER),
            judge: Judge::default(),
            stats: StreamStats::default(),
        })
    }

    /// Writes the state of a process; all of them come first.
    pub fn state(&mut self, image: &ProcessImage) -> Result<(), StreamError> {
        let body = codec::encode(image)?;
        self.frame(Kind::State, 0, 0, &body)
    }

    /// Describes an object, whose contents are to follow; all come before the memory of processes, which then
    /// begins with [`Self::process`].
    pub fn object(&mut self, object: &ObjectImage) -> Result<(), StreamError> {
        let body = codec::encode(object)?;
        self.frame(Kind::Object, 0, 0, &body)
    }

    /// What follows is memory of this process, by its place among the states.
    pub fn process(&mut self, index: usize) -> Result<(), StreamError> {
        self.frame(Kind::Process, 0, index as u64, &[])
    }

    /// Writes contents of memory: whole pages.
    pub fn data(&mut self, addr: u64, bytes: &[u8]) -> Result<(), StreamError> {
        if !bytes.len().is_multiple_of(PAGE) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not whole pages").into());
        }
        self.stats.raw_bytes += bytes.len() as u64;
        self.stats.pages += (bytes.len() / PAGE) as u64;
        let mut at = 0;
        while at < bytes.len() {
            let zero = is_zero(&bytes[at..at + PAGE]);
            let mut end = at + PAGE;
            while end < bytes.len() && end - at < CHUNK && is_zero(&bytes[end..end + PAGE]) == zero {
                end += PAGE;
            }
            let here = addr + at as u64;
            if zero {
                self.stats.zero_pages += ((end - at) / PAGE) as u64;
                self.frame(Kind::Zero, 0, here, &((end - at) as u64).to_le_bytes())?;
            } else {
                self.chunk(here, &bytes[at..end])?;
            }
            at = end;
        }
        Ok(())
    }

    /// Writes that a range is zero.
    pub fn zero(&mut self, addr: u64, len: u64) -> Result<(), StreamError> {
        self.stats.raw_bytes += len;
        self.stats.pages += len / PAGE as u64;
        self.stats.zero_pages += len / PAGE as u64;
        self.frame(Kind::Zero, 0, addr, &len.to_le_bytes())
    }

    /// Writes that a range is as the parent's of the process.
    pub fn same(&mut self, addr: u64, len: u64) -> Result<(), StreamError> {
        self.stats.raw_bytes += len;
        self.stats.pages += len / PAGE as u64;
        self.stats.shared_pages += len / PAGE as u64;
        self.frame(Kind::Same, 0, addr, &len.to_le_bytes())
    }

    fn chunk(&mut self, addr: u64, bytes: &[u8]) -> Result<(), StreamError> {
        let compress = match self.options.compress {
            Compress::Off => false,
            Compress::Level(_) => true,
            Compress::Auto => self.is_worth_it(bytes)?,
        };
        if !compress {
            self.judge.left_plain();
            return self.frame(Kind::Data, 0, addr, bytes);
        }
        let mut compressed = std::mem::take(&mut self.compressed);
        let length = self.compress(bytes, &mut compressed)?;
        let result = if length < bytes.len() - bytes.len() / 20 {
            self.frame(Kind::Data, COMPRESSED, addr, &compressed[..length])
        } else {
            self.frame(Kind::Data, 0, addr, bytes)
        };
        self.compressed = compressed;
        result
    }

    fn is_worth_it(&mut self, bytes: &[u8]) -> Result<bool, StreamError> {
        match self.judge.verdict() {
            Verdict::Plain => Ok(false),
            Verdict::Compress => Ok(true),
            Verdict::Sample => {
                let mut compressed = std::mem::take(&mut self.compressed);
                self.compress(&bytes[..bytes.len().min(SAMPLE)], &mut compressed)?;
                self.compressed = compressed;
                Ok(self.judge.verdict() == Verdict::Compress)
            }
        }
    }

    fn compress(&mut self, bytes: &[u8], into: &mut [u8]) -> Result<usize, StreamError> {
        let begun = Instant::now();
        let length = self.compressor.compress_to_buffer(bytes, into)?;
        self.judge.coded(bytes.len(), length, begun.elapsed());
        Ok(length)
    }

    fn frame(&mut self, kind: Kind, flags: u8, addr: u64, body: &[u8]) -> Result<(), StreamError> {
        let mut header = [0; HEADER];
        header[..4].copy_from_slice(MAGIC);
        header[4] = VERSION;
        header[5] = kind as u8;
        header[6] = flags;
        header[8..16].copy_from_slice(&self.sequence.to_le_bytes());
        header[16..24].copy_from_slice(&addr.to_le_bytes());
        header[24..28].copy_from_slice(&(body.len() as u32).to_le_bytes());
        let crc = crc32c::crc32c_append(crc32c::crc32c(&header[..28]), body);
        header[28..].copy_from_slice(&crc.to_le_bytes());
        self.small.extend_from_slice(&header);
        if body.len() <= SMALL {
            self.small.extend_from_slice(body);
            if self.small.len() > SMALL {
                self.write_small()?;
            }
        } else {
            self.write_small()?;
            let begun = Instant::now();
            self.out.write_all(body)?;
            self.judge.wrote(body.len(), begun.elapsed());
        }
        self.sequence += 1;
        self.stats.wire_bytes += (HEADER + body.len()) as u64;
        Ok(())
    }

    fn write_small(&mut self) -> Result<(), StreamError> {
        self.out.write_all(&self.small)?;
        self.small.clear();
        Ok(())
    }

    /// Ends the stream, flushes, and tells what it was.
    pub fn finish(mut self) -> Result<(W, StreamStats), StreamError> {
        let totals = [self.sequence, self.stats.raw_bytes, self.stats.pages];
        let body: Vec<u8> = totals.iter().flat_map(|n| n.to_le_bytes()).collect();
        self.frame(Kind::End, 0, 0, &body)?;
        self.write_small()?;
        self.out.flush()?;
        Ok((self.out, self.stats))
    }
}

/// Whether all bytes are zero; the compiler turns the words into vector code.
fn is_zero(page: &[u8]) -> bool {
    // Most pages that are not zero say so at once.
    page[..64].iter().all(|&byte| byte == 0)
        && page.chunks_exact(8).all(|word| u64::from_ne_bytes(word.try_into().expect("eight")) == 0)
}

/// What comes next in a stream.
#[derive(Debug)]
pub enum Item<'a> {
    /// The state of a process; the first items, at least one.
    State(Box<ProcessImage>),
    /// What follows belongs to this process, by its place among the states. What comes before the first
    /// of these belongs to the first process.
    Process(usize),
    /// What follows are contents of this object, by offsets.
    Object(Box<ObjectImage>),
    /// Contents.
    Data {
        /// Where.
        addr: u64,
        /// What; whole pages.
        bytes: &'a [u8],
    },
    /// Zeros.
    Zero {
        /// Where.
        addr: u64,
        /// How much; whole pages.
        len: u64,
    },
    /// Pages that are as those of the process' parent.
    Same {
        /// Where.
        addr: u64,
        /// How much; whole pages.
        len: u64,
    },
    /// The end, with totals that agree.
    End,
}

/// Reads a stream. Nothing in it is trusted.
pub struct StreamReader<R: Read> {
    input: R,
    decompressor: zstd::bulk::Decompressor<'static>,
    body: Vec<u8>,
    plain: Vec<u8>,
    sequence: u64,
    /// Kind, flags and address of a frame that was read to see what it is; its body is in `body`.
    ahead: Option<(u8, u8, u64)>,
    /// States read so far.
    states: u64,
    objects: usize,
    /// Memory of processes has begun: no object comes any more.
    in_memory: bool,
    /// There are pages of one process in it, and nothing else.
    only_pages: bool,
    raw_bytes: u64,
    ended: bool,
}

impl<R: Read> StreamReader<R> {
    /// Starts reading.
    pub fn new(input: R) -> Result<StreamReader<R>, StreamError> {
        Ok(StreamReader {
            input,
            decompressor: zstd::bulk::Decompressor::new()?,
            body: Vec::new(),
            plain: vec![0; CHUNK],
            sequence: 0,
            ahead: None,
            states: 0,
            objects: 0,
            in_memory: false,
            only_pages: false,
            raw_bytes: 0,
            ended: false,
        })
    }

    /// Starts reading pages that come without any state ([`crate::live::stream`]).
    pub fn of_pages(input: R) -> Result<StreamReader<R>, StreamError> {
        Ok(StreamReader { only_pages: true, ..StreamReader::new(input)? })
    }

    /// What it reads from; it stands right behind the last item.
    pub fn input(&mut self) -> &mut R {
        &mut self.input
    }

    /// Bytes of memory read so far.
    pub fn raw_bytes(&self) -> u64 {
        self.raw_bytes
    }

    fn damaged(&self, what: &'static str) -> StreamError {
        StreamError::Damaged { frame: self.sequence, what }
    }

    /// The states of all processes, at least one; what [`Self::next`] gives then is memory.
    pub fn states(&mut self) -> Result<Vec<ProcessImage>, StreamError> {
        let mut images = Vec::new();
        while images.is_empty() || self.next_is_state()? {
            match self.next()? {
                Item::State(image) => images.push(*image),
                _ => return Err(self.damaged("there is no state in it")),
            }
        }
        if let Some((first, others)) = images.split_first_mut()
            && first.mm.vdso.len() <= MAX_VDSO
        {
            for other in others.iter_mut().filter(|other| other.mm.vdso.is_empty()) {
                other.mm.vdso.clone_from(&first.mm.vdso);
            }
        }
        Ok(images)
    }

    fn next_is_state(&mut self) -> Result<bool, StreamError> {
        Ok(self.next_kind()? == Kind::State as u8)
    }

    /// Whether the next item is an object.
    pub fn next_is_object(&mut self) -> Result<bool, StreamError> {
        Ok(self.next_kind()? == Kind::Object as u8)
    }

    fn next_kind(&mut self) -> Result<u8, StreamError> {
        let frame = match self.ahead {
            Some(frame) => frame,
            None => self.read_frame()?,
        };
        self.ahead = Some(frame);
        Ok(frame.0)
    }

    /// The next item.
    #[allow(clippy::should_implement_trait)] // it lends its buffer, which an Iterator cannot
    pub fn next(&mut self) -> Result<Item<'_>, StreamError> {
        if self.ended {
            return Err(self.damaged("nothing comes after the end"));
        }
        let (kind, flags, addr) = match self.ahead.take() {
            Some(frame) => frame,
            None => self.read_frame()?,
        };
        if self.only_pages {
            // State, process, object.
            if matches!(kind, 0 | 4 | 6) {
                return Err(self.damaged("something else among the pages"));
            }
        // A state follows only states, and the first frame is one.
        } else if kind != 0 && self.sequence == 0 || kind == 0 && self.sequence != self.states {
            return Err(self.damaged("the states must be the first frames, and only those"));
        }
        let item = match kind {
            0 => Kind::State,
            1 => Kind::Data,
            2 => Kind::Zero,
            3 => Kind::End,
            4 => Kind::Process,
            5 => Kind::Same,
            6 => Kind::Object,
            _ => return Err(self.damaged("unknown kind of frame")),
        };
        if flags & !COMPRESSED != 0 || (flags != 0 && item != Kind::Data) {
            return Err(self.damaged("unknown flags"));
        }
        match item {
            Kind::State => {
                if self.states >= super::MAX_PROCESSES as u64 {
                    return Err(self.damaged("too many processes"));
                }
                let image = codec::decode(&self.body)?;
                self.sequence += 1;
                self.states += 1;
                Ok(Item::State(Box::new(image)))
            }
            Kind::Process => {
                if addr >= self.states || !self.body.is_empty() {
                    return Err(self.damaged("memory of a process that is not there"));
                }
                self.sequence += 1;
                self.in_memory = true;
                Ok(Item::Process(addr as usize))
            }
            Kind::Object => {
                if self.in_memory || self.objects >= MAX_OBJECTS {
                    return Err(self.damaged("an object where none may be"));
                }
                let object: ObjectImage = codec::decode(&self.body)?;
                self.sequence += 1;
                self.objects += 1;
                Ok(Item::Object(Box::new(object)))
            }
            Kind::Data => self.take_data(flags, addr),
            Kind::Zero | Kind::Same => {
                let len = self.word(0).ok_or(self.damaged("a frame without a length"))?;
                self.check_range(addr, len)?;
                self.raw_bytes = self.raw_bytes.saturating_add(len);
                self.sequence += 1;
                self.in_memory |= self.objects == 0;
                Ok(if item == Kind::Zero { Item::Zero { addr, len } } else { Item::Same { addr, len } })
            }
            Kind::End => {
                if self.word(0) != Some(self.sequence) || self.word(1) != Some(self.raw_bytes) {
                    return Err(self.damaged("the totals do not agree: frames are missing"));
                }
                self.ended = true;
                Ok(Item::End)
            }
        }
    }

    fn take_data(&mut self, flags: u8, addr: u64) -> Result<Item<'_>, StreamError> {
        let compressed = flags & COMPRESSED != 0;
        let len = if compressed {
            let mut plain = std::mem::take(&mut self.plain);
            let result = self.decompressor.decompress_to_buffer(&self.body, plain.as_mut_slice());
            self.plain = plain;
            result.map_err(|_| self.damaged("compressed data does not decompress"))?
        } else {
            self.body.len()
        };
        self.check_range(addr, len as u64)?;
        if len > CHUNK {
            return Err(self.damaged("a data frame over the limit"));
        }
        self.raw_bytes += len as u64;
        self.sequence += 1;
        self.in_memory |= self.objects == 0;
        let bytes = if compressed { &self.plain[..len] } else { &self.body[..] };
        Ok(Item::Data { addr, bytes })
    }

    fn check_range(&self, addr: u64, len: u64) -> Result<(), StreamError> {
        const TOP: u64 = 1 << 56;
        let whole = addr.is_multiple_of(PAGE as u64) && len.is_multiple_of(PAGE as u64) && len > 0;
        if !whole || addr >= TOP || len > TOP {
            return Err(self.damaged("a range that is not whole pages of memory"));
        }
        Ok(())
    }

    fn word(&self, n: usize) -> Option<u64> {
        let bytes = self.body.get(n * 8..n * 8 + 8)?;
        Some(u64::from_le_bytes(bytes.try_into().ok()?))
    }

    /// Reads header and body; checks what can be checked of any frame.
    fn read_frame(&mut self) -> Result<(u8, u8, u64), StreamError> {
        let mut header = [0; HEADER];
        self.fill(&mut header)?;
        if &header[..4] != MAGIC {
            return Err(self.damaged("not a frame of an image"));
        }
        if header[4] != VERSION {
            return Err(StreamError::Version(header[4]));
        }
        let long = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().expect("eight bytes"));
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"));
        if long(8) != self.sequence || header[7] != 0 {
            return Err(self.damaged("frames are missing or out of order"));
        }
        let length = word(24) as usize;
        let limit = if header[5] == Kind::State as u8 { codec::LIMIT } else { CHUNK };
        if length > limit {
            return Err(self.damaged("a frame over the limit"));
        }
        let mut body = std::mem::take(&mut self.body);
        body.clear();
        // Grows with what really comes: a lying length allocates nothing.
        let got = (&mut self.input).take(length as u64).read_to_end(&mut body);
        self.body = body;
        if got? != length {
            return Err(self.damaged("it ends in the middle of a frame"));
        }
        if crc32c::crc32c_append(crc32c::crc32c(&header[..28]), &self.body) != word(28) {
            return Err(self.damaged("wrong checksum"));
        }
        Ok((header[5], header[6], long(16)))
    }

    fn fill(&mut self, header: &mut [u8; HEADER]) -> Result<(), StreamError> {
        self.input.read_exact(header).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => self.damaged("it ends before its end frame"),
            _ => StreamError::Io(error),
        })
    }
}

#[cfg(test)]
mod tests;
