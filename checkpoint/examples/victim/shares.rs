//! Processes that share what threads share, and threads that do not (clone(2), unshare(2)).

use super::calls::{PAGE, map, ok};
use super::{Meeting, same};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Barrier};

/// What a process that was made here shows of itself, in memory that all have.
struct Slot {
    /// Its PID, when it is there.
    pid: AtomicI32,
    /// Counts on.
    beats: AtomicU64,
    /// What it reads at the address of [`WORD`].
    word: AtomicU64,
    /// What else it is to make: a slot, and flags; 0: nothing.
    bears: (usize, i32),
}

/// Private memory: who shares it sees what another has written.
static WORD: AtomicU64 = AtomicU64::new(1);

const STACK: usize = 16;

fn make(slot: &Slot, flags: i32) -> i32 {
    let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let stack = map(0, STACK, libc::PROT_READ | libc::PROT_WRITE, kind, -1);
    let arg = (&raw const *slot).cast_mut().cast();
    // SAFETY: `work` runs on its own stack, and uses nothing of this program but what is shared on purpose.
    unsafe { libc::clone(work, stack.add(STACK * PAGE).cast(), flags | libc::SIGCHLD, arg) }
}

/// Nothing here may allocate or lock: the memory may be that of a process that goes on meanwhile.
extern "C" fn work(slot: *mut libc::c_void) -> i32 {
    // SAFETY: slots are in memory that is mapped for as long as the program lives.
    let slot = unsafe { &*slot.cast::<Slot>() };
    if slot.bears.0 != 0 {
        // SAFETY: as above; `make` only maps and clones.
        make(unsafe { &*(slot.bears.0 as *const Slot) }, slot.bears.1);
    }
    // SAFETY: no pointers.
    slot.pid.store(unsafe { libc::syscall(libc::SYS_gettid) } as i32, SeqCst);
    loop {
        slot.beats.fetch_add(1, SeqCst);
        slot.word.store(WORD.load(SeqCst), SeqCst);
        let pause = libc::timespec { tv_sec: 0, tv_nsec: 2_000_000 };
        // SAFETY: `pause` outlives the call.
        unsafe { libc::syscall(libc::SYS_nanosleep, &raw const pause, 0) };
    }
}

const KINDS: [(&str, i32); 4] = [("memory", 1), ("descriptors", 2), ("directory", 3), ("handlers", 4)];

/// For each kind which two of the tasks have the same.
fn matrix(tasks: &[i32]) -> Vec<Vec<bool>> {
    let equal = |a: i32, b: i32, kind: i32| {
        // SAFETY: no pointers.
        ok("kcmp", unsafe { libc::syscall(libc::SYS_kcmp, a, b, kind, 0, 0) }) == 0
    };
    let pairs = || tasks.iter().flat_map(|&a| tasks.iter().map(move |&b| (a, b)));
    KINDS.iter().map(|&(_, kind)| pairs().map(|(a, b)| equal(a, b, kind)).collect()).collect()
}

