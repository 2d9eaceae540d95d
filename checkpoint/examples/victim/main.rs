//! A process that is saved and restored, and then checks itself: one case a kernel feature.
//!
//! `victim CASE DIR` prepares the case, makes `DIR/ready`, waits for `DIR/go`, checks, prints a line
//! `PASS CASE`, and exits with 0. What is wrong is printed as `FAIL …`, and the exit status is 1.
//! Cases `busy-…` never rest, and check themselves when they are let go.
//! Cases `threads-N`, `mappings-N`, `processes-N`, `mebibytes-N` have N of these.
//! `victim exec PROGRAM ARG…` runs a program with nothing but the standard streams open.
//!
//! It uses the C library directly: what is under test is what the kernel does for it.

mod aio;
mod busy;
mod calls;
mod clocks;
mod deadlines;
mod files;
mod futexes;
mod heirs;
mod huge_pages;
mod identity;
mod memory;
mod pkeys;
mod restart;
mod scale;
mod schedules;
mod seccomp;
mod shares;
mod signals;
mod stacks;
mod threads;
mod timers;
mod traits;
mod waits;

use std::ffi::CString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Where the test and this process meet.
pub struct Meeting {
    pub dir: PathBuf,
}

impl Meeting {
    /// Tells that all is prepared, and returns when the test lets us go on.
    pub fn pause(&self) {
        std::fs::write(self.dir.join("ready"), b"").expect("tells that it is ready");
        self.await_go();
    }

    pub fn await_go(&self) {
        let deadline = Instant::now() + Duration::from_secs(300);
        while !self.dir.join("go").exists() {
            assert!(Instant::now() < deadline, "nobody lets us go");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

static FAILURES: AtomicU32 = AtomicU32::new(0);

/// Notes a failed check; the others go on.
pub fn fail(what: &str) {
    println!("FAIL {what}");
    FAILURES.fetch_add(1, Ordering::SeqCst);
}

/// Compares, and notes what differs.
pub fn same<T: PartialEq + std::fmt::Debug>(what: &str, found: T, wanted: T) {
    if found != wanted {
        fail(&format!("{what}: {found:?} instead of {wanted:?}"));
    }
}

fn main() {
    // Whoever started us may have left descriptors open that no image can hold.
    // SAFETY: nothing of this program is open beyond the standard streams yet.
    unsafe { libc::close_range(3, u32::MAX, 0) };
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let case = arguments.first().and_then(|text| text.to_str()).unwrap_or_default().to_string();
    if case == "exec" {
        let strings: Vec<CString> = arguments[1..]
            .iter()
            .map(|text| CString::new(text.clone().into_vec()).expect("no NUL in arguments"))
            .collect();
        let mut pointers: Vec<_> = strings.iter().map(|text| text.as_ptr()).collect();
        pointers.push(std::ptr::null());
        // SAFETY: NUL-terminated strings and a NULL-terminated array that outlive the call.
        unsafe { libc::execvp(pointers[0], pointers.as_ptr()) };
        panic!("cannot run {strings:?}: {}", std::io::Error::last_os_error());
    }
    let meeting = Meeting { dir: PathBuf::from(arguments.get(1).expect("usage: victim CASE DIR")) };
    match case.as_str() {
        "memory" => memory::run(&meeting),
        "huge-pages" => huge_pages::run(&meeting),
        "huge-family" => huge_pages::family(&meeting),
        "huge-unreserved" => huge_pages::unreserved(&meeting),
        "huge-gigabyte" => huge_pages::gigabyte(&meeting),
        "aio" => aio::run(&meeting),
        "aio-busy" => aio::busy(&meeting),
        "aio-family" => aio::family(&meeting),
        "aio-submitting" => aio::submitting(&meeting),
        "aio-in-flight" => aio::in_flight(&meeting),
        "pkeys" => pkeys::run(&meeting, false),
        "pkeys-family" => pkeys::run(&meeting, true),
        "stacks" => stacks::run(&meeting),
        "traits" => traits::run(&meeting),
        "threads" => threads::run(&meeting),
        "schedules" => schedules::run(&meeting),
        "heirs" => heirs::run(&meeting, false),
        "heirs-of-another" => heirs::run(&meeting, true),
        "futexes" => futexes::run(&meeting),
        "membarrier" => threads::membarrier(&meeting),
        "signals" => signals::run(&meeting),
        "altstack" => signals::on_alternate_stack(&meeting),
        "timers" => timers::run(&meeting),
        "clocks" => clocks::run(&meeting),
        "deadlines" => deadlines::run(&meeting),
        "files" => files::run(&meeting),
        "identity" => identity::run(&meeting, false),
        "nobody" => identity::run(&meeting, true),
        "filters" => seccomp::filters(&meeting),
        "strict" => seccomp::strict(&meeting),
        "thread-credentials" => seccomp::credentials(&meeting),
        "shares" => shares::processes(&meeting),
        "apart" => shares::apart(&meeting),
        "leaderless" => shares::leaderless(&meeting),
        "waits" => waits::run(&meeting),
        "cpu-sleep" => waits::on_cpu_time(&meeting),
        "restart" => restart::run(&meeting),
        "handlers" => restart::with_handlers(&meeting),
        other if busy::run(other, &meeting) => {}
        other if scale::run(other, &meeting) => {}
        other => panic!("there is no case {other}"),
    }
    if FAILURES.load(Ordering::SeqCst) > 0 {
        std::process::exit(1);
    }
    println!("PASS {case}");
}
