//! What the demo's jobs work on: the same bytes on every run, made from nothing.

use anyhow::{Context, Result};
use nix::unistd::{Gid, Uid, chown};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

/// Sizes of the inputs; together the jobs are some 100 seconds of one core.
const LOG_LINES: u32 = 210_000;
const RECORD_LINES: u32 = 1_500_000;
const WORD_LINES: u32 = 2_500_000;

/// Python: a quarter of a GiB that is looked at and changed all over, then summed up.
const DATA_PY: &str = r#"import hashlib, zlib

blocks = [bytearray(hashlib.shake_128(str(i).encode()).digest(1 << 20)) for i in range(256)]
state = 12345
for step in range(200_000):
    state = (state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
    block = blocks[state >> 56]
    at = (state >> 20) % ((1 << 20) - 4096)
    piece = bytes(block[at:at + 4096])
    digest = hashlib.sha512(piece).digest()
    block[at:at + 64] = digest
    state ^= sum(piece[::16]) << 7
total = 0
for number, block in enumerate(blocks):
    total = zlib.crc32(block, total)
    print(number, hashlib.sha256(block).hexdigest())
print("all", total, state)
"#;

/// Perl: who did what, how often and how long, over several passes of the log.
const SCAN_PL: &str = r#"use strict;
my (%count, %time, %longest);
for my $pass (1 .. 14) {
    open(my $log, '<', $ARGV[0]) or die "$ARGV[0]: $!\n";
    while (<$log>) {
        next unless /^(\S+) (\S+) (\w+)\[(\d+)\]: user=(\w+) action=(\w+) bytes=(\d+) ms=(\d+)/;
        my $key = join '/', $3, $5, $6, $pass;
        $count{$key}++;
        $time{$key} += $8 * $pass;
        $longest{$key} = $7 if $7 > ($longest{$key} // 0);
        s/[aeiou]/*/g;
        $count{substr($_, 20, 9)} ^= length;
    }
    close $log;
}
print "$_ $count{$_} ", $time{$_} // 0, ' ', $longest{$_} // 0, "\n" for sort keys %count;
"#;

/// The same question for awk, where there is no perl.
const SCAN_AWK: &str = r#"{
    for (pass = 1; pass <= 14; pass++) {
        key = $3 "/" $4 "/" $5 "/" pass
        count[key]++
        split($7, ms, "=")
        time[key] += ms[2] * pass
    }
}
END { for (key in count) print key, count[key], time[key] | "cat" }
"#;

/// A small generator whose numbers never change (Marsaglia's xorshift64*).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u32) -> u32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let mixed = self.0.wrapping_mul(0x2545_F491_4F6C_DD1D);
        (mixed >> 33) as u32 % limit.max(1)
    }

    fn pick<'a>(&mut self, list: &[&'a str]) -> &'a str {
        list[self.below(list.len() as u32) as usize]
    }
}

/// Writes all inputs into `dir`, owned by the user.
pub fn write(dir: &Path, uid: u32, gid: u32) -> Result<()> {
    let own = |path: &Path| -> Result<()> {
        chown(path, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
            .with_context(|| format!("{} cannot be given to the user", path.display()))
    };
    for folder in [dir.to_path_buf(), dir.join("plain"), dir.join("moved")] {
        fs::create_dir_all(&folder)?;
        own(&folder)?;
    }
    for (name, text) in [("data.py", DATA_PY), ("scan.pl", SCAN_PL), ("scan.awk", SCAN_AWK)] {
        fs::write(dir.join(name), text)?;
    }
    write_log(&dir.join("log.txt"))?;
    write_records(&dir.join("records.txt"))?;
    write_words(&dir.join("words.txt"))?;
    for entry in fs::read_dir(dir)? {
        own(&entry?.path())?;
    }
    Ok(())
}

fn write_log(path: &Path) -> Result<()> {
    let mut out = BufWriter::new(File::create(path)?);
    let mut n = Numbers(0x5EED_0001);
    let services = ["sshd", "cron", "httpd", "mail", "backup", "sync", "build"];
    let users = ["ada", "bob", "cyd", "dora", "eve", "finn", "gil", "hana", "ivo"];
    let actions = ["login", "logout", "read", "write", "list", "remove", "rename", "stat"];
    for line in 0..LOG_LINES {
        writeln!(
            out,
            "2026-03-{:02}T{:02}:{:02}:{:02} host{:02} {}[{}]: user={} action={} bytes={} ms={}",
            1 + line / 9_000 % 28,
            line / 375 % 24,
            n.below(60),
            n.below(60),
            n.below(40),
            n.pick(&services),
            n.below(30_000),
            n.pick(&users),
            n.pick(&actions),
            n.below(1 << 20),
            n.below(5_000),
        )?;
    }
    Ok(out.flush()?)
}

fn write_records(path: &Path) -> Result<()> {
    let mut out = BufWriter::new(File::create(path)?);
    let mut n = Numbers(0x5EED_0002);
    for line in 0..RECORD_LINES {
        writeln!(out, "{:08x} {} {:05} item-{line}", n.below(u32::MAX), n.below(100_000), n.below(99_991))?;
    }
    Ok(out.flush()?)
}

fn write_words(path: &Path) -> Result<()> {
    let mut out = BufWriter::new(File::create(path)?);
    let mut n = Numbers(0x5EED_0003);
    for _ in 0..WORD_LINES {
        // The product of two makes some words frequent and most rare.
        let word = n.below(300) * n.below(300);
        writeln!(out, "word-{word:06}-{:03}", word % 997)?;
    }
    Ok(out.flush()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_never_change() {
        let mut n = Numbers(0x5EED_0001);
        let first: Vec<u32> = (0..3).map(|_| n.below(1000)).collect();
        let mut again = Numbers(0x5EED_0001);
        assert_eq!(first, (0..3).map(|_| again.below(1000)).collect::<Vec<_>>());
        assert!(first.iter().all(|number| *number < 1000));
    }
}
