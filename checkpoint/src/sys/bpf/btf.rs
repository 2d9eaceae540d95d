//! The kernel's description of its own types (Documentation/bpf/btf.rst): where a field is in this very
//! build of the kernel.

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use std::fs::{self, File};
use std::io;
use std::num::NonZeroUsize;
use std::ops::Deref;
use std::ptr::NonNull;

const MAGIC: u16 = 0xeb9f;
const KIND_INT: u32 = 1;
const KIND_PTR: u32 = 2;
const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_ENUM: u32 = 6;
const KIND_TYPEDEF: u32 = 8;
const KIND_VOLATILE: u32 = 9;
const KIND_CONST: u32 = 10;
const KIND_RESTRICT: u32 = 11;
const KIND_FUNC: u32 = 12;
const KIND_FUNC_PROTO: u32 = 13;
const KIND_VAR: u32 = 14;
const KIND_DATASEC: u32 = 15;
const KIND_DECL_TAG: u32 = 17;
const KIND_TYPE_TAG: u32 = 18;
const KIND_ENUM64: u32 = 19;
/// `struct btf_type`, bytes.
const TYPE_LEN: usize = 12;
/// Names of names: no type goes deeper.
const MAX_DEPTH: usize = 32;

/// The types of the running kernel.
pub struct Btf {
    bytes: Bytes,
    strings: usize,
    /// Where each type begins; number 0 is `void`.
    types: Vec<u32>,
}

/// The file: mapped where that is possible (6.16 on), as reading gives a page at a time, of 1,300.
enum Bytes {
    Mapped { at: NonNull<libc::c_void>, length: usize },
    Read(Vec<u8>),
}

impl Bytes {
    fn of_file(path: &str) -> io::Result<Bytes> {
        let file = File::open(path)?;
        if let Some(length) = NonZeroUsize::new(file.metadata()?.len() as usize) {
            // SAFETY: a new mapping, which nobody writes.
            let got = unsafe { mmap(None, length, ProtFlags::PROT_READ, MapFlags::MAP_PRIVATE, &file, 0) };
            if let Ok(at) = got {
                return Ok(Bytes::Mapped { at, length: length.get() });
            }
        }
        fs::read(path).map(Bytes::Read)
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            // SAFETY: mapped, as long, until it is dropped; the kernel does not change its types.
            Bytes::Mapped { at, length } => unsafe {
                std::slice::from_raw_parts(at.as_ptr().cast(), *length)
            },
            Bytes::Read(bytes) => bytes,
        }
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        if let Bytes::Mapped { at, length } = *self {
            // SAFETY: mapped by us, and borrowed by nobody any more.
            let _ = unsafe { munmap(at, length) };
        }
    }
}

/// Where in a structure something is, and what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Bytes from the structure's beginning.
    pub offset: u32,
    /// The number of its type.
    pub kind: u32,
}

impl Btf {
    /// Of the running kernel. `NotFound`: it does not tell (CONFIG_DEBUG_INFO_BTF).
    pub fn of_kernel() -> io::Result<Btf> {
        let bytes = Bytes::of_file("/sys/kernel/btf/vmlinux")?;
        let not_understood =
            || io::Error::new(io::ErrorKind::InvalidData, "the kernel's types are not understood");
        Btf::parse(bytes).ok_or_else(not_understood)
    }

    /// Of the text as it is in the file; `None`: it is none, or cut off.
    fn parse(bytes: Bytes) -> Option<Btf> {
        let half = |at: usize| Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
        let word = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        if half(0)? != MAGIC {
            return None;
        }
        let header = word(4)? as usize;
        let begin = header.checked_add(word(8)? as usize)?;
        let end = begin.checked_add(word(12)? as usize)?.min(bytes.len());
        let strings = header.checked_add(word(16)? as usize)?;
        let mut types = vec![0];
        types.reserve((end - begin.min(end)) / 24);
        let mut at = begin;
        while at + TYPE_LEN <= end {
            types.push(at as u32);
            let info = word(at + 4)?;
            at += TYPE_LEN + behind(info)?;
        }
        Some(Btf { bytes, strings, types })
    }

    /// The number of a structure.
    pub fn structure(&self, name: &str) -> Option<u32> {
        self.named(KIND_STRUCT, name)
    }

    /// The number of a function.
    pub fn function(&self, name: &str) -> Option<u32> {
        self.named(KIND_FUNC, name)
    }

    /// A member of a structure, or of one without a name in it.
    pub fn member(&self, structure: u32, name: &str) -> Option<Place> {
        self.member_within(structure, name, 0)
    }

    /// What a type is behind its other names and qualifiers.
    pub fn resolve(&self, mut kind: u32) -> u32 {
        for _ in 0..MAX_DEPTH {
            match self.info(kind).map(kind_of) {
                Some(KIND_TYPEDEF | KIND_VOLATILE | KIND_CONST | KIND_RESTRICT | KIND_TYPE_TAG) => {
                    kind = self.word(kind, 8).unwrap_or(0);
                }
                _ => break,
            }
        }
        kind
    }

    /// What a pointer points to; `None`: it is no pointer.
    pub fn pointed(&self, kind: u32) -> Option<u32> {
        let kind = self.resolve(kind);
        let is_pointer = kind_of(self.info(kind)?) == KIND_PTR;
        is_pointer.then(|| self.word(kind, 8)).flatten().map(|kind| self.resolve(kind))
    }

