//! Whom a process knows and who it is: relatives, tracers, namespaces, threads.

use super::family::{Family, SHARED};
use super::relations::Relation;
use super::{Blocker, Rules, spread};
use crate::image::shares::ApartImage;
use crate::image::{FilterImage, ProcessImage};
use crate::proc::{
    self,
    status::{Stat, Status},
};
use crate::sys::bpf::threads::{self, Thread};
use crate::sys::kcmp::{self, Shared};
use crate::sys::time_namespace::Offsets;
use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

/// With more threads than this, to look at every process is less than to look at every thread.
const MANY_THREADS: usize = 32;
/// Threads looked at.
const MAX_THREADS: usize = 16_384;
/// A thread that waits uninterruptibly is looked at so often before it counts: reading from a disk is
/// such a wait too, and short.
const LOOKS: usize = 5;
/// The same for a child to come out of vfork(2): no stop reaches its parent before.
const LOOKS_IN_VFORK: usize = 200;
const BETWEEN_LOOKS: Duration = Duration::from_millis(10);

/// What is no running program, and has nothing to look at.
pub fn not_a_program(pid: i32, status: &Status, rules: Rules) -> Option<Blocker> {
    let has_others = || proc::tids(pid).is_ok_and(|tids| tids.len() > 1);
    let what = match status.state() {
        'Z' if has_others() && rules == Rules::Standalone && proc::face(pid) != pid => return None,
        'Z' if has_others() => {
            format!("the first thread of process {pid} has ended, and the others run on")
        }
        'Z' => format!("process {pid} has ended and waits for its parent (a zombie)"),
        'X' => format!("process {pid} has ended"),
        _ if status.line("VmSize").is_some() => return None,
        _ if is_kernel_thread(pid) => format!("process {pid} is a thread of the kernel"),
        // Its memory goes first, and its state is "running" to the last (exit_mm in kernel/exit.c).
        _ => format!("process {pid} has ended"),
    };
    Some(Blocker { kind: "kernel", what })
}

/// From the flags in `stat`: what has no memory is of the kernel, or ends at this moment.
fn is_kernel_thread(pid: i32) -> bool {
    /// include/linux/sched.h; the same since Linux 2.6.27.
    const PF_KTHREAD: u64 = 0x0020_0000;
    Stat::read(pid).ok().and_then(|stat| stat.number(9)).is_some_and(|flags| flags & PF_KTHREAD != 0)
}

/// Whether it is a zombie or beyond, and all its threads with it.
pub fn has_ended(pid: i32, status: &Status) -> bool {
    matches!(status.state(), 'Z' | 'X') && is_alone(pid)
}

/// Whether its first thread has no others beside it.
pub fn is_alone(pid: i32) -> bool {
    proc::tids(pid).map_or(0, |tids| tids.len()) <= 1
}

/// Whether a process is there, and no zombie all of whose threads have ended.
pub fn lives(pid: i32) -> bool {
    // Cheaper than `status`.
    Stat::read(pid).is_ok_and(|stat| !matches!(stat.field(3), Some("Z" | "X")) || !is_alone(pid))
}

/// The children of all its threads, zombies too.
pub fn children(pid: i32) -> Vec<i32> {
    children_of_threads(pid).into_iter().map(|(_, child)| child).collect()
}

/// The same, each with the thread whose child it is (0: not looked at, there are too many threads).
pub fn children_of_threads(pid: i32) -> Vec<(i32, i32)> {
    children_of(pid, threads::of_many(pid).as_deref())
}