/// A memory, a table, a directory and handlers, shared in several ways.
pub fn processes(meeting: &Meeting) {
    const ALL: i32 = libc::CLONE_VM | libc::CLONE_FILES | libc::CLONE_FS | libc::CLONE_SIGHAND;
    let kind = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    let page = map(0, 1, libc::PROT_READ | libc::PROT_WRITE, kind, -1).cast::<Slot>();
    // What each shares with the root, and whom it makes: a child, or a sibling.
    let plan: [(i32, Option<(usize, i32)>); 8] = [
        (ALL, Some((6, 0))),
        (libc::CLONE_VM, None),
        (libc::CLONE_FILES, None),
        (libc::CLONE_FS, Some((7, libc::CLONE_FS | libc::CLONE_FILES))),
        (0, Some((5, libc::CLONE_PARENT | libc::CLONE_VM | libc::CLONE_FILES))),
        (-1, None),
        (-1, None),
        (-1, None),
    ];
    let slots: Vec<&Slot> = (0..plan.len())
        .map(|n| {
            let bears =
                plan[n].1.map_or((0, 0), |(who, flags)| (page as usize + who * size_of::<Slot>(), flags));
            let (pid, beats, word) = (AtomicI32::new(0), AtomicU64::new(0), AtomicU64::new(0));
            // SAFETY: the page has room for all of them, and is never unmapped.
            unsafe {
                page.add(n).write(Slot { pid, beats, word, bears });
                &*page.add(n)
            }
        })
        .collect();
    for (n, slot) in slots.iter().enumerate().filter(|&(n, _)| plan[n].0 >= 0) {
        ok("clone", make(slot, plan[n].0));
    }
    while slots.iter().any(|slot| slot.pid.load(SeqCst) == 0) {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    let mut tasks: Vec<i32> = slots.iter().map(|slot| slot.pid.load(SeqCst)).collect();
    tasks.push(std::process::id() as i32);
    let before = matrix(&tasks);
    let beats: Vec<u64> = slots.iter().map(|slot| slot.beats.load(SeqCst)).collect();
    meeting.pause();
    for (kind, (now, then)) in KINDS.iter().zip(matrix(&tasks).iter().zip(&before)) {
        same(kind.0, now, then);
    }
    WORD.store(2, SeqCst);
    std::thread::sleep(std::time::Duration::from_millis(200));
    let words: Vec<u64> = slots.iter().map(|slot| slot.word.load(SeqCst)).collect();
    same("what each reads", words, vec![2, 2, 1, 1, 1, 1, 1, 1]);
    for (n, slot) in slots.iter().enumerate() {
        same(&format!("whether {n} goes on"), slot.beats.load(SeqCst) > beats[n] + 20, true);
    }
    // Grandchildren first: their parents are killed too.
    for n in [6, 7, 0, 1, 2, 3, 4, 5] {
        let pid = slots[n].pid.load(SeqCst);
        // SAFETY: no pointers but to a status that outlives the call.
        unsafe {
            libc::kill(pid, libc::SIGKILL);
            let mut status = 0;
            if n < 6 {
                same("waitpid", libc::waitpid(pid, &raw mut status, 0), pid);
            }
        }
    }
}

/// Directory and umask of this thread. To ask by umask(2) is to change it, which others who have the same see.
fn here() -> (std::path::PathBuf, u32) {
    let status = std::fs::read_to_string("/proc/thread-self/status").expect("status");
    let umask = status.lines().find_map(|line| line.strip_prefix("Umask:")).expect("a umask");
    let umask = u32::from_str_radix(umask.trim(), 8).expect("octal");
    (std::env::current_dir().expect("a directory"), umask)
}

/// Goes to a directory of its own, with a umask of its own.
fn go_apart(dir: &std::path::Path, umask: u32) {
    // SAFETY: no pointers.
    ok("unshare", unsafe { libc::unshare(libc::CLONE_FS) });
    std::fs::create_dir_all(dir).expect("makes a directory");
    std::env::set_current_dir(dir).expect("goes there");
    // SAFETY: no pointers.
    unsafe { libc::umask(umask) };
}

/// Threads with directories of their own, some of them together.
pub fn apart(meeting: &Meeting) {
    let (ready, go) = (Arc::new(Barrier::new(4)), Arc::new(Barrier::new(4)));
    let (one, two) = (meeting.dir.join("one"), meeting.dir.join("two"));
    let wait = {
        let (ready, go) = (ready.clone(), go.clone());
        move |name: &str, wanted: (std::path::PathBuf, u32)| {
            same(name, here(), wanted.clone());
            ready.wait();
            go.wait();
            same(name, here(), wanted);
        }
    };
    let first = {
        let (wait, one) = (wait.clone(), one.clone());
        std::thread::spawn(move || {
            go_apart(&one, 0o77);
            let (waits, dir) = (wait.clone(), one.clone());
            let mate = std::thread::spawn(move || waits("mate", (dir, 0o77)));
            wait("first", (one.clone(), 0o77));
            mate.join().expect("ends");
            // What one does the other sees, and nobody else.
            let mate = std::thread::spawn(|| std::env::set_current_dir("..").expect("goes up"));
            mate.join().expect("ends");
            same("together", here().0, one.parent().map(Into::into).unwrap_or_default());
        })
    };
    let second = std::thread::spawn(move || {
        go_apart(&two, 0o7);
        wait("second", (two.clone(), 0o7));
    });
    ready.wait();
    let root = here();
    meeting.pause();
    go.wait();
    first.join().expect("ends");
    second.join().expect("ends");
    same("the others", here(), root);
}

static LEADER_GONE: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);

/// The leader ends, with a status of its own, and the others go on.
pub fn leaderless(meeting: &Meeting) {
    let dir = meeting.dir.clone();
    std::thread::spawn(move || {
        let meeting = Meeting { dir };
        let zombie = || {
            let stat = std::fs::read_to_string("/proc/self/stat").expect("stat");
            let fields: Vec<String> =
                stat.rsplit(") ").next().unwrap_or_default().split(' ').map(str::to_string).collect();
            (fields[0].clone(), fields[fields.len() - 1].trim().to_string(), stat.contains("(ended first)"))
        };
        while zombie().0 != "Z" {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        // SAFETY: the child does nothing but wait for its end.
        let child = ok("fork", unsafe { libc::fork() });
        if child == 0 {
            loop {
                std::thread::sleep(std::time::Duration::from_secs(60));
            }
        }
        LEADER_GONE.store(true, SeqCst);
        let other = std::thread::spawn(|| {
            while LEADER_GONE.load(SeqCst) {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        });
        let threads = || std::fs::read_dir("/proc/self/task").expect("threads").count();
        let count = threads();
        same("the leader", zombie(), ("Z".into(), (7 << 8).to_string(), true));
        meeting.pause();
        same("the leader", zombie(), ("Z".into(), (7 << 8).to_string(), true));
        same("threads", threads(), count);
        LEADER_GONE.store(false, SeqCst);
        other.join().expect("ends");
        let mut status = 0;
        // SAFETY: no pointers but to a status that outlives the call.
        unsafe {
            libc::kill(child, libc::SIGKILL);
            same("waitpid", libc::waitpid(child, &raw mut status, 0), child);
        }
        if super::FAILURES.load(SeqCst) > 0 {
            std::process::exit(1);
        }
        println!("PASS leaderless");
        // Its status is that of the process, or the leader's is: kernels differ.
        // SAFETY: nothing is left to be done.
        unsafe { libc::syscall(libc::SYS_exit, 7) };
    });
    // SAFETY: a name that outlives the call; the thread goes on without this one.
    unsafe {
        libc::prctl(libc::PR_SET_NAME, c"ended first".as_ptr());
        libc::syscall(libc::SYS_exit, 7);
    }
}
