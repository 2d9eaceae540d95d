//! The three machines in a world with delays, cuts, crashes and clocks that drift.

use super::*;
use std::collections::BTreeMap;

/// A small generator: the same seed, the same run (xorshift64*).
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % n.max(1)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Party {
    Source,
    Target,
}

/// What a party tells home.
type Told = HomeEvent;

#[derive(Debug, Clone, Copy)]
enum Event {
    Home(HomeEvent),
    Order(Party, Order),
    Told(Party, Told),
    SourceSelf(SourceEvent),
    TargetSelf(TargetEvent),
    Cut(Party),
    Heal(Party),
    Crash(Party),
    HomeLost(Party),
    HostLost(Party),
    HostLease(Party),
    HomeLease,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Copy {
    None,
    Runs,
    Stands,
}

/// Limits in ticks: a host notices silence before home does, whatever the drift.
const HOST_SILENCE: u64 = 1000;
const HOME_SILENCE: u64 = 1500;
const LEASE: u64 = 200;
const DRIFT: u64 = 40;
/// TCP sends again what a cut has swallowed.
const RESEND: u64 = 25;

struct World {
    now: u64,
    serial: u64,
    queue: BTreeMap<(u64, u64), Event>,
    dice: Dice,
    home: Home,
    source: Source,
    target: Target,
    at_source: Copy,
    at_target: Copy,
    /// When the link was cut.
    cut: BTreeMap<Party, u64>,
    /// Told lost: nothing more is delivered.
    home_has_lost: BTreeMap<Party, bool>,
    host_has_lost: BTreeMap<Party, bool>,
    dead: BTreeMap<Party, bool>,
    outcome: Option<Outcome>,
    steps: u64,
    /// A deliberately wrong home, to see that the checks find it.
    forgets_early: bool,
    no_fence: bool,
}

/// A fault: at which step, what.
#[derive(Debug, Clone, Copy)]
struct Fault {
    step: u64,
    what: Event,
}

impl World {
    fn new(seed: u64) -> World {
        World {
            now: 0,
            serial: 0,
            queue: BTreeMap::new(),
            dice: Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
            home: Home::default(),
            source: Source::default(),
            target: Target::default(),
            at_source: Copy::Runs,
            at_target: Copy::None,
            cut: BTreeMap::new(),
            home_has_lost: BTreeMap::new(),
            host_has_lost: BTreeMap::new(),
            dead: BTreeMap::new(),
            outcome: None,
            steps: 0,
            forgets_early: false,
            no_fence: false,
        }
    }

    fn at(&mut self, delay: u64, event: Event) {
        self.serial += 1;
        self.queue.insert((self.now + delay, self.serial), event);
    }

    fn latency(&mut self) -> u64 {
        1 + self.dice.below(20)
    }

    fn run(&mut self, faults: &[Fault]) {
        self.at(0, Event::Home(HomeEvent::Begin));
        while let Some(((at, _), event)) = self.queue.pop_first() {
            self.now = at;
            self.steps += 1;
            assert!(self.steps < 10_000, "it does not come to rest");
            let step = self.steps;
            for fault in faults.iter().filter(|fault| fault.step == step) {
                self.handle(fault.what);
            }
            self.handle(event);
            let runners = [self.at_source, self.at_target].iter().filter(|&&c| c == Copy::Runs).count();
            assert!(runners <= 1, "two copies run at step {} after {event:?}", self.steps);
        }
    }

    /// One side has given the connection up: what is under way on it never arrives.
    fn is_broken(&self, party: Party) -> bool {
        self.home_has_lost.contains_key(&party) || self.host_has_lost.contains_key(&party)
    }

