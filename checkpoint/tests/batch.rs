//! Batches of injected calls on the live kernel.

use checkpoint::tracee::{Call, NewThread, Recovered, Tracee, TraceeError, recover};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

struct Victim {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
}

impl Victim {
    /// A Python program that says `ready`.
    fn start(code: &str) -> Victim {
        let code = format!("import os, signal, sys, time\n{code}");
        let mut child =
            Command::new("python3").args(["-u", "-c", &code]).stdout(Stdio::piped()).spawn().expect("starts");
        let mut output = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut line = String::new();
        output.read_line(&mut line).expect("a line");
        assert_eq!(line, "ready\n");
        Victim { child, output }
    }

    fn idle() -> Victim {
        Victim::start("print('ready')\nwhile True: time.sleep(1)")
    }

    fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    fn frozen(&self) -> Tracee {
        let mut tracee = Tracee::freeze(self.pid()).expect("freezes");
        tracee.install_stub(&[]).expect("stub");
        tracee
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn nap(millis: u64) -> Call {
    let time = [0u64.to_le_bytes(), (millis * 1_000_000).to_le_bytes()].concat();
    Call::must("sleeping", libc::SYS_nanosleep, [0; 6]).input(0, &time)
}

fn ask(nr: libc::c_long) -> Call {
    Call::must("asking", nr, [0; 6])
}

fn state(pid: i32) -> char {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("stat");
    stat.rsplit(") ").next().and_then(|rest| rest.chars().next()).expect("a state")
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "{what} does not come about");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn results_and_answers_come_in_order_and_no_trace_stays() {
    let victim = Victim::idle();
    let pid = victim.pid();
    let look = || {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
        let mask = status.lines().find(|line| line.starts_with("SigBlk")).map(str::to_string);
        (fs::read_to_string(format!("/proc/{pid}/maps")).expect("maps"), mask)
    };
    let before = look();
    for _ in 0..100 {
        let mut tracee = victim.frozen();
        let calls = [
            ask(libc::SYS_getpid),
            Call::must("uname", libc::SYS_uname, [0; 6]).output(0, 390),
            Call::may("closing", libc::SYS_close, [9999, 0, 0, 0, 0, 0]),
            Call::must("getitimer", libc::SYS_getitimer, [0; 6]).in_out(1, &[7; 32]),
            Call::must("opening", libc::SYS_openat, [libc::AT_FDCWD as u64, 0, 0, 0, 0, 0])
                .string(1, b"/dev/null"),
        ];
        let replies = tracee.must_all(0, &calls).expect("runs");
        assert_eq!(replies[0].value, i64::from(pid));
        assert!(replies[1].answer(0).starts_with(b"Linux\0"));
        assert_eq!(replies[2].errno(), Some(Errno::EBADF));
        assert_eq!(replies[3].answer(0), [0; 32]);
        let fd = replies[4].value as u64;
        let closing = [Call::must("closing", libc::SYS_close, [fd, 0, 0, 0, 0, 0])];
        tracee.must_all(0, &closing).expect("closes");
        tracee.thaw().expect("thaws");
    }
    assert_eq!(look(), before);
}

#[test]
fn it_stops_where_it_must() {
    let victim = Victim::idle();
    let mut tracee = victim.frozen();
    let fails = Call::must("closing nothing", libc::SYS_close, [9999, 0, 0, 0, 0, 0]);
    let calls = [ask(libc::SYS_getpid), fails, ask(libc::SYS_getpid)];
    let replies = tracee.batch(0, &calls).expect("runs");
    assert_eq!(replies.len(), 2);
    assert_eq!(replies[1].errno(), Some(Errno::EBADF));
    let error = tracee.must_all(0, &calls).expect_err("fails");
    let TraceeError::Inside { operation: "closing nothing", errno: Errno::EBADF, .. } = error else {
        panic!("{error}");
    };
    // In the first of two rounds: the second is not run.
    let many: Vec<Call> = calls.iter().cycle().take(3000).cloned().collect();
    assert_eq!(tracee.batch(0, &many).expect("runs").len(), 2);
    tracee.thaw().expect("thaws");
}

#[test]
fn long_batches_go_in_rounds() {
    let victim = Victim::idle();
    let mut tracee = victim.frozen();
    let calls: Vec<Call> = (0..5000)
        .map(|n: u64| {
            // Gives back what it is given: the mask, unchanged.
            Call::must("the mask", libc::SYS_rt_sigprocmask, [0, 0, 0, 8, 0, 0])
                .output(2, 8)
                .input(1, &vec![0; 8 * (1 + n as usize % 300)])
        })
        .collect();
    let replies = tracee.must_all(0, &calls).expect("runs");
    assert_eq!(replies.len(), calls.len());
    // All are blocked but the two that cannot be.
    let all = !(1u64 << (libc::SIGKILL - 1) | 1 << (libc::SIGSTOP - 1));
    assert!(replies.iter().all(|reply| reply.answer(0) == all.to_le_bytes()));
    let too_long = Call::may("too long", libc::SYS_getpid, [0; 6]).input(0, &vec![0; 1 << 20]);
    assert!(matches!(tracee.batch(0, &[too_long]), Err(TraceeError::Unfit { .. })));
    let nul = Call::may("a NUL", libc::SYS_getpid, [0; 6]).string(0, b"a\0b");
    assert!(matches!(tracee.batch(0, &[ask(libc::SYS_getpid), nul]), Err(TraceeError::Unfit { .. })));
    assert_eq!(tracee.batch(0, &[]).expect("nothing"), []);
    tracee.thaw().expect("thaws");
}

#[test]
fn structures_may_point_to_bytes() {
    let mut victim = Victim::idle();
    let mut tracee = victim.frozen();
    let mut iov = [0u8; 32];
    iov[8..16].copy_from_slice(&6u64.to_le_bytes());
    iov[24..32].copy_from_slice(&6u64.to_le_bytes());
    let call = Call::must("writing", libc::SYS_writev, [1, 0, 2, 0, 0, 0])
        .input(1, &iov)
        .within(0, b"hello ")
        .within(16, b"world\n");
    assert_eq!(tracee.must_all(0, &[call]).expect("writes")[0].value, 12);
    tracee.thaw().expect("thaws");
    let mut line = String::new();
    victim.output.read_line(&mut line).expect("a line");
    assert_eq!(line, "hello world\n");
}

#[test]
fn threads_run_theirs_at_the_same_time() {
    let victim = Victim::start(
        "import threading\n\
         [threading.Thread(target=time.sleep, args=(100,), daemon=True).start() for _ in range(150)]\n\
         print('ready')\ntime.sleep(100)",
    );
    for _ in 0..5 {
        let mut tracee = victim.frozen();
        assert_eq!(tracee.thread_count(), 151);
        let calls = [ask(libc::SYS_gettid), nap(5), ask(libc::SYS_gettid)];
        let jobs: Vec<(usize, &[Call])> = (0..151).map(|i| (i, calls.as_slice())).collect();
        let replies = tracee.must_each(&jobs).expect("runs");
        for (i, replies) in replies.iter().enumerate() {
            let tid = i64::from(tracee.tid(i));
            assert_eq!([replies[0].value, replies[2].value], [tid, tid]);
        }
        // One thread twice: one after the other.
        let twice: [(usize, &[Call]); 3] = [(3, &calls), (3, &calls), (4, &calls)];
        let replies = tracee.must_each(&twice).expect("runs");
        assert_eq!(replies.iter().map(Vec::len).collect::<Vec<_>>(), [3, 3, 3]);
        tracee.thaw().expect("thaws");
    }
}

#[test]
fn an_interrupted_sleep_ends_in_time() {
    let mut victim =
        Victim::start("print('ready')\nstart = time.time()\ntime.sleep(2)\nprint(time.time() - start)");
    for _ in 0..20 {
        let mut tracee = victim.frozen();
        tracee.must_all(0, &[ask(libc::SYS_getpid), nap(1)]).expect("runs");
        tracee.thaw().expect("thaws");
        std::thread::sleep(Duration::from_millis(20));
    }
    let mut text = String::new();
    victim.output.read_to_string(&mut text).expect("its time");
    let took: f64 = text.trim().parse().expect("a number");
    assert!(took >= 2.0, "{took} s");
}

#[test]
fn signals_that_come_meanwhile_are_not_lost() {
    let mut victim = Victim::start(
        "signal.signal(signal.SIGUSR1, lambda *_: print('usr1'))\nprint('ready')\nwhile True: time.sleep(1)",
    );
    let pid = victim.pid();
    let mut tracee = victim.frozen();
    let sender = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        kill(Pid::from_raw(pid), Signal::SIGUSR1).expect("sends");
        kill(Pid::from_raw(pid), Signal::SIGSTOP).expect("sends");
    });
    let calls = [nap(300), ask(libc::SYS_getpid)];
    assert_eq!(tracee.must_all(0, &calls).expect("runs")[1].value, i64::from(pid));
    sender.join().expect("has sent");
    tracee.thaw().expect("thaws");
    until("the stop", || state(pid) == 'T');
    kill(Pid::from_raw(pid), Signal::SIGCONT).expect("sends");
    let mut line = String::new();
    victim.output.read_line(&mut line).expect("a line");
    assert_eq!(line, "usr1\n");
}

