//! How long threads still have to wait in the calls that a freeze interrupts.
//!
//! Where a call has a relative time-out, only the kernel knows when it began. What it has written for
//! the caller (nanosleep(2)) is taken; for all others the timer that is to wake the thread tells
//! ([`timer_list`]), if one knows whose it is:
//!
//! - A thread of which the kernel keeps a restart block is let sleep on for a moment, with a timer
//!   slack that no other has. Its timer is known by that; that of a sleep without a remainder, which
//!   takes no slack then, by being new ([`Waits::of_restart_blocks`]).
//! - The other waits the kernel forgets. The list is read before the freeze, when the timers of sleeping
//!   threads are in it, and after it, when they are not. Which of those that have gone was whose is told
//!   by when each thread last ran (`se.exec_start` in `/proc/TID/sched`). That alone would not do: its
//!   clock leaves out what other guests of the hypervisor and interrupts took, 150 ms in a second on a
//!   busy host.
//!
//! A thread that has run between the two looks, as its switches tell, has begun a new wait as far as
//! we know: it gets the whole time, as does every thread where the files cannot be read.

use crate::inventory::spread;
use crate::proc::{self, status::Status, timer_list, timer_list::Timer};
use crate::sys::bpf::threads;
use crate::sys::process_vm;
use crate::sys::ptrace::Regs;
use crate::tracee::{Tracee, TraceeError, restart};
use std::collections::{BTreeMap, BTreeSet};

/// Threads times timers that are compared, at most; beyond that nobody is told apart.
const MAX_PAIRS: usize = 1 << 22;
/// How much earlier or later than it should a timer may seem to be due, ns.
const TOLERANCE_NS: u64 = 1_000_000;

/// What counts against a timer that is over when all are frozen, ns.
const OVER_NS: u64 = 1 << 40;
/// The most by which estimates are late, ns.
const MOST_LATE_NS: u64 = 60_000_000_000;

/// A thread that waited when it was looked at.
struct Waiting {
    pid: i32,
    tid: i32,
    /// The whole time-out, ns.
    whole_ns: u64,
    /// When it seems to be due, ns of CLOCK_MONOTONIC.
    estimate_ns: u64,
    /// How often it had gone to sleep.
    switches: u64,
}

/// What was seen before a freeze.
#[derive(Default)]
pub struct Waits {
    looked_ns: u64,
    timers: Vec<Timer>,
    waiting: Vec<Waiting>,
    /// Threads in a call that the kernel has restarted before: registers, with the call's own number.
    restarted: BTreeMap<i32, Regs>,
    /// When the wait of each thread with a restart block is over, ns of CLOCK_MONOTONIC.
    blocks: BTreeMap<i32, u64>,
    /// When the wait of each is over, ns of CLOCK_MONOTONIC; known once all are frozen.
    due_ns: Option<BTreeMap<i32, u64>>,
}

impl Waits {
    /// Looks at processes that are about to be frozen.
    pub fn look(pids: &[i32]) -> Waits {
        let mut waits = Waits { looked_ns: monotonic_ns(), ..Waits::default() };
        // Of this thread's own clock, by which those of the others can be read.
        let behind = waits.looked_ns as i64 - exec_start_ns(0).map_or(waits.looked_ns, |(at, _)| at) as i64;
        for (pid, tid, mut regs, ran) in calls_of(pids) {
            let mut read = |addr: u64, buffer: &mut [u8]| process_vm::read(pid, addr, buffer).is_ok();
            if regs.orig_rax() == libc::SYS_restart_syscall as u64 {
                let Some(call) = restarted_call(tid, &regs, &mut read) else { continue };
                regs.set_orig_rax(call as u64);
                waits.restarted.insert(tid, regs);
            }
            if !restart::is_forgotten(regs.orig_rax() as i64) {
                continue;
            }
            let found = look_at((pid, tid), &regs, ran, &mut read, (waits.looked_ns, behind));
            waits.waiting.extend(found);
        }
        if !waits.waiting.is_empty() {
            waits.timers = timer_list::read().unwrap_or_default();
        }
        waits
    }

