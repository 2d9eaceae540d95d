//! What cannot be carried is named, and the process never notices.

mod victim;

use checkpoint::inventory::{Rules, inspect, inspect_tree};
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

/// So many threads that it is not `/proc` that tells which of them are not like the others.
const CROWD: &str = "import threading\n\
                     for _ in range(80): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n";

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

/// What a limit leaves must do for the stub.
#[test]
fn limits_without_room() {
    let limited = |limit: &str, counted: &str, room: &str| {
        format!(
            "import resource\n\
             text = open('/proc/self/status').read()\n\
             used = int(text.split('{counted}:')[1].split()[0]) * 1024\n\
             resource.setrlimit(resource.{limit}, (used + {room}, -1))\n"
        )
    };
    for (limit, counted) in [("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")] {
        let words = format!("({limit}) leaves");
        let tight = limited(limit, counted, "0");
        only(&refusals(&tight, Rules::Homed), &words);
        only(&refusals(&tight, Rules::Standalone), &words);
        let enough = limited(limit, counted, "(8 << 20)");
        assert_eq!(refusals(&enough, Rules::Standalone), Vec::<String>::new());
    }
}

#[test]
fn threads_that_have_unshared() {
    let both = [(0x400, "has a descriptor table of its own"), (0x200, "has a working directory of its own")];
    for ((flag, words), crowd) in both.into_iter().flat_map(|one| [(one, ""), (one, CROWD)]) {
        let code = format!(
            "{crowd}import threading\nready = threading.Event()\n\
             def work():\n  libc.unshare({flag}); ready.set(); time.sleep(60)\n\
             threading.Thread(target=work, daemon=True).start(); ready.wait()\n"
        );
        only(&refusals(&code, Rules::Homed), words);
        // An image has a thread's directory, and no second table.
        match flag {
            0x400 => only(&refusals(&code, Rules::Standalone), words),
            _ => assert_eq!(refusals(&code, Rules::Standalone), Vec::<String>::new()),
        }
    }
}

#[test]
fn threads_that_have_left_a_namespace() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    // CLONE_NEWNET, _NEWIPC, _NEWUTS, _NEWCGROUP, _NEWPID, _NEWTIME.
    let all = [
        (0x4000_0000u32, "net"),
        (0x0800_0000, "ipc"),
        (0x0400_0000, "uts"),
        (0x0200_0000, "cgroup"),
        (0x2000_0000, "pid"),
        (0x80, "time"),
    ];
    for ((flag, name), crowd) in all.into_iter().flat_map(|one| [(one, ""), (one, CROWD)]) {
        let code = format!(
            "{crowd}import threading\nready = threading.Event()\n\
             def work():\n  assert libc.unshare({flag}) == 0; ready.set(); time.sleep(60)\n\
             threading.Thread(target=work, daemon=True).start(); assert ready.wait(9)\n"
        );
        for rules in [Rules::Homed, Rules::Standalone] {
            only(&refusals(&code, rules), &format!("has left the {name} namespace of its process"));
        }
    }
    // A mount namespace comes with a directory.
    let code = "import threading\nready = threading.Event()\n\
                def work():\n  assert libc.unshare(0x20000) == 0; ready.set(); time.sleep(60)\n\
                threading.Thread(target=work, daemon=True).start(); assert ready.wait(9)\n";
    only(&refusals(code, Rules::Standalone), "has left the mnt namespace of its process");
    only(
        &refusals("libc.unshare(0x20000000)", Rules::Standalone),
        "its children will be in another pid namespace",
    );
    only(&refusals("libc.unshare(0x2000000)", Rules::Standalone), "it is in another cgroup namespace");
}

#[test]
fn one_of_many_threads() {
    assert_eq!(refusals(CROWD, Rules::Standalone), Vec::<String>::new());
    assert_eq!(refusals(CROWD, Rules::Homed), Vec::<String>::new());
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let with = |act: &str| {
        format!(
            "{CROWD}ready = threading.Event()\n\
             def work():\n  {act}; ready.set(); time.sleep(60)\n\
             threading.Thread(target=work, daemon=True).start(); assert ready.wait(9)\n"
        )
    };
    let user = with("assert libc.syscall(117, 99, 99, 0) == 0");
    only(&refusals(&user, Rules::Homed), "has other credentials than the process (Uid)");
    assert_eq!(refusals(&user, Rules::Standalone), Vec::<String>::new());
    let rights = with("assert libc.prctl(38, 1, 0, 0, 0) == 0");
    only(&refusals(&rights, Rules::Homed), "has other credentials than the process (NoNewPrivs)");
    let child = with("import subprocess; global p; p = subprocess.Popen(['sleep', '60'])");
    only(&refusals(&child, Rules::Homed), "it has child processes (");
}

