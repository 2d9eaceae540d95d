//! System-call filters and credentials of single threads.

use crate::calls::{ok, status};
use crate::{Meeting, fail, same};
use std::sync::mpsc;
use std::thread::JoinHandle;

const RET: u16 = 0x06;
const ALLOW: u32 = 0x7fff_0000;
const ERRNO: u32 = 0x0005_0000;
const TSYNC: u64 = 1;

/// A filter that answers one call with an errno, and allows all others.
fn forbid(nr: i64, errno: u32, flags: u64) -> i64 {
    let code = |code: u16, jt: u8, jf: u8, k: u32| libc::sock_filter { code, jt, jf, k };
    let mut program = [
        code(0x20, 0, 0, 0),
        code(0x15, 0, 1, nr as u32),
        code(RET, 0, 0, ERRNO | errno),
        code(RET, 0, 0, ALLOW),
    ];
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the program outlives the call.
    unsafe { libc::syscall(libc::SYS_seccomp, 1, flags, &raw const program) }
}

/// The errno of a call without arguments that matter.
fn errno_of(nr: i64) -> i32 {
    // SAFETY: what is called here takes no pointers.
    let got = unsafe { libc::syscall(nr, 0, 0, 0, 0) };
    if got < 0 { std::io::Error::last_os_error().raw_os_error().unwrap_or(0) } else { 0 }
}

/// A thread that prepares something, and checks when it is told to.
fn thread(
    prepare: impl FnOnce() + Send + 'static,
    check: impl FnOnce() + Send + 'static,
) -> (mpsc::Sender<()>, JoinHandle<()>) {
    let (go, wait) = mpsc::channel();
    let (tell, hear) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        prepare();
        tell.send(()).expect("told");
        wait.recv().expect("go");
        check();
    });
    hear.recv().expect("prepared");
    (go, thread)
}

fn end(threads: Vec<(mpsc::Sender<()>, JoinHandle<()>)>) {
    for (go, thread) in threads {
        go.send(()).expect("told");
        if thread.join().is_err() {
            fail("a thread has panicked");
        }
    }
}

/// Filters for all threads, for one, and none of restart_syscall(2), which a filter may not know.
pub fn filters(meeting: &Meeting) {
    // SAFETY: no pointers.
    ok("PR_SET_NO_NEW_PRIVS", unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) });
    let mine = || {
        same("getpriority", errno_of(libc::SYS_getpriority), 71);
        same("restart_syscall", errno_of(libc::SYS_restart_syscall), 73);
        same("Seccomp", status("Seccomp"), "2".to_string());
        same("NoNewPrivs", status("NoNewPrivs"), "1".to_string());
    };
    let before = thread(
        || (),
        move || {
            mine();
            same("getpgid", errno_of(libc::SYS_getpgid), 0);
            same("Seccomp_filters", status("Seccomp_filters"), "2".to_string());
        },
    );
    ok("seccomp", forbid(libc::SYS_getpriority, 71, TSYNC));
    ok("seccomp", forbid(libc::SYS_restart_syscall, 73, TSYNC));
    let own = thread(
        || {
            ok("seccomp", forbid(libc::SYS_getpgid, 72, 0));
        },
        move || {
            mine();
            same("getpgid", errno_of(libc::SYS_getpgid), 72);
            same("Seccomp_filters", status("Seccomp_filters"), "3".to_string());
        },
    );
    let sleeper = thread(|| (), || ());
    let sleeps = std::thread::spawn(|| {
        let time = libc::timespec { tv_sec: 4, tv_nsec: 0 };
        // SAFETY: the time outlives the call; the remainder may be null.
        same("a sleep", unsafe { libc::nanosleep(&raw const time, std::ptr::null_mut()) }, 0);
    });
    meeting.pause();
    mine();
    if sleeps.join().is_err() {
        fail("a thread has panicked");
    }
    end(vec![before, sleeper]);
    // One thread has a filter that we have not.
    same("TSYNC", forbid(libc::SYS_getsid, 74, TSYNC) > 0, true);
    end(vec![own]);
    ok("seccomp", forbid(libc::SYS_getsid, 74, TSYNC));
    same("getsid", errno_of(libc::SYS_getsid), 74);
}

