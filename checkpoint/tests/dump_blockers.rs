//! What cannot be carried is named, and the process never notices.

mod victim;

use checkpoint::inventory::{Rules, inspect};
use std::fs;
use std::process::Command;
use victim::Victim;

/// Starts a program, lets it get ready, and gives why it cannot be carried.
fn refusals(code: &str, rules: Rules) -> Vec<String> {
    let victim = Victim::python(&format!("{code}\ntell('ready'); time.sleep(60)\n"));
    assert_eq!(victim.line(), "ready");
    let before = victim.settled();
    let found = texts(victim.pid(), rules);
    // A sleeping process that was stopped, or asked anything, would have been on a CPU.
    assert_eq!(before, victim.settled(), "the process was disturbed");
    found
}

fn texts(pid: i32, rules: Rules) -> Vec<String> {
    let found = inspect(pid, rules).expect("looks");
    found.blockers.into_iter().map(|blocker| format!("{}: {}", blocker.kind, blocker.what)).collect()
}

#[track_caller]
fn only(found: &[String], wanted: &str) {
    assert!(found.len() == 1 && found[0].contains(wanted), "{found:?} is not {wanted}");
}

#[track_caller]
fn refused(code: &str, wanted: &str) {
    only(&refusals(code, Rules::Homed), wanted);
}

#[test]
fn nothing_is_wrong_with_an_ordinary_program() {
    let code = "import threading, mmap\n\
                threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n\
                m = mmap.mmap(-1, 1 << 20)\n\
                f = open('/etc/passwd')\n";
    assert_eq!(refusals(code, Rules::Homed), Vec::<String>::new());
    assert_eq!(refusals(code, Rules::Standalone), Vec::<String>::new());
}

#[test]
fn sockets() {
    refused(
        "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen()",
        "TCP socket listening on 127.0.0.1:",
    );
    refused(
        "import socket; l = socket.socket(); l.bind(('127.0.0.1', 0)); l.listen()\n\
         c = socket.create_connection(l.getsockname()); l.close()",
        "a TCP socket that is not bound or connected",
    );
    refused(
        "import socket; s = socket.socket(type=socket.SOCK_DGRAM); s.bind(('127.0.0.1', 0))",
        "UDP socket",
    );
    refused(
        "import socket, os; s = socket.socket(socket.AF_UNIX); s.bind('\\0migckpt-test-%d' % os.getpid())",
        "Unix stream socket named @migckpt-test-",
    );
    let both = "import socket; l = socket.socket(); l.bind(('127.0.0.1', 0)); l.listen()\n\
                c = socket.create_connection(l.getsockname()); s, _ = l.accept(); l.close()";
    let found = refusals(both, Rules::Homed);
    let established = |text: &String| text.contains("established TCP connection to 127.0.0.1:");
    assert!(found.len() == 2 && found.iter().all(established), "{found:?}");
    refused("import socket; s = socket.socket(16, socket.SOCK_RAW, 0); s.bind((0, 0))", "a netlink socket");
    refused("import socket; s = socket.socket(); s.bind(('127.0.0.1', 0))", "TCP socket");
}

#[test]
fn descriptors() {
    refused("import os; f = os.memfd_create('x')", "a memfd");
    refused("f = libc.inotify_init1(0)", "a kernel object of type inotify");
    refused("import os; f = os.pidfd_open(os.getpid())", "pidfd");
    refused("import os; a, b = os.openpty(); os.close(b)", "the master side of a pseudo-terminal");
    refused("f = open('/proc/self/status')", "a file of the process file system");
    refused("f = open('/proc/self/ns/net')", "a kernel file, net:");
    refused("import os; f = os.open('/', os.O_PATH)", "an O_PATH descriptor");
    refused(
        "import os, select\nr, w = os.pipe(); p = select.epoll(); p.register(r); c = os.dup(r); os.close(r)",
        "an epoll that watches a file which was closed as fd",
    );
}