#[test]
fn mappings() {
    // Memfds go with the subtree.
    let code = "import mmap; f = os.memfd_create('x'); os.truncate(f, 4096); m = mmap.mmap(f, 4096)";
    assert_eq!(refusals(code, Rules::Homed), Vec::<String>::new());
    let place = tempfile::tempdir().expect("a directory");
    let path = place.path().join("data");
    fs::write(&path, vec![0; 4096]).expect("writes");
    let open = format!("import mmap, os; f = os.open('{}', os.O_RDWR); ", path.display());
    let shared = format!("{open}m = mmap.mmap(f, 4096); os.close(f)");
    assert_eq!(refusals(&shared, Rules::Homed), Vec::<String>::new());
    let private = format!(
        "{open}m = mmap.mmap(f, 4096, mmap.MAP_PRIVATE); os.close(f); os.unlink('{}')",
        path.display()
    );
    assert_eq!(refusals(&private, Rules::Standalone), Vec::<String>::new());
    let secret = "f = libc.syscall(447, 0); os.ftruncate(f, 4096) if f >= 0 else None";
    let found = refusals(secret, Rules::Standalone);
    assert!(found.is_empty() || found[0].contains("secret memory (memfd_secret)"), "{found:?}");
    refused(
        "i = libc.shmget(0, 4096, 0o600); libc.shmat.restype = ctypes.c_void_p; libc.shmat(i, None, 0); libc.shmctl(i, 0, None)",
        "System V shared memory",
    );
}

#[test]
fn files_that_others_map_or_write() {
    let place = tempfile::tempdir().expect("a directory");
    let path = place.path().join("data");
    fs::write(&path, vec![0; 4096]).expect("writes");
    let open = format!("import mmap, os; f = os.open('{}', os.O_RDWR); ", path.display());
    let shared = format!("{open}m = mmap.mmap(f, 4096); os.close(f)");
    let others = [
        (format!("{open}m = mmap.mmap(f, 4096, prot=mmap.PROT_READ); os.close(f)"), "maps as well"),
        (open, "has open to be written"),
    ];
    for (other, words) in others {
        let other = Victim::python(&format!("{other}\ntell(1); time.sleep(60)\n"));
        other.line();
        let found = refusals(&shared, Rules::Homed);
        only(&found, &format!("mapped shared and writable, which process {} {words}", other.pid()));
    }
    let reading = format!("f = open('{}')", path.display());
    let reader = Victim::python(&format!("{reading}\ntell(1); time.sleep(60)\n"));
    reader.line();
    assert_eq!(refusals(&shared, Rules::Homed), Vec::<String>::new());
    // Somebody who merely reads a mapped file is in nobody's way.
    let other = Victim::python(&format!("{shared}\ntell(1); time.sleep(60)\n"));
    other.line();
    assert_eq!(refusals(&reading, Rules::Homed), Vec::<String>::new());
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
    let lease = format!(
        "{open}g = os.open('{}', os.O_RDONLY); f.close(); fcntl.fcntl(g, fcntl.F_SETLEASE, fcntl.F_RDLCK)",
        path.display()
    );
    refused(&lease, "a lease (read)");
    // It stays with what is open at home, and can be taken again where an image is restored.
    for rules in [Rules::Homed, Rules::Standalone] {
        let found = refusals(&format!("{open}fcntl.flock(f, fcntl.LOCK_SH)"), rules);
        assert_eq!(found, Vec::<String>::new());
    }
    let with_other = format!(
        "{open}fcntl.flock(f, fcntl.LOCK_SH)\nos.set_inheritable(f.fileno(), True)\n\
         import subprocess, atexit; p = subprocess.Popen(['sleep', '60'], close_fds=False); atexit.register(p.kill)\n\
         libc.prctl(1, 15, 0, 0, 0); tell(p.pid); time.sleep(60)"
    );
    let victim = Victim::python(&with_other);
    let other: i32 = victim.line().parse().expect("a PID");
    let found = texts(victim.pid(), Rules::Standalone);
    let wanted = format!("together with process {other}");
    assert!(
        found.iter().any(|text| text.contains("it holds a lock on") && text.contains(&wanted)),
        "{found:?}"
    );
    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(other), nix::sys::signal::Signal::SIGKILL);
}

