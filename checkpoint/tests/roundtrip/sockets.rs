//! Sockets within a process, and within a tree.

use super::open_files::{survives, survives_as_tree};

/// What every program here begins with.
pub const SOCKETS: &str = r#"
import array, socket
from socket import AF_UNIX, SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET, SOL_SOCKET, MSG_DONTWAIT
def got(s, n=1000):
    try:
        return s.recv(n, MSG_DONTWAIT)
    except OSError as error:
        return errno.errorcode[error.errno]
def put(s, data):
    try:
        return s.send(data, MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    except OSError as error:
        return errno.errorcode[error.errno]
def message(s, n=1000):
    try:
        data, ancillary, flags, name = s.recvmsg(n, 4096, MSG_DONTWAIT)
    except OSError as error:
        return errno.errorcode[error.errno], [], [], None
    fds, ids = [], []
    for level, kind, value in ancillary:
        if kind == socket.SCM_RIGHTS:
            fds += array.array("i", value).tolist()
        elif kind == socket.SCM_CREDENTIALS:
            ids.append(struct.unpack("3i", value))
    return data, fds, ids, name
def rights(s, data, fds, name=None):
    ancillary = [(SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
    s.sendmsg([data], ancillary, 0, name) if name else s.sendmsg([data], ancillary)
def cred(s):
    return struct.unpack("3i", s.getsockopt(SOL_SOCKET, socket.SO_PEERCRED, 12))
def events(s):
    p = select.poll(); p.register(s, select.POLLIN | select.POLLOUT | select.POLLRDHUP)
    return [event for _, event in p.poll(0)]
"#;

/// Pairs of every type, with data in both directions, and ends shut and closed.
const PAIRS: &str = r#"
a, b = socket.socketpair()
a.send(b"to b"); a.send(b", more"); b.send(b"to a")
big_a, big_b = socket.socketpair()
big_a.setblocking(False)
big = 0
while True:
    n = put(big_a, bytes([big // 1000 % 251]) * 1000)
    if n == "EAGAIN": break
    big += n
d, e = socket.socketpair(AF_UNIX, SOCK_DGRAM)
for text in (b"one", b"", b"three" * 1000): d.send(text)
e.send(b"back")
f, g = socket.socketpair(AF_UNIX, SOCK_SEQPACKET)
for text in (b"first", b"second"): f.send(text)
h, i = socket.socketpair()
h.send(b"last words"); h.shutdown(socket.SHUT_WR); i.send(b"answer")
j, k = socket.socketpair()
j.send(b"left"); j.close()
l, m = socket.socketpair()
m.send(b"unread"); l.send(b"then reset"); l.close()
n, o = socket.socketpair(AF_UNIX, SOCK_SEQPACKET)
n.send(b"a record"); n.close()
p, q = socket.socketpair(AF_UNIX, SOCK_DGRAM)
p.send(b"a datagram"); p.close()
r, s = socket.socketpair()
r.shutdown(socket.SHUT_RDWR)
ends = dict(a=a, b=b, d=d, e=e, f=f, g=g, h=h, i=i, k=k, m=m, o=o, q=q, r=r, s=s, big_b=big_b)
a.setsockopt(SOL_SOCKET, socket.SO_SNDBUF, 9999); b.setsockopt(SOL_SOCKET, socket.SO_RCVBUF, 54321)
a.setsockopt(SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("qq", 3, 500000))
b.setsockopt(SOL_SOCKET, socket.SO_PASSCRED, 1); e.setsockopt(SOL_SOCKET, 42, 2)
copy = a.dup()
other_number = os.dup2(b.fileno(), 700)
options = [socket.SO_SNDBUF, socket.SO_RCVBUF, socket.SO_PASSCRED, 42, socket.SO_PRIORITY, 72, socket.SO_RCVLOWAT]
def look():
    return {name: (events(end), [end.getsockopt(SOL_SOCKET, o) for o in options], cred(end), end.getsockname(),
                   end.getsockopt(SOL_SOCKET, socket.SO_SNDTIMEO, 16), end.type, end.getblocking(),
                   fcntl.fcntl(end, fcntl.F_GETFL)) for name, end in ends.items()}
before = look()
pause()
after = look()
for name in before:
    check("the end " + name, after[name], before[name])
check("a stream", (got(b), got(a), got(a)), (b"to b, more", b"to a", "EAGAIN"))
copy.send(b"x"); check("a copy", os.read(700, 9), b"x")
total = 0
while True:
    data = got(big_b, 1000)
    if data == "EAGAIN": break
    if data != bytes([total // 1000 % 251]) * len(data): check("the stream's bytes", data[:9], total)
    total += len(data)
check("a full stream", total, big)
check("the stream goes on", (put(big_a, b"y"), got(big_b)), (1, b"y"))
e.setsockopt(SOL_SOCKET, 42, -1)
check("datagrams", (got(e, 9999), got(e, 9999), got(e, 9999), got(e), got(d)), (b"one", b"", b"three" * 1000, "EAGAIN", b"back"))
check("records", (got(g), got(g), got(g)), (b"first", b"second", "EAGAIN"))
check("half closed", (got(i), got(i), got(h), put(i, b"z"), got(h), put(h, b"z")), (b"last words", b"", b"answer", 1, b"z", "EPIPE"))
check("closed", (got(k), got(k), put(k, b"z")), (b"left", b"", "EPIPE"))
check("reset", (got(m), got(m), got(m)), (b"then reset", "ECONNRESET", b""))
check("a record left", (got(o), got(o), put(o, b"z")), (b"a record", b"", "EPIPE"))
check("a datagram left", (got(q), got(q), put(q, b"z")), (b"a datagram", "EAGAIN", "ECONNREFUSED"))
check("shut", (got(r), got(s), put(s, b"z")), (b"", b"", "EPIPE"))
"#;

#[test]
fn pairs() {
    survives(&format!("{SOCKETS}{PAIRS}"));
}

/// Pairs between processes; who made them shows in `SO_PEERCRED`.
const FAMILY: &str = r#"
a, b = socket.socketpair()
c, d = socket.socketpair(AF_UNIX, SOCK_SEQPACKET)
root = os.getpid()
a.send(b"early")
child = os.fork()
if child == 0:
    a.close(); c.close()
    os.setresgid(12, 12, 12); os.setresuid(34, 34, 34)
    e, f = socket.socketpair()
    rights(d, b"mine", [e.fileno()])
    e.close()
    f.send(b"from the child")
    wait_for("go")
    text = b.recv(100)
    b.send(text + b" and " + f.recv(100))
    os._exit(5 if cred(b)[0] == root else 6)
b.close(); d.close()
while not events(c)[0] & select.POLLIN: time.sleep(0.01)
pause()
check("the pair's maker", cred(a), (root, 0, 0))
data, fds, ids, name = message(c)
check("a message", data, b"mine")
e = socket.socket(fileno=fds[0])
check("the child's pair", cred(e), (child, 34, 12))
check("its data", e.recv(100), b"from the child")
# Before the child can answer, and end.
a.send(b"")
e.send(b"late")
check("the answer", a.recv(100), b"early and late")
check("the child", os.waitpid(child, 0)[1], 5 << 8)
check("its end", (got(a), got(e)), (b"", b""))
"#;

#[test]
fn pairs_of_a_tree() {
    survives_as_tree(&format!("{SOCKETS}{FAMILY}"));
}

/// Named, abstract, hidden and connected ones; backlogs; datagrams of senders that are there or gone.
const NAMES: &str = r#"
import stat
os.mkdir("d"); here = os.getcwd()
l = socket.socket(AF_UNIX); l.bind(here + "/d/listening"); os.chmod("d/listening", 0o640); os.chown("d/listening", 5, 6)
l.listen(7)
c1 = socket.socket(AF_UNIX); c1.connect(here + "/d/listening"); c1.send(b"accepted"); s1, _ = l.accept(); s1.send(b"welcome")
c2 = socket.socket(AF_UNIX); c2.connect(here + "/d/listening")
c3 = socket.socket(AF_UNIX); c3.bind("\0client%d" % os.getpid()); c3.connect(here + "/d/listening")
relative = socket.socket(AF_UNIX); relative.bind("relative"); relative.listen()
r1 = socket.socket(AF_UNIX); r1.connect("relative"); r2, _ = relative.accept(); r1.send(b"by a relative name")
hidden = socket.socket(AF_UNIX, SOCK_SEQPACKET); hidden.bind(here + "/d/hidden"); hidden.listen(3)
h1 = socket.socket(AF_UNIX, SOCK_SEQPACKET); h1.connect(here + "/d/hidden"); h2, _ = hidden.accept(); h2.send(b"record")
h3 = socket.socket(AF_UNIX, SOCK_SEQPACKET); h3.connect(here + "/d/hidden")
os.unlink("d/hidden")
gone = socket.socket(AF_UNIX); gone.bind("\0gone%d" % os.getpid()); gone.listen()
g1 = socket.socket(AF_UNIX); g1.connect(gone.getsockname()); g2, _ = gone.accept(); g2.send(b"of a closed one")
g3 = socket.socket(AF_UNIX); g3.connect(gone.getsockname()); g4, _ = gone.accept(); g4.send(b"bye"); g4.close()
g5 = socket.socket(AF_UNIX); g5.connect(gone.getsockname()); g6, _ = gone.accept(); g5.send(b"bye too"); g5.close()
gone.close()
auto = socket.socket(AF_UNIX, SOCK_DGRAM); auto.bind(b"")
box = socket.socket(AF_UNIX, SOCK_DGRAM); box.bind(here + "/d/box")
sender = socket.socket(AF_UNIX, SOCK_DGRAM); sender.bind(here + "/d/sender"); sender.connect(here + "/d/box"); sender.send(b"from sender")
auto.sendto(b"from auto", here + "/d/box")
late = socket.socket(AF_UNIX, SOCK_DGRAM); late.bind(here + "/d/late"); late.sendto(b"from late", here + "/d/box"); late.close(); os.unlink("d/late")
nameless = socket.socket(AF_UNIX, SOCK_DGRAM); nameless.connect(here + "/d/box"); nameless.send(b"from nobody"); nameless.send(b"")
lost = socket.socket(AF_UNIX, SOCK_DGRAM); lost.bind("\0lost%d" % os.getpid())
widow = socket.socket(AF_UNIX, SOCK_DGRAM); widow.connect(lost.getsockname()); lost.close()
plain = socket.socket(AF_UNIX)
bound = socket.socket(AF_UNIX); bound.bind("\0bound%d" % os.getpid())
all = dict(l=l, c1=c1, s1=s1, c2=c2, c3=c3, relative=relative, r1=r1, r2=r2, hidden=hidden, h1=h1, h2=h2, h3=h3, g1=g1, g2=g2, g3=g3, g6=g6,
           auto=auto, box=box, sender=sender, nameless=nameless, widow=widow, plain=plain, bound=bound)
def peer(s):
    try: return s.getpeername()
    except OSError as error: return errno.errorcode[error.errno]
def file(name):
    s = os.stat(name); return stat.S_ISSOCK(s.st_mode), s.st_mode & 0o777, s.st_uid, s.st_gid
def look():
    return {name: (s.getsockname(), peer(s), cred(s), events(s), s.getsockopt(SOL_SOCKET, socket.SO_ACCEPTCONN)) for name, s in all.items()}
before = look(), [file(n) for n in ("d/listening", "relative", "d/box", "d/sender")], sorted(os.listdir("d"))
pause()
after = look(), [file(n) for n in ("d/listening", "relative", "d/box", "d/sender")], sorted(os.listdir("d"))
for name in before[0]: check(name, after[0][name], before[0][name])
check("files", after[1:], before[1:])
check("a connection", (got(s1), got(c1)), (b"accepted", b"welcome"))
a2, _ = l.accept(); a3, name = l.accept()
c2.send(b"two"); c3.send(b"three")
check("waiting ones", (got(a2), got(a3), name, cred(a3)[0]), (b"two", b"three", c3.getsockname().encode() if isinstance(c3.getsockname(), str) else c3.getsockname(), os.getpid()))
n = socket.socket(AF_UNIX); n.connect(here + "/d/listening"); a4, _ = l.accept(); n.send(b"new"); check("a new one", got(a4), b"new")
check("relative", (got(r2), got(h1)), (b"by a relative name", b"record"))
n = socket.socket(AF_UNIX); n.connect("relative"); relative.accept()
a5, _ = hidden.accept(); h3.send(b"five"); check("hidden", got(a5), b"five")
check("closed", (got(g1), got(g3), got(g3), got(g6), got(g6)), (b"of a closed one", b"bye", b"", b"bye too", b""))
def received():
    data, name = box.recvfrom(100, MSG_DONTWAIT); return data, name
check("mails", [received() for _ in range(5)], [(b"from sender", here + "/d/sender"), (b"from auto", auto.getsockname()),
      (b"from late", here + "/d/late"), (b"from nobody", None), (b"", None)])
sender.send(b"again"); nameless.send(b"once more")
check("more mail", [received() for _ in range(2)], [(b"again", here + "/d/sender"), (b"once more", None)])
"#;

#[test]
fn names_and_connections() {
    survives(&format!("{SOCKETS}{NAMES}"));
}

/// Descriptors and credentials in messages; what is nowhere else but in flight.
const FLIGHT: &str = r#"
a, b = socket.socketpair()
b.setsockopt(SOL_SOCKET, socket.SO_PASSCRED, 1)
file = os.open("file", os.O_RDWR | os.O_CREAT); os.write(file, b"0123456789"); os.lseek(file, 4, 0)
only = os.open("file", os.O_RDONLY); os.lseek(only, 7, 0)
r, w = os.pipe(); os.write(w, b"in the pipe")
c, d = socket.socketpair(AF_UNIX, SOCK_DGRAM)
e, f = socket.socketpair(); e.send(b"nested")
rights(c, b"inner", [f.fileno(), w]); f.close()
a.send(b"before"); rights(a, b"two", [file, only]); a.send(b"after"); rights(a, b"more", [d.fileno(), r])
os.close(only); d.close(); os.close(r); os.close(w)
g, h = socket.socketpair(AF_UNIX, SOCK_SEQPACKET)
us = (os.getpid(), 7, 8)
g.sendmsg([b"who"], [(SOL_SOCKET, socket.SCM_CREDENTIALS, struct.pack("3i", *us))])
g.send(b"unknown")
pause()
me = (os.getpid(), 0, 0)
check("plain", message(b, 6), (b"before", [], [me], None))
data, fds, ids, _ = message(b, 3)
check("two", (data, len(fds), ids), (b"two", 2, [me]))
check("positions", [os.lseek(fd, 0, 1) for fd in fds], [4, 7])
os.lseek(fds[0], 1, 0); check("the position is shared", os.lseek(file, 0, 1), 1)
check("after", message(b, 5), (b"after", [], [me], None))
data, fds, ids, _ = message(b, 100)
check("more", (data, len(fds)), (b"more", 2))
inner = socket.socket(fileno=fds[0])
check("a pipe", os.read(fds[1], 100), b"in the pipe")
data, more, _, _ = message(inner)
check("inner", (data, len(more)), (b"inner", 2))
check("nested", socket.socket(fileno=more[0]).recv(100), b"nested")
os.write(more[1], b"late"); check("the pipe", os.read(fds[1], 100), b"late")
h.setsockopt(SOL_SOCKET, socket.SO_PASSCRED, 1)
check("credentials", message(h)[:3], (b"who", [], [us]))
check("none", message(h)[2], [(0, 65534, 65534)])
"#;

#[test]
fn descriptors_in_flight() {
    survives(&format!("{SOCKETS}{FLIGHT}"));
}