    /// Looks again, as soon as all of them are frozen: the less time has passed, the fewer timers of
    /// other processes have gone.
    pub fn frozen(&mut self) {
        if self.due_ns.is_some() {
            return;
        }
        let mut due = BTreeMap::new();
        if !self.waiting.is_empty() {
            let frozen_ns = monotonic_ns();
            let there: BTreeSet<Timer> = timer_list::read().unwrap_or_default().into_iter().collect();
            let gone: Vec<Timer> =
                self.timers.iter().filter(|timer| !there.contains(timer)).copied().collect();
            let switches = switches_of(&self.waiting);
            let still: Vec<&Waiting> =
                self.waiting.iter().filter(|thread| has_slept_on(thread, &switches)).collect();
            due = assign(&still, &gone, self.looked_ns, frozen_ns);
        }
        self.due_ns = Some(due);
    }

    /// Finds out when the waits of threads with a restart block are over. Threads whose calls end
    /// meanwhile have their results from then on.
    pub fn of_restart_blocks(&mut self, tracee: &mut Tracee) -> Result<(), TraceeError> {
        let asleep: Vec<usize> = (0..tracee.thread_count()).filter(|&i| is_in_block(tracee, i)).collect();
        if asleep.is_empty() {
            return Ok(());
        }
        let (sleeps, others): (Vec<usize>, Vec<usize>) =
            asleep.into_iter().partition(|&i| self.is_sleep(tracee, i));
        let mut results = Vec::with_capacity(sleeps.len() + others.len());
        let slacks: Vec<Slack> = others.iter().map(|&i| Slack::set(tracee.tid(i), i)).collect();
        let blocks = &mut self.blocks;
        results.extend(tracee.sleep_on(&others, &mut || find_timers(&slacks, blocks))?);
        drop(slacks);
        for &i in &sleeps {
            results.push(self.of_sleep(tracee, i)?);
        }
        let asleep = [others, sleeps].concat();
        for (&i, result) in asleep.iter().zip(results) {
            let mut regs = tracee.original(i).regs;
            if result != regs.rax() as i64 {
                regs.set_rax(result as u64);
                regs.set_orig_rax(u64::MAX);
                tracee.amend(i, regs);
            }
        }
        Ok(())
    }

    /// The same of one sleep. Others go to sleep at this very moment too: what is there each time that it
    /// sleeps on, and not before, is its own.
    fn of_sleep(&mut self, tracee: &mut Tracee, i: usize) -> Result<i64, TraceeError> {
        const TRIES: usize = 6;
        let mut result = 0;
        let mut candidates: Option<BTreeSet<u64>> = None;
        for _ in 0..TRIES {
            let before = exact_timers();
            let mut during = BTreeSet::new();
            result = tracee.sleep_on(&[i], &mut || during = exact_timers())?[0];
            let new: BTreeSet<u64> = during.difference(&before).copied().collect();
            let left =
                candidates.map_or_else(|| new.clone(), |old| old.intersection(&new).copied().collect());
            if result != tracee.original(i).regs.rax() as i64 {
                break;
            }
            if left.len() == 1 {
                self.blocks.extend(left.first().map(|&due| (tracee.tid(i), due)));
                break;
            }
            candidates = (!left.is_empty()).then_some(left);
        }
        Ok(result)
    }

    /// Whether thread `i` is in a sleep. The time it takes to look is spent for few of them only.
    fn is_sleep(&self, tracee: &Tracee, i: usize) -> bool {
        let mut regs = tracee.original(i).regs;
        if let Some(call) = self.restarted_call(tracee.tid(i), &regs) {
            regs.set_orig_rax(call as u64);
        }
        matches!(regs.orig_rax() as i64, libc::SYS_nanosleep | libc::SYS_clock_nanosleep)
    }

    /// The number of the call that a frozen thread is in restart_syscall(2) for.
    pub fn restarted_call(&self, tid: i32, regs: &Regs) -> Option<i64> {
        let seen = self.restarted.get(&tid)?;
        let arguments = |regs: &Regs| (regs.rip(), regs.rdi(), regs.rsi(), regs.rdx(), regs.r10());
        (arguments(seen) == arguments(regs)).then_some(seen.orig_rax() as i64)
    }

