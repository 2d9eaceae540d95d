//! When to stop: rounds go on while they shrink.
//!
//! A function of what was measured; it looks at no clock and at no process. What a freeze would last is predicted from
//! the last two rounds: pages get dirty at the rate at which they did while the round before the last one
//! was sent, and do so for as long as the last one took to be sent.

use std::time::Duration;

const PAGE: u64 = 4096;

/// What the policy allows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rule {
    /// A freeze that is predicted to be no longer is good enough.
    pub max_downtime: Duration,
    /// Rounds with the process running, the first included.
    pub max_rounds: u32,
    /// A round shrinks if it has at most this share of the pages of the one before.
    pub shrinks_to: f64,
    /// Rounds in a row that do not shrink before pre-copy is given up: one may be a burst.
    pub patience: u32,
}

impl Default for Rule {
    fn default() -> Rule {
        Rule { max_downtime: Duration::from_millis(10), max_rounds: 12, shrinks_to: 0.8, patience: 2 }
    }
}

/// One round as it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measured {
    /// Pages that were sent.
    pub pages: u64,
    /// From the arming of its first page until its last was sent.
    pub took: Duration,
}

/// What a freeze costs apart from dirty pages.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Costs {
    /// Pages a second that the link and both ends take.
    pub pages_per_sec: f64,
    /// Stop, last look, state, restore and commit.
    pub fixed: Duration,
    /// Pages that cannot be tracked: all of them move in the freeze.
    pub untracked_pages: u64,
}

impl Costs {
    /// Of a link with this rate.
    pub fn of_link(link_bytes_per_sec: f64, fixed: Duration, untracked_pages: u64) -> Costs {
        Costs { pages_per_sec: link_bytes_per_sec / PAGE as f64, fixed, untracked_pages }
    }

    fn freeze(&self, dirty_pages: f64) -> Duration {
        let seconds = (dirty_pages + self.untracked_pages as f64) / self.pages_per_sec.max(1.0);
        // A prediction of years is as good as one of ages.
        self.fixed + Duration::from_secs_f64(seconds.clamp(0.0, 1e9))
    }
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Another round, with the process running.
    AnotherRound,
    /// Freeze it: short enough.
    StopNow {
        /// How long the freeze will be.
        predicted_freeze: Duration,
    },
    /// More rounds do not help: post-copy, or a freeze of this length.
    DoesNotConverge {
        /// How long the freeze would be.
        predicted_freeze: Duration,
    },
}

impl Rule {
    /// After each round: `rounds` are all so far, oldest first.
    pub fn judge(&self, rounds: &[Measured], costs: &Costs) -> Verdict {
        let [.., before, last] = rounds else {
            // How fast pages get dirty is known after two. One alone is allowed: then this is stop and copy.
            return match rounds {
                [only] if self.max_rounds <= 1 => self.at_the_cap(costs.freeze(only.pages as f64)),
                _ => Verdict::AnotherRound,
            };
        };
        let predicted_freeze = costs.freeze(dirtied_meanwhile(before, last));
        if predicted_freeze <= self.max_downtime {
            return Verdict::StopNow { predicted_freeze };
        }
        if rounds.len() as u64 >= u64::from(self.max_rounds) {
            return self.at_the_cap(predicted_freeze);
        }
        // Without a single dirty page it would be too long.
        let hopeless = costs.freeze(0.0) > self.max_downtime && last.pages <= costs.untracked_pages / 16;
        match hopeless || self.has_lost_patience(rounds) {
            true => Verdict::DoesNotConverge { predicted_freeze },
            false => Verdict::AnotherRound,
        }
    }

    fn at_the_cap(&self, predicted_freeze: Duration) -> Verdict {
        match predicted_freeze <= self.max_downtime {
            true => Verdict::StopNow { predicted_freeze },
            false => Verdict::DoesNotConverge { predicted_freeze },
        }
    }

    fn has_lost_patience(&self, rounds: &[Measured]) -> bool {
        let grows = |pair: &&[Measured]| pair[1].pages as f64 > pair[0].pages as f64 * self.shrinks_to;
        rounds.windows(2).rev().take_while(grows).count() as u64 >= u64::from(self.patience.max(1))
    }
}

