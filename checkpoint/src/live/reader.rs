//! Contents of pages of a process that runs meanwhile: what is there when it is asked for may be gone when it is read.

use crate::sys::process_vm;
use crate::tracee::{Memory, TraceeError};
use nix::errno::Errno;

const PAGE: u64 = 4096;
/// Largest piece, bytes: few enough that the buffer stays in the cache.
const PIECE: usize = 1 << 20;
/// Ranges of one read (`IOV_MAX`, readv(2)).
const MAX_RANGES: usize = 1024;

/// Gathers small ranges into one read.
pub struct Reader {
    memory: Memory,
    buffer: Vec<u8>,
    ranges: Vec<(u64, usize)>,
    filled: usize,
}

/// What the reader tells: contents, or that a page could not be read.
pub enum Page<'a> {
    /// Contents of whole pages.
    Data(u64, &'a [u8]),
    /// One page.
    Unread(u64, Errno),
}

impl Reader {
    /// Of the memory that the process has now.
    pub fn of(pid: i32) -> Result<Reader, TraceeError> {
        let (memory, buffer) = (Memory::of(pid)?, vec![0; PIECE]);
        Ok(Reader { memory, buffer, ranges: Vec::new(), filled: 0 })
    }

    /// Wants a range; calls `each` with what has come meanwhile.
    pub fn add<E>(
        &mut self,
        start: u64,
        end: u64,
        each: &mut impl FnMut(Page<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut at = start;
        while at < end {
            let length = (end - at).min((PIECE - self.filled) as u64) as usize;
            self.ranges.push((at, length));
            self.filled += length;
            at += length as u64;
            if self.filled == PIECE || self.ranges.len() == MAX_RANGES {
                self.flush(each)?;
            }
        }
        Ok(())
    }

    /// Reads what is wanted and was not read yet.
    pub fn flush<E>(&mut self, each: &mut impl FnMut(Page<'_>) -> Result<(), E>) -> Result<(), E> {
        let ranges = std::mem::take(&mut self.ranges);
        let pid = self.memory.pid();
        let whole = process_vm::read_ranges(pid, &ranges, &mut self.buffer[..self.filled]).is_ok();
        self.filled = 0;
        let mut at = 0;
        for &(addr, length) in &ranges {
            let bytes = &mut self.buffer[at..at + length];
            at += length;
            match whole || process_vm::read(pid, addr, bytes).is_ok() {
                true => each(Page::Data(addr, bytes))?,
                false => page_by_page(&self.memory, addr, bytes, each)?,
            }
        }
        self.ranges = ranges;
        self.ranges.clear();
        Ok(())
    }
}

/// process_vm_readv(2) is refused for memory without PROT_READ; `/proc/PID/mem` reads that too (FOLL_FORCE).
fn page_by_page<E>(
    memory: &Memory,
    addr: u64,
    bytes: &mut [u8],
    each: &mut impl FnMut(Page<'_>) -> Result<(), E>,
) -> Result<(), E> {
    if memory.read(addr, bytes).is_ok() {
        return each(Page::Data(addr, bytes));
    }
    for (page, bytes) in (addr..).step_by(PAGE as usize).zip(bytes.chunks_exact_mut(PAGE as usize)) {
        match memory.read(page, bytes) {
            Ok(()) => each(Page::Data(page, bytes))?,
            Err(TraceeError::Kernel { errno, .. }) => each(Page::Unread(page, errno))?,
            Err(_) => each(Page::Unread(page, Errno::ESRCH))?,
        }
    }
    Ok(())
}
