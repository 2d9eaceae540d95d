//! The way of the rounds through a stream: what comes out at its other end is the process' memory.

use super::harness::Case;
use super::model::Model;
use super::victims::{can_track, let_go, start};
use checkpoint::image::stream::{Compress, Options, StreamError};
use checkpoint::live::convergence::{Costs, Rule, Verdict};
use checkpoint::live::source::Source;
use checkpoint::live::stream::RoundReader;
use checkpoint::tracee::Tracee;
use std::io::BufWriter;
use std::time::Duration;

#[test]
fn rounds_until_they_are_short_then_the_freeze() {
    if !can_track("rounds_until_they_are_short_then_the_freeze") {
        return;
    }
    for compress in [Compress::Off, Compress::Auto, Compress::Level(1)] {
        for case in ["busy-writer", "busy-mapper", "busy-exec"] {
            send(case, Options { compress });
        }
    }
}

fn send(case: &str, options: Options) {
    let place = Case::new();
    let mut victim = start(&place, case);
    let (from, to) = std::io::pipe().expect("a pipe");
    let pid = victim.pid();
    // The target reads while the source sends.
    let target = std::thread::spawn(move || {
        let (mut reader, mut model) = (RoundReader::new(from), Model::default());
        loop {
            let head = reader.next(|change| {
                model.apply(change);
                Ok::<(), StreamError>(())
            });
            if head.expect("a whole round").last {
                return model;
            }
        }
    });
    let mut source = Source::start(pid, BufWriter::new(to), options).expect("starts");
    let rule = Rule { max_downtime: Duration::from_millis(15), ..Rule::default() };
    let costs = Costs::of_link(5e8, Duration::from_millis(5), 0);
    let mut rounds = 0;
    let verdict = loop {
        let sent = source.round().expect("sent");
        assert!(sent.stats.pages >= sent.round.pages());
        rounds += 1;
        match source.judge(&rule, &costs) {
            Verdict::AnotherRound => {}
            verdict => break verdict,
        }
    };
    let frozen = Tracee::freeze(pid).expect("freezes");
    let last = source.last().expect("sent");
    println!("{case}: {verdict:?} after {rounds} rounds, the last with {} pages", last.round.pages());
    assert!(!last.carried().is_empty());
    let model = target.join().expect("the target reads all");
    let wrong = model.wrong_pages(&frozen);
    frozen.thaw().expect("goes on");
    assert!(wrong.is_empty(), "{case}: {} pages are wrong: {:?}", wrong.len(), &wrong[..wrong.len().min(9)]);
    source.stop();
    super::traces::assert_none(pid);
    let_go(&place);
    assert!(victim.end().success(), "{}", place.output());
}