    fn is_cut(&self, party: Party) -> bool {
        self.cut.contains_key(&party)
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Home(event) => self.home_step(event),
            Event::Order(party, order) => {
                if self.is_broken(party) {
                    return;
                }
                if self.is_cut(party) {
                    return self.at(RESEND, event);
                }
                match party {
                    Party::Source => self.source_step(SourceEvent::Order(order)),
                    Party::Target => self.target_step(TargetEvent::Order(order)),
                }
            }
            Event::Told(party, told) => {
                if self.is_broken(party) {
                    return;
                }
                if self.is_cut(party) {
                    return self.at(RESEND, event);
                }
                self.home_step(told);
            }
            Event::SourceSelf(event) if !self.dead.contains_key(&Party::Source) => self.source_step(event),
            Event::TargetSelf(event) if !self.dead.contains_key(&Party::Target) => self.target_step(event),
            Event::SourceSelf(_) | Event::TargetSelf(_) => {}
            Event::Cut(party) => self.cut_link(party),
            Event::Heal(party) => {
                // Too late once a side has told it lost: a link does not come back, a new one would.
                if !self.home_has_lost.contains_key(&party) && !self.host_has_lost.contains_key(&party) {
                    self.cut.remove(&party);
                }
            }
            Event::Crash(party) => {
                self.dead.insert(party, true);
                match party {
                    Party::Source => self.at_source = Copy::None,
                    Party::Target => self.at_target = Copy::None,
                }
                self.cut_link(party);
            }
            Event::HomeLost(party) => {
                if self.is_cut(party) && self.home_has_lost.insert(party, true).is_none() {
                    let lost = match party {
                        Party::Source => HomeEvent::SourceLost,
                        Party::Target => HomeEvent::TargetLost,
                    };
                    self.home_step(lost);
                    // After the move: its only host is gone.
                    let there = match party {
                        Party::Source => Some(Outcome::Failed),
                        Party::Target => Some(Outcome::Moved),
                    };
                    if self.outcome == there {
                        self.outcome = Some(Outcome::Lost);
                    }
                }
            }
            Event::HostLost(party) => {
                let alive = !self.dead.contains_key(&party);
                if alive && self.is_cut(party) && self.host_has_lost.insert(party, true).is_none() {
                    match party {
                        Party::Source => self.source_step(SourceEvent::LinkLost),
                        Party::Target => self.target_step(TargetEvent::LinkLost),
                    }
                    self.at(LEASE - DRIFT, Event::HostLease(party));
                }
            }
            Event::HostLease(Party::Source) => self.source_step(SourceEvent::LeaseExpired),
            Event::HostLease(Party::Target) => self.target_step(TargetEvent::LeaseExpired),
            Event::HomeLease => self.home_step(HomeEvent::LeaseExpired),
        }
    }

    fn cut_link(&mut self, party: Party) {
        self.cut.insert(party, self.now);
        let drift = self.dice.below(DRIFT);
        self.at(HOST_SILENCE + drift, Event::HostLost(party));
        let drift = self.dice.below(DRIFT);
        self.at(HOME_SILENCE - drift, Event::HomeLost(party));
    }

    fn home_step(&mut self, event: HomeEvent) {
        for action in self.home.step(event) {
            match action {
                HomeAction::ToTarget(order) => {
                    if self.forgets_early && order == Order::Commit {
                        let delay = self.latency();
                        self.at(delay, Event::Order(Party::Source, Order::Forget));
                    }
                    let delay = self.latency();
                    self.at(delay, Event::Order(Party::Target, order));
                }
                HomeAction::ToSource(order) => {
                    let delay = self.latency();
                    self.at(delay, Event::Order(Party::Source, order));
                }
                HomeAction::Record => {
                    let delay = self.latency();
                    let result =
                        if self.dice.below(20) == 0 { HomeEvent::RecordFailed } else { HomeEvent::Recorded };
                    self.at(delay, Event::Home(result));
                }
                HomeAction::AwaitLease => {
                    let delay = if self.no_fence { 0 } else { LEASE };
                    self.at(delay, Event::HomeLease);
                }
                HomeAction::Finish(outcome) => {
                    assert_eq!(self.outcome, None, "a move ends once");
                    self.outcome = Some(outcome);
                }
                HomeAction::Ignore(_) => {}
            }
        }
    }

    fn tell(&mut self, party: Party, told: Told) {
        let delay = self.latency();
        self.at(delay, Event::Told(party, told));
    }

    fn source_step(&mut self, event: SourceEvent) {
        for action in self.source.step(event) {
            match action {
                SourceAction::FreezeAndSend => {
                    self.at_source = Copy::Stands;
                    let failed = self.dice.below(20) == 0;
                    let result = if failed { SourceEvent::SendFailed } else { SourceEvent::Sent };
                    let delay = self.latency();
                    self.at(delay, Event::SourceSelf(result));
                    if !failed {
                        // The image arrives behind it.
                        let delay = delay + self.latency();
                        let built = if self.dice.below(20) == 0 {
                            TargetEvent::BuildFailed
                        } else {
                            TargetEvent::Built
                        };
                        self.at(delay, Event::TargetSelf(built));
                    }
                }
                SourceAction::Thaw => self.at_source = Copy::Runs,
                SourceAction::TellSent => self.tell(Party::Source, HomeEvent::Sent),
                SourceAction::TellFailed => self.tell(Party::Source, HomeEvent::SourceFailed),
                SourceAction::Suspend => self.at_source = Copy::Stands,
                SourceAction::Discard => self.at_source = Copy::None,
                SourceAction::Ignore(_) => {}
            }
        }
    }

