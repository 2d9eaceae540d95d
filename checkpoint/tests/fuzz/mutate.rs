//! Random changes to inputs, and the loop that feeds them.

use crate::LARGEST;
use checkpoint::image::codec;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// splitmix64: enough to choose what to break.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }
}

/// A number from the environment.
pub fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Feeds mutations of the corpus to `target` until the time is over.
pub fn fuzz(
    what: &str,
    corpus: &[Vec<u8>],
    mutate: impl Fn(&mut Random, &mut Vec<u8>),
    target: impl Fn(&[u8]),
) {
    let (seconds, seed) = (number("FUZZ_SECONDS", 5), number("FUZZ_SEED", 1));
    let mut random = Random(seed);
    let until = Instant::now() + Duration::from_secs(seconds);
    let mut rounds = 0u64;
    while Instant::now() < until {
        let mut input = corpus[random.below(corpus.len())].clone();
        mutate(&mut random, &mut input);
        LARGEST.store(0, Ordering::Relaxed);
        target(&input);
        let largest = LARGEST.load(Ordering::Relaxed);
        // A body of the codec's limit, grown by doubling.
        assert!(
            largest <= 2 * codec::LIMIT + input.len(),
            "{what}, round {rounds}, seed {seed}: {largest} bytes"
        );
        rounds += 1;
    }
    eprintln!("{what}: {rounds} inputs, seed {seed}");
}

/// Flips, cuts, doubles, overwrites, sometimes several times.
pub fn break_bytes(random: &mut Random, input: &mut Vec<u8>) {
    for _ in 0..=random.below(4) {
        if input.is_empty() {
            return;
        }
        let at = random.below(input.len());
        match random.below(7) {
            0 => input[at] ^= 1 << random.below(8),
            1 => input.truncate(at),
            2 => input[at] = [0, 1, 0x7f, 0x80, 0xfb, 0xfc, 0xfd, 0xff, b' ', b'\n'][random.below(10)],
            3 => {
                let end = (at + random.below(64)).min(input.len());
                let piece = input[at..end].to_vec();
                let to = random.below(input.len());
                input.splice(to..to, piece);
            }
            4 => {
                let end = (at + random.below(64)).min(input.len());
                input.drain(at..end);
            }
            5 => {
                let lie = random.next() >> random.below(64);
                for (to, byte) in input[at..].iter_mut().zip(lie.to_le_bytes()) {
                    *to = byte;
                }
            }
            _ => {
                let lie = (random.next() >> random.below(64)).to_string();
                input.splice(at..at, lie.into_bytes());
            }
        }
    }
}

const HEADER: usize = 32;

/// Where the frames of a stream begin, as far as they are whole.
pub fn frames(stream: &[u8]) -> Vec<(usize, usize)> {
    let (mut at, mut found) = (0, Vec::new());
    while at + HEADER <= stream.len() {
        let length = u32::from_le_bytes(stream[at + 24..at + 28].try_into().expect("four bytes")) as usize;
        if at + HEADER + length > stream.len() {
            break;
        }
        found.push((at, length));
        at += HEADER + length;
    }
    found
}

/// What is in a frame.
pub fn body_of(stream: &[u8], (at, length): (usize, usize)) -> &[u8] {
    &stream[at + HEADER..at + HEADER + length]
}

/// Puts something else in it, with a checksum that is right.
pub fn put_body(stream: &mut Vec<u8>, (at, length): (usize, usize), body: &[u8]) {
    let mut frame = stream[at..at + HEADER].to_vec();
    frame[24..28].copy_from_slice(&(body.len() as u32).to_le_bytes());
    let crc = crc32c::crc32c_append(crc32c::crc32c(&frame[..28]), body);
    frame[28..].copy_from_slice(&crc.to_le_bytes());
    frame.extend(body);
    stream.splice(at..at + HEADER + length, frame);
}

/// Makes it lie, or breaks it.
pub fn damage(random: &mut Random, stream: &mut Vec<u8>) {
    if random.below(2) == 0 || !crate::lies::lie(random, stream) {
        break_frame(random, stream);
    }
}

/// Breaks one frame and makes its checksum right again, so that what is behind it is reached.
fn break_frame(random: &mut Random, stream: &mut Vec<u8>) {
    let frames = frames(stream);
    if frames.is_empty() || random.below(8) == 0 {
        return break_bytes(random, stream);
    }
    // The first ones are states, where most can be told wrongly.
    let pick = if random.below(2) == 0 { 0 } else { random.below(frames.len()) };
    let (at, length) = frames[pick];
    let mut header = stream[at..at + HEADER].to_vec();
    let mut body = stream[at + HEADER..at + HEADER + length].to_vec();
    if random.below(4) == 0 {
        let byte = 4 + random.below(24);
        header[byte] ^= 1 << random.below(8);
    } else {
        break_bytes(random, &mut body);
    }
    if random.below(8) != 0 {
        header[24..28].copy_from_slice(&(body.len() as u32).to_le_bytes());
    }
    let crc = crc32c::crc32c_append(crc32c::crc32c(&header[..28]), &body);
    header[28..].copy_from_slice(&crc.to_le_bytes());
    header.extend(body);
    stream.splice(at..at + HEADER + length, header);
}
