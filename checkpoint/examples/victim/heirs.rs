//! What a thread has of the one that made it, and what it has set itself: each thread is another way in one thing.

use crate::calls::{ok, status};
use crate::{Meeting, same};
use std::sync::{Arc, Barrier};

const PR_GET_TID_ADDRESS: i32 = 40;
const SECBIT_NOROOT: u64 = 1;
const MPOL_INTERLEAVE: usize = 3;
const STATUS: [&str; 10] =
    ["Name", "Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs"];
/// What threads do.
const WAYS: [&str; 14] = [
    "nothing",
    "named like the leader",
    "named",
    "no alternate stack",
    "usual slack",
    "other slack",
    "usual personality",
    "other personality",
    "policy",
    "tsc",
    "failures",
    "user",
    "bounds",
    "no new privileges",
];

fn prctl(option: i32, value: u64, more: u64) -> i32 {
    // SAFETY: none of the options used with it takes a pointer.
    unsafe { libc::prctl(option, value, more, 0, 0) }
}

/// Everything of the calling thread, in words.
fn describe() -> Vec<String> {
    let mut all: Vec<String> = STATUS.iter().map(|key| format!("{key} {}", status(key))).collect();
    let (mut tsc, mut address, mut mode, mut nodes) = (0i32, 0u64, 0i32, [0u64; 16]);
    let (mut head, mut length) = (0u64, 0u64);
    // SAFETY: everything outlives the calls; 1024 bits are there.
    unsafe {
        let mut stack: libc::stack_t = std::mem::zeroed();
        ok("sigaltstack", libc::sigaltstack(std::ptr::null(), &raw mut stack));
        ok("PR_GET_TSC", libc::prctl(libc::PR_GET_TSC, &raw mut tsc, 0, 0, 0));
        // Not in every kernel.
        libc::prctl(PR_GET_TID_ADDRESS, &raw mut address, 0, 0, 0);
        libc::syscall(libc::SYS_get_mempolicy, &raw mut mode, nodes.as_mut_ptr(), 1024, 0, 0);
        libc::syscall(libc::SYS_get_robust_list, 0, &raw mut head, &raw mut length);
        all.push(format!("stack {:?} {} {}", stack.ss_sp, stack.ss_flags, stack.ss_size));
        all.push(format!("thread {} personality {:x}", libc::gettid(), libc::personality(0xffff_ffff)));
    }
    all.push(format!("tsc {tsc} tid address {address:x} robust list {head:x} {length}"));
    all.push(format!("policy {mode} {:x} failures {}", nodes[0], prctl(libc::PR_MCE_KILL_GET, 0, 0)));
    let (slack, bits) = (prctl(libc::PR_GET_TIMERSLACK, 0, 0), prctl(libc::PR_GET_SECUREBITS, 0, 0));
    all.push(format!("slack {slack} secure bits {bits}"));
    all.push(format!("directory {:?}", std::env::current_dir().ok()));
    all
}

fn name(name: &std::ffi::CStr) {
    // SAFETY: a text with its NUL.
    ok("PR_SET_NAME", unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) });
}

fn set(way: &str) {
    let nobody = 65534;
    // SAFETY: plain calls for this thread alone; what they point to outlives them.
    unsafe {
        match way {
            "named like the leader" => name(c"the leader"),
            "named" => name(c"another (name)"),
            "no alternate stack" => {
                let mut none: libc::stack_t = std::mem::zeroed();
                none.ss_flags = libc::SS_DISABLE;
                ok("sigaltstack", libc::sigaltstack(&raw const none, std::ptr::null_mut()));
            }
            "usual slack" => drop(prctl(libc::PR_SET_TIMERSLACK, 50_000, 0)),
            "other slack" => drop(prctl(libc::PR_SET_TIMERSLACK, 123_456, 0)),
            "usual personality" => drop(libc::personality(0)),
            "other personality" => drop(libc::personality(0x0020000)),
            "policy" => {
                let node = 1u64;
                let got = libc::syscall(libc::SYS_set_mempolicy, MPOL_INTERLEAVE, &raw const node, 64);
                ok("set_mempolicy", got);
            }
            // Nothing that it waits in reads the clock.
            "tsc" => drop(prctl(libc::PR_SET_TSC, libc::PR_TSC_SIGSEGV as u64, 0)),
            "failures" => drop(prctl(libc::PR_MCE_KILL, libc::PR_MCE_KILL_SET as u64, 1)),
            "user" => {
                ok("PR_SET_SECUREBITS", prctl(libc::PR_SET_SECUREBITS, SECBIT_NOROOT, 0));
                ok("setgroups", libc::syscall(libc::SYS_setgroups, 2, [4u32, 27].as_ptr()));
                ok("setresgid", libc::syscall(libc::SYS_setresgid, nobody, nobody, nobody));
                ok("setresuid", libc::syscall(libc::SYS_setresuid, nobody, 0, nobody));
            }
            "bounds" => drop(prctl(libc::PR_CAPBSET_DROP, 21, 0)),
            "no new privileges" => drop(prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0)),
            _ => {}
        }
    }
}

/// One that stands in a futex while it is saved.
fn heir(way: &'static str, barrier: Arc<Barrier>) {
    set(way);
    let before = describe();
    barrier.wait();
    barrier.wait();
    for (found, wanted) in describe().into_iter().zip(before) {
        same(way, found, wanted);
    }
}

/// Threads with a directory that is not the leader's: the first has made the second.
fn apart(barrier: Arc<Barrier>) {
    // SAFETY: for this thread alone.
    ok("unshare", unsafe { libc::unshare(libc::CLONE_FS) });
    std::env::set_current_dir("/proc").expect("enters /proc");
    name(c"apart");
    prctl(libc::PR_SET_TIMERSLACK, 77_777, 0);
    let its = barrier.clone();
    let second = std::thread::spawn(move || heir("with who is apart", its));
    heir("apart", barrier);
    second.join().expect("it ends");
}

/// `differs`: the leader is another way than whoever restores it.
pub fn run(meeting: &Meeting, differs: bool) {
    name(c"the leader");
    if differs {
        prctl(libc::PR_SET_TIMERSLACK, 99_999, 0);
        // SAFETY: no pointers.
        ok("personality", unsafe { libc::personality(0x0040000) });
        ok("PR_CAPBSET_DROP", prctl(libc::PR_CAPBSET_DROP, 22, 0));
        // SAFETY: the groups outlive the call.
        ok("setgroups", unsafe { libc::setgroups(1, [4].as_ptr()) });
        ok("PR_SET_NO_NEW_PRIVS", prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0));
    }
    let barrier = Arc::new(Barrier::new(WAYS.len() + 3));
    let start = |way: &'static str| {
        let barrier = barrier.clone();
        std::thread::spawn(move || heir(way, barrier))
    };
    let mut threads: Vec<_> = WAYS.into_iter().map(start).collect();
    let its = barrier.clone();
    threads.push(std::thread::spawn(move || apart(its)));
    let before = describe();
    barrier.wait();
    meeting.pause();
    for (found, wanted) in describe().into_iter().zip(before) {
        same("the leader", found, wanted);
    }
    barrier.wait();
    for thread in threads {
        thread.join().expect("a thread ends");
    }
}