    fn target_step(&mut self, event: TargetEvent) {
        for action in self.target.step(event) {
            match action {
                TargetAction::MakePlace => {
                    let made = if self.dice.below(20) == 0 {
                        TargetEvent::BuildFailed
                    } else {
                        TargetEvent::PlaceMade
                    };
                    let delay = self.latency();
                    self.at(delay, Event::TargetSelf(made));
                }
                TargetAction::TellPrepared => self.tell(Party::Target, HomeEvent::Prepared),
                TargetAction::TellReady => {
                    self.at_target = Copy::Stands;
                    self.tell(Party::Target, HomeEvent::Ready);
                }
                TargetAction::Release => self.at_target = Copy::Runs,
                TargetAction::TellRunning => self.tell(Party::Target, HomeEvent::Running),
                TargetAction::TellFailed => self.tell(Party::Target, HomeEvent::TargetFailed),
                TargetAction::Suspend => self.at_target = Copy::Stands,
                TargetAction::Discard => self.at_target = Copy::None,
                TargetAction::Ignore(_) => {}
            }
        }
    }

    /// At rest: exactly one copy runs, where home believes it, or the loss was told.
    fn check_rest(&self) {
        let outcome = self.outcome.expect("every move ends");
        let wanted = match outcome {
            Outcome::Moved => (Copy::None, Copy::Runs),
            Outcome::Failed => (Copy::Runs, Copy::None),
            Outcome::Lost => (Copy::None, Copy::None),
        };
        assert_eq!((self.at_source, self.at_target), wanted, "at rest after {outcome:?}");
        if outcome == Outcome::Lost {
            assert!(!self.cut.is_empty(), "lost without a cause");
        }
    }
}

fn run(seed: u64, faults: &[Fault], change: fn(&mut World)) -> World {
    let mut world = World::new(seed);
    change(&mut world);
    world.run(faults);
    world.check_rest();
    world
}

/// Every fault at every step of many runs.
fn every_fault(seeds: u64, change: fn(&mut World)) {
    for seed in 1..=seeds {
        let steps = run(seed, &[], change).steps;
        for step in 1..=steps + 1 {
            for party in [Party::Source, Party::Target] {
                for what in [Event::Cut(party), Event::Crash(party)] {
                    run(seed, &[Fault { step, what }], change);
                }
                // A short cut heals; a second one follows.
                let heal = Fault { step: step + 1, what: Event::Heal(party) };
                run(seed, &[Fault { step, what: Event::Cut(party) }, heal], change);
            }
        }
    }
}

#[test]
fn most_moves_without_faults_succeed() {
    let moved = (1..=1000).filter(|&seed| run(seed, &[], |_| {}).outcome == Some(Outcome::Moved)).count();
    assert!((600..1000).contains(&moved), "{moved} of 1000");
}

#[test]
fn a_fault_at_every_step() {
    every_fault(60, |_| {});
}

#[test]
fn two_faults_anywhere() {
    let mut dice = Dice(7);
    for seed in 1..=20_000 {
        let mut fault = || {
            let party = if dice.below(2) == 0 { Party::Source } else { Party::Target };
            let what = if dice.below(2) == 0 { Event::Cut(party) } else { Event::Crash(party) };
            Fault { step: 1 + dice.below(30), what }
        };
        let faults = [fault(), fault()];
        let result = std::panic::catch_unwind(|| run(seed, &faults, |_| {}).steps);
        assert!(result.is_ok(), "seed {seed}, faults {faults:?}");
    }
}

#[test]
#[should_panic(expected = "at rest")]
fn a_source_forgotten_too_early_is_found() {
    every_fault(60, |world| world.forgets_early = true);
}

#[test]
fn a_late_event_is_ignored() {
    let mut home = Home::default();
    assert_eq!(home.step(HomeEvent::Running), [HomeAction::Ignore(HomeEvent::Running)]);
    assert!(!home.is_over());
    let mut target = Target::default();
    target.step(TargetEvent::LinkLost);
    assert!(!target.is_running());
    assert_eq!(
        target.step(TargetEvent::Order(Order::Commit)),
        [TargetAction::Ignore(TargetEvent::Order(Order::Commit))]
    );
}
