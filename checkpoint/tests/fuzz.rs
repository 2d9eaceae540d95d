//! What is read and not trusted, mutated at random: images, and the texts of `/proc`.
//!
//! Every input gives an error or a value: no panic, and no allocation beyond a bound. Some seconds each
//! with all tests; for long (the same seed gives the same inputs):
//!
//! ```sh
//! FUZZ_SECONDS=3600 FUZZ_SEED=7 cargo test --release -p checkpoint --test fuzz -- --nocapture
//! ```

use checkpoint::image::codec;
use checkpoint::image::stream::{Item, Options, StreamReader, StreamWriter};
use checkpoint::proc::fdinfo::FdInfo;
use checkpoint::proc::maps;
use checkpoint::proc::status::{Stat, Status};
use std::alloc::{GlobalAlloc, Layout, System};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Notes the largest allocation asked for.
struct Watching;

static LARGEST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is passed on to the system's allocator as it is.
unsafe impl GlobalAlloc for Watching {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are the system's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LARGEST.fetch_max(size, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Watching = Watching;

/// splitmix64: enough to choose what to break.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Feeds mutations of the corpus to `target` until the time is over.
fn fuzz(what: &str, corpus: &[Vec<u8>], mutate: impl Fn(&mut Random, &mut Vec<u8>), target: impl Fn(&[u8])) {
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
fn break_bytes(random: &mut Random, input: &mut Vec<u8>) {
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
fn frames(stream: &[u8]) -> Vec<(usize, usize)> {
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

/// Images by the engine's own hand: of one process, and of a tree. None without the right to save any.
fn images() -> Vec<Vec<u8>> {
    use std::os::unix::process::CommandExt;
    // Whoever started us may have left descriptors open that no image can hold.
    for entry in std::fs::read_dir("/proc/self/fd").expect("readable").flatten() {
        let number: i32 = entry.file_name().to_string_lossy().parse().expect("a number");
        if number > 2 {
            // SAFETY: no pointers; only what an exec does with it changes.
            unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) };
        }
    }
    let mut tree = Command::new("sh");
    tree.args(["-c", "sleep 100 & sleep 100"]).process_group(0).stdin(Stdio::null()).stdout(Stdio::null());
    let mut tree = tree.stderr(Stdio::null()).spawn().expect("runs");
    let mut one = Command::new("sleep");
    let mut one = one.arg("100").stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("runs");
    // Until both have become what they are to be, and the shell has its children.
    std::thread::sleep(Duration::from_millis(500));
    let saved = |pid: u32, more: &[&str]| {
        let mut dump = Command::new(env!("CARGO_BIN_EXE_migckpt"));
        dump.args(["dump", &pid.to_string(), "--to", "-", "--leave-running"]).args(more);
        dump.output().expect("runs").stdout
    };
    let mut images = vec![
        saved(one.id(), &[]),
        saved(one.id(), &["--compress", "off"]),
        saved(tree.id(), &["--tree", "--compress", "off"]),
    ];
    let group = nix::unistd::Pid::from_raw(tree.id() as i32);
    nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL).expect("it is there");
    one.kill().expect("it is there");
    tree.wait().and_then(|_| one.wait()).expect("they end");
    images.retain(|image| !image.is_empty());
    assert!(images.len() == 3 || !nix::unistd::geteuid().is_root(), "{} of 3 were saved", images.len());
    images
}

#[test]
fn the_image_reader() {
    let mut corpus = images();
    if corpus.is_empty() {
        // Not root: what can be written without a process.
        let mut writer = StreamWriter::new(Vec::new(), Options::default()).expect("starts");
        writer.data(0x1000, &[7; 8192]).expect("written");
        corpus.push(writer.finish().expect("ends").0);
    }
    let small: Vec<Vec<u8>> = corpus.iter().map(|image| image[..image.len().min(300_000)].to_vec()).collect();
    fuzz("images", &small, break_frame, |input| {
        let Ok(mut reader) = StreamReader::new(input) else { return };
        let Ok(images) = reader.states() else { return };
        assert!(!images.is_empty());
        let _ = checkpoint::dump::tree::blockers(&images);
        while let Ok(item) = reader.next() {
            if matches!(item, Item::End) {
                break;
            }
        }
    });
}

#[test]
fn texts_of_proc() {
    let mut corpus = Vec::new();
    for name in ["smaps", "maps", "status", "stat", "fdinfo/0", "fdinfo/1", "fdinfo/2"] {
        for pid in ["self", "1"] {
            corpus.extend(std::fs::read(format!("/proc/{pid}/{name}")));
        }
    }
    corpus.push(
        b"pos:\t0\nflags:\t02\nmnt_id:\t15\ntfd:        5 events:       19 data: 7ffc  pos:0 ino:0 sdev:0\n"
            .to_vec(),
    );
    corpus
        .push(b"pos:\t0\nflags:\t02\nclockid: 1\nticks: 0\nit_value: (3, 7)\nit_interval: (0, 0)\n".to_vec());
    for text in &mut corpus {
        text.truncate(6000);
    }
    fuzz("texts of /proc", &corpus, break_bytes, |input| {
        for vma in maps::parse(input) {
            assert!(vma.start < vma.end, "{vma:?}");
        }
        let status = Status::parse(input);
        status.state();
        status.inner_id();
        status.numbers("Groups");
        status.mask("CapEff");
        let stat = Stat::parse(&String::from_utf8_lossy(input));
        for field in 0..60 {
            stat.number(field);
        }
        if let Some(info) = FdInfo::parse(input) {
            info.epoll_targets();
            info.timer("it_value");
            info.number("ticks", 10);
            info.has_locks();
        }
    });
}
