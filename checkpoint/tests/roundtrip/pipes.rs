//! Pipes and FIFOs.

use super::harness::{Case, can_run, run};
use super::open_files::{prepared, survives, survives_as_tree};
use std::fs;

/// Packets keep their ends, sizes are kept, and several readers and writers have flags of their own.
const PIPES: &str = r#"
DIRECT, NONBLOCK, SETSIZE, GETSIZE = os.O_DIRECT, os.O_NONBLOCK, 1031, 1032
pr, pw = os.pipe2(DIRECT | NONBLOCK)
for packet in (b"a" * 10, b"b", b"c" * 4096, b"d" * 3):
    os.write(pw, packet)
mr, mw = os.pipe2(NONBLOCK)
fcntl.fcntl(mw, fcntl.F_SETFL, NONBLOCK | DIRECT); os.write(mw, b"packet")
fcntl.fcntl(mw, fcntl.F_SETFL, NONBLOCK); os.write(mw, b"p" * 4000)
fcntl.fcntl(mw, fcntl.F_SETFL, NONBLOCK | DIRECT); os.write(mw, b"z" * 200); os.write(mw, b"last")
lr, lw = os.pipe2(DIRECT | NONBLOCK)
os.write(lw, b"only packets"); os.write(lw, b"left"); os.close(lw)
br, bw = os.pipe()
fcntl.fcntl(bw, SETSIZE, 1 << 20)
os.write(bw, os.urandom(1000)); os.read(br, 1000)
os.set_blocking(bw, False)
while True:
    try:
        os.write(bw, b"0123456789abcdef" * 100)
    except BlockingIOError:
        break
r1 = os.open(f"/proc/self/fd/{br}", os.O_RDONLY | NONBLOCK)
both = os.open(f"/proc/self/fd/{br}", os.O_RDWR)
w1 = os.open(f"/proc/self/fd/{bw}", os.O_WRONLY)
small_r, small_w = os.pipe()
fcntl.fcntl(small_r, SETSIZE, 4096)
gone_r, gone_w = os.pipe()
os.close(gone_r)
import termios
filled = lambda fd: struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))[0]
length = filled(br)
fds = (pr, pw, mr, mw, lr, br, bw, r1, both, w1, small_r, small_w, gone_w)
def look():
    return [(fcntl.fcntl(fd, fcntl.F_GETFL), fcntl.fcntl(fd, GETSIZE), os.fstat(fd).st_mode) for fd in fds]
before = look()
pause()
check("flags and sizes", look(), before)
os.write(pw, b"after")
check("packets", [os.read(pr, 8192), os.read(pr, 8192), os.read(pr, 10), os.read(pr, 8192), os.read(pr, 8192)],
      [b"a" * 10, b"b", b"c" * 10, b"d" * 3, b"after"])
check("mixed", [os.read(mr, 3), os.read(mr, 2000), os.read(mr, 2100), os.read(mr, 100)],
      [b"pac", b"p" * 2000, b"p" * 2000 + b"z" * 100, b"last"])
check("left", [os.read(lr, 4), os.read(lr, 100), os.read(lr, 100)], [b"only", b"left", b""])
got = b""
while True:
    try:
        got += os.read(r1, 1 << 20)
    except BlockingIOError:
        break
check("a full pipe", (len(got), got[:20]), (length, b"0123456789abcdef0123"))
os.write(w1, b"x"); check("the same pipe", os.read(both, 1), b"x")
os.write(small_w, b"y" * 4096)
check("small", select.select([], [small_w], [], 0)[1], [])
signal.signal(signal.SIGPIPE, signal.SIG_IGN)
try:
    os.write(gone_w, b"x"); check("nobody reads", True, False)
except BrokenPipeError:
    pass
"#;

#[test]
fn pipes_with_packets() {
    survives(PIPES);
}

const FIFOS: &str = r#"
NONBLOCK = os.O_NONBLOCK
for name in ("both", "ends", "gone", "quiet", "left", "taken", "packets"):
    os.mkfifo(name, 0o640)