    /// What is left, ns, of the relative time-out of the call in which thread `tid`, frozen now, has
    /// these registers. `None`: it has none. `read` reads its memory.
    pub fn left(
        &mut self,
        tid: i32,
        regs: &Regs,
        read: &mut dyn FnMut(u64, &mut [u8]) -> bool,
    ) -> Option<u64> {
        let timeout = restart::timeout(regs).filter(|_| restart::is_interrupted(regs))?;
        let whole = restart::timeout_ns(regs, timeout, read)?;
        if let Some(left) = restart::remainder_at(regs).and_then(|at| restart::time_at(at, read)) {
            return Some(left.min(whole));
        }
        self.frozen();
        let due = self.due_ns.get_or_insert_default();
        let left =
            self.blocks.get(&tid).or_else(|| due.get(&tid)).map(|due| due.saturating_sub(monotonic_ns()));
        Some(left.unwrap_or(whole).min(whole))
    }
}

/// Whether thread `i` waits with a time-out that nothing but its restart block knows.
fn is_in_block(tracee: &Tracee, i: usize) -> bool {
    let regs = &tracee.original(i).regs;
    if !restart::is_in_restart_block(regs) {
        return false;
    }
    // Restarted before, it may be in any of them.
    regs.orig_rax() == libc::SYS_restart_syscall as u64
        || restart::timeout(regs).is_some() && restart::remainder_at(regs).is_none()
}

/// A timer slack that no other task has, for a moment.
struct Slack {
    tid: i32,
    own_ns: u64,
    before: String,
}

impl Slack {
    fn set(tid: i32, i: usize) -> Slack {
        /// Above what poll(2) takes by itself (`select_estimate_accuracy`, fs/select.c), ns.
        const BASE_NS: u64 = 1_000_000_000;
        let path = format!("/proc/{tid}/timerslack_ns");
        let before = std::fs::read_to_string(&path).unwrap_or_default();
        let own_ns = BASE_NS + 1 + i as u64;
        let _ = std::fs::write(&path, own_ns.to_string());
        Slack { tid, own_ns, before }
    }
}

impl Drop for Slack {
    fn drop(&mut self) {
        let _ = std::fs::write(format!("/proc/{}/timerslack_ns", self.tid), self.before.trim());
    }
}

/// When the sleepers that take no slack are to be woken, ns of CLOCK_MONOTONIC.
fn exact_timers() -> BTreeSet<u64> {
    let exact = |timer: &Timer| timer.due_ns == timer.latest_ns;
    timer_list::read().unwrap_or_default().into_iter().filter(exact).map(|timer| timer.due_ns).collect()
}

/// Some are not there: of waits without a time-out, of calls that have ended. The kernel's list misses one now
/// and then, when another one before it goes off while it is made (`print_active_timers`,
/// kernel/time/timer_list.c): so it is looked at again.
fn find_timers(slacks: &[Slack], due: &mut BTreeMap<i32, u64>) {
    const LOOKS: usize = 4;
    due.retain(|tid, _| slacks.iter().all(|slack| slack.tid != *tid));
    for _ in 0..LOOKS {
        let open = slacks.iter().filter(|slack| !due.contains_key(&slack.tid)).collect::<Vec<&Slack>>();
        if open.is_empty() {
            break;
        }
        let timers = timer_list::read().unwrap_or_default();
        let found = |slack: &&Slack| {
            let is_its = |timer: &&Timer| timer.latest_ns.wrapping_sub(timer.due_ns) == slack.own_ns;
            timers.iter().find(is_its).map(|timer| (slack.tid, timer.due_ns))
        };
        let found: Vec<(i32, u64)> = open.iter().filter_map(found).collect();
        due.extend(found);
    }
}

fn monotonic_ns() -> u64 {
    use nix::time::{ClockId, clock_gettime};
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map_or(0, |time| time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64)
}

/// Process, thread, and the call that it sleeps in; where that is known, when it last began to run, ns, and how
/// often it has gone to sleep.
type InCall = (i32, i32, Regs, Option<(u64, u64)>);

