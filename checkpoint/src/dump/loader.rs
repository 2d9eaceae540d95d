//! Reading memory in large pieces, ahead of whoever writes them.
//!
//! Small ranges that follow each other become one read, and what is contiguous one piece, whatever
//! mappings it belongs to. When there is much, another thread reads the next piece while this one is
//! checked and written; of ptrace(2) that needs nothing. One such thread only: two that read the same
//! process are slower than one.

use super::DumpError;
use crate::sys::process_vm;
use crate::tracee::Memory;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::Scope;

/// Largest piece, bytes: few enough that buffers stay in the cache.
pub const RUN: usize = 1 << 20;
/// Ranges of one read (`IOV_MAX`, readv(2)).
const MAX_RANGES: usize = 1024;
/// Full buffers before another thread is worth its start.
const ALONE: usize = 4;
/// Buffers that may be on their way to and from it.
const AHEAD: usize = 2;

/// A buffer, and what it is to be filled with.
struct Load {
    buffer: Vec<u8>,
    /// Address and length of each range, in the order of the buffer.
    ranges: Vec<(u64, usize)>,
    filled: usize,
}

impl Load {
    fn new() -> Load {
        Load { buffer: vec![0; RUN], ranges: Vec::new(), filled: 0 }
    }

    fn read(&mut self, memory: &Memory) -> Result<(), DumpError> {
        let Load { buffer, ranges, filled } = self;
        if process_vm::read_ranges(memory.pid(), ranges, &mut buffer[..*filled]).is_ok() {
            return Ok(());
        }
        // Refused for memory without PROT_READ; `/proc/PID/mem` reads that too (FOLL_FORCE).
        let mut rest = &mut buffer[..*filled];
        for &(addr, length) in ranges.iter() {
            let (part, others) = rest.split_at_mut(length);
            if process_vm::read(memory.pid(), addr, part).is_err() {
                memory.read(addr, part)?;
            }
            rest = others;
        }
        Ok(())
    }

    fn give<E>(&mut self, each: &mut impl FnMut(u64, &[u8]) -> Result<(), E>) -> Result<(), E> {
        let mut at = 0;
        for &(addr, length) in &self.ranges {
            each(addr, &self.buffer[at..at + length])?;
            at += length;
        }
        self.ranges.clear();
        self.filled = 0;
        Ok(())
    }
}

/// The thread that reads ahead.
struct Helper {
    wanted: SyncSender<Load>,
    loaded: Receiver<Result<Load, DumpError>>,
    under_way: usize,
}

/// Reads what it is told, in that order.
pub struct Loader<'scope, 'env> {
    scope: &'scope Scope<'scope, 'env>,
    memory: &'env Memory,
    current: Load,
    free: Vec<Load>,
    helper: Option<Helper>,
    loads: usize,
}

impl<'scope, 'env> Loader<'scope, 'env> {
    /// Reads from `memory`; the scope ends the thread that it may start.
    pub fn new(scope: &'scope Scope<'scope, 'env>, memory: &'env Memory) -> Loader<'scope, 'env> {
        Loader { scope, memory, current: Load::new(), free: Vec::new(), helper: None, loads: 0 }
    }

    /// Wants a range of whole pages; `each` is called with what has come meanwhile.
    pub fn add<E: From<DumpError>>(
        &mut self,
        start: u64,
        end: u64,
        each: &mut impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut at = start;
        while at < end {
            let load = &mut self.current;
            let length = (end - at).min((RUN - load.filled) as u64) as usize;
            match load.ranges.last_mut() {
                Some((addr, before)) if *addr + *before as u64 == at => *before += length,
                _ => load.ranges.push((at, length)),
            }
            load.filled += length;
            at += length as u64;
            if load.filled == RUN || load.ranges.len() == MAX_RANGES {
                self.load(each)?;
            }
        }
        Ok(())
    }

