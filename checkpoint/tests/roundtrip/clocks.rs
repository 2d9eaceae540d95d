//! The clocks that count from boot go on where they were: later, and on machines with other clocks.

use super::harness::{Case, Running, can_run, installed, migckpt, run, victim};
use checkpoint::image::stream::StreamReader;
use checkpoint::sys::time_namespace::{ForChildren, Offsets};
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const SECOND: i64 = 1_000_000_000;

/// CLOCK_MONOTONIC and CLOCK_BOOTTIME as the image has them, ns.
fn recorded(case: &Case) -> (u64, u64) {
    let image = File::open(case.path("img").join("process.img")).expect("an image");
    let mut stream = StreamReader::new(image).expect("an image");
    stream.states().expect("states")[0].misc.clocks_ns
}

/// What the victim has read: monotonic, boottime, raw, coarse, all ns, and uptime, s.
fn readings(case: &Case) -> Vec<([u64; 4], f64)> {
    let text = fs::read_to_string(case.path("times")).unwrap_or_default();
    let of_line = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = |n: usize| words[2 * n + 1].parse().expect("a number");
        ([0, 1, 2, 3].map(number), words[9].parse().expect("seconds"))
    };
    text.lines().map(of_line).collect()
}

/// `migckpt restore` on a machine whose clocks are ahead of ours by this.
fn restore_elsewhere(case: &Case, offsets: Offsets) -> Running {
    let mut command = migckpt();
    command.arg("restore").arg(case.path("img")).stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(File::create(case.path("errors")).expect("a file"));
    // A program is in the namespace from its exec on (Linux 6.1).
    let enter = move || ForChildren::make(offsets).map(std::mem::forget).map_err(std::io::Error::from);
    // SAFETY: it only makes system calls, and allocates; the child of a fork of a program with threads
    // may do that with this C library.
    #[allow(unsafe_code)]
    unsafe {
        command.pre_exec(enter);
    }
    Running(command.spawn().expect("runs"))
}

/// Waits for readings after number `known`.
fn await_more(case: &Case, known: usize) -> Vec<([u64; 4], f64)> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let all = readings(case);
        if all.len() > known + 1 {
            return all;
        }
        assert!(Instant::now() < deadline, "it does not go on: {}", case.output());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Saved, restored after a while, or where the clocks are others, again and again.
fn go_on(name: &str, machines: &[Offsets]) {
    if !can_run(name) {
        return;
    }
    let case = Case::new();
    let dir = case.dir.path().to_str().expect("UTF-8");
    let mut running = case.start(victim().to_str().expect("UTF-8"), &["clocks", dir]);
    case.await_file("ready");
    let pid = running.pid();
    for (round, &offsets) in machines.iter().enumerate() {
        if round == 0 {
            case.dump(&mut running);
        } else {
            let image = case.path("img");
            let done = run(&["dump", &pid.to_string(), "--to", image.to_str().expect("UTF-8")]);
            assert!(done.status.success(), "dump: {}", String::from_utf8_lossy(&done.stderr));
            running.end();
        }
        let (before, saved) = (readings(&case), recorded(&case));
        let (last, uptime) = *before.last().expect("it has read its clocks");
        assert!(last[0] <= saved.0 && last[1] <= saved.1, "{last:?} before {saved:?}");
        // It would be seen.
        std::thread::sleep(Duration::from_millis(700));
        let begun = Instant::now();
        running = match offsets == Offsets::default() {
            true => case.restore(),
            false => restore_elsewhere(&case, offsets),
        };
        let after = await_more(&case, before.len());
        let took = begun.elapsed();
        // The one before was perhaps read before it was saved, and written now.
        let (first, uptime_then) = after[before.len() + 1];
        for (n, was) in [(0, saved.0), (1, saved.1)] {
            let jump = first[n].checked_sub(was).expect("it does not go back");
            // The restore itself, and not what was before it.
            assert!(u128::from(jump) <= took.as_nanos(), "clock {n} has jumped by {jump} ns in {took:?}");
        }
        // Those without a record of their own go with it.
        assert!(first[2] >= last[2] && first[3] >= last[3], "{last:?}, then {first:?}");
        assert!(uptime_then >= uptime && uptime_then <= first[1] as f64 / 1e9 + 1.0);
        case.await_restored(pid);
    }
    fs::write(case.path("go"), b"").expect("lets it go on");
    let status = running.end();
    assert!(status.success() && case.output().contains("PASS clocks"), "{status}: {}", case.output());
}

#[test]
fn clocks_go_on() {
    go_on("clocks_go_on", &[Offsets::default(); 3]);
}

#[test]
fn clocks_go_on_after_a_reboot() {
    let ahead = Offsets { monotonic_ns: 5000 * SECOND + 7, boottime_ns: 9000 * SECOND };
    // Such a machine has just been started.
    let uptime = checkpoint::sys::time_namespace::clocks_ns().0 as i64;
    let behind = Offsets { monotonic_ns: SECOND - uptime, boottime_ns: 2 * SECOND - uptime };
    go_on("clocks_go_on_after_a_reboot", &[behind, ahead, Offsets::default()]);
}

/// Without the right to make a time namespace: said when they jump, refused when they would go back.
#[test]
fn clocks_that_cannot_go_on() {
    let name = "clocks_that_cannot_go_on";
    if !can_run(name) || !installed(name, "setpriv") {
        return;
    }
    let case = Case::new();
    let mut running = case.start("setpriv", &["--bounding-set", "-sys_admin", "sleep", "1"]);
    std::thread::sleep(Duration::from_millis(100));
    case.dump(&mut running);
    let without_rights = |ahead: i64| {
        let mut command = Command::new("setpriv");
        command.args(["--bounding-set", "-sys_admin"]).arg(env!("CARGO_BIN_EXE_migckpt"));
        command.arg("restore").arg(case.path("img")).stdin(Stdio::null());
        let enter = move || {
            let offsets = Offsets { monotonic_ns: ahead, boottime_ns: ahead };
            ForChildren::make(offsets).map(std::mem::forget).map_err(std::io::Error::from)
        };
        // SAFETY: as above.
        #[allow(unsafe_code)]
        unsafe {
            command.pre_exec(enter);
        }
        let output = command.output().expect("runs");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, text) = without_rights(-100 * SECOND);
    assert_eq!(code, Some(3), "{text}");
    assert!(text.contains("would go back by 100 s") && text.contains("CAP_SYS_ADMIN"), "{text}");
    assert!(!super::harness::exists(running.pid()));
    let (code, text) = without_rights(1000 * SECOND);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("have jumped by 100") && text.contains("CAP_SYS_ADMIN"), "{text}");
}