#[test]
fn who_is_killed_meanwhile_has_died() {
    let victim = Victim::idle();
    let pid = victim.pid();
    let mut tracee = victim.frozen();
    let killer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        kill(Pid::from_raw(pid), Signal::SIGKILL).expect("sends");
    });
    let error = tracee.must_all(0, &[nap(900), nap(900)]).expect_err("dies");
    assert!(matches!(error, TraceeError::Died { .. }), "{error}");
    killer.join().expect("has sent");
}

/// Set for the process that is to be killed in the middle of a batch.
const TO_BE_KILLED: &str = "CHECKPOINT_TEST_BATCH_IN";

/// No test by itself: see [`a_killed_tracer_loses_nothing`].
#[test]
fn tracer_to_be_killed() {
    let Some(pid) = std::env::var(TO_BE_KILLED).ok().and_then(|pid| pid.parse().ok()) else { return };
    let mut tracee = Tracee::freeze(pid).expect("freezes");
    tracee.install_stub(&[]).expect("stub");
    let calls: Vec<Call> = (0..40).map(|_| nap(50)).collect();
    println!("at it");
    let _ = tracee.must_all(0, &calls);
}

#[test]
fn a_killed_tracer_loses_nothing() {
    let mut victim = Victim::start(
        "signal.signal(signal.SIGUSR1, lambda *_: print('usr1'))\nprint('ready')\nwhile True: time.sleep(1)",
    );
    let pid = victim.pid();
    let before = fs::read_to_string(format!("/proc/{pid}/maps")).expect("maps");
    for wait_for_its_end in [false, true] {
        let mut tracer = Command::new(std::env::current_exe().expect("this program"))
            .args(["--exact", "tracer_to_be_killed", "--nocapture"])
            .env(TO_BE_KILLED, pid.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .expect("starts");
        let output = BufReader::new(tracer.stdout.take().expect("a pipe"));
        assert!(output.lines().any(|line| line.is_ok_and(|line| line.contains("at it"))));
        std::thread::sleep(Duration::from_millis(120));
        tracer.kill().expect("kills");
        tracer.wait().expect("reaps");
        kill(Pid::from_raw(pid), Signal::SIGUSR1).expect("sends");
        if wait_for_its_end {
            // It goes through the rest, and into the hold loop: pause(2).
            until("the hold loop", || {
                fs::read_to_string(format!("/proc/{pid}/syscall")).is_ok_and(|text| text.starts_with("34 "))
            });
        }
        assert_eq!(recover(pid).expect("recovers"), Recovered::Thawed);
        let mut line = String::new();
        victim.output.read_line(&mut line).expect("a line");
        assert_eq!(line, "usr1\n");
        assert_eq!(fs::read_to_string(format!("/proc/{pid}/maps")).expect("maps"), before);
    }
}

/// TIDs that nobody has, from the highest down.
fn free_tids(count: usize) -> Vec<i32> {
    let most = fs::read_to_string("/proc/sys/kernel/pid_max").expect("pid_max");
    let most: i32 = most.trim().parse().expect("a number");
    (1..most).rev().filter(|tid| !fs::exists(format!("/proc/{tid}")).expect("looks")).take(count).collect()
}

fn name(text: &str) -> Call {
    let args = [libc::PR_SET_NAME as u64, 0, 0, 0, 0, 0];
    Call::must("naming", libc::SYS_prctl, args).string(1, text.as_bytes())
}

fn end_others(tracee: &mut Tracee) {
    for i in (1..tracee.thread_count()).rev() {
        tracee.end_thread(i).expect("ends");
    }
}

#[test]
fn new_threads_have_made_their_calls_when_they_stand() {
    let victim = Victim::idle();
    let mut tracee = victim.frozen();
    // More than a round has room for; some have nothing to call.
    let calls = |n: usize| (0..n % 7).map(|k| name(&format!("{n} {k}"))).collect::<Vec<Call>>();
    let thread = |(n, &tid): (usize, &i32)| NewThread { tid, clear_child_tid: 0, calls: calls(n) };
    let tids = free_tids(700);
    let new: Vec<NewThread> = tids.iter().enumerate().map(thread).collect();
    tracee.add_threads(0, &new).expect("makes them");
    assert_eq!(tracee.thread_count(), 701);
    for (n, &tid) in tids.iter().enumerate() {
        assert!(tracee.index_of(tid).is_some(), "thread {tid} is not known");
        assert_eq!(state(tid), 't');
        let found = fs::read_to_string(format!("/proc/{tid}/comm")).expect("a name");
        let wanted = if n % 7 == 0 { "python3".to_string() } else { format!("{n} {}", n % 7 - 1) };
        assert_eq!(found.trim(), wanted);
    }
    // They can be used as any other.
    let ask = [ask(libc::SYS_gettid)];
    let jobs: Vec<(usize, &[Call])> = (1..701).map(|i| (i, ask.as_slice())).collect();
    let replies = tracee.must_each(&jobs).expect("runs");
    assert!(replies.iter().zip(1..).all(|(replies, i)| replies[0].value == i64::from(tracee.tid(i))));
    end_others(&mut tracee);
    tracee.thaw().expect("thaws");
    until("it sleeps on", || state(victim.pid()) == 'S');
}

#[test]
fn what_fails_of_new_threads_is_named() {
    let victim = Victim::idle();
    let mut tracee = victim.frozen();
    let tids = free_tids(3);
    let new = |calls: [Vec<Call>; 3]| -> Vec<NewThread> {
        let thread = |(&tid, calls)| NewThread { tid, clear_child_tid: 0, calls };
        tids.iter().zip(calls).map(thread).collect()
    };
    let fails = || Call::must("closing nothing", libc::SYS_close, [9999, 0, 0, 0, 0, 0]);
    let calls = [vec![name("first")], vec![fails(), name("never")], vec![name("third")]];
    let error = tracee.add_threads(0, &new(calls)).expect_err("fails");
    let TraceeError::Inside { operation: "closing nothing", tid, errno: Errno::EBADF } = error else {
        panic!("{error}");
    };
    assert_eq!(tid, tids[1]);
    let found = |tid: i32| fs::read_to_string(format!("/proc/{tid}/comm")).expect("a name");
    assert_eq!((found(tids[0]).trim(), found(tids[1]).trim()), ("first", "python3"));
    end_others(&mut tracee);
    // A number that is taken: those before it are there.
    let mut taken = new([vec![name("first")], vec![], vec![]]);
    taken[1].tid = victim.pid();
    let error = tracee.add_threads(0, &taken).expect_err("fails");
    let TraceeError::Inside { operation: "making a thread", errno: Errno::EEXIST, .. } = error else {
        panic!("{error}");
    };
    assert_eq!((tracee.thread_count(), found(tids[0]).trim()), (2, "first"));
    end_others(&mut tracee);
    let error = tracee.add_threads(0, &new([vec![], vec![], vec![name("a\0b")]])).expect_err("is refused");
    assert!(matches!(error, TraceeError::Unfit { .. }), "{error}");
    let many = vec![ask(libc::SYS_getpid); 600];
    let error = tracee.add_threads(0, &new([vec![], vec![], many])).expect_err("is refused");
    assert!(matches!(error, TraceeError::Unfit { .. }), "{error}");
    end_others(&mut tracee);
    tracee.thaw().expect("thaws");
    until("it sleeps on", || state(victim.pid()) == 'S');
}

#[test]
fn a_stop_meanwhile_does_not_keep_new_threads_from_their_calls() {
    let victim = Victim::idle();
    let pid = victim.pid();
    let mut tracee = victim.frozen();
    let thread = |tid: i32| NewThread { tid, clear_child_tid: 0, calls: vec![nap(400), name("through")] };
    let new: Vec<NewThread> = free_tids(5).into_iter().map(thread).collect();
    let stopper = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(150));
        kill(Pid::from_raw(pid), Signal::SIGSTOP).expect("sent");
    });
    tracee.add_threads(0, &new).expect("makes them");
    stopper.join().expect("has sent it");
    for thread in &new {
        let found = fs::read_to_string(format!("/proc/{}/comm", thread.tid)).expect("a name");
        assert_eq!(found.trim(), "through");
    }
    end_others(&mut tracee);
    tracee.thaw().expect("thaws");
    until("it is stopped", || state(pid) == 'T');
    kill(Pid::from_raw(pid), Signal::SIGCONT).expect("sent");
    until("it sleeps on", || state(pid) == 'S');
}