    /// Bytes that a value of the type takes; `None` for what is no number, pointer or structure.
    pub fn size(&self, kind: u32) -> Option<u32> {
        let kind = self.resolve(kind);
        match kind_of(self.info(kind)?) {
            KIND_PTR => Some(8),
            KIND_INT | KIND_ENUM | KIND_ENUM64 | KIND_STRUCT | KIND_UNION => self.word(kind, 8),
            KIND_ARRAY => {
                let (element, count) = (self.word(kind, 12)?, self.word(kind, 20)?);
                // Of arrays of arrays nobody asks.
                self.scalar_size(element)?.checked_mul(count)
            }
            _ => None,
        }
    }

    fn scalar_size(&self, kind: u32) -> Option<u32> {
        let kind = self.resolve(kind);
        match kind_of(self.info(kind)?) {
            KIND_PTR => Some(8),
            KIND_INT | KIND_ENUM | KIND_ENUM64 => self.word(kind, 8),
            _ => None,
        }
    }

    fn named(&self, wanted: u32, name: &str) -> Option<u32> {
        let is_it = |&kind: &u32| {
            self.info(kind).is_some_and(|info| kind_of(info) == wanted)
                && self.word(kind, 0).is_some_and(|at| self.has_name(at, name))
        };
        (1..self.types.len() as u32).find(is_it)
    }

    fn member_within(&self, structure: u32, name: &str, depth: usize) -> Option<Place> {
        let structure = self.resolve(structure);
        let info = self.info(structure)?;
        if !matches!(kind_of(info), KIND_STRUCT | KIND_UNION) || depth > MAX_DEPTH {
            return None;
        }
        let has_bit_fields = info >> 31 != 0;
        for n in 0..info & 0xffff {
            let at = TYPE_LEN as u32 + n * 12;
            let (text, kind, place) =
                (self.word(structure, at)?, self.word(structure, at + 4)?, self.word(structure, at + 8)?);
            let (bits, width) = if has_bit_fields { (place & 0xff_ffff, place >> 24) } else { (place, 0) };
            let offset = bits / 8;
            if text == 0 {
                if let Some(inside) = self.member_within(kind, name, depth + 1) {
                    return Some(Place { offset: offset + inside.offset, ..inside });
                }
            } else if self.has_name(text, name) {
                // A part of a byte has no place that could be loaded from.
                return (width == 0 && bits % 8 == 0).then_some(Place { offset, kind });
            }
        }
        None
    }

    fn has_name(&self, at: u32, name: &str) -> bool {
        let text = self.bytes.get(self.strings.saturating_add(at as usize)..).unwrap_or_default();
        text.strip_prefix(name.as_bytes()).is_some_and(|rest| rest.first() == Some(&0))
    }

    fn info(&self, kind: u32) -> Option<u32> {
        self.word(kind, 4)
    }

    /// The four bytes at `offset` of what is known of a type.
    fn word(&self, kind: u32, offset: u32) -> Option<u32> {
        let at = match *self.types.get(kind as usize)? {
            0 => return None,
            at => at as usize + offset as usize,
        };
        Some(u32::from_le_bytes(self.bytes.get(at..at + 4)?.try_into().ok()?))
    }
}

fn kind_of(info: u32) -> u32 {
    info >> 24 & 0x1f
}

/// Bytes that follow a `struct btf_type`; `None`: a kind that is newer than this.
fn behind(info: u32) -> Option<usize> {
    let count = (info & 0xffff) as usize;
    Some(match kind_of(info) {
        KIND_INT | KIND_VAR | KIND_DECL_TAG => 4,
        KIND_ARRAY => 12,
        KIND_STRUCT | KIND_UNION | KIND_DATASEC | KIND_ENUM64 => count * 12,
        KIND_ENUM | KIND_FUNC_PROTO => count * 8,
        // Pointers, names of other types, qualifiers, functions, floating-point numbers, declarations.
        2 | 7..=12 | 16 | KIND_TYPE_TAG => 0,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Header, one structure `s { int n; struct { long m; }; }`, and their names.
    fn small() -> Vec<u8> {
        let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
        let types = [
            words(&[1, KIND_INT << 24, 4, 0x20]),
            words(&[5, KIND_INT << 24, 8, 0x40]),
            words(&[0, KIND_STRUCT << 24 | 1, 8, 12, 2, 0]),
            words(&[10, KIND_STRUCT << 24 | 2, 16, 14, 1, 32, 0, 3, 64]),
        ]
        .concat();
        let names = b"\0int\0long\0s\0m\0n\0".to_vec();
        let header = [MAGIC.to_le_bytes().to_vec(), vec![1, 0], words(&[24, 0])].concat();
        let lengths = words(&[types.len() as u32, types.len() as u32, names.len() as u32]);
        [header, lengths, types, names].concat()
    }

    #[test]
    fn finds_members() {
        let btf = Btf::parse(Bytes::Read(small())).expect("is one");
        let s = btf.structure("s").expect("is there");
        assert_eq!(btf.member(s, "n").map(|place| (place.offset, btf.size(place.kind))), Some((4, Some(4))));
        assert_eq!(btf.member(s, "m").map(|place| (place.offset, btf.size(place.kind))), Some((8, Some(8))));
        assert_eq!((btf.member(s, "o"), btf.structure("int"), btf.function("s")), (None, None, None));
    }

    proptest! {
        #[test]
        fn never_panics(at in 0usize..140, byte in any::<u8>(), length in 0usize..140) {
            let mut bytes = small();
            let at = at % bytes.len();
            bytes[at] = byte;
            bytes.truncate(length.max(1));
            if let Some(btf) = Btf::parse(Bytes::Read(bytes)) {
                for kind in 0..6 {
                    let _ = (btf.member(kind, "m"), btf.size(kind), btf.pointed(kind), btf.structure("s"));
                }
            }
        }
    }
}