    /// Calls `each` with all that is left.
    pub fn finish<E: From<DumpError>>(
        mut self,
        each: &mut impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        while self.helper.as_ref().is_some_and(|helper| helper.under_way > 0) {
            self.receive(each)?;
        }
        self.current.read(self.memory)?;
        self.current.give(each)
    }

    fn load<E: From<DumpError>>(
        &mut self,
        each: &mut impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.loads += 1;
        if self.loads <= ALONE {
            self.current.read(self.memory)?;
            return self.current.give(each);
        }
        if self.helper.as_ref().is_some_and(|helper| helper.under_way == AHEAD) {
            self.receive(each)?;
        }
        let next = self.free.pop().unwrap_or_else(Load::new);
        let load = std::mem::replace(&mut self.current, next);
        let helper = self.helper.get_or_insert_with(|| start(self.scope, self.memory));
        helper.under_way += 1;
        helper.wanted.send(load).expect("it ends after this end of the channel only");
        Ok(())
    }

    fn receive<E: From<DumpError>>(
        &mut self,
        each: &mut impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let Some(helper) = &mut self.helper else { return Ok(()) };
        helper.under_way -= 1;
        let mut load = helper.loaded.recv().expect("it ends after this end of the channel only")?;
        load.give(each)?;
        self.free.push(load);
        Ok(())
    }
}

fn start<'scope, 'env>(scope: &'scope Scope<'scope, 'env>, memory: &'env Memory) -> Helper {
    let (wanted, requests) = sync_channel::<Load>(AHEAD);
    let (results, loaded) = sync_channel(AHEAD);
    scope.spawn(move || {
        while let Ok(mut load) = requests.recv() {
            let result = load.read(memory).map(|()| load);
            if results.send(result).is_err() {
                break;
            }
        }
    });
    Helper { wanted, loaded, under_way: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads ranges of this process' own memory.
    fn loaded(ranges: &[(u64, u64)]) -> Result<Vec<(u64, Vec<u8>)>, DumpError> {
        let memory = Memory::of(std::process::id() as i32).expect("opens");
        let mut out = Vec::new();
        let mut each = |addr: u64, bytes: &[u8]| {
            out.push((addr, bytes.to_vec()));
            Ok::<(), DumpError>(())
        };
        std::thread::scope(|scope| {
            let mut loader = Loader::new(scope, &memory);
            for &(start, end) in ranges {
                loader.add(start, end, &mut each)?;
            }
            loader.finish(&mut each)
        })?;
        Ok(out)
    }

    #[test]
    fn pieces_come_in_order_and_whole() {
        let bytes: Vec<u8> = (0..24 << 20).map(|n: u32| (n >> 3) as u8 ^ (n >> 12) as u8).collect();
        let at = bytes.as_ptr() as u64;
        // Every other 4 KiB of the first 4 MiB, then all of the rest.
        let mut ranges: Vec<(u64, u64)> = (0..512).map(|n| (at + n * 8192, at + n * 8192 + 4096)).collect();
        ranges.push((at + (4 << 20), at + (24 << 20)));
        let got = loaded(&ranges).expect("reads");
        let mut expected = ranges.iter().flat_map(|&(start, end)| start..end).step_by(4096);
        for (addr, piece) in &got {
            assert!(piece.len() <= RUN && piece.len() % 4096 == 0 && !piece.is_empty());
            let offset = (addr - at) as usize;
            assert!(piece[..] == bytes[offset..offset + piece.len()]);
            for page in (*addr..addr + piece.len() as u64).step_by(4096) {
                assert_eq!(expected.next(), Some(page));
            }
        }
        assert_eq!(expected.next(), None);
    }

    #[test]
    fn what_cannot_be_read_is_an_error_and_ends_all() {
        let bytes = vec![7u8; 16 << 20];
        let at = bytes.as_ptr() as u64;
        assert!(loaded(&[(at, at + (16 << 20)), (0x1000, 0x2000)]).is_err());
        assert!(loaded(&[(at, at + 4096), (0x1000, 0x2000)]).is_err());
    }
}
