//! Whom a process knows and who it is: relatives, tracers, namespaces, threads.

use super::Blocker;
use super::relations::Relation;
use crate::proc::{
    self,
    status::{Stat, Status},
};
use crate::sys::kcmp::{self, Shared};
use std::fs;
use std::time::Duration;

/// Threads looked at.
const MAX_THREADS: usize = 16_384;
/// A thread that waits uninterruptibly is looked at so often before it counts: reading from a disk is
/// such a wait too, and short.
const LOOKS: usize = 5;
const BETWEEN_LOOKS: Duration = Duration::from_millis(10);

/// What is no running program, and has nothing to look at.
pub fn not_a_program(pid: i32, status: &Status) -> Option<Blocker> {
    let others = proc::tids(pid).map_or(0, |tids| tids.len());
    let what = match status.state() {
        'Z' if others > 1 => {
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
    matches!(status.state(), 'Z' | 'X') && proc::tids(pid).map_or(0, |tids| tids.len()) <= 1
}

/// The children of all its threads, zombies too.
pub fn children(pid: i32) -> Vec<i32> {
    let of_thread = |tid: i32| {
        let text = fs::read_to_string(format!("/proc/{pid}/task/{tid}/children")).unwrap_or_default();
        text.split_ascii_whitespace().filter_map(|word| word.parse().ok()).collect::<Vec<i32>>()
    };
    proc::tids(pid).unwrap_or_default().into_iter().flat_map(of_thread).collect()
}

/// Sessions and groups of these processes; those that have ended are left out.
pub fn relations(family: &[i32]) -> Vec<Relation> {
    let of_one = |&pid: &i32| {
        let stat = Stat::read(pid).ok()?;
        let number = |n| stat.number(n).map(|number| number as i32);
        Some(Relation { pid, ppid: number(4)?, pgid: number(5)?, sid: number(6)? })
    };
    family.iter().filter_map(of_one).collect()
}

/// A process and its descendants, parents first; at most one more than an image may hold.
pub fn descendants(root: i32) -> Vec<i32> {
    let mut family = vec![root];
    let mut at = 0;
    while at < family.len() && family.len() <= crate::image::MAX_PROCESSES {
        let children = children(family[at]);
        family.extend(children.into_iter().filter(|child| !family.contains(child)).collect::<Vec<i32>>());
        at += 1;
    }
    family
}

/// Children that are not of the family, and what is shared with other processes.
pub fn relatives(pid: i32, status: &Status, family: &[i32], blockers: &mut Vec<Blocker>) {
    let children: Vec<i32> = children(pid).into_iter().filter(|child| !family.contains(child)).collect();
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
    for other in proc::pids().into_iter().filter(|&other| other != pid) {
        for (shared, name) in [
            (Shared::Memory, "its memory (vfork or clone)"),
            (Shared::Files, "its descriptor table"),
            (Shared::Fs, "its working directory"),
        ] {
            if kcmp::shared(pid, other, shared).unwrap_or(false) {
                let whom = if other == parent { "its parent, process" } else { "process" };
                let what = format!("it shares {name} with {whom} {other}");
                blockers.push(Blocker { kind: "tree", what });
            }
        }
    }
}

/// Namespaces other than ours, and a root other than theirs.
pub fn surroundings(pid: i32, blockers: &mut Vec<Blocker>) {
    let name_of = |whose: &str, name: &str| fs::read_link(format!("/proc/{whose}/ns/{name}")).ok();
    let theirs = pid.to_string();
    for name in ["mnt", "pid", "net", "ipc", "user", "uts", "time"] {
        if let (Some(theirs), Some(ours)) = (name_of(&theirs, name), name_of("self", name))
            && theirs != ours
        {
            let what = format!("it is in another {name} namespace (a container?)");
            blockers.push(Blocker { kind: "namespace", what });
        }
    }
    for (now, later) in [("pid", "pid_for_children"), ("time", "time_for_children")] {
        if let (Some(now_is), Some(later)) = (name_of(&theirs, now), name_of(&theirs, later))
            && now_is != later
        {
            let what = format!("its children will be in another {now} namespace (unshare)");
            blockers.push(Blocker { kind: "namespace", what });
        }
    }
    if let Ok(root) = proc::link(pid, "root")
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

/// What must be the same in every thread: one image holds one set of credentials.
const SAME_IN_ALL: [&str; 9] =
    ["Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs"];

/// What single threads have: tracers, filters, credentials, long waits.
pub fn threads(pid: i32, status: &Status, blockers: &mut Vec<Blocker>) {
    let tids = proc::tids(pid).unwrap_or_default();
    let mut waiting = Vec::new();
    for tid in tids.into_iter().take(MAX_THREADS) {
        // One that has ended meanwhile has nothing.
        let Ok(thread) = Status::read(tid) else { continue };
        if thread.state() == 'D' {
            waiting.push(tid);
        }
        if let Some((kind, what)) = of_thread(tid, &thread, status) {
            // One is enough: the others are mostly alike.
            blockers.push(Blocker { kind, what });
            break;
        }
    }
    if let Some(tid) = waiting.into_iter().find(|&tid| keeps_waiting(tid)) {
        let place = fs::read_to_string(format!("/proc/{tid}/wchan")).unwrap_or_default();
        let what = format!("thread {tid} is in an uninterruptible wait ({})", place.trim());
        blockers.push(Blocker { kind: "kernel", what });
    }
}

fn of_thread(tid: i32, thread: &Status, process: &Status) -> Option<(&'static str, String)> {
    match thread.decimal("TracerPid") {
        Some(0) | None => {}
        Some(tracer) => {
            return Some(("kernel", format!("it is traced by process {tracer} (a debugger or strace)")));
        }
    }
    match thread.decimal("Seccomp") {
        Some(0) | None => {}
        Some(1) => return Some(("kernel", "it is in seccomp's strict mode".into())),
        Some(_) => return Some(("kernel", "it has a seccomp filter of its own".into())),
    }
    if thread.line("x86_Thread_features").is_some_and(|line| line.contains("shstk")) {
        return Some(("cpu", "it has a shadow stack (CET), which is not carried".into()));
    }
    let different = SAME_IN_ALL.into_iter().find(|key| thread.line(key) != process.line(key))?;
    Some(("identity", format!("thread {tid} has other credentials than the process ({different})")))
}

fn keeps_waiting(tid: i32) -> bool {
    (0..LOOKS).all(|_| {
        std::thread::sleep(BETWEEN_LOOKS);
        Status::read(tid).is_ok_and(|status| status.state() == 'D')
    })
}