#[test]
fn mappings() {
    // Python keeps a copy of the descriptor of what it maps.
    let code = "import mmap; f = os.memfd_create('x'); os.truncate(f, 4096); m = mmap.mmap(f, 4096)";
    assert!(refusals(code, Rules::Homed).iter().any(|text| text.contains("of /memfd:x: a memfd")));
    let place = tempfile::tempdir().expect("a directory");
    let path = place.path().join("data");
    fs::write(&path, vec![0; 4096]).expect("writes");
    let open = format!("import mmap, os; f = os.open('{}', os.O_RDWR); ", path.display());
    refused(&format!("{open}m = mmap.mmap(f, 4096); os.close(f)"), "mapped shared and writable");
    let private = format!(
        "{open}m = mmap.mmap(f, 4096, mmap.MAP_PRIVATE); os.close(f); os.unlink('{}')",
        path.display()
    );
    let found = refusals(&private, Rules::Standalone);
    assert!(found[0].contains("the file has been deleted or replaced"), "{found:?}");
    assert!(found[1].contains("a deleted file, "), "{found:?}");
    assert_eq!(found.len(), 2);
    refused(
        "i = libc.shmget(0, 4096, 0o600); libc.shmat.restype = ctypes.c_void_p; libc.shmat(i, None, 0); libc.shmctl(i, 0, None)",
        "System V shared memory",
    );
}

#[test]
fn relatives() {
    let code = "import subprocess; p = subprocess.Popen(['sleep', '60'], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)\n\
                import atexit; atexit.register(p.kill)\n\
                libc.prctl(1, 15, 0, 0, 0)";
    let victim = Victim::python(&format!("{code}\ntell(p.pid); time.sleep(60)\n"));
    let child: i32 = victim.line().parse().expect("a PID");
    only(&texts(victim.pid(), Rules::Homed), &format!("child processes ({child})"));
    assert_eq!(texts(child, Rules::Homed), Vec::<String>::new());
    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(child), nix::sys::signal::Signal::SIGKILL);
}

#[test]
fn shared_memory_with_a_relative() {
    let code = "import mmap, os\nm = mmap.mmap(-1, 4096)\nm[0] = 1\nchild = os.fork()\n\
                if not child: libc.prctl(1, 9, 0, 0, 0); tell(os.getpid()); time.sleep(60)\n\
                time.sleep(60)\n";
    let victim = Victim::python(code);
    let child: i32 = victim.line().parse().expect("a PID");
    only(&texts(child, Rules::Homed), &format!("shares anonymous memory with process {}", victim.pid()));
}

#[test]
fn locks() {
    let place = tempfile::tempdir().expect("a directory");
    let path = place.path().join("lock");
    let open = format!("import fcntl; f = open('{}', 'w'); ", path.display());
    refused(&format!("{open}fcntl.lockf(f, fcntl.LOCK_EX)"), "POSIX lock (write)");
    refused(&format!("{open}fcntl.flock(f, fcntl.LOCK_SH)"), "FLOCK lock (read)");
}

#[test]
fn kernel_states() {
    let filter = "class Program(ctypes.Structure): _fields_ = [('n', ctypes.c_ushort), ('p', ctypes.c_void_p)]\n\
                  allow = (ctypes.c_ulong * 1)(0x7fff0000 << 32 | 6)\n\
                  libc.prctl(38, 1, 0, 0, 0)\n\
                  assert libc.prctl(22, 2, ctypes.byref(Program(1, ctypes.addressof(allow))), 0, 0) == 0";
    refused(filter, "a seccomp filter of its own");
    let found = texts_of_zombie();
    only(&found, "a zombie");
    let found = refusals("", Rules::Homed);
    assert_eq!(found, Vec::<String>::new());
    // Process 2 is a thread of the kernel wherever this is the first PID namespace.
    if let Ok(name) = fs::read_to_string("/proc/2/comm")
        && name.trim() == "kthreadd"
    {
        let found = inspect(2, Rules::Homed).expect("looks");
        assert!(found.blockers[0].what.contains("a thread of the kernel"));
    }
}

fn texts_of_zombie() -> Vec<String> {
    let mut child = Command::new("true").spawn().expect("starts");
    let pid = child.id() as i32;
    std::thread::sleep(std::time::Duration::from_millis(200));
    let found = inspect(pid, Rules::Homed).expect("looks");
    child.wait().expect("waits");
    found.blockers.into_iter().map(|blocker| blocker.what).collect()
}

#[test]
fn namespaces() {
    let mut command = Command::new("unshare");
    command.args([
        "--net",
        "--uts",
        "python3",
        "-c",
        "import os, time; os.closerange(3, 65536); print('ready', flush=True); time.sleep(60)",
    ]);
    let victim = Victim::start(&mut command);
    assert_eq!(victim.line(), "ready");
    let found = texts(victim.pid(), Rules::Homed);
    assert!(found.len() == 2 && found.iter().all(|text| text.starts_with("namespace: ")), "{found:?}");
}