/// The threads of these processes that sleep in a call.
fn calls_of(pids: &[i32]) -> Vec<InCall> {
    let mut found: Vec<InCall> = Vec::new();
    let mut others: Vec<(i32, i32)> = Vec::new();
    for &pid in pids {
        match threads::of_many(pid) {
            Some(all) => found.extend(all.iter().filter_map(|thread| {
                let regs = of_words(thread.sleeps_in()?);
                Some((pid, thread.tid, regs, Some((thread.ran_ns, thread.switches))))
            })),
            None => others.extend(proc::tids(pid).unwrap_or_default().into_iter().map(|tid| (pid, tid))),
        }
    }
    let calls = spread::over(&others, |(pid, tid)| call_of(pid, tid));
    found
        .extend(others.into_iter().zip(calls).filter_map(|((pid, tid), regs)| Some((pid, tid, regs?, None))));
    found
}

fn call_of(pid: i32, tid: i32) -> Option<Regs> {
    let text = proc::read(pid, &format!("task/{tid}/syscall")).ok()?;
    in_call(&String::from_utf8_lossy(&text))
}

/// From number, six arguments, stack and instruction pointers of a call.
fn of_words([nr, rdi, rsi, rdx, r10, r8, r9, rsp, rip]: [u64; 9]) -> Regs {
    let mut regs = Regs([0; 27]);
    regs.set_orig_rax(nr);
    regs.set_rdi(rdi);
    regs.set_rsi(rsi);
    regs.set_rdx(rdx);
    regs.set_r10(r10);
    regs.set_r8(r8);
    regs.set_r9(r9);
    regs.set_rsp(rsp);
    regs.set_rip(rip);
    regs
}

/// The call that a thread in restart_syscall(2) made at first: where it sleeps tells, its registers
/// only perhaps.
fn restarted_call(tid: i32, regs: &Regs, read: &mut dyn FnMut(u64, &mut [u8]) -> bool) -> Option<i64> {
    let place = proc::read(tid, "wchan").unwrap_or_default();
    restart::call_by_place(&String::from_utf8_lossy(&place), regs)
        .or_else(|| restart::original_call(regs, read))
}

/// `ran`: when it last began to run, and how often it has gone to sleep, if that is known by now; `now_ns` and how
/// far the scheduler's clock is `behind` it.
fn look_at(
    (pid, tid): (i32, i32),
    regs: &Regs,
    ran: Option<(u64, u64)>,
    read: &mut dyn FnMut(u64, &mut [u8]) -> bool,
    (now_ns, behind): (u64, i64),
) -> Option<Waiting> {
    let whole_ns = restart::timeout_ns(regs, restart::timeout(regs)?, read)?;
    let ran = ran.or_else(|| exec_start_ns(tid));
    let (ran_ns, switches) = match ran {
        Some(ran) => ran,
        None => (now_ns, switches(tid)?),
    };
    let estimate_ns = ran_ns.saturating_add_signed(behind).saturating_add(whole_ns);
    Some(Waiting { pid, tid, whole_ns, estimate_ns, switches })
}

/// `/proc/TID/syscall`: number, six arguments, stack pointer, instruction pointer; or `running`.
fn in_call(text: &str) -> Option<Regs> {
    let mut words = text.split_ascii_whitespace();
    let nr: u64 = words.next()?.parse().ok()?;
    let number = |word: &str| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok();
    let mut all = [nr; 9];
    for slot in &mut all[1..] {
        *slot = number(words.next()?)?;
    }
    Some(of_words(all))
}

/// When a task last began to run, ns of the scheduler's clock, and how often it has gone to sleep.
/// 0 is the calling thread.
fn exec_start_ns(tid: i32) -> Option<(u64, u64)> {
    let path = match tid {
        0 => "/proc/thread-self/sched".to_string(),
        tid => format!("/proc/{tid}/sched"),
    };
    let text = std::fs::read_to_string(path).ok()?;
    let value = |key: &str| Some(text.lines().find(|line| line.starts_with(key))?.rsplit_once(':')?.1.trim());
    let (millis, nanos) = value("se.exec_start")?.split_once('.')?;
    let ran = millis.parse::<u64>().ok()?.checked_mul(1_000_000)?.checked_add(nanos.parse().ok()?)?;
    Some((ran, value("nr_voluntary_switches")?.parse().ok()?))
}

