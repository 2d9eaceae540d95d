//! Real programs that no one here wrote, each moved at random moments of a piece of work: what it
//! writes is what it writes undisturbed. What cannot be moved is refused by name, and runs on.
//!
//! A program that this machine does not have is a counted skip. One of them for long:
//!
//! ```sh
//! PROGRAMS_MOVES=200 PROGRAMS_SEED=7 cargo test --release -p systest --test programs node -- --nocapture
//! ```

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use std::process::Command;
use std::time::{Duration, Instant};
use systest::lab::{Lab, PATIENCE};
use systest::{require_labs, skip};

/// A piece of work for one process.
struct Program {
    name: &'static str,
    /// What must be installed.
    needs: &'static str,
    /// Run once on node 1, in `/srv`.
    prepare: &'static str,
    /// Run plainly, and with `mosrun` in front of it.
    command: &'static str,
    /// What is done with its output, unmoved.
    then: &'static str,
}

const PROGRAMS: [Program; 13] = [
    Program {
        name: "python-threads",
        needs: "python3",
        prepare: "cat > threads.py <<'END'\n\
            import hashlib, threading\n\
            out = [None] * 4\n\
            def work(n):\n\
            \x20   h = hashlib.sha256(b'%d' % n)\n\
            \x20   d = {}\n\
            \x20   for i in range(1500000):\n\
            \x20       h.update(h.digest()); d[i] = h.hexdigest()[:8]\n\
            \x20   out[n] = h.hexdigest() + str(len(d)) + ''.join(d[k] for k in range(0, 1500000, 9999))\n\
            ts = [threading.Thread(target=work, args=(n,)) for n in range(4)]\n\
            [t.start() for t in ts]; [t.join() for t in ts]\n\
            print('\\n'.join(out))\n\
            END",
        command: "/usr/bin/python3 threads.py",
        then: "cat",
    },
    Program {
        name: "perl",
        needs: "perl",
        prepare: ":",
        command: "perl -ne '$n{$_}++ for /(\\w+)/g; s/(\\w)(\\w*)/$2$1/g; $x ^= length; \
                  END { print \"$_ $n{$_}\\n\" for sort keys %n; print $x }' text text text text",
        then: "sha256sum",
    },
    Program {
        name: "node",
        needs: "node",
        prepare: "cat > workers.js <<'END'\n\
            const { Worker, isMainThread, parentPort, workerData } = require('worker_threads');\n\
            const crypto = require('crypto');\n\
            if (isMainThread) {\n\
            \x20 const out = []; let left = 3;\n\
            \x20 for (let n = 0; n < 3; n++) {\n\
            \x20   const w = new Worker(__filename, { workerData: n });\n\
            \x20   w.on('message', m => { out[n] = m; });\n\
            \x20   w.on('exit', () => { if (--left === 0) console.log(out.join('\\n')); });\n\
            \x20 }\n\
            } else {\n\
            \x20 let h = 'x' + workerData; const kept = [];\n\
            \x20 for (let i = 0; i < 1500000; i++) { h = crypto.createHash('sha256').update(h).digest('hex'); if (i % 1000 === 0) kept.push(h); }\n\
            \x20 parentPort.postMessage(h + ' ' + kept.length);\n\
            }\n\
            END",
        command: "node workers.js",
        then: "cat",
    },
    Program {
        name: "java",
        needs: "/usr/lib/jvm/*/bin/java",
        prepare: "cat > Work.java <<'END'\n\
            import java.util.*;\n\
            public class Work {\n\
            \x20 static long chain(int n) { Map<Long, Long> seen = new HashMap<>(); long x = n;\n\
            \x20   for (int i = 0; i < 5000000; i++) { x = x * 6364136223846793005L + 1442695040888963407L; seen.merge(x >>> 48, 1L, Long::sum); }\n\
            \x20   long s = 0; for (Map.Entry<Long, Long> e : new TreeMap<>(seen).entrySet()) s = s * 31 + e.getKey() * e.getValue(); return s; }\n\
            \x20 public static void main(String[] a) throws Exception {\n\
            \x20   long[] out = new long[4]; Thread[] ts = new Thread[4];\n\
            \x20   for (int n = 0; n < 4; n++) { final int k = n; ts[n] = new Thread(() -> out[k] = chain(k)); ts[n].start(); }\n\
            \x20   for (Thread t : ts) t.join();\n\
            \x20   System.out.println(Arrays.toString(out)); } }\n\
            END",
        // Compiles it first. Without the counters that it would map shared and writable in /tmp.
        command: "$(ls -d /usr/lib/jvm/*/bin/java | sort -V | tail -n 1) -XX:-UsePerfData -Xmx256m Work.java",
        then: "cat",
    },
    Program {
        name: "sqlite",
        needs: "sqlite3",
        prepare: "cat > work.sql <<'END'\n\
            CREATE TABLE t (id INTEGER PRIMARY KEY, a TEXT, b INTEGER);\n\
            WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1500000)\n\
            INSERT INTO t SELECT i, hex(i * 7919 % 65537), i * 48271 % 2147483647 FROM n;\n\
            CREATE INDEX ti ON t (a, b);\n\
            SELECT a, count(*), sum(b), max(id) FROM t GROUP BY a ORDER BY 3 DESC LIMIT 50;\n\
            UPDATE t SET b = b + length(a) WHERE id % 3 = 0;\n\
            SELECT sum(b), count(DISTINCT a) FROM t;\n\
            PRAGMA integrity_check;\n\
            END",
        command: "sqlite3 -init work.sql -batch :memory: .quit",
        then: "cat",
    },
    Program {
        name: "xz-threads",
        needs: "xz",
        prepare: ":",
        command: "xz -6 -T4 --block-size=1MiB -c text",
        then: "sha256sum",
    },
    Program {
        name: "zstd-threads",
        needs: "zstd",
        prepare: ":",
        command: "zstd -q -17 -T2 -c text",
        then: "sha256sum",
    },
    Program {
        name: "bzip2",
        needs: "bzip2",
        prepare: ":",
        command: "bzip2 -9 -c text text text text text text text text",
        then: "sha256sum",
    },
    Program {
        name: "bc",
        needs: "bc",
        prepare: "echo 'scale=2200; 4*a(1); e(1); sqrt(2)' > pi.bc; echo quit >> pi.bc",
        command: "bc -lq pi.bc",
        then: "cat",
    },
    Program {
        name: "tcl",
        needs: "tclsh",
        prepare: "cat > work.tcl <<'END'\n\
            set s 1; array set seen {}\n\
            for {set i 0} {$i < 6000000} {incr i} { set s [expr {($s * 48271) % 2147483647}]; incr seen([expr {$s % 5003}]) }\n\
            foreach k [lsort -integer [array names seen]] { puts \"$k $seen($k)\" }\n\
            END",
        command: "tclsh work.tcl",
        then: "sha256sum",
    },
    Program {
        name: "cc1",
        needs: "gcc",
        prepare: "i=0; (echo 'typedef unsigned long u;'; while [ $i -lt 1500 ]; do i=$((i + 1)); \
            echo \"u f$i(u *a, int n) { u s = $i; for (int i = 0; i < n; i++) { if (a[i] % $i) s += a[i] * $i; else s ^= a[i] << (s & 7); } return s; }\"; \
            done) > big.c",
        command: "$(gcc -print-prog-name=cc1) -quiet -O2 big.c -o -",
        then: "sha256sum",
    },
    Program {
        name: "rustc",
        needs: "rustc",
        prepare: "(echo '#![crate_type = \"lib\"]'; i=0; while [ $i -lt 220 ]; do i=$((i + 1)); \
            echo \"pub fn f$i(v: &[u64]) -> Vec<String> { let mut m = std::collections::BTreeMap::new(); for x in v { *m.entry(x % $i).or_insert(0u64) += x; } m.iter().map(|(k, v)| format!(\\\"{k} {v}\\\")).collect() }\"; \
            done) > big.rs",
        command: "$(rustc --print sysroot)/bin/rustc -O --emit=llvm-ir -C codegen-units=1 big.rs -o -",
        then: "sha256sum",
    },
    Program {
        name: "git",
        needs: "git",
        prepare: "git init -q g && cd g && git config user.email a@example.org && git config user.name a && \
            split -n 60 ../text t && git add . && git commit -qm one && for f in t*; do head -c 20000 $f >> taa; done && git commit -qam two",
        command: "git -C g -c pack.threads=2 pack-objects -q --all --no-reuse-delta --window=200 --depth=50 --stdout",
        then: "wc -c",
    },
];

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn installed(program: &str) -> bool {
    let found = Command::new("sh").args(["-c", &format!("command -v {program}")]).output();
    found.is_ok_and(|output| output.status.success())
}

