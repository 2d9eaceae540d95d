//! All threads of a process, as the kernel has them.

use super::Target;
use super::btf::Btf;
use super::program::{self, Field, LEVELS, WORDS_OF_PID};
use nix::errno::Errno;
use std::io;
use std::os::fd::OwnedFd;

/// With fewer threads, to load the program takes longer than to read files.
const MANY: usize = 64;

/// What a row has behind the numbers of the task, in the order in which [`Thread::from_row`] takes it.
const FIELDS: [Field; 36] = [
    Field::Task(&["__state"]),
    Field::Task(&["exit_state"]),
    Field::Task(&["ptrace"]),
    Field::Address("children"),
    Field::Task(&["children", "next"]),
    Field::Task(&["nvcsw"]),
    Field::Task(&["se", "exec_start"]),
    Field::Task(&["cred"]),
    Field::Task(&["files"]),
    Field::Task(&["fs"]),
    Field::Task(&["nsproxy"]),
    Field::Task(&["flags"]),
    Field::Task(&["atomic_flags"]),
    Field::Task(&["thread_info", "flags"]),
    Field::Task(&["personality"]),
    Field::Perhaps(&["mempolicy"]),
    Field::Perhaps(&["thread", "features"]),
    Field::Perhaps(&["seccomp", "mode"]),
    Field::Perhaps(&["seccomp", "filter"]),
    Field::Task(&["clear_child_tid"]),
    Field::Task(&["sas_ss_sp"]),
    Field::Task(&["sas_ss_size"]),
    Field::Task(&["sas_ss_flags"]),
    Field::Part("comm", 0),
    Field::Part("comm", 8),
    Field::Task(&["timer_slack_ns"]),
    Field::Task(&["pdeath_signal"]),
    Field::Register("orig_ax"),
    Field::Register("di"),
    Field::Register("si"),
    Field::Register("dx"),
    Field::Register("r10"),
    Field::Register("r8"),
    Field::Register("r9"),
    Field::Register("sp"),
    Field::Register("ip"),
];
const WORDS: usize = WORDS_OF_PID + FIELDS.len();

/// A thread, as it was at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Thread {
    /// Its TID here.
    pub tid: i32,
    /// Its TID as it knows it itself.
    pub inner_tid: i32,
    /// `TASK_*` (include/linux/sched.h).
    pub state: u32,
    /// Somebody traces it.
    pub is_traced: bool,
    /// It has children, zombies too.
    pub has_children: bool,
    /// How often it has gone to sleep.
    pub switches: u64,
    /// When it last began to run, ns of the scheduler's clock.
    pub ran_ns: u64,
    /// What it may share with others.
    pub shares: Shares,
    /// What it has set, as far as it is only of use to compare threads.
    pub settings: Settings,
    /// Mode of its seccomp filters.
    pub seccomp_mode: u8,
    /// Where the kernel clears and wakes at its end.
    pub clear_child_tid: u64,
    /// Alternate signal stack: address, flags that were set, size.
    pub altstack: (u64, u32, u64),
    /// Its name, with what follows a NUL.
    pub comm: [u8; 16],
    /// Slack of its timers, ns.
    pub timer_slack_ns: u64,
    /// The signal at the end of its parent.
    pub pdeathsig: u32,
    call: [u64; 9],
}

/// Addresses in the kernel of what threads share, which are good for comparing alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Shares {
    /// Ids, groups, capabilities, securebits, keyrings, and all that a security module has.
    pub creds: u64,
    /// Descriptor table.
    pub files: u64,
    /// Working directory, root, umask.
    pub fs: u64,
    /// All namespaces but that of users, which cannot be left by a thread alone.
    pub namespaces: u64,
    /// Seccomp filters.
    pub filters: u64,
}

/// Flags and settings, whose meaning is of no matter here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Settings {
    /// `PF_*`: among others what becomes of it when memory fails, and that it writes out pages.
    flags: u64,
    /// `PFA_*`: no new rights, speculation.
    atomic_flags: u64,
    /// `TIF_*`: faults at RDTSC and CPUID, speculation.
    thread_flags: u64,
    personality: u64,
    mempolicy: u64,
    /// Shadow stack.
    features: u64,
    mode: u64,
}

impl Thread {
    /// `TASK_UNINTERRUPTIBLE` (include/linux/sched.h; `/proc` calls it D).
    pub const UNINTERRUPTIBLE: u32 = 2;

    /// Whether it shares all with another, and has set nothing else that makes it a blocker or tells its rights.
    pub fn is_like(&self, other: &Thread) -> bool {
        let Settings { atomic_flags, features, mode, .. } = self.settings;
        let theirs = &other.settings;
        // Of one that has ended nothing is left, and two of these are not alike.
        self.shares.creds != 0
            && self.shares.namespaces != 0
            && self.shares == other.shares
            && (atomic_flags, features, mode) == (theirs.atomic_flags, theirs.features, theirs.mode)
    }

