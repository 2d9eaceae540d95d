//! Real programs, moved again and again at random moments among three nodes: every output is that of
//! an undisturbed run. A short form runs with all tests; for hours:
//!
//! ```sh
//! SOAK_ROUNDS=200 SOAK_SEED=7 cargo test --release -p systest --test soak -- --nocapture
//! ```

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use std::time::Duration;
use systest::lab::Lab;
use systest::require_labs;

/// What runs, all at once, on node 1: each reads what [`inputs`] has written and tells one result.
const PROGRAMS: [(&str, &str); 8] = [
    ("xz", "xz -9 -T1 -c /srv/text | sha256sum"),
    ("xz-threads", "xz -4 -T3 --block-size=1MiB -c /srv/text | sha256sum"),
    ("gzip", "gzip -9 -c /srv/text | sha256sum"),
    ("sort", "sort -S 4M --parallel=2 -T /srv/tmp /srv/text /srv/text /srv/text | sha256sum"),
    (
        "perl",
        "perl -ne '$n{$_}++ for /(\\w+)/g; END { print \"$_ $n{$_}\\n\" for sort keys %n }' /srv/text | sha256sum",
    ),
    (
        "awk",
        "awk '{ for (i = 1; i <= NF; i++) n[$i]++; if (NR % 1000 == 0) print NR, length(n) }' /srv/text | sha256sum",
    ),
    (
        "python",
        "python3 -c \"import hashlib; d = {i: str(i * i) for i in range(400000)}; \
         h = hashlib.sha256(); [h.update(d[i].encode()) for i in range(400000)]; print(h.hexdigest())\"",
    ),
    ("shell", "sh -c 'i=0; while [ $i -lt 150 ]; do i=$((i + 1)); expr $i \\* $i; done' | sha256sum"),
];

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn inputs(lab: &Lab, random: &mut SmallRng) {
    let mut text = String::new();
    while text.len() < 6 << 20 {
        let words: Vec<String> = (0..random.random_range(3..12))
            .map(|_| format!("w{:x}", random.random_range(0..50_000u32)))
            .collect();
        text.push_str(&words.join(" "));
        text.push('\n');
    }
    std::fs::write(lab.srv("node1", "text"), text).expect("written");
    std::fs::create_dir_all(lab.srv("node1", "tmp")).expect("made");
}

/// The program itself with mosrun, whatever follows in its pipeline without.
fn as_job(name: &str, command: &str) -> String {
    format!("mosrun -J {name} {command}")
}

#[test]
fn programs_that_never_rest_stay_what_they_are() {
    require_labs!();
    let (rounds, seed) = (number("SOAK_ROUNDS", 1), number("SOAK_SEED", 1));
    let mut random = SmallRng::seed_from_u64(seed);
    let lab = Lab::up_with(3, &["--cpus-per-node", "0"]);
    inputs(&lab, &mut random);
    let expected: Vec<String> = PROGRAMS.iter().map(|(_, command)| lab.sh("node1", command).ok()).collect();
    for round in 0..rounds {
        let mut running: Vec<_> = PROGRAMS
            .iter()
            .map(|(name, command)| (*name, lab.start("node1", &as_job(name, command))))
            .collect();
        let (mut moves, mut refused) = (0u32, 0u32);
        while running.iter_mut().any(|(_, job)| job.runs()) {
            let name = running[random.random_range(0..running.len())].0;
            let to = ["node1", "node2", "node3", "home"][random.random_range(0..4)];
            // It may have ended, be there already, or have a child just now.
            match lab.sh("node1", &format!("migrate job:{name} {to}")).status {
                0 => moves += 1,
                _ => refused += 1,
            }
            std::thread::sleep(Duration::from_millis(random.random_range(0..150)));
        }
        eprintln!("round {round}: {moves} moves, {refused} not possible");
        for ((name, job), expected) in running.into_iter().zip(&expected) {
            let ran = job.end();
            assert_eq!(&ran.clone().ok(), expected, "{name}, seed {seed}, round {round}: {}", ran.stderr);
        }
        assert!(moves > 5, "only {moves} moves");
    }
    for node in ["node1", "node2", "node3"] {
        let left = lab.sh(node, "ps -eo args | grep '[m]igd shepherd'").stdout;
        eprint!("{left}");
    }
}