both = os.open("both", os.O_RDWR); os.write(both, b"in both")
er = os.open("ends", os.O_RDONLY | NONBLOCK); ew = os.open("ends", os.O_WRONLY); other_w = os.open("ends", os.O_WRONLY | NONBLOCK)
os.write(ew, b"in the fifo")
gone = os.open("gone", os.O_RDWR | NONBLOCK); gone_r = os.open("gone", os.O_RDONLY); os.write(gone, b"nameless"); os.unlink("gone")
quiet = os.open("quiet", os.O_RDONLY | NONBLOCK)
left = os.open("left", os.O_RDONLY | NONBLOCK); w = os.open("left", os.O_WRONLY); os.write(w, b"x"); os.read(left, 1); os.close(w)
taken = os.open("taken", os.O_RDWR | NONBLOCK); os.unlink("taken"); open("taken", "w").close()
pk = os.open("packets", os.O_RDWR | NONBLOCK); fcntl.fcntl(pk, fcntl.F_SETFL, NONBLOCK | os.O_DIRECT)
os.write(pk, b"one"); os.write(pk, b"two")
child = os.fork()
if child == 0:
    os.close(ew)
    wait_for("ask")
    got = os.read(er, 4)
    os._exit(len(got))
fds = (both, er, ew, other_w, gone, gone_r, quiet, left, taken, pk)
def look():
    return [(os.readlink(f"/proc/self/fd/{fd}"), fcntl.fcntl(fd, fcntl.F_GETFL), oct(os.fstat(fd).st_mode)) for fd in fds]
def polled(fd):
    p = select.poll(); p.register(fd, select.POLLIN)
    return [event for _, event in p.poll(0)]
before = look()
check("prepared", (polled(quiet), polled(left)), ([], [select.POLLHUP]))
pause()
now = look()
check("the same", now[:8] + now[9:], before[:8] + before[9:])
check("taken", now[8][0].endswith("/taken.1 (deleted)") or now[8][0].endswith("/taken.1.1 (deleted)"), True)
check("hang-ups", (polled(quiet), polled(left)), ([], [select.POLLHUP]))
check("both", os.read(both, 100), b"in both")
open("ask", "w").close()
check("child", os.waitpid(child, 0)[1], 4 << 8)
check("the rest", os.read(er, 100), b"he fifo")
os.close(ew); os.write(other_w, b"again"); os.close(other_w)
check("the end", [os.read(er, 100), os.read(er, 100)], [b"again", b""])
check("nameless", os.read(gone_r, 100), b"nameless")
w = os.open("quiet", os.O_WRONLY); os.write(w, b"q"); check("quiet", os.read(quiet, 9), b"q")
os.close(w); check("quiet no more", polled(quiet), [select.POLLHUP])
check("packets", [os.read(pk, 100), os.read(pk, 100)], [b"one", b"two"])
"#;

#[test]
fn fifos_in_every_mode() {
    survives_as_tree(FIFOS);
}

#[test]
fn a_fifo_to_somebody_else() {
    if !can_run("a_fifo_to_somebody_else") {
        return;
    }
    let case = Case::new();
    let fifo = case.path("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).expect("a FIFO");
    let program = "f = os.open('fifo', os.O_RDONLY | os.O_NONBLOCK)\npause()";
    let mut running = prepared(&case, program);
    let (pid, image) = (running.pid().to_string(), case.path("img"));
    let image = image.to_str().expect("UTF-8");
    let other = fs::OpenOptions::new().read(true).write(true).open(&fifo).expect("opens");
    let done = run(&["dump", &pid, "--to", image]);
    let text = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(4), "{text}");
    assert!(text.contains("/fifo, whose other end is elsewhere"), "{text}");
    // Nobody has it when it is saved, and somebody when it is to be restored.
    drop(other);
    case.dump(&mut running);
    let mut other = fs::OpenOptions::new().read(true).write(true).open(&fifo).expect("opens");
    std::io::Write::write_all(&mut other, b"not ours").expect("writes");
    let done = run(&["restore", image]);
    let text = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(4), "{text}");
    assert!(text.contains("somebody else has written to the FIFO"), "{text}");
    drop(other);
    fs::remove_file(&fifo).expect("removes");
    let done = run(&["restore", image]);
    let text = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.code() == Some(4) && text.contains("is not there any more"), "{text}");
}