    /// The call that it sleeps in: its number, six arguments, stack and instruction pointers.
    pub fn sleeps_in(&self) -> Option<[u64; 9]> {
        const RUNS: u32 = 0;
        let is_call = self.state != RUNS && (self.call[0] as i64) >= 0;
        is_call.then_some(self.call)
    }
}

/// The threads of a process. `None`: the kernel does not let itself be asked, or has them deeper in
/// namespaces than we look.
pub fn look(pid: i32) -> Option<Vec<Thread>> {
    let programs = super::programs()?;
    let rows: Vec<Row> = super::rows(&programs.of_threads, Target::Threads(pid), |_, _| true).ok()?;
    let threads: Option<Vec<Thread>> = rows.iter().map(|row| Thread::from_row(row, programs.level)).collect();
    threads.filter(|threads| !threads.is_empty())
}

/// All threads of a process, where that pays; `None`: it has few, or they come and go too fast. When one that
/// is looked at ends at this moment, the kernel tells of none of those behind it (`task_group_seq_get_next`,
/// kernel/bpf/task_iter.c).
pub fn of_many(pid: i32) -> Option<Vec<Thread>> {
    const TRIES: usize = 4;
    let mut count = crate::proc::thread_count(pid);
    for _ in 0..TRIES {
        if count < MANY {
            break;
        }
        let (all, now) = (look(pid)?, crate::proc::thread_count(pid));
        if all.len() == count && count == now {
            return Some(all);
        }
        count = now;
    }
    None
}

/// Loads the programs, and learns what flags of mappings mean, beside the work, if they are of use for this process.
/// Nothing of it goes on afterwards; who wants to know something earlier waits for it.
pub fn prepare_beside<T>(pid: i32, work: impl FnOnce() -> T) -> T {
    if super::is_prepared() || crate::proc::thread_count(pid) < MANY {
        return work();
    }
    std::thread::scope(|scope| {
        scope.spawn(crate::proc::vm_flags::prepare);
        work()
    })
}

/// The program that [`look`] runs.
pub(super) fn program(btf: &Btf) -> Option<Vec<u64>> {
    program::assemble_task(btf, &FIELDS)
}

/// How deep our own PID namespace is.
pub(super) fn own_level(program: &OwnedFd) -> io::Result<usize> {
    let own = Target::Threads(std::process::id() as i32);
    let own: Vec<Row> = super::rows(program, own, |_, _| true)?;
    let level = own.first().map_or(LEVELS, |row| row[0] as usize);
    if level < LEVELS { Ok(level) } else { Err(Errno::ENOTSUP.into()) }
}

type Row = [u64; WORDS];

impl Thread {
    /// `None`: it is too deep.
    fn from_row(row: &Row, level: usize) -> Option<Thread> {
        let mut words = row.iter().copied();
        let mut next = || words.next().unwrap_or(0);
        let deepest = next() as usize;
        // A number, and the address of the namespace in which it is that.
        let numbers: [i32; LEVELS] = std::array::from_fn(|_| (next() as i32, next()).0);
        Some(Thread {
            tid: *numbers.get(level)?,
            inner_tid: *numbers.get(deepest)?,
            state: (next() | next()) as u32,
            is_traced: next() != 0,
            has_children: next() != next(),
            switches: next(),
            ran_ns: next(),
            ..Thread::rest(&mut next)
        })
    }

    fn rest(next: &mut impl FnMut() -> u64) -> Thread {
        let (creds, files, fs, namespaces) = (next(), next(), next(), next());
        let settings = Settings {
            flags: next(),
            atomic_flags: next(),
            thread_flags: next(),
            personality: next(),
            mempolicy: next(),
            features: next(),
            mode: next(),
        };
        let shares = Shares { creds, files, fs, namespaces, filters: next() };
        let clear_child_tid = next();
        let (stack, size, flags) = (next(), next(), next() as u32);
        let mut comm = [0; 16];
        comm[..8].copy_from_slice(&next().to_ne_bytes());
        comm[8..].copy_from_slice(&next().to_ne_bytes());
        let (timer_slack_ns, pdeathsig) = (next(), next() as u32);
        Thread {
            tid: 0,
            inner_tid: 0,
            state: 0,
            is_traced: false,
            has_children: false,
            switches: 0,
            ran_ns: 0,
            shares,
            settings,
            seccomp_mode: settings.mode as u8,
            clear_child_tid,
            altstack: (stack, flags, size),
            comm,
            timer_slack_ns,
            pdeathsig,
            call: std::array::from_fn(|_| next()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_of_oneself() {
        if !crate::sys::bpf::prepare() {
            return;
        }
        let own = std::thread::spawn(|| {
            let tid = nix::unistd::gettid().as_raw();
            let all = look(std::process::id() as i32).expect("there are threads");
            all.into_iter().find(|thread| thread.tid == tid)
        });
        let own = own.join().expect("it does not panic").expect("it is there");
        assert_eq!((own.is_traced, own.has_children, own.pdeathsig), (false, false, 0));
        assert_eq!(own.sleeps_in(), None, "it runs");
        assert_eq!(look(i32::MAX), None);
    }
}
