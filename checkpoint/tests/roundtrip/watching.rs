//! What epolls, inotifies and pidfds watch.

use super::harness::{Case, can_run, run};
use super::open_files::{prepared, survives, survives_as_tree};
use std::fs;

/// Every kind of target, with and without an event that was taken.
const EPOLLS: &str = r#"
child = os.fork()
if child == 0:
    wait_for("end")
    os._exit(5)
IN, OUT, HUP, ET, ONE, EXCLUSIVE = 1, 4, 0x10, 1 << 31, 1 << 30, 1 << 28
def pipe():
    r, w = os.pipe()
    os.set_blocking(r, False)
    return r, w
def told(epoll):
    return sorted(epoll.poll(0))
# Edge-triggered and told: not again, until something comes.
edge, (er, ew) = select.epoll(), pipe()
edge.register(er, IN | ET); os.write(ew, b"x"); edge.poll(0)
# Edge-triggered and not yet told.
fresh, (fr, fw) = select.epoll(), pipe()
fresh.register(fr, IN | ET); os.write(fw, b"x")
# One-shot, told: with data, without, and when the writer has gone.
once, (ar, aw), (br, bw), (cr, cw) = select.epoll(), pipe(), pipe(), pipe()
for r, w in ((ar, aw), (br, bw), (cr, cw)):
    once.register(r, IN | ONE)
    os.write(w, b"x")
once.poll(0); os.read(br, 1); os.read(cr, 1)
armed, (dr, dw) = select.epoll(), pipe()
armed.register(dr, IN | ONE)
# Closed under its number, alive in a copy; the number is another file's now.
moved, (mr, mw), (nr, nw) = select.epoll(), pipe(), pipe()
moved.register(mr, IN); moved.register(nr, IN | ONE)
os.write(nw, b"x"); moved.poll(0); os.read(nr, 1)
copy, other_copy = os.dup(mr), os.dup(nr)
os.close(mr); os.close(nr)
mr_now = os.open("/dev/null", os.O_RDONLY)
check("the number is used again", mr_now in (mr, nr), True)
# Nested, exclusive, and all that is no pipe.
inner, outer, deep = select.epoll(), select.epoll(), select.epoll()
outer.register(inner.fileno(), IN | ET); deep.register(outer.fileno(), IN)
inner.register(ar, IN)
deep.poll(0); outer.poll(0)
exclusive = select.epoll()
exclusive.register(ar, IN | EXCLUSIVE); exclusive.register(br, IN | EXCLUSIVE)
kinds = select.epoll()
counter = libc.eventfd(3, 0o4000)
timer = libc.timerfd_create(1, 0o4000)
libc.timerfd_settime(timer, 0, (ctypes.c_long * 4)(0, 0, 1000, 0), None)
mask = ctypes.c_ulong(1 << (signal.SIGUSR1 - 1))
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
signals = libc.signalfd(-1, ctypes.byref(mask), 0o4000)
process = os.pidfd_open(child)
for fd in (counter, timer, signals, process):
    kinds.register(fd, IN)
check("prepared", told(kinds), [(counter, IN)])
pause()
check("edge", told(edge), [])
check("fresh", told(fresh), [(fr, IN)])
check("fresh once", told(fresh), [])
check("one-shot", told(once), [])
check("moved", told(moved), [])
check("deep", told(deep), [])
check("inner", told(inner), [(ar, IN)])
check("exclusive", told(exclusive), [(ar, IN)])
check("kinds", told(kinds), [(counter, IN)])
os.write(ew, b"y"); check("edge again", told(edge), [(er, IN)])
os.write(bw, b"y"); os.close(cw)
check("one-shot is silent", told(once), [])
for r in (ar, br, cr):
    once.modify(r, IN | ONE)
