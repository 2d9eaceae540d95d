//! Costs of the home file system beside the same calls at home. Not run by default:
//! `cargo test --release -p migd --test homefs_figures -- --ignored --nocapture`.

mod homefs_support;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use homefs_support::{Join, mounted};
use migd::homefs::HandleKind;

fn each(n: u32, mut call: impl FnMut()) -> Duration {
    let started = Instant::now();
    for _ in 0..n {
        call();
    }
    started.elapsed() / n
}

fn row(what: &str, native: Duration, away: Duration) {
    let ratio = away.as_secs_f64() / native.as_secs_f64();
    println!("{what:<32} {native:>12.1?} {away:>12.1?} {ratio:>8.1} x");
}

fn both(what: &str, here: &Path, there: &Path, n: u32, call: impl Fn(&Path)) {
    call(there);
    row(what, each(n, || call(here)), each(n, || call(there)));
}

fn figures(join: Join) {
    mounted(join, move |m| {
        let dir = m.scratch.clone();
        println!("{join:?}");
        let big = dir.join("big");
        fs::write(&big, vec![7u8; 256 << 20]).expect("write");
        let (here, there) = (dir.as_path(), m.path(&dir));
        both("stat", &big, &m.path(&big), 2000, |p| drop(fs::metadata(p)));
        both("open, close", &big, &m.path(&big), 2000, |p| drop(File::open(p)));
        let mut read = vec![0u8; 1 << 20];
        for chunk in [128 << 10, 1 << 20] {
            let time = |p: &Path, read: &mut [u8]| {
                each(1, || {
                    let mut file = File::open(p).expect("open");
                    while file.read(&mut read[..chunk]).expect("read") > 0 {}
                })
            };
            let native = time(&big, &mut read);
            row(&format!("read 256 MiB by {} KiB", chunk >> 10), native, time(&m.path(&big), &mut read));
        }
        for (what, chunk) in [("write 64 MiB by 4 KiB", 4096), ("write 64 MiB by 1 MiB", 1 << 20)] {
            let data = vec![1u8; chunk];
            let time = |p: &Path| {
                each(1, || {
                    let mut file = File::create(p.join("out")).expect("create");
                    for _ in 0..(64 << 20) / chunk {
                        file.write_all(&data).expect("write");
                    }
                })
            };
            row(what, time(here), time(&there));
        }
        let (near, far) = (File::open(&big).expect("open"), File::open(m.path(&big)).expect("open"));
        let mut seed = 1u64;
        let mut random = |file: &File| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1);
            let mut page = [0; 4096];
            file.read_exact_at(&mut page, (seed >> 40) % (255 << 20)).expect("read");
        };
        row("random 4 KiB", each(2000, || random(&near)), each(2000, || random(&far)));
        both("create, write, unlink", here, &there, 500, |p| {
            fs::write(p.join("small"), "x").expect("write");
            fs::remove_file(p.join("small")).expect("unlink");
        });
        both("readdir of 1,000+", Path::new("/usr/bin"), &m.path("/usr/bin"), 20, |p| {
            assert!(fs::read_dir(p).expect("readdir").count() > 100);
        });
        let (r, w) = nix::unistd::pipe().expect("pipe");
        let (near_r, mut near_w) =
            nix::unistd::pipe().map(|(r, w)| (File::from(r), File::from(w))).expect("pipe");
        let handle = m.home.add_handle(r, HandleKind::Stream).expect("handle");
        let far_r = File::open(m.path(m.home.handle_path(handle))).expect("open");
        let mut far_w = File::from(w);
        let mut byte = [0];
        row(
            "pipe, one byte",
            each(2000, || {
                near_w.write_all(b"x").expect("room");
                (&near_r).read_exact(&mut byte).expect("read");
            }),
            each(2000, || {
                far_w.write_all(b"x").expect("room");
                (&far_r).read_exact(&mut [0]).expect("read");
            }),
        );
        let pump = |mut from: File, mut to: File| {
            let started = Instant::now();
            let writer = std::thread::spawn(move || {
                let data = vec![0u8; 64 << 10];
                for _ in 0..2048 {
                    to.write_all(&data).expect("write");
                }
            });
            let mut data = vec![0u8; 64 << 10];
            while from.read(&mut data).expect("read") > 0 {}
            writer.join().expect("writer");
            started.elapsed()
        };
        let native = pump(near_r, near_w);
        row("128 MiB through a pipe", native, pump(far_r, far_w));
    });
}

#[test]
#[ignore = "prints figures"]
fn by_calls() {
    figures(Join::Memory);
}

#[test]
#[ignore = "prints figures"]
fn over_tcp() {
    figures(Join::Tcp);
}
