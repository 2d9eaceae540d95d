//! Pseudo-terminals with both sides in the tree: what programs see of them, and real programs.

use super::harness::installed;
use super::open_files::{survives, survives_as_tree};

/// What is seen of a pair: modes, size, name, and what waits on either side.
const PAIR: &str = r#"
import pty, termios, tty
m, s = pty.openpty(); name = os.ttyname(s)
raw_m, raw_s = pty.openpty(); tty.setraw(raw_s)
half_m, half_s = pty.openpty()
gone_m, gone_s = pty.openpty(); os.write(gone_s, b"last words"); os.close(gone_s)
never = os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY)
modes = termios.tcgetattr(s); modes[3] &= ~termios.ECHO; modes[6][termios.VERASE] = b"%"; termios.tcsetattr(s, termios.TCSANOW, modes)
fcntl.ioctl(m, termios.TIOCSWINSZ, struct.pack("4H", 33, 77, 5, 6))
again = os.open(name, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
os.set_blocking(half_m, False)
os.write(m, b"one\rtwo\x04half a li"); os.write(s, b"out\n")
os.write(raw_m, bytes(range(256))); os.write(raw_s, b"\x00\n\xff")
fcntl.ioctl(raw_s, termios.TIOCEXCL)
fcntl.ioctl(half_m, termios.TIOCPKT, struct.pack("i", 1))
time.sleep(0.1)
def number(fd, request): return struct.unpack("i", fcntl.ioctl(fd, request, b"1234"))[0]
def look():
    return [(termios.tcgetattr(fd), fcntl.ioctl(fd, termios.TIOCGWINSZ, b"12345678"), fcntl.fcntl(fd, fcntl.F_GETFL),
             number(fd, termios.FIONREAD), os.readlink(f"/proc/self/fd/{fd}"), os.fstat(fd).st_rdev) for fd in (m, s, again, raw_m, raw_s, half_m, half_s, gone_m, never)] + [
            number(fd, request) for fd in (m, raw_m, half_m, never) for request in (0x80045430, 0x80045438, 0x80045439)] + [
            number(raw_s, 0x80045440), os.stat(name).st_mode, os.stat(name).st_uid, os.ttyname(s)]
def events(fd):
    p = select.poll(); p.register(fd, select.POLLIN | select.POLLOUT); return p.poll(0)
watched = [events(fd) for fd in (m, s, raw_m, raw_s, half_m, half_s, gone_m)]
before = look()
pause()
for n, (new, old) in enumerate(zip(look(), before)): check(f"part {n}", new, old)
check("events", [events(fd) for fd in (m, s, raw_m, raw_s, half_m, half_s, gone_m)], watched)
check("lines", [os.read(s, 100), os.read(s, 100)], [b"one\n", b"two"])
os.write(m, b"X%ne\r"); time.sleep(0.05)
check("the rest of the line", os.read(again, 100), b"half a line\n")
check("output", os.read(m, 100), b"out\r\n")
check("raw", (os.read(raw_s, 1000), os.read(raw_m, 1000)), (bytes(range(256)), b"\x00\n\xff"))
os.write(half_s, b"z"); time.sleep(0.05); check("a packet", os.read(half_m, 100), b"\x00z")
def end_of(fd):
    try: return os.read(fd, 100)
    except OSError as error: return errno.errorcode[error.errno]
check("a side that is gone", (end_of(gone_m), end_of(gone_m)), (b"last words", "EIO"))
"#;

#[test]
fn a_pair_with_all_that_waits_in_it() {
    survives(PAIR);
}

/// A session on a terminal of the tree: who is in the foreground, and that nobody hears of a hang-up.
const SESSION: &str = r#"
import pty, termios
pid, m = pty.fork()
if pid == 0:
    hups = []
    signal.signal(signal.SIGHUP, lambda *a: hups.append(1))
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    tty = os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC)
    job = os.fork()
    if job == 0:
        os.setpgid(0, 0)
        os.tcsetpgrp(0, os.getpid())
        os.write(1, b"job ready\n")
        text = os.read(0, 100)
        os.write(1, b"job got " + text)
        os._exit(3)
    status = os.waitpid(job, 0)[1]
    os.tcsetpgrp(0, os.getpgrp())
    check_name = os.readlink("/proc/self/fd/%d" % tty) == "/dev/tty"
    os.write(tty, b"done %d %d %d %s\n" % (status >> 8, len(hups), check_name and os.tcgetpgrp(0) == os.getpid(), os.ttyname(0).encode()))
    os._exit(4)