/// Programs that are installed for us alone are found in a node as well, after its own.
fn with_our_path() -> String {
    format!("PATH=$PATH:'{}'", std::env::var("PATH").unwrap_or_default())
}

fn write_text(lab: &Lab, random: &mut SmallRng) {
    let mut text = String::new();
    while text.len() < 8 << 20 {
        let words: Vec<String> = (0..random.random_range(3..12))
            .map(|_| format!("w{:x}", random.random_range(0..50_000u32)))
            .collect();
        text.push_str(&words.join(" "));
        text.push('\n');
    }
    std::fs::write(lab.srv("node1", "text"), text).expect("written");
}

/// What became of one program.
struct Outcome {
    moves: u64,
    refusals: Vec<String>,
}

fn run(lab: &Lab, program: &Program, moves_wanted: u64, random: &mut SmallRng) -> Outcome {
    let Program { name, command, then, .. } = program;
    let started = Instant::now();
    let path = with_our_path();
    // Its own status counts, not that of what reads its output.
    let script = |front: &str, out: &str| {
        format!("cd /srv && {path} && {{ {front} {command} > {out} && {then} < {out}; }}")
    };
    let plain = lab.sh("node1", &script("", "plain.out"));
    let takes = started.elapsed();
    assert_eq!(plain.status, 0, "{name}, unmoved: {}", plain.stderr);
    let expected = plain.stdout;
    let mut job = lab.start("node1", &script(&format!("mosrun -J {name}"), "moved.out"));
    let mut outcome = Outcome { moves: 0, refusals: Vec::new() };
    let until = Instant::now() + 4 * PATIENCE;
    while job.runs() && outcome.moves < moves_wanted && Instant::now() < until {
        // Moments spread over the work, most of which is done between the moves.
        let pause = (takes / (moves_wanted as u32 + 2)).min(Duration::from_secs(2));
        std::thread::sleep(pause.mul_f64(random.random_range(0.2..1.4)));
        let to = ["node2", "node3", "home"][random.random_range(0..3)];
        let moved = lab.sh("node1", &format!("migrate job:{name} {to}"));
        match moved.status {
            0 if moved.stdout.contains("already") => {}
            0 => outcome.moves += 1,
            _ => outcome.refusals.push(moved.stderr.lines().take(3).collect::<Vec<_>>().join(" ")),
        }
    }
    let ran = job.end();
    assert_eq!(ran.status, 0, "{name}: {}", ran.stderr);
    assert!(ran.stdout == expected, "{name} has written something else: {}", ran.stderr);
    outcome
}