check("one-shot armed again", told(once), sorted([(ar, IN), (br, IN), (cr, HUP)]))
os.write(dw, b"z"); check("armed", [told(armed), told(armed)], [[(dr, IN)], []])
os.write(mw, b"z"); os.write(nw, b"z"); check("moved tells", told(moved), [(mr, IN)])
check("exclusive later", told(exclusive), sorted([(ar, IN), (br, IN)]))
os.close(copy); check("moved and gone", told(moved), [])
os.write(aw, b"y"); check("outer", told(deep), [(outer.fileno(), IN)])
libc.eventfd_read(counter, ctypes.byref(ctypes.c_ulong()))
os.kill(os.getpid(), signal.SIGUSR1)
libc.timerfd_settime(timer, 0, (ctypes.c_long * 4)(0, 0, 0, 1), None)
open("end", "w").close()
deadline = time.time() + 20
while len(told(kinds)) < 3 and time.time() < deadline:
    time.sleep(0.01)
check("all kinds", told(kinds), sorted([(timer, IN), (signals, IN), (process, IN)]))
check("child", os.waitpid(child, 0)[1], 5 << 8)
"#;

#[test]
fn epolls_of_every_kind() {
    survives_as_tree(EPOLLS);
}

/// An epoll of several processes, and one whose target only a child has still.
const SHARED_EPOLL: &str = r#"
IN = 1
shared, far = select.epoll(), select.epoll()
r, w = os.pipe()
far_r, far_w = os.pipe()
late_r, late_w = os.pipe()
shared.register(r, IN)
far.register(far_r, IN)
child = os.fork()
if child == 0:
    wait_for("ask")
    got = shared.poll(20)
    shared.register(late_r, IN)
    os.read(r, 1)
    os._exit(7 if got == [(r, IN)] else 8)
os.close(far_r)
pause()
check("nothing", [shared.poll(0), far.poll(0)], [[], []])
os.write(far_w, b"x")
check("what the child has", far.poll(5), [(far_r, IN)])
os.write(w, b"x")
open("ask", "w").close()
check("child", os.waitpid(child, 0)[1], 7 << 8)
check("gone with the child", far.poll(0), [])
os.write(late_w, b"x")
check("what the child has added", shared.poll(5), [(late_r, IN)])
"#;

#[test]
fn an_epoll_of_two_processes() {
    survives_as_tree(SHARED_EPOLL);
}

const INOTIFY: &str = r#"
def add(fd, path, mask):
    return libc.inotify_add_watch(fd, os.fsencode(path), mask)
def events(fd):
    found, at = [], 0
    try:
        data = os.read(fd, 65536)
    except BlockingIOError:
        return []
    while at < len(data):
        wd, mask, cookie, length = struct.unpack_from("iIII", data, at)
        found.append((wd, mask, data[at + 16:at + 16 + length].rstrip(b"\0").decode()))
        at += 16 + length
    return found
CREATE, DELETE, MODIFY, DELETE_SELF, ONESHOT, IGNORED = 0x100, 0x200, 2, 0x400, 0x80000000, 0x8000
os.mkdir("watched"); os.mkdir("was here")
open("file", "w").close(); open("once", "w").close()
fd = libc.inotify_init1(0o4000)
for n in range(40):
    libc.inotify_rm_watch(fd, add(fd, "watched", CREATE))
a = add(fd, "watched", CREATE | DELETE)
b = add(fd, "file", MODIFY | DELETE_SELF)
gone = add(fd, "/usr", CREATE)
c = add(fd, "was here", CREATE)
d = add(fd, "once", MODIFY | ONESHOT)
libc.inotify_rm_watch(fd, gone)
os.rename("was here", "is there")
events(fd)
copy = os.dup(fd)
before = sorted(info(fd, "inotify"))
check("numbers", (a, len(before)), (41, 4))
pause()
check("watches", sorted(info(fd, "inotify")), before)
check("nothing came", events(fd), [])
open("watched/new", "w").close(); open("is there/too", "w").close()
with open("file", "w") as file:
    file.write("x")