def until(text):
    got = b""
    while text not in got: got += os.read(m, 1000)
    return got
until(b"job ready\r\n")
name = os.readlink(f"/proc/{pid}/fd/0")
def stat(pid): return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[2:6]
before = stat(pid)
pause()
check("group, session, terminal, foreground", stat(pid), before)
os.write(m, b"typed\r")
check("what is printed", until(b"done"), b"typed\r\njob got typed\r\ndone 3 0 1 " + name.encode() + b"\r\n")
check("its end", os.waitpid(pid, 0)[1], 4 << 8)
"#;

#[test]
fn a_session_with_a_job_in_the_foreground() {
    survives_as_tree(SESSION);
}

/// A shell with job control inside script(1).
const SCRIPT: &str = r#"
p = subprocess.Popen(["script", "-q", "-f", "-c", "bash --norc -i", "log"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                     stderr=subprocess.STDOUT, env=dict(os.environ, PS1="", TERM="dumb", HISTFILE="/dev/null"), bufsize=0)
seen = b""
def say(text): p.stdin.write(text.encode() + b"\n")
def until(text):
    global seen
    deadline = time.time() + 60
    while text.encode() not in seen and time.time() < deadline:
        if select.select([p.stdout], [], [], 1)[0]:
            more = os.read(p.stdout.fileno(), 4096)
            if not more: break
            seen += more
    if text.encode() not in seen: wrong.append(f"no {text!r} in {seen!r}")
    seen = seen[seen.find(text.encode()) + len(text):]
say("x=41; sleep 987 & echo started $((x + 1))"); until("started 42")
say("sh -c 'echo in front $((6 * 7)); read a; echo got $a; exit 3'"); until("in front 42")
pause()
say("typed"); until("got typed")
say("echo status $? x $x tty $(tty)"); until("status 3 x 41 tty /dev/pts/")
say("jobs"); until("Running"); until("sleep 987")
say("kill %1; wait %1; echo ended $?"); until("ended 143")
say("cat > /dev/null"); time.sleep(0.3); say("\x1a"); time.sleep(0.3); say("echo stopped $((70 + 7))"); until("stopped 77")
say("kill -9 %%; exit 5")
p.stdin.close()
check("the end of script", p.wait(), 0)
"#;

#[test]
fn a_shell_inside_script() {
    if installed("script", "script") && installed("script", "bash") {
        survives_as_tree(SCRIPT);
    }
}

/// A server of terminals, its client, and the shells in it.
const TMUX: &str = r##"
import pty
libc.prctl(36, 1, 0, 0, 0)
env = dict(os.environ, TERM="xterm", PS1="$ ", SHELL="/bin/sh", LC_ALL="C.UTF-8"); env.pop("TMUX", None)
def tmux(*args): return subprocess.run(["tmux", "-S", os.getcwd() + "/socket", "-f", "/dev/null", *args], env=env, stdin=subprocess.DEVNULL,
                                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout.decode()
print(tmux("new-session", "-d", "-x", "80", "-y", "24", "sh"), end="")
pid, m = pty.fork()
if pid == 0: os.execvpe("tmux", ["tmux", "-S", os.getcwd() + "/socket", "attach"], env)
seen = ""
def until(text):
    global seen
    deadline = time.time() + 60
    while text not in seen and time.time() < deadline:
        if select.select([m], [], [], 1)[0]: seen += os.read(m, 65536).decode(errors="replace")
    if text not in seen: wrong.append(f"no {text!r} in {seen[-500:]!r}")
    seen = seen[seen.find(text) + len(text):]
os.write(m, b"y=5; echo in shell $((y + 1))\r"); until("in shell 6")
time.sleep(0.5)
while select.select([m], [], [], 0.3)[0]: os.read(m, 65536)
pause()
os.write(m, b"echo and now $((y + 2)) $(tty)\r"); until("and now 7 /dev/pts/")
check("a window more", tmux("new-window", "sh"), "")
os.write(m, b"echo window $((50 + 5))\r"); until("window 55")
check("sessions", tmux("list-windows", "-F", "#{window_index}").split(), ["0", "1"])
tmux("kill-server")
check("the client", os.waitpid(pid, 0)[1] >> 8 in (0, 1), True)
"##;

#[test]
fn tmux_with_client_and_shells() {
    if installed("tmux", "tmux") {
        survives_as_tree(TMUX);
    }
}
