//! What a process must ask the kernel itself: all questions in one batch of injected calls, those of
//! the process by its leader, those of each thread by the thread.

use super::waits::Waits;
use super::{DumpError, Seen, aio, membarrier, traits};
use crate::image::traits::{PolicyImage, ProcessTraits, ThreadTraits};
use crate::image::{Backing, ContextImage, MAX_VDSO, Vma};
use crate::inventory::timers::readable;
use crate::proc::status::Status;
use crate::restore::pkeys;
use crate::sys::bpf::threads::{Settings, Shares, Thread};
use crate::sys::ptrace::Regs;
use crate::sys::rlimit::LIMITS;
use crate::tracee::restart::{self, Timeout, original_call};
use crate::tracee::{Call, Jobs, Reply, ThreadState, Tracee, must_each_of};

use std::collections::BTreeMap;

/// Signals there are.
const SIGNALS: u64 = 64;
/// `prctl(2)`: where the kernel clears and wakes at the thread's end.
const PR_GET_TID_ADDRESS: i32 = 40;
/// Length of a thread's name with its NUL (`TASK_COMM_LEN`, linux/sched.h).
const COMM_LEN: usize = 16;

/// linux/signal.h: the stack is taken for as long as a handler runs on it.
const SS_AUTODISARM: u32 = 1 << 31;

/// How often a timer's rest is asked for: somebody else may run between that and its clock.
const TIMES_ASKED: usize = 3;

/// A process that was asked.
pub struct Inside<'a> {
    tracee: &'a mut Tracee,
    /// What its leader has answered for all of it.
    pub process: ProcessAnswers,
    /// What each thread has answered.
    pub threads: Vec<ThreadAnswers>,
    policies: Vec<Reply>,
}

/// What holds of a whole process.
#[derive(Debug)]
pub struct ProcessAnswers {
    /// End of the heap.
    pub brk: u64,
    /// Handler, flags, restorer and mask of every signal.
    pub actions: Vec<[u64; 4]>,
    /// Every limit: number, soft, hard. Asked inside, as prlimit(2) on a process with other ids needs
    /// CAP_SYS_RESOURCE.
    pub limits: Vec<(u32, u64, u64)>,
    /// Interval and remainder of the interval timers, microseconds.
    pub itimers: [(u64, u64); 3],
    /// CLOCK_MONOTONIC and CLOCK_BOOTTIME as it sees them, ns.
    pub clocks: (u64, u64),
    /// Host name and domain name it sees.
    pub utsname: (Vec<u8>, Vec<u8>),
    /// `PR_GET_THP_DISABLE`.
    pub thp_disable: i64,
    /// `PR_GET_SECUREBITS`.
    pub securebits: u32,
    /// `PR_GET_DUMPABLE`.
    pub dumpable: u32,
    /// `PR_GET_CHILD_SUBREAPER`.
    pub child_subreaper: bool,
    /// Registrations of membarrier(2).
    pub membarrier: u32,
    /// Protection keys, one bit each.
    pub pkeys: u16,
    /// What else it has set.
    pub traits: ProcessTraits,
}

/// What is known of a POSIX timer from inside.
#[derive(Debug, Clone, Copy)]
pub struct TimerAnswer {
    /// Interval, ns.
    pub interval_ns: u64,
    /// What is left, ns.
    pub value_ns: u64,
    /// Overrun of what was told last.
    pub overrun: i32,
    /// Its clock right before and right after that was asked, ns, if the clock can be read.
    pub clock_ns: Option<(u64, u64)>,
}

/// What holds of one thread.
#[derive(Debug, Clone)]
pub struct ThreadAnswers {
    /// Its TID as it knows it.
    pub tid: i32,
    /// `PR_GET_TID_ADDRESS`.
    pub clear_child_tid: u64,
    /// Alternate signal stack: address, flags, size.
    pub altstack: (u64, u32, u64),
    /// Its name.
    pub comm: Vec<u8>,
    /// `PR_GET_TIMERSLACK`.
    pub timer_slack_ns: u64,
    /// `PR_GET_PDEATHSIG`.
    pub pdeathsig: u32,
    /// `PR_GET_SECCOMP`.
    pub seccomp_mode: u8,
    /// `PR_GET_SECUREBITS`.
    pub securebits: u32,
    /// What else it has set.
    pub traits: ThreadTraits,
    /// It has a keyring of its own.
    pub has_keyring: bool,
}

