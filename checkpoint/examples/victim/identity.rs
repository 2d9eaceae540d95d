//! Who it is and where: everything that `/proc` and the kernel tell about a process.

use crate::calls::{ok, status};
use crate::{Meeting, same};
use std::mem::zeroed;

const STATUS: [&str; 14] = [
    "Name",
    "Umask",
    "Uid",
    "Gid",
    "Groups",
    "CapInh",
    "CapPrm",
    "CapEff",
    "CapBnd",
    "CapAmb",
    "NoNewPrivs",
    "SigBlk",
    "SigIgn",
    "Cpus_allowed",
];

fn proc(name: &str) -> Vec<u8> {
    std::fs::read(format!("/proc/self/{name}")).unwrap_or_default()
}

fn link(name: &str) -> String {
    std::fs::read_link(format!("/proc/self/{name}"))
        .map(|path| path.display().to_string())
        .unwrap_or_default()
}

fn prctl(option: i32) -> i32 {
    // SAFETY: these options take no pointers.
    unsafe { libc::prctl(option, 0, 0, 0, 0) }
}

/// Everything, in words.
fn describe() -> Vec<String> {
    let mut all: Vec<String> = STATUS.iter().map(|key| format!("{key} {}", status(key))).collect();
    for name in ["cmdline", "environ", "auxv", "limits", "oom_score_adj", "coredump_filter", "personality"] {
        let bytes = proc(name);
        // A user without rights cannot read these of a process that is not dumpable.
        all.push(format!("{name} {}", String::from_utf8_lossy(&bytes)));
    }
    all.push(format!("exe {} cwd {} root {}", link("exe"), link("cwd"), link("root")));
    for option in [
        libc::PR_GET_DUMPABLE,
        libc::PR_GET_SECUREBITS,
        libc::PR_GET_TIMERSLACK,
        libc::PR_GET_KEEPCAPS,
        libc::PR_GET_THP_DISABLE,
    ] {
        all.push(format!("prctl {option} {}", prctl(option)));
    }
    let (mut subreaper, mut death) = (0i32, 0i32);
    // SAFETY: both outlive the calls; the others take no pointers.
    unsafe {
        libc::prctl(libc::PR_GET_CHILD_SUBREAPER, &raw mut subreaper, 0, 0, 0);
        libc::prctl(libc::PR_GET_PDEATHSIG, &raw mut death, 0, 0, 0);
        all.push(format!("subreaper {subreaper} death {death}"));
        all.push(format!("nice {}", libc::getpriority(libc::PRIO_PROCESS, 0)));
        all.push(format!("policy {}", libc::sched_getscheduler(0)));
        all.push(format!("I/O {}", libc::syscall(libc::SYS_ioprio_get, 1, 0)));
        all.push(format!("pid {} {}", libc::getpid(), libc::gettid()));
    }
    all.push(format!("fields {}", stat_fields()));
    all
}

/// Start and end of code, stack, data, heap, arguments, environment (proc_pid_stat(5)).
fn stat_fields() -> String {
    let text = String::from_utf8_lossy(&proc("stat")).into_owned();
    let tail: Vec<&str> =
        text.rsplit_once(')').map_or("", |(_, tail)| tail).split_ascii_whitespace().collect();
    [26, 27, 28, 45, 46, 47, 48, 49, 50, 51].map(|n: usize| tail.get(n - 3).copied().unwrap_or("?")).join(" ")
}

pub fn run(meeting: &Meeting, nobody: bool) {
    std::env::set_current_dir(&meeting.dir).expect("enters the directory");
    // SAFETY: plain calls of the kernel on this process.
    unsafe {
        libc::umask(0o027);
        let limit = |resource, soft, hard| {
            let limit = libc::rlimit { rlim_cur: soft, rlim_max: hard };
            ok("setrlimit", libc::setrlimit(resource, &raw const limit));
        };
        limit(libc::RLIMIT_NOFILE, 700, 900);
        limit(libc::RLIMIT_CORE, 0, 0);
        limit(libc::RLIMIT_STACK, 4 << 20, 16 << 20);
        libc::prctl(libc::PR_SET_NAME, c"a (b) name".as_ptr());
        libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
        libc::prctl(libc::PR_SET_TIMERSLACK, 123_456, 0, 0, 0);
        libc::personality(0x0040000);
        ok("setpriority", libc::setpriority(libc::PRIO_PROCESS, 0, 7));
        let parameters: libc::sched_param = zeroed();
        ok("sched_setscheduler", libc::sched_setscheduler(0, libc::SCHED_BATCH, &raw const parameters));
        let mut cpus: libc::cpu_set_t = zeroed();
        libc::CPU_SET(0, &mut cpus);
        ok("sched_setaffinity", libc::sched_setaffinity(0, size_of_val(&cpus), &raw const cpus));
        // Best effort, level 6.
        ok("ioprio_set", libc::syscall(libc::SYS_ioprio_set, 1, 0, 2 << 13 | 6));
        std::fs::write("/proc/self/oom_score_adj", "321").expect("oom_score_adj");
        std::fs::write("/proc/self/coredump_filter", "0x7").expect("coredump_filter");
        ok("PR_CAPBSET_DROP", libc::prctl(libc::PR_CAPBSET_DROP, 22, 0, 0, 0));
        let groups = [4, 27, 1000];
        ok("setgroups", libc::setgroups(3, groups.as_ptr()));
        if nobody {
            ok("setresgid", libc::setresgid(65534, 65533, 65532));
            ok("setresuid", libc::setresuid(65534, 65534, 65534));
            ok("PR_SET_NO_NEW_PRIVS", libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
        } else {
            libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0);
            libc::setfsgid(77);
        }
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGWINCH, 0, 0, 0);
    }
    let before = describe();
    meeting.pause();
    for (found, wanted) in describe().into_iter().zip(before) {
        same("a trait", found, wanted);
    }
}
