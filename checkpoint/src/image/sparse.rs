//! Bytes that are mostly zero, without most of their zeros: of a thread's extended state the registers of AVX-512 alone
//! take 1.6 KiB, which few threads use. The length, then runs: offset, length, bytes; numbers of 32 bits.

use serde::de::Error;
use serde::{Deserializer, Serializer};
use serde_bytes::{ByteBuf, Bytes};

/// Longest, bytes.
const MAX: usize = 64 << 10;
/// Fewer zeros than this, in words of eight bytes, are left in a run.
const GAP: usize = 4;

/// For serde's `with`.
pub fn serialize<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
    serde_bytes::serialize(Bytes::new(&pack(bytes)), to)
}

/// For serde's `with`.
pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
    let packed: ByteBuf = serde_bytes::deserialize(from)?;
    unpack(&packed).ok_or_else(|| D::Error::custom("runs of sparse bytes that do not fit"))
}

fn pack(bytes: &[u8]) -> Vec<u8> {
    let number = |n: usize| (n as u32).to_le_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    out.extend(number(bytes.len()));
    let is_zero = |word: &[u8]| word.iter().all(|&byte| byte == 0);
    let words: Vec<bool> = bytes.chunks(8).map(is_zero).collect();
    let mut at = 0;
    while let Some(first) = words[at..].iter().position(|zero| !zero).map(|n| at + n) {
        let gap = words[first..].windows(GAP).position(|some| some.iter().all(|&zero| zero));
        let end = gap.map_or(words.len(), |n| first + n);
        let run = &bytes[first * 8..bytes.len().min(end * 8)];
        out.extend(number(first * 8));
        out.extend(number(run.len()));
        out.extend_from_slice(run);
        at = end;
    }
    out
}

fn unpack(packed: &[u8]) -> Option<Vec<u8>> {
    let number = |at: usize| {
        let bytes = packed.get(at..at.checked_add(4)?)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?) as usize)
    };
    let length = number(0).filter(|&length| length <= MAX)?;
    let mut out = vec![0; length];
    let (mut at, mut done) = (4, 0);
    while at < packed.len() {
        let (offset, length) = (number(at)?, number(at + 4)?);
        let run = packed.get(at + 8..(at + 8).checked_add(length)?)?;
        // In order, and something in each.
        if offset < done || run.is_empty() {
            return None;
        }
        out.get_mut(offset..offset.checked_add(length)?)?.copy_from_slice(run);
        done = offset + length;
        at += 8 + length;
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn comes_back(parts in prop::collection::vec((any::<u8>(), 0usize..90), 0..20)) {
            let bytes: Vec<u8> = parts.iter().flat_map(|&(byte, n)| vec![byte & (byte >> 4); n]).collect();
            prop_assert_eq!(unpack(&pack(&bytes)), Some(bytes));
        }

        #[test]
        fn never_panics(bytes in prop::collection::vec(prop_oneof![Just(0u8), 0u8..20, any::<u8>()], 0..80)) {
            let _ = unpack(&bytes);
        }
    }

    #[test]
    fn zeros_take_no_room() {
        let mut bytes = vec![0; 2696];
        bytes[24] = 1;
        bytes[2688] = 0x54;
        assert_eq!(pack(&bytes).len(), 4 + 2 * (8 + 8));
        assert_eq!(unpack(&pack(&bytes)), Some(bytes));
        assert_eq!(pack(&[]), [0; 4]);
    }

    #[test]
    fn lies_are_refused() {
        let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
        assert!(unpack(&words(&[16, 0, 4, 7, 8, 4, 9])).is_some());
        // Too long; past the end; backwards; nothing; cut off.
        for lie in
            [&[1 << 20][..], &[4, 4, 4, 1], &[16, 8, 4, 1, 0, 4, 1], &[16, 0, 0], &[16, 0, 8, 1], &[16, 0]]
        {
            assert_eq!(unpack(&words(lie)), None, "{lie:?}");
        }
        assert_eq!(unpack(&words(&[16, u32::MAX, 4, 1])), None);
    }
}