for n in range(2):
    with open("once", "a") as file:
        file.write("x")
        file.flush()
        file.write("y")
check("told", events(copy), [(a, CREATE, "new"), (c, CREATE, "too"), (b, MODIFY, ""), (d, MODIFY, ""), (d, IGNORED, "")])
check("a new number", add(fd, "/usr", CREATE), d + 1)
"#;

#[test]
fn inotify() {
    survives(INOTIFY);
}

/// Of itself, a child, an ended child, one that was waited for; and what two processes have.
const PIDFDS: &str = r#"
def state(fd):
    return bool(select.select([fd], [], [], 0)[0])
children = []
def child(work):
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(4)
    return pid
THREAD, NONBLOCK = 0o200, 0o4000
own = os.pidfd_open(os.getpid())
thread = libc.syscall(434, os.getpid(), THREAD)
ended = child(lambda: None)
zombie = os.pidfd_open(ended)
reaped = child(lambda: None)
past = os.pidfd_open(reaped)
os.waitpid(reaped, 0)
first = child(lambda: wait_for("first"))
alive = os.pidfd_open(first, NONBLOCK)
libc.dup3(alive, 900, 0o2000000)
# Its sister waits for it by the same description, and one of its own.
def sister():
    mine = os.pidfd_open(os.getppid())
    # Its flags are those of both: not before they have been looked at.
    wait_for("looked")
    os.set_blocking(alive, True)
    select.select([alive], [], [], 30)
    os._exit(3 if not state(mine) and state(alive) else 2)
second = child(sister)
while open(f"/proc/{ended}/stat").read().rsplit(")", 1)[1].split()[0] != "Z":
    time.sleep(0.01)
def look():
    return [(info(fd, "NSpid:"), info(fd, "flags:")) for fd in (own, thread, zombie, past, alive, 900)]
before = look()
pause()
check("pidfds", look(), before)
open("looked", "w").close()
check("states", [state(fd) for fd in (own, zombie, past, alive)], [False, True, True, False])
check("wait by pidfd", os.waitid(os.P_PIDFD, zombie, os.WEXITED).si_status, 4)
try:
    signal.pidfd_send_signal(past, 0)
    check("signal to one that is gone", True, False)
except ProcessLookupError:
    pass
signal.pidfd_send_signal(own, 0)
open("first", "w").close()
select.select([alive], [], [], 30)
check("first", os.waitpid(first, 0)[1], 4 << 8)
check("sister", os.waitpid(second, 0)[1], 3 << 8)
"#;

#[test]
fn pidfds() {
    survives_as_tree(PIDFDS);
}

/// Files of itself, of a relative, and of the system, with positions; places without contents.
const PROC_FILES: &str = r#"
child = os.fork()
if child == 0:
    wait_for("end")
    os._exit(0)