/// What a process has answered.
pub struct Answers {
    process: ProcessAnswers,
    threads: Vec<ThreadAnswers>,
    /// Of the policies of its mappings.
    policies: Vec<Reply>,
}

/// Who is asked, and what is known of it.
pub struct Asked<'a> {
    /// With a stub.
    pub tracee: &'a mut Tracee,
    /// Its mappings, of which there are questions too.
    pub vmas: &'a [Vma],
    /// What the kernel tells of its threads.
    pub seen: &'a Seen,
}

/// Who answers for a thread.
enum Answerer<'a> {
    /// It itself.
    Itself,
    /// The so-manyth of those who answer, for all that cannot be seen; the rest is seen.
    Another(usize, &'a Thread),
}

/// Asks all threads of each; of those that are alike one.
pub fn ask(mut asked: Vec<Asked<'_>>) -> Result<Vec<Answers>, DumpError> {
    let of_thread = thread_questions();
    let of_process = [process_questions(), of_thread.clone()].concat();
    let of_leaders: Vec<Vec<Call>> =
        asked.iter().map(|one| [of_process.clone(), traits::policy_questions(one.vmas)].concat()).collect();
    let answerers: Vec<Vec<Answerer<'_>>> = asked.iter().map(|one| answerers(one.tracee, one.seen)).collect();
    let mut jobs: Vec<(&mut Tracee, Jobs<'_>)> = asked
        .iter_mut()
        .zip(&of_leaders)
        .zip(&answerers)
        .map(|((one, of_leader), answerers)| {
            let calls = |i| if i == 0 { of_leader.as_slice() } else { of_thread.as_slice() };
            let themselves = answerers.iter().enumerate();
            let themselves = themselves.filter(|(_, answerer)| matches!(answerer, Answerer::Itself));
            (&mut *one.tracee, themselves.map(|(i, _)| (i, calls(i))).collect())
        })
        .collect();
    let replies = must_each_of(&mut jobs)?;
    Ok(replies
        .into_iter()
        .zip(answerers)
        .map(|(replies, answerers)| Answers::from(replies, answerers))
        .collect())
}

/// Who answers for each thread. The leader answers for the process, and so for itself.
fn answerers<'a>(tracee: &Tracee, seen: &'a Seen) -> Vec<Answerer<'a>> {
    let mut asked = 0;
    let mut alike: BTreeMap<(Shares, Settings), usize> = BTreeMap::new();
    let of_one = |i: usize| {
        let thread = seen.get(&tracee.tid(i));
        let key = thread.map(|thread| (thread.shares, thread.settings));
        if i > 0
            && let Some((other, thread)) = key.and_then(|key| alike.get(&key)).zip(thread)
        {
            return Answerer::Another(*other, thread);
        }
        alike.extend(key.map(|key| (key, asked)));
        asked += 1;
        Answerer::Itself
    };
    (0..tracee.thread_count()).map(of_one).collect()
}

impl Answers {
    /// The replies of those who were asked, the leader's first.
    fn from(replies: Vec<Vec<Reply>>, answerers: Vec<Answerer<'_>>) -> Answers {
        let mut replies = replies.into_iter();
        let mut leaders = replies.next().unwrap_or_default().into_iter();
        let process = ProcessAnswers::from(&mut leaders);
        let leader = ThreadAnswers::from(&mut leaders);
        let policies = leaders.collect();
        let others = replies.map(|of_one| ThreadAnswers::from(&mut of_one.into_iter()));
        let answers: Vec<ThreadAnswers> = std::iter::once(leader).chain(others).collect();
        let mut itself = answers.iter();
        let of_one = |answerer: Answerer<'_>| match answerer {
            Answerer::Itself => itself.next().expect("one answer of each who is asked").clone(),
            Answerer::Another(other, thread) => answers[other].of_another(thread),
        };
        let threads = answerers.into_iter().map(of_one).collect();
        Answers { process, threads, policies }
    }
}

