//! The functions of a vDSO (vdso(7)): an ELF shared object that the kernel maps into every process.
//!
//! The bytes are an image's, so nothing in them is believed: what does not lie inside them is no symbol.

use std::collections::BTreeMap;

/// Bound on the program headers, dynamic entries, and symbols that are looked at; a vDSO has a dozen.
const MOST: usize = 1024;

const PT_LOAD: u32 = 1;
const PT_DYNAMIC: u32 = 2;
const DT_HASH: u64 = 4;
const DT_STRTAB: u64 = 5;
const DT_SYMTAB: u64 = 6;
const DT_GNU_HASH: u64 = 0x6fff_fef5;
const STT_FUNC: u8 = 2;

/// Names, without `__vdso_`, and offsets of the functions. Empty: it has none, or is no such object.
pub fn functions(bytes: &[u8]) -> BTreeMap<Vec<u8>, u64> {
    Object { bytes }.functions().unwrap_or_default()
}

struct Object<'a> {
    bytes: &'a [u8],
}

impl Object<'_> {
    fn part<const N: usize>(&self, at: u64) -> Option<[u8; N]> {
        let at = usize::try_from(at).ok()?;
        self.bytes.get(at..at.checked_add(N)?)?.try_into().ok()
    }

    fn half(&self, at: u64) -> Option<u16> {
        self.part(at).map(u16::from_le_bytes)
    }

    fn word(&self, at: u64) -> Option<u32> {
        self.part(at).map(u32::from_le_bytes)
    }

    fn long(&self, at: u64) -> Option<u64> {
        self.part(at).map(u64::from_le_bytes)
    }

    fn functions(&self) -> Option<BTreeMap<Vec<u8>, u64>> {
        // ELF, 64 bits, little-endian (elf(5)).
        if self.bytes.get(..6)? != b"\x7fELF\x02\x01" {
            return None;
        }
        let (headers, length, count) = (self.long(32)?, u64::from(self.half(54)?), self.half(56)?);
        let (mut base, mut dynamic) = (None, None);
        for n in 0..u64::from(count).min(MOST as u64) {
            let header = headers.checked_add(n.checked_mul(length)?)?;
            let field = |at: u64| self.long(header.checked_add(at)?);
            match self.word(header)? {
                // Offset in the file, address.
                PT_LOAD if base.is_none() => base = Some(field(16)?.wrapping_sub(field(8)?)),
                PT_DYNAMIC => dynamic = Some(field(8)?),
                _ => {}
            }
        }
        let base = base?;
        let offset = |address: u64| address.wrapping_sub(base);
        let mut tables = BTreeMap::new();
        let dynamic = dynamic?;
        for n in 0..MOST as u64 {
            let at = dynamic.checked_add(n * 16)?;
            match self.long(at)? {
                0 => break,
                tag => tables.insert(tag, offset(self.long(at.checked_add(8)?)?)),
            };
        }
        let (symbols, strings) = (*tables.get(&DT_SYMTAB)?, *tables.get(&DT_STRTAB)?);
        let count = match (tables.get(&DT_HASH), tables.get(&DT_GNU_HASH)) {
            // nbucket, nchain: as many chains as symbols.
            (Some(&hash), _) => self.word(hash.checked_add(4)?)?,
            (None, Some(&hash)) => self.count_by_gnu_hash(hash)?,
            (None, None) => return None,
        };
        let mut found = BTreeMap::new();
        for n in 0..u64::from(count).min(MOST as u64) {
            // struct Elf64_Sym: name, info, other, section, value, size.
            let symbol = symbols.checked_add(n * 24)?;
            let [info] = self.part::<1>(symbol.checked_add(4)?)?;
            let section = self.half(symbol.checked_add(6)?)?;
            let at = offset(self.long(symbol.checked_add(8)?)?);
            if info & 0xf != STT_FUNC || section == 0 || at >= self.bytes.len() as u64 {
                continue;
            }
            let name = usize::try_from(strings.checked_add(self.word(symbol)?.into())?).ok()?;
            let name = self.bytes.get(name..)?.split(|&byte| byte == 0).next()?;
            let name = name.strip_prefix(b"__vdso_").unwrap_or(name);
            if !name.is_empty() && name.len() <= 64 {
                found.insert(name.to_vec(), at);
            }
        }
        Some(found)
    }

    /// The last chain ends with the last symbol (`DT_GNU_HASH`: nbuckets, symoffset, bloom_size, bloom_shift,
    /// bloom, buckets, chains).
    fn count_by_gnu_hash(&self, hash: u64) -> Option<u32> {
        let (buckets, first, bloom) = (self.word(hash)?, self.word(hash + 4)?, self.word(hash + 8)?);
        let at_buckets = hash.checked_add(16)?.checked_add(u64::from(bloom).checked_mul(8)?)?;
        let bucket = |n: u32| self.word(at_buckets.checked_add(u64::from(n) * 4)?);
        let mut last = (0..buckets.min(MOST as u32)).filter_map(bucket).max()?;
        if last < first {
            return Some(first);
        }
        let at_chains = at_buckets.checked_add(u64::from(buckets) * 4)?;
        for _ in 0..MOST {
            let chain = self.word(at_chains.checked_add(u64::from(last - first) * 4)?)?;
            last = last.checked_add(1)?;
            if chain & 1 == 1 {
                return Some(last);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn own() -> Vec<u8> {
        let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
        let line = maps.lines().find(|line| line.ends_with("[vdso]")).expect("a vDSO");
        let (start, rest) = line.split_once('-').expect("a range");
        let number = |text: &str| u64::from_str_radix(text, 16).expect("a number");
        let (start, end) = (number(start), number(rest.split(' ').next().expect("an end")));
        let mut bytes = vec![0; (end - start) as usize];
        crate::sys::process_vm::read(std::process::id() as i32, start, &mut bytes).expect("reads");
        bytes
    }

    #[test]
    fn finds_what_this_kernel_has() {
        let found = functions(&own());
        for name in ["clock_gettime", "gettimeofday", "time", "getcpu"] {
            assert!(found.contains_key(name.as_bytes()), "{name} is not in {found:?}");
        }
        // The same by the other table.
        let mut bytes = own();
        let at = bytes.windows(8).position(|eight| eight == DT_HASH.to_le_bytes());
        let dynamic = at.filter(|_| bytes.windows(8).any(|eight| eight == DT_GNU_HASH.to_le_bytes()));
        if let Some(at) = dynamic {
            bytes[at..at + 8].copy_from_slice(&0x7000_0000u64.to_le_bytes());
            assert_eq!(functions(&bytes), found);
        }
    }

    proptest! {
        #[test]
        fn never_panics(at in 0usize..4096, word in any::<u64>(), noise in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut bytes = own();
            let at = at.min(bytes.len() - 8);
            bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
            prop_assert!(functions(&bytes).values().all(|&at| at < bytes.len() as u64));
            functions(&noise);
        }
    }
}