/// The same where the kernel may just have told of the threads.
pub fn children_of(pid: i32, seen: Option<&[Thread]>) -> Vec<(i32, i32)> {
    let with_some = |all: &[Thread]| all.iter().filter(|one| one.has_children).map(|one| one.tid).collect();
    let tids: Vec<i32> = seen.map_or_else(|| proc::tids(pid).unwrap_or_default(), with_some);
    if tids.len() > MANY_THREADS {
        let is_parent =
            |&other: &i32| Stat::read(other).ok().and_then(|stat| stat.number(4)) == Some(pid as u64);
        return proc::pids().into_iter().filter(is_parent).map(|child| (0, child)).collect();
    }
    let of_thread = |tid: i32| {
        let text = proc::read(pid, &format!("task/{tid}/children")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let children = text.split_ascii_whitespace().filter_map(|word| word.parse().ok());
        children.map(|child| (tid, child)).collect::<Vec<(i32, i32)>>()
    };
    tids.into_iter().flat_map(of_thread).collect()
}

/// Sessions and groups of these processes; those that have ended are left out.
pub fn relations(family: &[i32]) -> Vec<Relation> {
    let of_one = |&pid: &i32| {
        let stat = Stat::read(pid).ok()?;
        let number = |n| stat.number(n).map(|number| number as i32);
        let ended = stat.field(3) == Some("Z") && proc::tids(pid).map_or(0, |tids| tids.len()) <= 1;
        Some(Relation { pid, ppid: number(4)?, pgid: number(5)?, sid: number(6)?, ended })
    };
    family.iter().filter_map(of_one).collect()
}

/// Whether a process or thread has the number.
pub fn in_use(id: i32) -> bool {
    std::path::Path::new(&format!("/proc/{id}")).exists()
}

/// A process and its descendants, parents first; at most one more than an image may hold.
pub fn descendants(root: i32) -> Vec<i32> {
    let mut family = vec![root];
    let mut known = BTreeSet::from([root]);
    let mut at = 0;
    while at < family.len() && family.len() <= crate::image::MAX_PROCESSES {
        family.extend(children(family[at]).into_iter().filter(|&child| known.insert(child)));
        at += 1;
    }
    family
}

/// Children that are not of the family, and what is shared with other processes.
pub fn relatives(
    pid: i32,
    status: &Status,
    seen: Option<&[Thread]>,
    family: &Family,
    rules: Rules,
    blockers: &mut Vec<Blocker>,
) {
    let children: Vec<i32> = children_of(pid, seen)
        .into_iter()
        .map(|(_, child)| child)
        .filter(|&child| !family.has(child))
        .collect();
    // One that was born since the family was counted is found again when it stands still.
    if !children.is_empty() && family.len() <= 1 {
        let list: Vec<String> = children.iter().take(5).map(i32::to_string).collect();
        let more = if children.len() > 5 { ", …" } else { "" };
        let what = format!(
            "it has child processes ({}{more}): only a process without children moves",
            list.join(", ")
        );
        blockers.push(Blocker { kind: "tree", what });
    }
    let parent = status.decimal("PPid").unwrap_or(0) as i32;
    for (what, other) in family.sharing_with(proc::face(pid)) {
        if rules == Rules::Standalone && family.has(other) {
            // They are made so that they share it again.
            continue;
        }
        let whom = if other == parent { "its parent, process" } else { "process" };
        let what = format!("it shares {} with {whom} {other}", SHARED[what].1);
        blockers.push(Blocker { kind: "tree", what });
    }
}

/// Namespaces other than ours, and a root other than theirs. A time namespace is nothing but what clocks
/// are ahead by, which an image has: it must be one for the whole family.
pub fn surroundings(pid: i32, family: &Family, rules: Rules, blockers: &mut Vec<Blocker>) {
    let name_of = |whose: &str, name: &str| fs::read_link(format!("/proc/{whose}/ns/{name}")).ok();
    let theirs = pid.to_string();
    for (name, ours) in family.namespaces_here() {
        if let (Some(theirs), Some(ours)) = (name_of(&theirs, name), ours)
            && theirs != *ours
        {
            let what = format!("it is in another {name} namespace (a container?)");
            blockers.push(Blocker { kind: "namespace", what });
        }
    }
    if let Some((root, clocks)) = family.clocks_of_root()
        && name_of(&theirs, "time") != clocks
        && Offsets::of(pid).ok() != Offsets::of(root).ok()
    {
        let what = format!("its clocks are not those of process {root} (another time namespace)");
        blockers.push(Blocker { kind: "namespace", what });
    }
    for (now, later) in [("pid", "pid_for_children"), ("time", "time_for_children")] {
        // A PID namespace without anybody in it is not shown yet (pid_namespaces(7)).
        let known = name_of(&theirs, now);
        if known.is_some() && known != name_of(&theirs, later) {
            let what = format!("its children will be in another {now} namespace (unshare)");
            blockers.push(Blocker { kind: "namespace", what });
        }
    }
    if rules == Rules::Homed
        && let Ok(root) = proc::link(pid, "root")
        && root != b"/"
    {
        let what = format!("its root is {} (chroot)", String::from_utf8_lossy(&root));
        blockers.push(Blocker { kind: "namespace", what });
    }
    if is_32_bit(pid) {
        blockers.push(Blocker { kind: "kernel", what: "it is a 32-bit program".into() });
    }
}

fn is_32_bit(pid: i32) -> bool {
    use std::io::Read;
    let mut head = [0; 5];
    let read = fs::File::open(format!("/proc/{pid}/exe")).and_then(|mut file| file.read_exact(&mut head));
    read.is_ok() && head == [0x7f, b'E', b'L', b'F', 1]
}

/// What must be the same in every thread of a guest: a deputy's new threads have the leader's credentials.
const SAME_IN_ALL: [&str; 9] =
    ["Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs"];

/// What single threads have: tracers, filters, credentials, long waits.
pub fn threads(
    pid: i32,
    status: &Status,
    seen: Option<Vec<Thread>>,
    rules: Rules,
    blockers: &mut Vec<Blocker>,
) {
    let face = proc::face(pid);
    let Looked { mut tids, waiting } = who_is_looked_at(pid, face, seen.unwrap_or_default());
    tids.truncate(MAX_THREADS);
    // Of one thread alone nothing is compared.
    let places = if tids.len() > 1 { namespaces(pid, face) } else { Places::default() };
    let mut looked = spread::over(&tids, |tid| {
        // One that has ended meanwhile has nothing.
        let thread = proc::Dir::open(pid, &format!("task/{tid}"));
        let thread = thread.and_then(|dir| Ok((Status::parse(&dir.read("status")?), dir)));
        let Ok((thread, dir)) = thread else { return (false, None) };
        let found = of_thread(tid, &thread, status, rules)
            .or_else(|| of_its_own((pid, face), tid, rules))
            .or_else(|| elsewhere((pid, face), tid, &dir, &places));
        (thread.state() == 'D', found)
    });
    // One is enough: the others are mostly alike.
    if let Some((kind, what)) = looked.iter_mut().find_map(|(_, found)| found.take()) {
        blockers.push(Blocker { kind, what });
    }
    let found = tids.into_iter().zip(looked).filter(|(_, (waits, _))| *waits).map(|(tid, _)| tid);
    if let Some(tid) = waiting.into_iter().chain(found).find(|&tid| keeps_waiting(tid)) {
        let what = match is_in_vfork(tid) {
            true => format!("thread {tid} is in vfork(2), until its child runs another program or ends"),
            false => {
                let place = fs::read_to_string(format!("/proc/{tid}/wchan")).unwrap_or_default();
                format!("thread {tid} is in an uninterruptible wait ({})", place.trim())
            }
        };
        blockers.push(Blocker { kind: "kernel", what });
    }
}

/// Threads that must be looked at each by itself.
struct Looked {
    tids: Vec<i32>,
    /// Those of the others that wait uninterruptibly.
    waiting: Vec<i32>,
}

/// With many threads, the kernel tells which of them have nothing that the process has not.
fn who_is_looked_at(pid: i32, face: i32, all: Vec<Thread>) -> Looked {
    let Some(first) = all.iter().find(|thread| thread.tid == face).cloned() else {
        return Looked { tids: proc::tids(pid).unwrap_or_default(), waiting: Vec::new() };
    };
    let is_alike = |thread: &Thread| {
        thread.tid != face && thread.tid != pid && !thread.is_traced && thread.is_like(&first)
    };
    let (alike, others): (Vec<Thread>, Vec<Thread>) = all.into_iter().partition(is_alike);
    let waits = |thread: &Thread| thread.state & Thread::UNINTERRUPTIBLE != 0;
    let waiting = alike.iter().filter(|thread| waits(thread)).map(|thread| thread.tid).collect();
    Looked { tids: others.iter().map(|thread| thread.tid).collect(), waiting }
}

/// Namespaces that a thread can leave by itself (unshare(2), setns(2)); for the mount namespace it must have
/// a working directory of its own, and all others are those of the process.
const OF_THREADS: [&str; 6] = ["net", "ipc", "uts", "cgroup", "pid_for_children", "time_for_children"];

/// What the links in `/proc/TID/ns` say, in the order of [`OF_THREADS`]; `None`: nothing.
type Places = [Option<Vec<u8>>; OF_THREADS.len()];

fn namespaces(pid: i32, tid: i32) -> Places {
    let dir = proc::Dir::open(pid, &format!("task/{tid}/ns"));
    dir.map_or_else(|_| Places::default(), |dir| OF_THREADS.map(|name| dir.link(name).ok()))
}

/// A namespace of its own, which nothing of a process tells.
fn elsewhere(
    (pid, face): (i32, i32),
    tid: i32,
    dir: &proc::Dir,
    places: &Places,
) -> Option<(&'static str, String)> {
    if tid == pid || tid == face {
        return None;
    }
    // One that has ended is nowhere.
    let own = dir.dir("ns").ok()?;
    let differs = |name: &str, of_process: &Option<Vec<u8>>| {
        let of_thread = own.link(name).ok();
        // A PID namespace is shown when there is somebody in it; of one that has ended nothing is.
        of_thread != *of_process && (of_thread.is_some() || own.link("net").is_ok())
    };
    let found =
        OF_THREADS.iter().zip(places).find(|(name, place)| differs(name, place)).map(|(name, _)| *name);
    let mounts = || {
        let of_process = || proc::link(face, "ns/mnt").ok();
        kcmp::shared(face, tid, Shared::Fs) == Ok(false) && differs("mnt", &of_process())
    };
    let name = found.or_else(|| mounts().then_some("mnt"))?.trim_end_matches("_for_children");
    let what = format!("thread {tid} has left the {name} namespace of its process (unshare)");
    Some(("namespace", what))
}

/// What a thread no longer shares with its process (unshare(2)), and what of it an image cannot have.
fn of_its_own((pid, face): (i32, i32), tid: i32, rules: Rules) -> Option<(&'static str, String)> {
    // A leader that has ended has nothing to compare with, and is named by itself.
    let apart = |what| tid != pid && tid != face && kcmp::shared(face, tid, what) == Ok(false);
    if apart(Shared::Files) {
        return Some(("tree", format!("thread {tid} has a descriptor table of its own (unshare)")));
    }
    if !apart(Shared::Fs) {
        return None;
    }
    if rules == Rules::Homed {
        return Some(("tree", format!("thread {tid} has a working directory of its own (unshare)")));
    }
    let of = |tid: i32, name: &str| fs::read_link(format!("/proc/{tid}/{name}")).ok();
    if of(tid, "root") != of(face, "root") {
        return Some(("tree", format!("thread {tid} has a root of its own (chroot)")));
    }
    let others = proc::pids().into_iter().filter(|&other| other != pid);
    let sharer = others
        .flat_map(|other| proc::tids(other).unwrap_or_default())
        .find(|&other| kcmp::shared(tid, other, Shared::Fs) == Ok(true))?;
    // Threads that share a directory with each other are made by each other; processes by their parents.
    let what =
        format!("thread {tid} shares its own working directory with thread {sharer} of another process");
    Some(("tree", what))
}

/// The same of an image.
pub fn image_threads(image: &ProcessImage, rules: Rules, blockers: &mut Vec<Blocker>) {
    let asks = |filter: &FilterImage| filter.program.chunks_exact(8).any(asks_a_supervisor);
    if image.seccomp.filters.iter().any(asks) {
        let what = "its seccomp filter asks a supervisor (SECCOMP_RET_USER_NOTIF)".into();
        blockers.push(Blocker { kind: "kernel", what });
    }
    if rules == Rules::Homed {
        if image.threads.iter().any(|thread| thread.seccomp_mode != 0) {
            blockers.push(Blocker { kind: "kernel", what: OWN_FILTER.into() });
        }
        if let Some((with, _, what)) = image.shares.each().into_iter().find(|&(with, ..)| with != 0) {
            let what = format!("it shares {what} with process {with}");
            blockers.push(Blocker { kind: "tree", what });
        }
        if let Some(thread) = image.threads.iter().find(|thread| thread.apart != ApartImage::default()) {
            let what = format!("thread {} has a working directory of its own (unshare)", thread.tid);
            blockers.push(Blocker { kind: "tree", what });
        }
        if let Some(thread) = image.threads.iter().find(|thread| thread.creds.is_some()) {
            let what = format!("thread {} has other credentials than the process", thread.tid);
            blockers.push(Blocker { kind: "identity", what });
        }
    }
}

/// An instruction that returns `SECCOMP_RET_USER_NOTIF`.
fn asks_a_supervisor(instruction: &[u8]) -> bool {
    const RETURN: [u8; 2] = [0x06, 0];
    const USER_NOTIF: [u8; 2] = [0xc0, 0x7f];
    instruction[..2] == RETURN && instruction[6..8] == USER_NOTIF
}

const OWN_FILTER: &str = "it has a seccomp filter of its own";

/// Whether this program may read and suspend other processes' filters (ptrace(2),
/// `PTRACE_O_SUSPEND_SECCOMP`).
fn may_suspend_filters() -> bool {
    const CAP_SYS_ADMIN: u64 = 1 << 21;
    Status::read(std::process::id() as i32).is_ok_and(|own| {
        own.decimal("Seccomp") == Some(0) && own.mask("CapEff").unwrap_or(0) & CAP_SYS_ADMIN != 0
    })
}

fn of_thread(tid: i32, thread: &Status, process: &Status, rules: Rules) -> Option<(&'static str, String)> {
    match thread.decimal("TracerPid") {
        Some(0) | None => {}
        Some(tracer) => {
            return Some(("kernel", format!("it is traced by process {tracer} (a debugger or strace)")));
        }
    }
    match thread.decimal("Seccomp") {
        Some(0) | None => {}
        Some(_) if rules == Rules::Standalone && may_suspend_filters() => {}
        Some(_) if rules == Rules::Standalone => {
            let what = "it has a seccomp filter, which takes CAP_SYS_ADMIN and no filter here to read";
            return Some(("kernel", what.into()));
        }
        Some(1) => return Some(("kernel", "it is in seccomp's strict mode".into())),
        Some(_) => return Some(("kernel", OWN_FILTER.into())),
    }
    if thread.line("x86_Thread_features").is_some_and(|line| line.contains("shstk")) {
        return Some(("cpu", "it has a shadow stack (CET), which is not carried".into()));
    }
    if rules == Rules::Standalone {
        return None;
    }
    let different = SAME_IN_ALL.into_iter().find(|key| thread.line(key) != process.line(key))?;
    Some(("identity", format!("thread {tid} has other credentials than the process ({different})")))
}

fn keeps_waiting(tid: i32) -> bool {
    let waits = |_| {
        std::thread::sleep(BETWEEN_LOOKS);
        Status::read(tid).is_ok_and(|status| status.state() == 'D')
    };
    (0..LOOKS).all(waits) && (!is_in_vfork(tid) || (0..LOOKS_IN_VFORK).all(waits))
}

/// Whether a thread that waits uninterruptibly waits for a child that it has lent its memory (vfork(2)).
pub fn is_in_vfork(tid: i32) -> bool {
    const CALLS: [libc::c_long; 3] = [libc::SYS_vfork, libc::SYS_clone, libc::SYS_clone3];
    let text = proc::read(tid, "syscall").unwrap_or_default();
    let number = String::from_utf8_lossy(&text).split(' ').next().and_then(|word| word.parse().ok());
    number.is_some_and(|number| CALLS.contains(&number))
}
