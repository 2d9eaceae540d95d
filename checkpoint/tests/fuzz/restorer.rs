//! Hostile images, as the restorer meets them: whatever they say, it ends with an error or a process
//! that it takes back, and nothing is left.
//!
//! Each is rebuilt by `migckpt restore --dry-run` in PID, network and IPC namespaces of its own, where the
//! numbers and addresses of the image are free, and from which nothing of what an image may ask for can
//! reach a process of ours.

use crate::mutate::{Random, damage, number};
use crate::seeds::{HUGE_PAGES, seeds};
use checkpoint::image::stream::{Item, StreamReader};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Rebuilds the image in the file `$1`; tells its own status, then every process that is left but
/// itself, and every socket and segment, one a line.
const SCRIPT: &str = r#"
ip link set lo up
timeout -k 1 30 "$0" restore --dry-run "$1" >&2
echo $?
for entry in /proc/[0-9]*; do
    [ "$entry" = /proc/$$ ] || cat "$entry/stat" 2>/dev/null
done
# Connections that have ended stay for a while.
for list in tcp tcp6 udp udp6 unix; do
    sed -e 1d -e '/ 06 0000/d' "/proc/net/$list"
done
sed 1d /proc/sysvipc/shm
"#;

fn rebuild(directory: &std::path::Path) -> Output {
    Command::new("unshare")
        .args(["--pid", "--net", "--ipc", "--fork", "--mount-proc", "--kill-child", "sh", "-c", SCRIPT])
        .arg(env!("CARGO_BIN_EXE_migckpt"))
        .arg(directory)
        .stdin(Stdio::null())
        .output()
        .expect("runs")
}

/// Whether the reader has nothing against it.
fn is_readable(image: &[u8]) -> bool {
    let Ok(mut reader) = StreamReader::new(image) else { return false };
    if reader.states().is_err() {
        return false;
    }
    loop {
        match reader.next() {
            Ok(Item::End) => return true,
            Ok(_) => {}
            Err(_) => return false,
        }
    }
}

#[test]
fn the_restorer() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped the restorer of hostile images: needs root (PIDs of one's choice)");
        return;
    }
    let seeds = seeds();
    let corpus = &seeds.images;
    let (seconds, seed) = (number("FUZZ_SECONDS", 5), number("FUZZ_SEED", 1));
    let mut random = Random(seed);
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("process.img");
    for image in corpus {
        std::fs::write(&file, image).expect("written");
        let done = rebuild(directory.path());
        let (told, said) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
        assert_eq!(told, "0\n", "untouched, it can be restored: {said}");
    }
    let until = Instant::now() + Duration::from_secs(seconds);
    let (mut rounds, mut readable, mut rebuilt) = (0u64, 0u64, 0u64);
    while Instant::now() < until {
        let mut image = corpus[random.below(corpus.len())].clone();
        damage(&mut random, &mut image);
        rounds += 1;
        // The reader has a test of its own; some of what it refuses is tried all the same.
        if !is_readable(&image) && random.below(50) != 0 {
            continue;
        }
        readable += 1;
        std::fs::write(&file, &image).expect("written");
        let done = rebuild(directory.path());
        let (told, said) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
        let (status, left) = told.split_once('\n').unwrap_or((&told, ""));
        if !(matches!(status, "0" | "1" | "3" | "4") && left.is_empty()) {
            let kept = std::env::temp_dir().join(format!("hostile-{seed}-{rounds}.img"));
            std::fs::write(&kept, &image).expect("written");
            panic!("{}: status {status}, left: {left:?}: {said}", kept.display());
        }
        assert!(status == "0" || said.contains("why:"), "no reason was given: {said}");
        if let Some(pool) = &seeds.huge_pages {
            pool.await_free(HUGE_PAGES);
        }
        rebuilt += u64::from(status == "0");
    }
    eprintln!("hostile images: {rounds} inputs, {readable} tried, {rebuilt} rebuilt, seed {seed}");
}
