//! One kind of change a test: many rounds at random moments, and every byte compared, again and again.

use super::harness::{Case, Running, can_run, skip, victim};
use super::huge_pool::Pool;
use super::model::Model;
use checkpoint::live::{LiveError, Round, Tracker};
use checkpoint::sys::userfaultfd;
use std::time::Duration;

/// Rounds of each test; every fourth is followed by a freeze in which all is compared.
fn rounds() -> u32 {
    std::env::var("LIVE_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(60)
}

/// xorshift64.
pub struct Random(u64);

impl Random {
    pub fn seeded(test: &str) -> Random {
        let given = std::env::var("LIVE_SEED").ok().and_then(|text| text.parse().ok());
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
        let seed: u64 = given.unwrap_or(now.subsec_nanos().into());
        println!("{test}: LIVE_SEED={seed}");
        Random(seed | 1)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// Whether written pages can be tracked here.
pub fn can_track(test: &str) -> bool {
    let can = can_run(test);
    if can && !userfaultfd::can_track() {
        skip(test, "this kernel cannot track written pages (Linux 6.7)");
        return false;
    }
    can
}

/// What a test learns.
#[derive(Default)]
pub struct Seen {
    pub rounds: Vec<Round>,
    pub last: Vec<Round>,
}

impl Seen {
    pub fn has_untracked(&self, why: &str) -> bool {
        self.rounds.iter().all(|round| round.untracked.iter().any(|mapping| mapping.why.contains(why)))
    }
}

/// Starts a case of the victim program, and waits until it is at it.
pub fn start(place: &Case, case: &str) -> Running {
    let program = victim().to_str().expect("a path in UTF-8");
    let running = place.start(program, &[case, place.dir.path().to_str().expect("a path in UTF-8")]);
    place.await_file("ready");
    running
}

pub fn let_go(place: &Case) {
    std::fs::write(place.path("go"), b"").expect("lets it go");
}

/// Follows a victim, and lets it check itself at the end.
fn follow(case: &str) -> Option<Seen> {
    if !can_track(case) {
        return None;
    }
    let place = Case::new();
    let mut victim = start(&place, case);
    let followed = std::panic::catch_unwind(|| follow_process(case, victim.pid()));
    let seen = followed.unwrap_or_else(|_| panic!("it said {}", place.output()));
    let_go(&place);
    let status = victim.end();
    assert!(status.success(), "{case} found something wrong: {status}\n{}", place.output());
    Some(seen)
}

fn follow_process(case: &str, pid: i32) -> Seen {
    let mut random = Random::seeded(case);
    let mut model = Model::default();
    let mut tracker = Tracker::start(pid).expect("tracks");
    let mut seen = Seen::default();
    for n in 1..=rounds() {
        seen.rounds.push(model.round(&mut tracker).expect("a round"));
        if n % 4 == 0 {
            seen.last.push(model.compare_frozen(&mut tracker).expect("the last pages"));
        }
        std::thread::sleep(Duration::from_micros(random.below(12_000)));
    }
    let pages: Vec<u64> = seen.rounds.iter().map(|round| round.data_pages + round.zero_pages).collect();
    println!("{case}: {} pages at the end; rounds {pages:?}", model.pages());
    assert!(pages[1..].iter().any(|&count| count > 0), "it wrote nothing");
    tracker.stop();
    super::traces::assert_none(pid);
    seen
}

macro_rules! follows {
    ($($name:ident $case:literal;)*) => {
        $(#[test]
        fn $name() {
            follow($case);
        })*
    };
}

follows! {
    random_writes "busy-writer";
    sixteen_threads "busy-threads";
    mapping_and_unmapping "busy-mapper";
    moving_mappings "busy-mremap";
    a_heap_up_and_down "busy-brk";
    dropped_pages "busy-advise";
    forking "busy-forks";
    what_the_kernel_writes "busy-reads";
    what_a_device_writes "busy-direct";
    huge_pages_by_advice "busy-huge";
    private_pages_of_files "busy-files";
    a_growing_stack "busy-stack";
    protections "busy-protect";
}

#[test]
fn explicit_huge_pages() {
    if can_track("explicit_huge_pages")
        && let Some(_pool) = Pool::reserve("explicit_huge_pages", 2048, 6)
    {
        follow("busy-hugetlb");
    }
}

#[test]
fn executing_other_programs() {
    if let Some(seen) = follow("busy-exec") {
        assert!(seen.rounds.iter().chain(&seen.last).any(|round| round.anew), "it never executed another");
    }
}

#[test]
fn shared_memory_is_named() {
    if let Some(seen) = follow("busy-shared") {
        assert!(seen.has_untracked("shared memory"));
    }
}

#[test]
fn its_end_is_told() {
    if !can_track("its_end_is_told") {
        return;
    }
    let place = Case::new();
    let victim: Running = start(&place, "busy-writer");
    let mut tracker = Tracker::start(victim.pid()).expect("tracks");
    Model::default().round(&mut tracker).expect("a round");
    let pid = victim.pid();
    drop(victim);
    let ended = Model::default().round(&mut tracker).map(drop);
    assert!(matches!(ended, Err(LiveError::Ended { .. })), "{ended:?}");
    assert!(matches!(Tracker::start(pid), Err(LiveError::Ended { .. })));
}