/// Nothing but read, write and exit is allowed; another thread waits and ends the process.
pub fn strict(meeting: &Meeting) {
    let mut ends = [0; 2];
    // SAFETY: room for two.
    ok("pipe", unsafe { libc::pipe(ends.as_mut_ptr()) });
    let [reading, writing] = ends;
    let (tell, hear) = mpsc::channel();
    std::thread::spawn(move || {
        tell.send(()).expect("told");
        let mut byte = 0u8;
        // SAFETY: no pointers, then room for one; exit(2) ends this thread alone.
        unsafe {
            libc::syscall(libc::SYS_seccomp, 0, 0, 0);
            libc::syscall(libc::SYS_read, reading, &raw mut byte, 1);
            libc::syscall(libc::SYS_exit, 0);
        }
    });
    hear.recv().expect("started");
    let other = || {
        let tasks = std::fs::read_dir("/proc/self/task").expect("tasks").flatten();
        let own = std::process::id().to_string();
        tasks.map(|task| task.path()).find(|path| !path.ends_with(&own))
    };
    let mode = |path: std::path::PathBuf| {
        let text = std::fs::read_to_string(path.join("status")).unwrap_or_default();
        text.lines().find_map(|line| line.strip_prefix("Seccomp:").map(|mode| mode.trim().to_string()))
    };
    while other().and_then(mode).as_deref() != Some("1") {
        std::thread::yield_now();
    }
    meeting.pause();
    same("mode of the other thread", other().and_then(mode), Some("1".to_string()));
    same("own mode", status("Seccomp"), "0".to_string());
    // SAFETY: one byte.
    unsafe { libc::write(writing, b"x".as_ptr().cast(), 1) };
    let deadline = crate::calls::now() + 20.0;
    while other().is_some() && crate::calls::now() < deadline {
        std::thread::yield_now();
    }
    same("the other thread is there", other().is_some(), false);
}

/// Threads with users, groups and capabilities of their own.
pub fn credentials(meeting: &Meeting) {
    const KEYS: [&str; 9] =
        ["Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs"];
    let all = || {
        // SAFETY: no pointers.
        let bits = unsafe { libc::prctl(libc::PR_GET_SECUREBITS) };
        (KEYS.map(status), bits)
    };
    let one = |change: fn()| {
        let (tell, hear) = mpsc::channel();
        thread(
            move || {
                change();
                tell.send(all()).expect("told");
            },
            move || same("credentials of a thread", all(), hear.recv().expect("before")),
        )
    };
    // The system calls themselves: the C library changes all threads.
    let threads = vec![
        one(|| ()),
        one(|| {
            let groups = [5u32, 6, 7];
            // SAFETY: the list outlives the call.
            unsafe {
                ok("setgroups", libc::syscall(libc::SYS_setgroups, 3, groups.as_ptr()));
                ok("setresgid", libc::syscall(libc::SYS_setresgid, 11, 12, 13));
                ok("setresuid", libc::syscall(libc::SYS_setresuid, 1001, 1002, 1003));
            }
        }),
        one(|| {
            // SAFETY: no pointers.
            unsafe {
                ok("setfsuid", libc::syscall(libc::SYS_setfsuid, 77));
                ok("PR_CAPBSET_DROP", libc::prctl(libc::PR_CAPBSET_DROP, 22, 0, 0, 0));
                ok("PR_SET_SECUREBITS", libc::prctl(libc::PR_SET_SECUREBITS, 4, 0, 0, 0));
                ok("PR_SET_NO_NEW_PRIVS", libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
            }
        }),
    ];
    let before = all();
    meeting.pause();
    same("credentials of the leader", all(), before);
    end(threads);
}
