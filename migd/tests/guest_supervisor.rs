//! The filter and its supervisor on an ordinary process, into which they are put as into a guest.
//! Needs root; without it the tests say so and are skipped.

use checkpoint::tracee::Tracee;
use migd::shepherd::session::{IdentityQuestion, Reply};
use migd::shepherd::supervisor::{self, Supervisor, SupervisorHooks};
use std::io::{self, BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const PARENT: i64 = 777;

/// Answers with numbers that cannot be right here.
struct Home {
    retreats: Mutex<Sender<String>>,
    deaf: AtomicBool,
}

impl SupervisorHooks for Home {
    fn identity(&self, question: IdentityQuestion) -> io::Result<i64> {
        if self.deaf.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(match question {
            IdentityQuestion::ParentPid => PARENT,
            IdentityQuestion::ProcessGroup(0) => 778,
            IdentityQuestion::ProcessGroup(_) => -i64::from(libc::ESRCH),
            IdentityQuestion::Session(_) => 779,
        })
    }

    fn terminal(&self, _: u64, _: u64, _: u64, _: &[u8]) -> io::Result<Reply> {
        panic!("nothing here is a file of home's")
    }

    fn retreat(&self, reason: String) {
        let _ = self.retreats.lock().expect("no panic holds it").send(reason);
    }
}

/// A Python that evaluates what it is told, one line at a time.
struct Victim {
    child: Child,
    stdin: ChildStdin,
    answers: Receiver<String>,
}

impl Victim {
    fn start() -> Victim {
        let code = "import os,sys,threading,time,signal\ngot=[]\n\
                    for line in sys.stdin:\n  try: print(eval(line),flush=True)\n  except Exception as e: print(repr(e),flush=True)";
        let mut child = Command::new("python3")
            .args(["-c", code])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 starts");
        let stdin = child.stdin.take().expect("piped");
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        let (sender, answers) = channel();
        std::thread::spawn(move || {
            stdout.lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        let mut victim = Victim { child, stdin, answers };
        assert_eq!(victim.ask("1+1"), "2");
        victim
    }

    fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    fn tell(&mut self, line: &str) {
        writeln!(self.stdin, "{line}").expect("it listens");
    }

    #[track_caller]
    fn ask(&mut self, line: &str) -> String {
        self.tell(line);
        self.answers.recv_timeout(Duration::from_secs(20)).expect("it answers")
    }

    fn supervise(&self) -> (Supervisor, Arc<Home>, Receiver<String>) {
        let mut tracee = Tracee::freeze(self.pid()).expect("freezes");
        tracee.install_stub(&[]).expect("a stub");
        let listener = supervisor::install(&mut tracee, self.pid()).expect("a filter");
        let (sender, retreats) = channel();
        let home = Arc::new(Home { retreats: Mutex::new(sender), deaf: AtomicBool::new(false) });
        let supervisor = Supervisor::start(listener, self.pid(), home.clone()).expect("starts");
        tracee.thaw().expect("thaws");
        (supervisor, home, retreats)
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn unprivileged() -> bool {
    let unprivileged = !nix::unistd::geteuid().is_root();
    if unprivileged {
        eprintln!("skipped: needs root");
    }
    unprivileged
}

#[test]
fn home_says_who_it_is() {
    if unprivileged() {
        return;
    }
    let mut victim = Victim::start();
    let (_supervisor, home, retreats) = victim.supervise();
    assert_eq!(victim.ask("os.getppid()"), PARENT.to_string());
    assert_eq!(victim.ask("os.getpgrp()"), "778");
    assert_eq!(victim.ask("os.getsid(0)"), "779");
    assert!(victim.ask("os.getpgid(5)").starts_with("ProcessLookupError"));
    assert_eq!(victim.ask("os.getpid()"), victim.pid().to_string());
    // Nobody at home for a moment: the call waits, and gets its answer.
    home.deaf.store(true, Ordering::SeqCst);
    victim.tell("os.getppid()");
    assert!(victim.answers.recv_timeout(Duration::from_millis(500)).is_err());
    home.deaf.store(false, Ordering::SeqCst);
    assert_eq!(victim.answers.recv_timeout(Duration::from_secs(5)).expect("an answer"), PARENT.to_string());
    assert!(retreats.try_recv().is_err());
}

#[test]
fn what_is_native_stays_native() {
    if unprivileged() {
        return;
    }
    let mut victim = Victim::start();
    let (_supervisor, _, retreats) = victim.supervise();
    let threads = "[t.join() for t in [threading.Thread(target=time.sleep,args=(0.01,)) for _ in range(8)] if not t.start()]";
    assert_eq!(victim.ask(threads), "[None, None, None, None, None, None, None, None]");
    assert_eq!(victim.ask("os.kill(os.getpid(),0)"), "None");
    assert_eq!(victim.ask("len(os.listdir('/'))>0"), "True");
    assert_eq!(victim.ask("os.isatty(0)"), "False");
    assert_eq!(
        victim.ask(
            "[os.isatty(os.open('/dev/null',0)), os.sched_getaffinity(threading.get_native_id())!=set()]"
        ),
        "[False, True]"
    );
    assert!(retreats.try_recv().is_err());
}

#[test]
fn a_retreat_is_held_through_signals_and_freezes() {
    if unprivileged() {
        return;
    }
    let mut victim = Victim::start();
    let (supervisor, _, retreats) = victim.supervise();
    let heard = |limit| retreats.recv_timeout(Duration::from_secs(limit));
    assert_eq!(victim.ask("signal.signal(signal.SIGUSR1,lambda n,_:got.append(n))"), "0");
    victim.tell("threading.Thread(target=lambda:print(os.pipe(),flush=True)).start()");
    // The thread is held, the others run on.
    assert_eq!(victim.answers.recv_timeout(Duration::from_secs(5)).expect("its thread runs"), "None");
    assert_eq!(heard(5).expect("a retreat"), "pipe2");
    assert_eq!(victim.ask("2+3"), "5");
    // A freeze that comes to nothing: the call is told again.
    let mut tracee = supervisor.freeze().expect("a held call does not hinder a freeze");
    tracee.install_stub(&[]).expect("a stub");
    tracee.thaw().expect("thaws");
    assert_eq!(heard(5).expect("told again"), "pipe2");
    // A signal for the thread that is held: it waits, or fork() would fail with EINTR.
    victim.tell("signal.pthread_kill([t.ident for t in threading.enumerate() if t is not threading.main_thread()][0],signal.SIGUSR1)");
    assert_eq!(victim.answers.recv_timeout(Duration::from_secs(5)).expect("it was sent"), "None");
    assert_eq!(victim.ask("got"), "[]");
    supervisor.freeze().expect("freezes").thaw().expect("thaws");
    assert_eq!(heard(5).expect("told again"), "pipe2");
    assert_eq!(victim.ask("got"), "[10]");
    // Nobody takes it home: asked for again after a while.
    assert_eq!(heard(10).expect("asked for again"), "pipe2");
    victim.tell("os.fork()");
    assert_eq!(heard(5).expect("a retreat"), "clone");
    let start = Instant::now();
    drop(supervisor);
    assert!(start.elapsed() < Duration::from_secs(2));
}

#[test]
fn system_calls_that_are_not_told_cost_nothing() {
    if unprivileged() {
        return;
    }
    let mut victim = Victim::start();
    let measure = "min((lambda a:([os.getpid() for _ in range(50000)],time.thread_time()-a)[1])(time.thread_time()) for _ in range(20))";
    let before: f64 = victim.ask(measure).parse().expect("seconds");
    let (_supervisor, _, _) = victim.supervise();
    let after: f64 = victim.ask(measure).parse().expect("seconds");
    eprintln!("getpid: {:.0} ns before, {:.0} ns with the filter", before * 2e4, after * 2e4);
    assert!(after < before * 1.6, "{before} s, {after} s");
}

#[test]
fn freezes_and_calls_of_many_threads_do_not_miss_each_other() {
    if unprivileged() {
        return;
    }
    let mut victim = Victim::start();
    let (supervisor, _, retreats) = victim.supervise();
    let busy = "[threading.Thread(target=lambda:[got.append(os.getppid()) for _ in iter(int,1)],daemon=True).start() for _ in range(3)]";
    assert_eq!(victim.ask(busy), "[None, None, None]");
    for _ in 0..200 {
        supervisor.freeze().expect("freezes").thaw().expect("thaws");
    }
    assert_eq!(victim.ask("set(got)"), "{777}");
    assert!(retreats.try_recv().is_err());
}