#[test]
fn kernel_states() {
    let filter = "class Program(ctypes.Structure): _fields_ = [('n', ctypes.c_ushort), ('p', ctypes.c_void_p)]\n\
                  allow = (ctypes.c_ulong * 1)(0x7fff0000 << 32 | 6)\n\
                  libc.prctl(38, 1, 0, 0, 0)\n\
                  assert libc.prctl(22, 2, ctypes.byref(Program(1, ctypes.addressof(allow))), 0, 0) == 0";
    assert_eq!(refusals(filter, Rules::Standalone), Vec::<String>::new());
    only(&refusals(filter, Rules::Homed), "a seccomp filter of its own");
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

/// A time namespace is no more than what clocks are ahead by; but all of a family have one clock.
#[test]
fn time_namespaces() {
    let mut command = Command::new("unshare");
    let sleeps = "import os, time; os.closerange(3, 65536); print('ready', flush=True); time.sleep(60)";
    command.args(["--time", "--monotonic", "1000000", "python3", "-c", sleeps]);
    let victim = Victim::start(&mut command);
    assert_eq!(victim.line(), "ready");
    assert_eq!(texts(victim.pid(), Rules::Standalone), Vec::<String>::new());
    let code = "import os\nown = os.open('/proc/self/ns/time', os.O_RDONLY)\n\
                if libc.unshare(0x80): raise OSError('unshare')\n\
                with open('/proc/self/timens_offsets', 'w') as f: f.write('monotonic 1000 0\\n')\n\
                if os.fork() == 0: libc.prctl(1, 9); time.sleep(60)\n\
                if libc.setns(own, 0x80): raise OSError('setns')\nos.close(own)\n";
    let victim = Victim::python(&format!("{code}\ntell('ready'); time.sleep(60)\n"));
    assert_eq!(victim.line(), "ready");
    for rules in [Rules::Standalone, Rules::Homed] {
        let found = inspect_tree(victim.pid(), rules).expect("looks");
        let found: Vec<String> =
            found.into_iter().flat_map(|(_, one)| one.blockers).map(|blocker| blocker.what).collect();
        let wanted = format!("its clocks are not those of process {}", victim.pid());
        assert!(found.iter().any(|what| what.contains(&wanted)), "{found:?}");
    }
}

#[test]
fn a_timer_on_the_time_of_another_process() {
    // struct sigevent: value, signal, SIGEV_NONE.
    let code = "import os, struct\nevent = ctypes.create_string_buffer(struct.pack('qii', 0, 0, 1).ljust(64, b'\\0'))\n\
                made = ctypes.c_int()\n\
                clock = (~WHOSE << 3) | 2\n\
                if libc.syscall(222, clock, event, ctypes.byref(made)): raise OSError('timer_create')";
    for rules in [Rules::Standalone, Rules::Homed] {
        only(&refusals(&code.replace("WHOSE", "1"), rules), "counts the CPU time of process 1");
        assert_eq!(refusals(&code.replace("WHOSE", "os.getpid()"), rules), Vec::<String>::new());
    }
}

/// TCP and UDP: what an image does not carry.
#[test]
fn internet_sockets_of_images() {
    let refused = |code: &str, wanted: &str| {
        let code = format!("import socket, struct\nTCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM\n{code}");
        only(&refusals(&code, Rules::Standalone), wanted);
    };
    let holder = Victim::python(
        "import socket\nl = socket.socket(); l.bind(('127.0.0.1', 0)); l.listen()\n\
         u = socket.socket(type=socket.SOCK_DGRAM); u.bind(l.getsockname()); tell(l.getsockname()[1])\n\
         s, _ = l.accept(); time.sleep(60)\n",
    );
    let theirs: u16 = holder.line().parse().expect("a port");
    let who = format!("process {} (python3)", holder.pid());
    refused(
        &format!("c = socket.create_connection(('127.0.0.1', {theirs})); time.sleep(0.3)"),
        &format!("connected to {who} (127.0.0.1:{theirs})"),
    );
    refused(
        &format!("u = socket.socket(type=UDP); u.connect(('127.0.0.1', {theirs}))"),
        &format!("connected to {who} (127.0.0.1:{theirs})"),
    );
    refused(
        "u = socket.socket(type=UDP); u.setsockopt(0, socket.IP_MULTICAST_IF, socket.inet_aton('127.0.0.1'))\n\
         u.setsockopt(0, socket.IP_ADD_MEMBERSHIP, socket.inet_aton('239.1.2.3') + socket.inet_aton('127.0.0.1'))",
        "a member of the group 239.1.2.3",
    );
    refused("u = socket.socket(type=UDP); u.bind(('127.0.0.1', 0)); u.setsockopt(17, 100, 2)", "UDP_ENCAP");
    refused("u = socket.socket(type=UDP); u.setsockopt(17, 1, 1)", "UDP_CORK");
    refused(
        "u = socket.socket(type=UDP); u.connect(('127.0.0.1', 1)); u.send(b'x'); time.sleep(0.1)",
        "which has an error to tell",
    );
    refused(
        "l = socket.socket(); l.bind(('127.0.0.1', 0)); l.listen(0); wait = socket.create_connection(l.getsockname())\n\
         c = socket.socket(); c.setblocking(False); c.connect_ex(l.getsockname()); time.sleep(0.1)",
        "which is being connected to 127.0.0.1:",
    );
    refused(
        "l = socket.socket(); l.bind(('127.0.0.1', 0)); l.listen(); c = socket.create_connection(l.getsockname())\n\
         c.send(b'early'); time.sleep(0.1)",
        "whose connection is not accepted yet and has data in it",
    );
    refused(
        "l = socket.socket(); l.bind(('127.0.0.1', 0)); l.listen(); c = socket.create_connection(l.getsockname())\n\
         c.close(); time.sleep(0.1)",
        "where a connection from 127.0.0.1:",
    );
    refused("s = socket.socket(socket.AF_INET, TCP, 262)", "MPTCP");
}