own = os.open("/proc/self/status", os.O_RDONLY)
head = os.read(own, 20)
theirs = os.open(f"/proc/{child}/stat", os.O_RDONLY)
directory = os.open(f"/proc/{child}", os.O_RDONLY)
task = os.open("/proc/thread-self", os.O_RDONLY)
memory = os.open("/proc/self/mem", os.O_RDWR)
global_file = os.open("/proc/meminfo", os.O_RDONLY)
os.read(global_file, 4)
fds = os.open("/proc/self/fd", os.O_RDONLY)
system = os.open("/proc/sys/kernel", os.O_RDONLY)
sysfs = os.open("/sys/kernel/mm/transparent_hugepage/enabled", os.O_RDONLY)
net = os.open("/proc/self/ns/net", os.O_RDONLY)
os.symlink("nowhere", "link")
open("file", "w").close(); os.mkfifo("fifo"); os.mkdir("dir")
places = [os.open(name, os.O_PATH | os.O_NOFOLLOW) for name in ("link", "file", "fifo", "dir", "/dev/null", f"/proc/{child}")]
os.rename("file", "renamed")
text = ctypes.create_string_buffer(b"something of ours")
links = {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in (own, theirs, directory, task, memory, global_file, fds, system, sysfs, net, *places)}
flags = {fd: info(fd, "flags:") for fd in links}
pause()
check("links", {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in links}, links)
check("flags", {fd: info(fd, "flags:") for fd in links}, flags)
check("own", head + os.read(own, 100000)[:10], open("/proc/self/status", "rb").read()[:30])
check("theirs", os.read(theirs, 20).split()[0], str(child).encode())
check("in its directory", os.read(os.open("comm", os.O_RDONLY, dir_fd=directory), 9), b"python3\n")
check("memory", os.pread(memory, 9, ctypes.addressof(text)), b"something")
os.pwrite(memory, b"S", ctypes.addressof(text)); check("written", text.raw[:3], b"Som")
check("position", os.lseek(global_file, 0, os.SEEK_CUR), 4)
check("system", "ostype" in os.listdir(system), True)
check("descriptors", str(fds) in os.listdir(fds), True)
check("namespace", os.fstat(net).st_ino, os.stat("/proc/self/ns/net").st_ino)
check("a link", os.readlink("", dir_fd=places[0]), "nowhere")
check("places", [oct(os.fstat(fd).st_mode & 0o170000) for fd in places],
      ["0o120000", "0o100000", "0o10000", "0o40000", "0o20000", "0o40000"])
try:
    os.read(places[1], 1)
    check("a place is read", True, False)
except OSError as error:
    check("a place", error.errno, errno.EBADF)
open("end", "w").close()
check("child", os.waitpid(child, 0)[1], 0)
"#;

#[test]
fn files_of_proc_and_places() {
    survives_as_tree(PROC_FILES);
}

#[test]
fn what_is_not_carried_is_named() {
    if !can_run("what_is_not_carried_is_named") {
        return;
    }
    for (program, words) in [
        ("f = os.pidfd_open(1)", "a pidfd of process 1, which is not saved with it"),
        ("f = open('/proc/1/status')", "/proc/1/status, a file of process 1, which is not saved with it"),
        (
            "f = libc.inotify_init1(0); libc.inotify_add_watch(f, b'.', 0x100); open('x', 'w').close()",
            "an inotify with events that have not been read yet",
        ),
        (
            "f = libc.inotify_init1(0); g = open('x', 'w'); libc.inotify_add_watch(f, b'x', 2); os.unlink('x'); os.read(f, 99) if select.select([f], [], [], 0)[0] else 0",
            "which watches a file without a name",
        ),
        (
            "r, w = os.pipe(); fcntl.fcntl(r, fcntl.F_SETOWN, 1)",
            "its signals go to process 1, which is not saved",
        ),
        (
            "f = open('x', 'w'); g = os.open('x', os.O_PATH); f.close(); os.unlink('x')",
            "an O_PATH descriptor of a deleted file",
        ),
    ] {
        let case = Case::new();
        let running = prepared(&case, &format!("{program}\npause()"));
        let done =
            run(&["dump", &running.pid().to_string(), "--to", case.path("img").to_str().expect("UTF-8")]);
        let text = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.code(), Some(4), "{program}: {text}");
        assert!(text.contains(words), "{program}: {text}");
    }
}

#[test]
fn a_watched_file_that_is_gone() {
    let program =
        "f = libc.inotify_init1(0); open('x', 'w').close(); libc.inotify_add_watch(f, b'x', 2)\npause()";
    if !can_run("a_watched_file_that_is_gone") {
        return;
    }
    let case = Case::new();
    let mut running = prepared(&case, program);
    let pid = running.pid();
    case.dump(&mut running);
    fs::remove_file(case.path("x")).expect("removes");
    let done = run(&["restore", case.path("img").to_str().expect("UTF-8")]);
    let text = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(4), "{text}");
    assert!(text.contains("/x, which it watches for changes, is not there any more"), "{text}");
    assert!(!super::harness::exists(pid), "a process was left");
}