fn switches(tid: i32) -> Option<u64> {
    Status::read(tid).ok()?.decimal("voluntary_ctxt_switches")
}

/// How often the threads of processes with many of them have gone to sleep by now.
fn switches_of(waiting: &[Waiting]) -> BTreeMap<i32, u64> {
    let pids: BTreeSet<i32> = waiting.iter().map(|thread| thread.pid).collect();
    let all = pids.into_iter().filter_map(threads::of_many).flatten();
    all.map(|thread| (thread.tid, thread.switches)).collect()
}

/// Whether a frozen thread was woken by nothing but the freeze: it has gone to sleep once more, in
/// its stop.
fn has_slept_on(thread: &Waiting, known: &BTreeMap<i32, u64>) -> bool {
    let now = known.get(&thread.tid).copied().or_else(|| switches(thread.tid));
    now.is_some_and(|now| now == thread.switches + 1)
}

/// Whose timer was whose: both in the order in which they are due, at the least sum of differences
/// from the estimates.
fn assign(waiting: &[&Waiting], gone: &[Timer], looked_ns: u64, frozen_ns: u64) -> BTreeMap<i32, u64> {
    if waiting.is_empty() || gone.is_empty() || waiting.len().saturating_mul(gone.len()) > MAX_PAIRS {
        return BTreeMap::new();
    }
    let mut waiting = waiting.to_vec();
    waiting.sort_by_key(|thread| thread.estimate_ns);
    let late = lateness(&waiting, gone);
    let fits = |thread: &Waiting, timer: &Timer| {
        let last = looked_ns.saturating_add(thread.whole_ns).saturating_add(TOLERANCE_NS);
        (looked_ns.saturating_sub(TOLERANCE_NS)..=last).contains(&timer.due_ns)
    };
    let difference = |thread: &Waiting, timer: &Timer| {
        // Over by now: more likely a timer of somebody else that has just gone off.
        let over = if timer.due_ns < frozen_ns { OVER_NS } else { 0 };
        u128::from(timer.due_ns.abs_diff(thread.estimate_ns.saturating_add_signed(-late))) + u128::from(over)
    };
    // Worse than any difference: a thread without a timer.
    const WITHOUT: u64 = 1 << 62;
    let width = gone.len() + 1;
    // costs[n][m]: the first n threads with some of the first m timers.
    let mut costs = vec![0u128; (waiting.len() + 1) * width];
    for (n, thread) in waiting.iter().enumerate() {
        costs[(n + 1) * width] = u128::from(WITHOUT) * (n as u128 + 1);
        for (m, timer) in gone.iter().enumerate() {
            let skip = costs[(n + 1) * width + m].min(costs[n * width + m + 1] + u128::from(WITHOUT));
            let take = match fits(thread, timer) {
                true => costs[n * width + m] + difference(thread, timer),
                false => u128::MAX,
            };
            costs[(n + 1) * width + m + 1] = skip.min(take);
        }
    }
    let mut found = BTreeMap::new();
    let (mut n, mut m) = (waiting.len(), gone.len());
    while n > 0 && m > 0 {
        let cost = costs[n * width + m];
        if cost == costs[n * width + m - 1] {
            m -= 1;
        } else if cost == costs[(n - 1) * width + m] + u128::from(WITHOUT) {
            n -= 1;
        } else {
            n -= 1;
            m -= 1;
            found.insert(waiting[n].tid, gone[m].due_ns);
        }
    }
    found
}