/// Pages that got dirty while the last round was sent. Those of the last round did while the one before was.
fn dirtied_meanwhile(before: &Measured, last: &Measured) -> f64 {
    let (pages, gathered) = (last.pages as f64, before.took.as_secs_f64());
    match gathered > 0.0 {
        true => pages * (last.took.as_secs_f64() / gathered),
        false => pages,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GIB: u64 = 1 << 18;

    fn costs(link_mib: f64) -> Costs {
        Costs::of_link(link_mib * 1048576.0, Duration::from_millis(5), 0)
    }

    /// A process that dirties pages at a rate, up to `set` different ones; gives the verdict and the rounds.
    fn simulate(
        rule: &Rule,
        costs: &Costs,
        memory: u64,
        dirty_per_sec: f64,
        set: u64,
    ) -> (Verdict, Vec<Measured>) {
        let mut rounds: Vec<Measured> = Vec::new();
        let mut pages = memory;
        loop {
            let took = Duration::from_secs_f64(pages as f64 / costs.pages_per_sec + 0.001);
            rounds.push(Measured { pages, took });
            match rule.judge(&rounds, costs) {
                Verdict::AnotherRound => {}
                verdict => return (verdict, rounds),
            }
            pages = ((dirty_per_sec * took.as_secs_f64()) as u64).min(set);
        }
    }

    #[test]
    fn an_idle_process_stops_after_two_rounds() {
        let (verdict, rounds) = simulate(&Rule::default(), &costs(1000.0), GIB, 0.0, GIB);
        assert!(
            matches!(verdict, Verdict::StopNow { predicted_freeze } if predicted_freeze.as_millis() == 5)
        );
        assert_eq!(rounds.len(), 2);
    }

    #[test]
    fn a_slow_writer_converges_whatever_its_size() {
        for memory in [GIB / 16, GIB, 4 * GIB, 64 * GIB] {
            let (verdict, rounds) = simulate(&Rule::default(), &costs(1000.0), memory, 1280.0, memory);
            assert!(matches!(verdict, Verdict::StopNow { .. }), "{verdict:?} after {rounds:?}");
            assert!(rounds.len() <= 5, "{rounds:?}");
        }
    }

    #[test]
    fn a_small_hot_set_is_no_reason_to_go_on() {
        // It is written again and again, but moves in 4 ms.
        let (verdict, rounds) = simulate(&Rule::default(), &costs(1000.0), GIB, 1e6, 1000);
        assert!(matches!(verdict, Verdict::StopNow { .. }), "{verdict:?} after {rounds:?}");
        assert!(rounds.len() <= 4);
    }

    #[test]
    fn faster_than_the_link_does_not_converge() {
        let (verdict, rounds) = simulate(&Rule::default(), &costs(100.0), GIB, 50_000.0, GIB);
        let Verdict::DoesNotConverge { predicted_freeze } = verdict else { panic!("{verdict:?}") };
        assert!(predicted_freeze > Duration::from_secs(1));
        assert!((3..=4).contains(&rounds.len()), "given up at once when it is plain: {}", rounds.len());
    }

    #[test]
    fn untracked_memory_counts_each_time() {
        let costs = Costs { untracked_pages: GIB, ..costs(1000.0) };
        let (verdict, rounds) = simulate(&Rule::default(), &costs, GIB, 0.0, GIB);
        let Verdict::DoesNotConverge { predicted_freeze } = verdict else { panic!("{verdict:?}") };
        assert!(predicted_freeze > Duration::from_secs(1));
        assert_eq!(rounds.len(), 2);
    }

    #[test]
    fn one_burst_is_forgiven() {
        let ms = Duration::from_millis;
        let round = |pages, took| Measured { pages, took: ms(took) };
        let mut rounds = vec![round(GIB, 1000), round(60_000, 240), round(58_000, 230)];
        let rule = Rule::default();
        assert_eq!(rule.judge(&rounds, &costs(1000.0)), Verdict::AnotherRound);
        rounds.push(round(9_000, 40));
        assert!(matches!(
            rule.judge(&rounds, &costs(1000.0)),
            Verdict::StopNow { .. } | Verdict::AnotherRound
        ));
        rounds.extend([round(9_000, 40), round(9_000, 40)]);
        assert!(matches!(rule.judge(&rounds, &costs(1000.0)), Verdict::DoesNotConverge { .. }));
    }

    #[test]
    fn a_cap_of_one_round_is_stop_and_copy() {
        let rule = Rule { max_rounds: 1, ..Rule::default() };
        let (verdict, rounds) = simulate(&rule, &costs(1000.0), GIB, 0.0, GIB);
        assert!(matches!(verdict, Verdict::DoesNotConverge { .. }));
        assert_eq!(rounds.len(), 1);
    }

    proptest! {
        #[test]
        fn it_always_ends_and_keeps_its_word(
            memory in 1..(8 * GIB),
            dirty in 0.0..1e6f64,
            share in 0.0..1.0f64,
            link in 1.0..4000.0f64,
            max_rounds in 1..40u32,
        ) {
            let rule = Rule { max_rounds, ..Rule::default() };
            let set = (memory as f64 * share) as u64;
            let (verdict, rounds) = simulate(&rule, &costs(link), memory, dirty, set);
            prop_assert!(rounds.len() as u32 <= max_rounds.max(2));
            if let Verdict::StopNow { predicted_freeze } = verdict {
                prop_assert!(predicted_freeze <= rule.max_downtime);
            }
        }
    }
}
