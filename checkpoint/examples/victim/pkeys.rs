//! Protection keys (pkeys(7)), execute-only memory, and code that is written and then protected.

use crate::calls::{PAGE, fill, is_filled, map, ok};
use crate::{Meeting, same};
use std::arch::asm;
use std::sync::atomic::{AtomicBool, Ordering};

const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
const PRIVATE: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
const SHARED: i32 = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
const NO_ACCESS: u64 = 1;
const NO_WRITE: u64 = 2;

fn pkru() -> u32 {
    let value: u32;
    // SAFETY: reads a register; this case runs only where there is one.
    unsafe { asm!("rdpkru", in("ecx") 0, out("eax") value, out("edx") _) };
    value
}

fn set_pkru(value: u32) {
    // SAFETY: key 0, which everything else has, stays allowed.
    unsafe { asm!("wrpkru", in("eax") value & !3, in("ecx") 0, in("edx") 0) };
}

fn allocate(rights: u64) -> i64 {
    // SAFETY: no pointers.
    unsafe { libc::syscall(libc::SYS_pkey_alloc, 0, rights) }
}

fn free(key: i64) {
    // SAFETY: no pointers.
    ok("pkey_free", unsafe { libc::syscall(libc::SYS_pkey_free, key) });
}

fn protect(at: *mut u8, prot: i32, key: i64) {
    // SAFETY: pages that this test has mapped.
    ok("pkey_mprotect", unsafe { libc::syscall(libc::SYS_pkey_mprotect, at, 4 * PAGE, prot, key) });
}

/// The key of every mapping that has one, and its protection.
fn keys() -> Vec<String> {
    let text = std::fs::read_to_string("/proc/self/smaps").expect("smaps");
    let mut range = String::new();
    let mut out = Vec::new();
    for line in text.lines() {
        match line.strip_prefix("ProtectionKey:") {
            Some(key) if key.trim() != "0" => out.push(format!("{range} {}", key.trim())),
            None if line.split_once('-').is_some_and(|(start, _)| u64::from_str_radix(start, 16).is_ok()) => {
                range = line.split_ascii_whitespace().take(2).collect::<Vec<_>>().join(" ");
            }
            _ => {}
        }
    }
    out
}

/// All keys that can still be had.
fn free_keys() -> Vec<i64> {
    let keys: Vec<i64> = std::iter::from_fn(|| Some(allocate(0)).filter(|&key| key > 0)).collect();
    keys.iter().for_each(|&key| free(key));
    keys
}

static GO_ON: AtomicBool = AtomicBool::new(false);

/// With `family`, a child beside it has other keys.
pub fn run(meeting: &Meeting, family: bool) {
    let [first, closed, freed, constant] =
        [allocate(0), allocate(NO_ACCESS), allocate(0), allocate(NO_WRITE)];
    assert_eq!([first, closed, freed, constant], [1, 2, 3, 4], "this CPU has protection keys");
    let memory: Vec<*mut u8> = (0..4).map(|_| map(0, 8, RW, PRIVATE, -1)).collect();
    let shared = map(0, 4, RW, SHARED, -1);
    set_pkru(0);
    for (n, &at) in memory.iter().chain([&shared]).enumerate() {
        fill(at, 4 * PAGE, n as u64);
    }
    protect(memory[0], RW, closed);
    protect(memory[1], libc::PROT_READ, freed);
    protect(shared, RW, constant);
    free(freed);
    free(first);
    // mov eax, 42; ret. Execute-only memory takes the lowest key that is free.
    let code = [0xb8, 42, 0, 0, 0, 0xc3];
    for &at in &memory[2..] {
        // SAFETY: the mapping is writable and larger.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), at, code.len()) };
    }
    protect(memory[2], libc::PROT_EXEC, constant);
    // SAFETY: pages that this test has mapped.
    ok("mprotect", unsafe { libc::mprotect(memory[3].cast(), 4 * PAGE, libc::PROT_EXEC) });
    let rights = pkru() | 1 << (2 * closed) | 2 << (2 * constant) | 3 << 20;
    set_pkru(rights);
    let other = std::thread::spawn(move || {
        set_pkru(rights ^ 3 << 22);
        while !GO_ON.load(Ordering::SeqCst) {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        pkru() == (rights ^ 3 << 22) & !3
    });
    let before = keys();
    let free_before = free_keys();
    set_pkru(rights);
    let child = if family { Some(child(meeting, memory[0], closed)) } else { None };
    meeting.pause();
    same("PKRU", pkru(), rights & !3);
    same("keys", keys(), before);
    for &at in &memory[2..] {
        // SAFETY: the code above.
        let call: extern "C" fn() -> i32 = unsafe { std::mem::transmute(at) };
        same("code that can only be executed", call(), 42);
    }
    GO_ON.store(true, Ordering::SeqCst);
    same("PKRU of a thread", other.join().expect("ends"), true);
    same("keys that are free", free_keys(), free_before);
    set_pkru(0);
    same("closed memory", is_filled(memory[0], 4 * PAGE, 0), true);
    same("memory with a freed key", is_filled(memory[1], 4 * PAGE, 1), true);
    same("shared memory", is_filled(shared, 4 * PAGE, 4), true);
    if let Some(child) = child {
        let mut status = 0;
        // SAFETY: our child; `status` outlives the call.
        ok("waitpid", unsafe { libc::waitpid(child, &raw mut status, 0) });
        same("the child", status, 0);
    }
}

/// It has allocated a key more, freed one, and gives its copy of the memory at `at` another one.
fn child(meeting: &Meeting, at: *mut u8, freed: i64) -> i32 {
    // SAFETY: the child uses this program's memory by itself: there is a thread, which holds no lock.
    let pid = ok("fork", unsafe { libc::fork() });
    if pid != 0 {
        while !meeting.dir.join("child").exists() {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        return pid;
    }
    // 3 is the lowest that is free.
    let own = allocate(0);
    protect(at, libc::PROT_READ, own);
    free(freed);
    let (before, free_before, rights) = (keys(), free_keys(), 0x0055_5540);
    set_pkru(rights);
    std::fs::write(meeting.dir.join("child"), b"").expect("tells that it is ready");
    meeting.await_go();
    let mut good = pkru() == rights && keys() == before && free_keys() == free_before;
    set_pkru(0);
    good &= is_filled(at, 4 * PAGE, 0);
    // SAFETY: ends this process and nothing else.
    unsafe { libc::_exit(i32::from(!good)) }
}