impl<'a> Inside<'a> {
    pub fn new(tracee: &'a mut Tracee, answers: Answers) -> Inside<'a> {
        let Answers { process, threads, policies } = answers;
        Inside { tracee, process, threads, policies }
    }

    /// Its PID, if its leader has ended before the other threads.
    pub fn lost_leader(&self) -> Option<i32> {
        self.tracee.has_lost_its_leader().then(|| self.tracee.process())
    }

    /// The signal of the group stop it was found in.
    pub fn group_stop(&self) -> Option<u8> {
        self.tracee.group_stop()
    }

    pub fn pid(&self) -> i32 {
        self.tracee.pid()
    }

    pub fn thread_count(&self) -> usize {
        self.tracee.thread_count()
    }

    /// What its mappings, and those to come, are to be like; `of_system` is what is known from outside.
    pub fn traits_of_memory(
        &mut self,
        vmas: &[Vma],
        status: &Status,
        of_system: ProcessTraits,
    ) -> Result<ProcessTraits, DumpError> {
        let leaders: PolicyImage = self.threads[0].traits.policy.clone();
        let mut found = self.process.traits.clone();
        found.thp_disable = self.process.thp_disable.max(0) as u32;
        found.has_keyring = self.threads.iter().any(|thread| thread.has_keyring);
        found.policies = traits::policies(self.tracee, vmas, &self.policies, &leaders)?;
        found.lock_future = traits::lock_future(self.tracee, vmas, status)?;
        let ProcessTraits { cgroups, login_uid, session_nice, .. } = of_system;
        Ok(ProcessTraits { cgroups, login_uid, session_nice, ..found })
    }

    pub fn original(&self, i: usize) -> &ThreadState {
        self.tracee.original(i)
    }

    /// Its asynchronous I/O contexts.
    pub fn contexts(&mut self, vmas: &[Vma]) -> Result<Vec<ContextImage>, DumpError> {
        aio::read(self.tracee, vmas)
    }

    /// What is in the vDSO among its mappings; empty: it has none.
    pub fn read_vdso(&self, vmas: &[Vma]) -> Vec<u8> {
        let vdso = vmas.iter().find(|vma| vma.backing == Backing::Vdso);
        let length = vdso.map_or(0, |vma| (vma.end - vma.start) as usize);
        let mut bytes = vec![0; if length <= MAX_VDSO { length } else { 0 }];
        let read = vdso.map(|vma| self.tracee.read_mem(vma.start, &mut bytes));
        if !matches!(read, Some(Ok(()))) {
            bytes.clear();
        }
        bytes
    }

    /// Asks for the interval timers once more, if one is set: while others of a family were looked after, it
    /// may have gone off.
    pub fn ask_itimers_again(&mut self) -> Result<(), DumpError> {
        if self.process.itimers.iter().any(|&(_, left)| left > 0) {
            let replies = self.tracee.must_all(0, &itimer_questions())?;
            self.process.itimers = itimers(&mut replies.into_iter());
        }
        Ok(())
    }

    /// POSIX timers, each by its id and clock.
    pub fn posix_timers(&mut self, timers: &[(i32, i32)]) -> Result<Vec<TimerAnswer>, DumpError> {
        let questions = |&(id, clock): &(i32, i32)| {
            let args = [id as u64, 0, 0, 0, 0, 0];
            let of_clock = [readable(clock) as i64 as u64, 0, 0, 0, 0, 0];
            let time = Call::may("clock_gettime", libc::SYS_clock_gettime, of_clock);
            let time = time.output(1, 16);
            let rest = Call::must("timer_gettime", libc::SYS_timer_gettime, args).output(1, 32);
            let mut calls =
                vec![Call::may("timer_getoverrun", libc::SYS_timer_getoverrun, args), time.clone()];
            calls.extend((0..TIMES_ASKED).flat_map(|_| [rest.clone(), time.clone()]));
            calls
        };
        let calls: Vec<Call> = timers.iter().flat_map(questions).collect();
        let replies = self.tracee.must_all(0, &calls)?;
        let answers = replies.chunks_exact(2 + 2 * TIMES_ASKED).map(|of_one| {
            let time = |reply: &Reply| (reply.value == 0).then(|| one_time(reply.answer(0)));
            let answer = |n: usize| {
                let (interval_ns, value_ns) = two_times(of_one[n].answer(0), 1_000_000_000);
                let clock_ns = time(&of_one[n - 1]).zip(time(&of_one[n + 1]));
                let overrun = of_one[0].value.max(0) as i32;
                TimerAnswer { interval_ns, value_ns, overrun, clock_ns }
            };
            let width = |answer: &TimerAnswer| {
                answer.clock_ns.map_or(u64::MAX, |(before, after)| after.saturating_sub(before))
            };
            (0..TIMES_ASKED).map(|n| answer(2 + 2 * n)).min_by_key(width).expect("asked at least once")
        });
        Ok(answers.collect())
    }

    /// Sets a timer without an interval; 0 disarms it.
    pub fn set_timer(&mut self, id: i32, value_ns: u64) -> Result<(), DumpError> {
        let times = [[0; 16], restart::timespec(value_ns)].concat();
        let args = [id as u64, 0, 0, 0, 0, 0];
        let call = Call::must("timer_settime", libc::SYS_timer_settime, args).input(2, &times);
        self.tracee.must_all(0, &[call])?;
        Ok(())
    }

    /// Whether what is left of a timer shrinks while thread `i` runs and no other does.
    pub fn timer_counts_thread(&mut self, id: i32, i: usize) -> Result<bool, DumpError> {
        let get = Call::must("timer_gettime", libc::SYS_timer_gettime, [id as u64, 0, 0, 0, 0, 0]);
        let get = get.output(1, 32);
        let mut calls = vec![get.clone()];
        // A microsecond or two.
        calls.resize(16, Call::may("getpid", libc::SYS_getpid, [0; 6]));
        calls.push(get);
        let replies = self.tracee.must_all(i, &calls)?;
        let left = |reply: Option<&Reply>| reply.map(|reply| two_times(reply.answer(0), 1_000_000_000).1);
        Ok(left(replies.first()) != left(replies.last()))
    }

    /// Whether what a timer has sent is pending.
    pub fn has_timer_signal(&self, id: i32) -> Result<bool, DumpError> {
        let tids = (0..self.thread_count()).map(|i| (self.original(i).tid, false));
        for (tid, shared) in tids.chain([(self.pid(), true)]) {
            if super::pending(tid, shared)?.iter().any(|info| super::timers::is_of(info, id)) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The registers of thread `i`, with the call that it was interrupted in, and what is left of that
    /// call's relative time-out, ns.
    ///
    /// A wait of which the kernel keeps nothing would be made again for the whole time, in the thread
    /// itself too: its argument is made shorter. A `struct timespec` for it is put below what the
    /// thread uses of its stack, where a handler may overwrite it: after a handler none of these calls
    /// is repeated.
    pub fn interrupted_call(&mut self, i: usize, waits: &mut Waits) -> (Regs, Option<u64>) {
        /// The red zone (x86-64 psABI) is 128 bytes.
        const BELOW_STACK: u64 = 128 + 64;
        let (tid, mut regs) = (self.tracee.tid(i), self.tracee.original(i).regs);
        let mut read = |addr: u64, buffer: &mut [u8]| self.tracee.read_mem(addr, buffer).is_ok();
        if regs.orig_rax() == libc::SYS_restart_syscall as u64
            && let Some(call) = waits.restarted_call(tid, &regs).or_else(|| original_call(&regs, &mut read))
        {
            regs.set_orig_rax(call as u64);
        }
        let left = waits.left(tid, &regs, &mut read);
        let numbered = regs.orig_rax() != libc::SYS_restart_syscall as u64;
        if self.threads[i].seccomp_mode != 0 && restart::is_in_restart_block(&regs) && numbered {
            // Its filter may know nothing of restart_syscall(2): the call is made again by its own number.
            restart::restart_by_number(&mut regs);
            self.tracee.amend(i, regs);
        }
        let Some(left) = left else { return (regs, None) };
        if restart::is_in_restart_block(&regs) {
            return (regs, Some(left));
        }
        let at = regs.rsp().wrapping_sub(BELOW_STACK) & !15;
        match restart::timeout(&regs) {
            Some(Timeout::Millis(register)) => regs.0[register] = restart::millis(left),
            Some(Timeout::Time(register)) if self.tracee.write_mem(at, &restart::timespec(left)).is_ok() => {
                regs.0[register] = at;
            }
            _ => return (regs, Some(left)),
        }
        self.tracee.amend(i, regs);
        (regs, Some(left))
    }
}

/// In the order in which [`ProcessAnswers::from`] takes the replies.
fn process_questions() -> Vec<Call> {
    let mut calls = vec![Call::may("brk", libc::SYS_brk, [0; 6])];
    calls.extend((1..=SIGNALS).map(|signal| {
        Call::must("rt_sigaction", libc::SYS_rt_sigaction, [signal, 0, 0, 8, 0, 0]).output(2, 32)
    }));
    calls.extend((0..LIMITS).map(|resource| {
        Call::may("prlimit", libc::SYS_prlimit64, [0, resource.into(), 0, 0, 0, 0]).output(3, 16)
    }));
    calls.extend(itimer_questions());
    calls.extend([libc::CLOCK_MONOTONIC, libc::CLOCK_BOOTTIME].map(|clock| {
        Call::must("clock_gettime", libc::SYS_clock_gettime, [clock as u64, 0, 0, 0, 0, 0]).output(1, 16)
    }));
    // struct new_utsname: six fields of 65 bytes.
    calls.push(Call::must("uname", libc::SYS_uname, [0; 6]).output(0, 390));
    calls.extend([libc::PR_GET_THP_DISABLE, libc::PR_GET_SECUREBITS, libc::PR_GET_DUMPABLE].map(prctl));
    calls.push(prctl(libc::PR_GET_CHILD_SUBREAPER).output(1, 8));
    calls.extend(membarrier::questions());
    calls.extend(pkeys::questions());
    calls.extend(traits::process_questions());
    calls
}

fn itimer_questions() -> [Call; 3] {
    [0, 1, 2].map(|which| Call::must("getitimer", libc::SYS_getitimer, [which, 0, 0, 0, 0, 0]).output(1, 32))
}

fn itimers(replies: &mut impl Iterator<Item = Reply>) -> [(u64, u64); 3] {
    std::array::from_fn(|_| two_times(next(replies).answer(0), 1_000_000))
}

/// In the order in which [`ThreadAnswers::from`] takes the replies.
fn thread_questions() -> Vec<Call> {
    let mut calls = vec![
        Call::must("gettid", libc::SYS_gettid, [0; 6]),
        prctl(PR_GET_TID_ADDRESS).output(1, 8),
        Call::must("sigaltstack", libc::SYS_sigaltstack, [0; 6]).output(1, 24),
        prctl(libc::PR_GET_NAME).output(1, COMM_LEN),
        prctl(libc::PR_GET_TIMERSLACK),
        prctl(libc::PR_GET_PDEATHSIG).output(1, 8),
        // Answered in strict mode too: filters are suspended.
        prctl(libc::PR_GET_SECCOMP),
        prctl(libc::PR_GET_SECUREBITS),
    ];
    calls.extend(traits::thread_questions());
    calls
}

fn prctl(option: i32) -> Call {
    Call::must("prctl", libc::SYS_prctl, [option as u64, 0, 0, 0, 0, 0])
}

/// The replies come one a question.
pub(super) fn next(replies: &mut impl Iterator<Item = Reply>) -> Reply {
    replies.next().expect("as many replies as questions, or must_each fails")
}

impl ProcessAnswers {
    fn from(replies: &mut impl Iterator<Item = Reply>) -> ProcessAnswers {
        let brk = next(replies).value as u64;
        let action = |reply: Reply| std::array::from_fn(|n| word(reply.answer(0), n * 8));
        let actions = (0..SIGNALS).map(|_| action(next(replies))).collect();
        let mut limits = Vec::with_capacity(LIMITS as usize);
        for resource in 0..LIMITS {
            let reply = next(replies);
            if reply.value == 0 {
                limits.push((resource, word(reply.answer(0), 0), word(reply.answer(0), 8)));
            }
        }
        let itimers = itimers(replies);
        let mut clock = || one_time(next(replies).answer(0));
        let clocks = (clock(), clock());
        let uname = next(replies);
        let field = |n: usize| {
            let field = &uname.answer(0)[n * 65..(n + 1) * 65];
            field.split(|&byte| byte == 0).next().unwrap_or_default().to_vec()
        };
        ProcessAnswers {
            brk,
            actions,
            limits,
            itimers,
            clocks,
            utsname: (field(1), field(5)),
            thp_disable: next(replies).value,
            securebits: next(replies).value as u32,
            dumpable: next(replies).value as u32,
            child_subreaper: word(next(replies).answer(0), 0) as u32 != 0,
            membarrier: membarrier::registered(&mut || next(replies).value),
            pkeys: pkeys::allocated(&replies.take(pkeys::KEYS.into()).collect::<Vec<Reply>>()),
            traits: traits::process(replies),
        }
    }
}

impl ThreadAnswers {
    /// Those of a thread that is alike, as far as it is.
    fn of_another(&self, thread: &Thread) -> ThreadAnswers {
        let (stack, flags, size) = thread.altstack;
        let disabled = if size == 0 { libc::SS_DISABLE as u32 } else { 0 };
        ThreadAnswers {
            tid: thread.inner_tid,
            clear_child_tid: thread.clear_child_tid,
            altstack: (stack, flags & SS_AUTODISARM | disabled, size),
            comm: thread.comm.split(|&byte| byte == 0).next().unwrap_or_default().to_vec(),
            timer_slack_ns: thread.timer_slack_ns,
            pdeathsig: thread.pdeathsig,
            seccomp_mode: thread.seccomp_mode,
            ..self.clone()
        }
    }

    fn from(replies: &mut impl Iterator<Item = Reply>) -> ThreadAnswers {
        let tid = next(replies).value as i32;
        let clear_child_tid = word(next(replies).answer(0), 0);
        let stack = next(replies);
        let stack = stack.answer(0);
        let comm = next(replies);
        let mut answers = ThreadAnswers {
            tid,
            clear_child_tid,
            altstack: (word(stack, 0), word(stack, 8) as u32, word(stack, 16)),
            comm: comm.answer(0).split(|&byte| byte == 0).next().unwrap_or_default().to_vec(),
            timer_slack_ns: next(replies).value as u64,
            pdeathsig: word(next(replies).answer(0), 0) as u32,
            seccomp_mode: next(replies).value as u8,
            securebits: next(replies).value as u32,
            traits: ThreadTraits::default(),
            has_keyring: false,
        };
        (answers.traits, answers.has_keyring) = traits::thread(replies);
        answers
    }
}

/// Interval and value of `struct itimerval` or `itimerspec`: seconds of so many parts, and parts.
fn two_times(bytes: &[u8], second: u64) -> (u64, u64) {
    let time = |at| word(bytes, at).saturating_mul(second).saturating_add(word(bytes, at + 8));
    (time(0), time(16))
}

/// A `struct timespec` in nanoseconds.
fn one_time(bytes: &[u8]) -> u64 {
    word(bytes, 0).saturating_mul(1_000_000_000).saturating_add(word(bytes, 8))
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