/// By how much the estimates are late (or early), all of them alike: what brings most of them to a
/// timer each; of two such the smaller.
fn lateness(waiting: &[&Waiting], gone: &[Timer]) -> i64 {
    /// As exact as the estimates are but for that, ns.
    const NEAR_NS: i64 = 500_000;
    if waiting.len() < 2 || waiting.len() * gone.len() > 4096 {
        return 0;
    }
    let hits = |late: i64| {
        let mut timers = gone.iter().peekable();
        let near = |thread: &&&Waiting| {
            let due = thread.estimate_ns as i64 - late;
            while timers.next_if(|timer| (timer.due_ns as i64) < due - NEAR_NS).is_some() {}
            timers.next_if(|timer| timer.due_ns as i64 <= due + NEAR_NS).is_some()
        };
        waiting.iter().filter(near).count()
    };
    let of_pair = |thread: &Waiting, timer: &Timer| thread.estimate_ns as i64 - timer.due_ns as i64;
    let shifts = waiting.iter().flat_map(|thread| gone.iter().map(move |timer| of_pair(thread, timer)));
    let best = shifts
        .filter(|late| late.unsigned_abs() < MOST_LATE_NS)
        .max_by_key(|&late| (hits(late), u64::MAX - late.unsigned_abs()));
    best.filter(|&late| hits(late) > 1).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn waiting(tid: i32, whole_ms: u64, estimate_ms: u64) -> Waiting {
        Waiting {
            pid: tid,
            tid,
            whole_ns: whole_ms * 1_000_000,
            estimate_ns: estimate_ms * 1_000_000,
            switches: 0,
        }
    }

    fn assigned(threads: &[Waiting], due_ms: &[u64]) -> Vec<(i32, u64)> {
        let timer = |(id, &ms): (usize, &u64)| Timer { due_ns: ms * 1_000_000, latest_ns: 0, id: id as u64 };
        let gone: Vec<Timer> = due_ms.iter().enumerate().map(timer).collect();
        let threads: Vec<&Waiting> = threads.iter().collect();
        assign(&threads, &gone, 1_000_000_000, 1_100_000_000)
            .into_iter()
            .map(|(tid, due)| (tid, due / 1_000_000))
            .collect()
    }

    #[test]
    fn each_gets_its_own_timer() {
        // The estimates are 150 ms late, and one timer more has gone meanwhile.
        let threads = [waiting(1, 5000, 5150), waiting(2, 5000, 5160), waiting(3, 900, 1950)];
        assert_eq!(assigned(&threads, &[1001, 1800, 5000, 5010]), [(1, 5000), (2, 5010), (3, 1800)]);
        // Two that began at one time are late by the same; others' timers lie nearer.
        let threads = [waiting(1, 5000, 5150), waiting(2, 5000, 5160)];
        assert_eq!(assigned(&threads, &[1050, 5000, 5010, 5149, 5163]), [(1, 5000), (2, 5010)]);
        // Three at once, early by 14 ms, and one timer that is not theirs.
        let threads = [waiting(1, 5000, 4000), waiting(2, 5000, 4000), waiting(3, 5000, 4001)];
        assert_eq!(assigned(&threads, &[1200, 4014, 4014, 4015]), [(1, 4014), (2, 4014), (3, 4015)]);
        // None can be due later than its whole time from now.
        assert_eq!(assigned(&[waiting(3, 900, 1500)], &[2500]), []);
        // Two threads, and the timer of the second has not been seen.
        assert_eq!(assigned(&[waiting(1, 5000, 4000), waiting(2, 5000, 5000)], &[4001]), [(1, 4001)]);
    }

    #[test]
    fn reads_the_call_of_a_sleeping_thread() {
        let regs = in_call("232 0x3 0x7f14d4000ba0 0x3ff 0x4e20 0x0 0x7f14 0x7f 0x8f\n").expect("a call");
        assert_eq!((regs.orig_rax(), regs.r10(), regs.rsp(), regs.rip()), (232, 20_000, 0x7f, 0x8f));
        assert!(in_call("running").is_none() && in_call("-1 0x7f 0x8").is_none());
    }

    proptest! {
        #[test]
        fn never_panics(text in "[-0-9a-fx ]{0,80}", mut due in prop::collection::vec(0u64..9000, 0..6),
                        threads in prop::collection::vec((0u64..9000, 0u64..9000), 0..6)) {
            in_call(&text);
            due.sort_unstable();
            let threads: Vec<Waiting> = threads.iter().zip(0..).map(|(&(w, e), tid)| waiting(tid, w, e)).collect();
            let found = assigned(&threads, &due);
            let mut used: Vec<u64> = found.iter().map(|&(_, due)| due).collect();
            used.sort_unstable();
            prop_assert!(used.iter().all(|ms| due.contains(ms)));
        }
    }
}
