//! Settings that no file of `/proc` tells: of the process, and of a thread that has others.

use crate::calls::{PAGE, map, ok};
use crate::{Meeting, same};
use std::sync::mpsc::channel;

const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
const PRIVATE: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
/// linux/prctl.h.
const PR_SET_IO_FLUSHER: i32 = 57;
const PR_SET_MDWE: i32 = 65;
const PR_SET_MEMORY_MERGE: i32 = 67;
const MPOL_BIND: usize = 2;
const MPOL_INTERLEAVE: usize = 3;

fn prctl(option: i32, value: u64, more: u64) -> i32 {
    // SAFETY: none of the options used takes a pointer.
    unsafe { libc::prctl(option, value, more, 0, 0) }
}

fn arch_prctl(option: u64, value: u64) -> i64 {
    // SAFETY: none of the options used takes a pointer.
    unsafe { libc::syscall(libc::SYS_arch_prctl, option, value) }
}

/// Mode and nodes of the thread's policy, or of the memory at an address.
fn policy(at: usize) -> (i32, u64) {
    let (mut mode, mut nodes) = (0i32, [0u64; 16]);
    let flags = if at == 0 { 0 } else { 2 };
    // SAFETY: both outlive the call; 1024 bits are there.
    let got =
        unsafe { libc::syscall(libc::SYS_get_mempolicy, &raw mut mode, nodes.as_mut_ptr(), 1024, at, flags) };
    (if got == 0 { mode } else { -1 }, nodes[0])
}

/// What holds of the thread that asks.
fn of_thread() -> Vec<String> {
    let mut tsc = 0i32;
    // SAFETY: `tsc` outlives the call; the others take no pointers.
    let personality = unsafe {
        libc::prctl(libc::PR_GET_TSC, &raw mut tsc, 0, 0, 0);
        libc::personality(0xffff_ffff)
    };
    // Of a CPU that cannot, -1.
    let speculation: Vec<i32> = (0..3).map(|which| prctl(52, which, 0)).collect();
    vec![
        format!("personality {personality:x}, policy {:?}, tsc {tsc}", policy(0)),
        format!("cpuid {}, speculation {speculation:?}", arch_prctl(0x1011, 0)),
        format!("failures {}, flusher {}", prctl(libc::PR_MCE_KILL_GET, 0, 0), prctl(58, 0, 0)),
    ]
}

fn locked(at: *const u8) -> String {
    let text = std::fs::read_to_string("/proc/self/smaps").expect("smaps");
    let start = format!("{:x}-", at as usize);
    let mut lines = text.lines().skip_while(|line| !line.starts_with(&start));
    let flags = lines.find_map(|line| line.strip_prefix("VmFlags:")).unwrap_or_default();
    ["lo", "lf"].into_iter().filter(|flag| flags.split(' ').any(|word| word == *flag)).collect()
}

pub fn run(meeting: &Meeting) {
    let bound = map(0, 8, RW, PRIVATE, -1);
    let node = 1u64;
    // SAFETY: this test's mapping, and a mask that outlives the calls.
    unsafe {
        let mask = &raw const node;
        ok("mbind", libc::syscall(libc::SYS_mbind, bound, 8 * PAGE, MPOL_BIND, mask, 64, 0));
        ok("set_mempolicy", libc::syscall(libc::SYS_set_mempolicy, MPOL_INTERLEAVE, mask, 64));
        ok("mlockall", libc::mlockall(libc::MCL_FUTURE | libc::MCL_ONFAULT));
    }
    ok("PR_SET_MEMORY_MERGE", prctl(PR_SET_MEMORY_MERGE, 1, 0));
    // Only this kernel or later has the second kind.
    if prctl(libc::PR_SET_THP_DISABLE, 1, 2) != 0 {
        ok("PR_SET_THP_DISABLE", prctl(libc::PR_SET_THP_DISABLE, 1, 0));
    }
    let (told, ready) = channel();
    let (let_go, go) = channel::<()>();
    let other = std::thread::spawn(move || {
        // SAFETY: plain calls on this thread.
        unsafe { libc::personality(0x0020000) };
        ok("PR_SET_TSC", prctl(libc::PR_SET_TSC, libc::PR_TSC_SIGSEGV as u64, 0));
        ok("PR_MCE_KILL", prctl(libc::PR_MCE_KILL, libc::PR_MCE_KILL_SET as u64, 1));
        // Not without CAP_SYS_RESOURCE.
        prctl(PR_SET_IO_FLUSHER, 1, 0);
        // Not every CPU can.
        arch_prctl(0x1012, 0);
        prctl(53, 0, 4);
        let before = of_thread();
        told.send(()).expect("somebody listens");
        // Without a time-out: the clock's vDSO reads the time-stamp counter.
        let _ = go.recv();
        (before, of_thread())
    });
    ready.recv().expect("it is ready");
    ok("PR_SET_MDWE", prctl(PR_SET_MDWE, 1, 0));
    let group = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let describe = || {
        let mut all = of_thread();
        let fresh = map(0, 4, RW, PRIVATE, -1);
        // SAFETY: asks for memory that can be written and executed; made above, and given back.
        let both = unsafe {
            let got = libc::mmap(std::ptr::null_mut(), PAGE, RW | libc::PROT_EXEC, PRIVATE, -1, 0);
            let locked = locked(fresh);
            libc::munmap(fresh.cast(), 4 * PAGE);
            all.push(format!("fresh memory is {locked}"));
            got != libc::MAP_FAILED
        };
        all.push(format!("writable code {both}, mdwe {}", prctl(66, 0, 0)));
        all.push(format!("merge {}, huge {}", prctl(68, 0, 0), prctl(libc::PR_GET_THP_DISABLE, 0, 0)));
        all.push(format!("memory's policy {:?}", policy(bound as usize)));
        all
    };
    let before = describe();
    assert_eq!(before[3..5], ["fresh memory is lolf", "writable code false, mdwe 1"]);
    meeting.pause();
    for (found, wanted) in describe().into_iter().zip(before) {
        same("a setting", found, wanted);
    }
    same("control groups", std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default(), group);
    drop(let_go);
    let (before, after) = other.join().expect("ends");
    for (found, wanted) in after.into_iter().zip(before) {
        same("a setting of a thread", found, wanted);
    }
}