/// Moves one of them, and skips it where it is not installed.
fn moved(name: &str) {
    require_labs!();
    let program = PROGRAMS.iter().find(|program| program.name == name).expect("it is in the list");
    if !installed(program.needs) {
        return skip(&format!("programs: {name}"), &format!("{} is not installed", program.needs));
    }
    let (wanted, seed) = (number("PROGRAMS_MOVES", 10), number("PROGRAMS_SEED", 1));
    let mut random = SmallRng::seed_from_u64(seed);
    let lab = Lab::up_with(3, &["--cpus-per-node", "0"]);
    write_text(&lab, &mut random);
    lab.sh("node1", &format!("cd /srv && {} && {}", with_our_path(), program.prepare)).ok();
    let outcome = run(&lab, program, wanted, &mut random);
    let why = outcome.refusals.first().cloned().unwrap_or_default();
    eprintln!("{name:15} {:3} moves, {:2} refused {why}", outcome.moves, outcome.refusals.len());
    assert!(outcome.moves > 0, "{name} was never moved: {why}");
}

#[test]
fn python_threads() {
    moved("python-threads");
}

#[test]
fn perl() {
    moved("perl");
}

#[test]
fn node() {
    moved("node");
}

#[test]
fn java() {
    moved("java");
}

#[test]
fn sqlite() {
    moved("sqlite");
}

#[test]
fn xz_threads() {
    moved("xz-threads");
}

#[test]
fn zstd_threads() {
    moved("zstd-threads");
}

#[test]
fn bzip2() {
    moved("bzip2");
}

#[test]
fn bc() {
    moved("bc");
}

#[test]
fn tcl() {
    moved("tcl");
}

#[test]
fn cc1() {
    moved("cc1");
}

#[test]
fn rustc() {
    moved("rustc");
}

#[test]
fn git() {
    moved("git");
}
