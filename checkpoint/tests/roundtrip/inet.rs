//! TCP and UDP sockets whose peers are in the tree, over loopback.

use super::harness::{Case, can_run, installed, run};
use super::open_files::{prepared, survives, survives_as_tree};
use super::sockets::SOCKETS;

/// What every program here begins with.
const INET: &str = r#"
from socket import AF_INET, AF_INET6, IPPROTO_TCP, IPPROTO_UDP, IPPROTO_IP, IPPROTO_IPV6
def number(s, level, name):
    try:
        return s.getsockopt(level, name)
    except OSError as error:
        return errno.errorcode[error.errno]
def peer(s):
    try:
        return s.getpeername()
    except OSError as error:
        return errno.errorcode[error.errno]
def inq(s):
    return struct.unpack("i", fcntl.ioctl(s, 0x541b, b"\0" * 4))[0]
def outq(s):
    return struct.unpack("i", fcntl.ioctl(s, 0x5411, b"\0" * 4))[0]
def tcp(s):
    return s.getsockopt(IPPROTO_TCP, 11, 8)[0]
def look_at(s):
    return (s.getsockname(), peer(s), events(s), s.getsockopt(SOL_SOCKET, socket.SO_ACCEPTCONN), s.getblocking(),
            # Whether the end of what it has sent is acknowledged (FIN_WAIT1, FIN_WAIT2) is nothing to see.
            tcp(s) - (tcp(s) == 5) if s.type == SOCK_STREAM else None, os.fstat(s.fileno()).st_uid)
def options_of(s):
    found = {}
    # Not: what the last segments were like (TCP_INFO and its like, time stamps, SO_INCOMING_CPU), who asks.
    for level, names in [(SOL_SOCKET, [n for n in range(1, 84) if n not in (4, 13, 17, 49, 55, 56, 57, 71)]), (IPPROTO_IP, [n for n in range(1, 60) if n not in (14, 52)]),
                         (IPPROTO_IPV6, [n for n in range(1, 80) if n not in (24, 32)]), (IPPROTO_TCP if s.type == SOCK_STREAM else IPPROTO_UDP,
                          [n for n in range(1, 120) if n not in (10, 11, 19, 20, 21, 24, 26, 28, 29, 35)])]:
        for name in names:
            try:
                found[level, name] = s.getsockopt(level, name, 64)
            except OSError as error:
                found[level, name] = errno.errorcode[error.errno]
    return found
def check_options(what, before, after):
    for key in before:
        check(f"option {key} of {what}", after[key], before[key])
"#;

fn program(text: &str) -> String {
    format!("{SOCKETS}{INET}{text}")
}

/// UDP: unbound, bound, connected; datagrams of senders that are there, gone, elsewhere.
const DATAGRAMS: &str = r#"
def udp(family=AF_INET): return socket.socket(family, SOCK_DGRAM)
fresh = udp()
a = udp(); a.bind(("127.0.0.1", 0))
b = udp(); b.bind(("0.0.0.0", 0)); b.setsockopt(IPPROTO_IP, 8, 1)
c = udp(AF_INET6); c.bind(("::1", 0))
d = udp(AF_INET6); d.bind(("::", 0))
e = udp(); e.connect(a.getsockname())
f = udp(AF_INET6); f.setsockopt(IPPROTO_IPV6, socket.IPV6_V6ONLY, 1); f.bind(("::1", 0)); f.connect(c.getsockname()); c.connect(f.getsockname())
g = udp(); g.connect(("127.0.0.1", 9)); g.shutdown(socket.SHUT_WR)
lost = udp(); lost.bind(("127.0.0.3", 0)); lost_name = lost.getsockname()
e.setsockopt(IPPROTO_IP, socket.IP_TOS, 0x28); e.setsockopt(IPPROTO_IP, socket.IP_TTL, 7)
e.send(b"one"); e.send(b""); lost.sendto(b"three" * 10000, a.getsockname()); e.send(b"four")
b_port = b.getsockname()[1]
lost.sendto(b"to 127.9.9.9", ("127.9.9.9", b_port)); b.sendto(b"to itself", ("127.0.0.1", b_port))
d_port = d.getsockname()[1]
f.send(b"six"); c.send(b"back"); lost.sendto(b"mapped", ("127.0.0.1", d_port)); d.sendto(b"from d", ("::1", d_port))
lost.close()
h = udp(); h.setsockopt(SOL_SOCKET, socket.SO_REUSEADDR, 1); h.bind(("127.0.0.1", 0))
i = udp(); i.setsockopt(SOL_SOCKET, socket.SO_REUSEADDR, 1); i.bind(h.getsockname())
j = udp(); j.bind(("127.0.0.1", 0)); j.connect(h.getsockname()); j.send(b"for one of two"); 
which = h if events(h)[0] & 1 else i
k = udp(); k.setsockopt(SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0"); k.bind(("127.0.0.1", 0)); k.setblocking(False)
a.setsockopt(SOL_SOCKET, socket.SO_RCVBUF, 300000); a.setsockopt(SOL_SOCKET, 29, 1); a.setsockopt(IPPROTO_IP, 12, 1)
a.setsockopt(IPPROTO_IP, 13, 1); d.setsockopt(IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
a.setsockopt(SOL_SOCKET, socket.SO_BROADCAST, 1); a.setsockopt(IPPROTO_IP, socket.IP_MULTICAST_TTL, 3); a.setsockopt(IPPROTO_IP, socket.IP_MULTICAST_LOOP, 0)
d.setsockopt(IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, 9); d.setsockopt(IPPROTO_IPV6, socket.IPV6_TCLASS, 16)
b.setsockopt(IPPROTO_IP, 10, 2); b.setsockopt(SOL_SOCKET, 42, 5)
for s in (fresh, e): os.fchown(s.fileno(), 1234, -1)
ep = select.epoll(); ep.register(a, select.EPOLLIN); ep.register(g, select.EPOLLIN | select.EPOLLET)
left, right = socket.socketpair(); flying = udp(); flying.bind(("127.0.0.1", 0)); flying_name = flying.getsockname()
e2 = udp(); e2.bind(("127.0.0.1", 0)); e2.sendto(b"in flight", flying_name); rights(left, b"fd", [flying.fileno()]); flying.close()
all = dict(fresh=fresh, a=a, b=b, c=c, d=d, e=e, f=f, g=g, h=h, i=i, j=j, k=k)
before = {n: (look_at(s), options_of(s)) for n, s in all.items()}
pause()
for n, s in all.items():
    check(n, look_at(s), before[n][0]); check_options(n, before[n][1], options_of(s))
check("epoll", ep.poll(0), [(a.fileno(), select.EPOLLIN)])
def got_all(s):
    data, ancillary, flags, name = s.recvmsg(70000, 500, MSG_DONTWAIT)
    return data, name, [(l, k, v) for l, k, v in ancillary if l != SOL_SOCKET]
check("one", got_all(a), (b"one", e.getsockname(), [(0, 2, struct.pack("i", 7)), (0, 1, b"\x28")]))
check("none", got_all(a)[:2], (b"", e.getsockname()))
check("three", got_all(a), (b"three" * 10000, lost_name, [(0, 2, struct.pack("i", 64)), (0, 1, b"\0")]))
check("four", got_all(a)[0], b"four"); check("no more", got(a), "EAGAIN")
b.setsockopt(SOL_SOCKET, 42, -1)
check("another address", got_all(b), (b"to 127.9.9.9", lost_name, [(0, 8, struct.pack("i4s4s", 1, socket.inet_aton("127.9.9.9"), socket.inet_aton("127.9.9.9")))]))
check("itself", got_all(b)[:2], (b"to itself", ("127.0.0.1", b_port)))
check("six", (got(c), got(f), got(c)), (b"six", b"back", "EAGAIN"))
check("mapped", got_all(d)[:2], (b"mapped", ("::ffff:127.0.0.3", lost_name[1], 0, 0)))
check("of IPv6", got_all(d), (b"from d", ("::1", d_port, 0, 0), [(41, 50, socket.inet_pton(AF_INET6, "::1") + struct.pack("i", 1))]))
check("of two", got(which), b"for one of two")
check("the shut", put(g, b"x"), "EPIPE")
e.send(b"on"); check("goes on", a.recv(9), b"on"); f.send(b"on"); check("goes on", c.recv(9), b"on")
j.send(b"on"); check("of two", got(which), b"on")
fresh.sendto(b"fresh", k.getsockname()); check("fresh", got(k), b"fresh")
data, fds, _, _ = message(right); flying = socket.socket(fileno=fds[0])
check("in flight", (flying.getsockname(), flying.recvfrom(99)), (flying_name, (b"in flight", e2.getsockname())))
"#;

#[test]
fn udp() {
    survives(&program(DATAGRAMS));
}

/// Those that listen, or are only bound.
const LISTENERS: &str = r#"
fresh = socket.socket()
bound = socket.socket(); bound.bind(("127.0.0.1", 0))
a = socket.socket(); a.setsockopt(SOL_SOCKET, socket.SO_REUSEADDR, 1); a.bind(("127.0.0.1", 0)); a.listen(7)
b = socket.socket(); b.bind(("0.0.0.0", 0)); b.listen(1); b.setblocking(False)
c = socket.socket(AF_INET6); c.setsockopt(IPPROTO_IPV6, socket.IPV6_V6ONLY, 1); c.bind(("::", 0)); c.listen(3)
same = socket.socket(); same.bind(("0.0.0.0", c.getsockname()[1])); same.listen(4)
d = socket.socket(AF_INET6); d.bind(("::", 0)); d.listen()
e = socket.socket(); e.setsockopt(SOL_SOCKET, socket.SO_REUSEPORT, 1); os.fchown(e.fileno(), 1234, -1); e.bind(("127.0.0.1", 0)); e.listen(2)
f = socket.socket(); f.setsockopt(SOL_SOCKET, socket.SO_REUSEPORT, 1); os.fchown(f.fileno(), 1234, -1); f.bind(e.getsockname()); f.listen(5)
g = socket.socket(); g.bind(("127.0.0.1", 0)); g.listen(9); g.setsockopt(IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 3); g.setsockopt(IPPROTO_TCP, 23, 5)
h = socket.socket(); h.bind(("127.0.0.1", 0)); h.listen(); h.setsockopt(SOL_SOCKET, socket.SO_RCVBUF, 20000); h.setsockopt(IPPROTO_TCP, socket.TCP_MAXSEG, 900)
h.setsockopt(IPPROTO_TCP, socket.TCP_NODELAY, 1); h.setsockopt(SOL_SOCKET, socket.SO_KEEPALIVE, 1); h.setsockopt(IPPROTO_TCP, socket.TCP_KEEPIDLE, 33)
i = socket.socket(); i.bind(("127.0.0.1", 0)); i.listen(); i.shutdown(socket.SHUT_RD)
ep = select.epoll(); ep.register(a, select.EPOLLIN)
def backlog(s):
    text = [line for line in subprocess.run(["ss", "-Hltn"], stdout=subprocess.PIPE).stdout.decode().splitlines()]
    return [line.split()[2] for line in text if line.split()[3].endswith(":%d" % s.getsockname()[1])]
all = dict(fresh=fresh, bound=bound, a=a, b=b, c=c, same=same, d=d, e=e, f=f, g=g, h=h, i=i)
before = {n: (look_at(s), options_of(s)) for n, s in all.items()}
pause()
for n, s in all.items():
    check(n, look_at(s), before[n][0]); check_options(n, before[n][1], options_of(s))
def meets(n, at):
    s = all[n]
    k = socket.socket(AF_INET6 if ":" in at else AF_INET); k.connect((at, s.getsockname()[1]))
    s.setblocking(True); l, name = s.accept(); k.send(b"x"); check("through " + n, (got(l), name), (b"x", k.getsockname()))
    return l
for n, at in [("a", "127.0.0.1"), ("b", "127.0.0.5"), ("c", "::1"), ("same", "127.0.0.1"), ("d", "::1"), ("h", "127.0.0.1")]: s = meets(n, at)
check("inherited", (s.getsockopt(IPPROTO_TCP, socket.TCP_NODELAY), s.getsockopt(IPPROTO_TCP, socket.TCP_KEEPIDLE), s.getsockopt(IPPROTO_TCP, socket.TCP_MAXSEG)), (1, 33, 888))
k = socket.socket(); k.connect(("127.0.0.1", d.getsockname()[1])); l, name = d.accept(); check("mapped", name[0], "::ffff:127.0.0.1")
check("epoll", ep.poll(0), [])
k = socket.socket(); k.connect(a.getsockname()); check("epoll", ep.poll(1), [(a.fileno(), select.EPOLLIN)])
bound.listen(); k = socket.socket(); k.connect(bound.getsockname()); bound.accept()
k = socket.socket(); k.connect(g.getsockname()); check("deferred", events(g), []); k.send(b"data"); l, _ = g.accept(); check("data", got(l), b"data")
k = socket.socket(); k.connect(e.getsockname()); both = select.select([e, f], [], [], 1)[0]; check("one of two", len(both), 1)
fresh.connect(a.getsockname())
"#;

#[test]
fn listeners() {
    survives(&program(LISTENERS));
}

#[test]
fn listeners_of_a_tree() {
    survives_as_tree(&program(&format!(
        "child = os.fork()\nif child == 0: time.sleep(1000)\n{LISTENERS}\nos.kill(child, 9)\n"
    )));
}

/// Connections with data in both directions, as much as goes in, shut and closed ends.
const CONNECTIONS: &str = r#"
def listener(family=AF_INET, at="127.0.0.1"):
    l = socket.socket(family); l.bind((at, 0)); l.listen(50); return l
l = listener(); w = listener(AF_INET6, "::"); six = listener(AF_INET6, "::1")
def pair(l=l, family=AF_INET, at="127.0.0.1", before=lambda c: None):
    c = socket.socket(family); before(c); c.connect((at, l.getsockname()[1])); return c, l.accept()[0]
a, b = pair(); a.send(b"to b"); b.send(b"to a"); b.send(b", more")
def stuffed(c, s, room=None):
    # Little: through so small a window it drips.
    if room: s.setsockopt(SOL_SOCKET, socket.SO_RCVBUF, room); c.setsockopt(SOL_SOCKET, socket.SO_SNDBUF, 4 * room)
    total, quiet = 0, 0
    c.setblocking(False)
    while quiet < 20:
        n = put(c, bytes([(total // 1000 + k) % 251 for k in range(16)]) * 64)
        if n == "EAGAIN": quiet += 1; time.sleep(0.002)
        else:
            quiet = 0
            if n != 1024: return total + n
            total += n
    return total
def patterned(s, size):
    out = b""
    s.settimeout(20)
    while len(out) < size:
        data = s.recv(1 << 20)
        if not data: break
        out += data
    at = 0
    while at < size:
        wanted = (bytes([(at // 1000 + k) % 251 for k in range(16)]) * 64)[:size - at]
        if out[at:at + 1024] != wanted: return f"{len(out)} bytes, wrong at {at}"
        at += 1024
    return len(out)
full1, full2 = pair(); full = stuffed(full1, full2)
tight1, tight2 = pair(); tight = stuffed(tight1, tight2, 8000); tight_back = stuffed(tight2, tight1)
c, d = pair(); c.send(b"last words"); c.shutdown(socket.SHUT_WR); d.send(b"answer")
e, f = pair(); f.send(b"more"); e.shutdown(socket.SHUT_WR); stuck_e, stuck_f = pair(); stuck = stuffed(stuck_e, stuck_f, 6000); stuck_e.shutdown(socket.SHUT_WR)
g, h = pair(); h.send(b"left"); h.close()
i, j = pair(); i.send(b"left too"); i.close()
k, m = pair(); m.send(b"bye"); k.shutdown(socket.SHUT_WR); time.sleep(0.05); m.close()
n, o = pair(); n.shutdown(socket.SHUT_RD)
p, q = pair(w); p.send(b"mapped"); r, s = pair(six, AF_INET6, "::1"); r.send(b"six"); t, u = pair(w, AF_INET6, "::ffff:127.0.0.1"); u.send(b"both mapped")
v, x = pair(l, AF_INET, "127.0.0.1", lambda c: c.bind(("127.0.0.7", 0))); v.send(b"from 7")
gone = listener(); y, z = pair(gone); z.send(b"no listener"); y2, z2 = pair(gone); y2.send(b"nor here"); z3, z4 = pair(gone); z3.send(b"end"); z3.close(); gone.close()
cork, uncork = pair(); cork.setsockopt(IPPROTO_TCP, socket.TCP_CORK, 1); cork.send(b"corked")
same1, same2 = pair(l, AF_INET, "127.0.0.1", lambda c: (c.setsockopt(SOL_SOCKET, socket.SO_REUSEADDR, 1), c.bind(("127.0.0.1", 0))))
a.setsockopt(SOL_SOCKET, 42, 1) if number(a, SOL_SOCKET, 42) != "EOPNOTSUPP" else None
time.sleep(0.3)
all = dict(l=l, w=w, six=six, a=a, b=b, full1=full1, full2=full2, tight1=tight1, tight2=tight2, c=c, d=d, e=e, f=f, stuck_e=stuck_e, stuck_f=stuck_f, g=g, j=j, k=k,
           n=n, o=o, p=p, q=q, r=r, s=s, t=t, u=u, v=v, x=x, y=y, z=z, y2=y2, z2=z2, z4=z4, cork=cork, uncork=uncork, same1=same1, same2=same2)
def look():
    return {name: (look_at(one), inq(one) if tcp(one) != 10 and not name.startswith(("full", "tight", "stuck")) else 0) for name, one in all.items()}
before = look()
pause()
after = look()
for name in before: check(name, after[name], before[name])
a.setsockopt(SOL_SOCKET, 42, -1) if number(a, SOL_SOCKET, 42) != "EOPNOTSUPP" else None
check("a and b", (got(a), got(b), got(a), got(b)), (b"to a, more", b"to b", "EAGAIN", "EAGAIN"))
a.send(b"on"); check("goes on", b.recv(9), b"on"); b.send(b"back"); check("goes on", a.recv(9), b"back")
check("full", patterned(full2, full), full); full1.setblocking(True); full1.send(b"on"); check("goes on", full2.recv(9), b"on")
check("tight", (patterned(tight2, tight), patterned(tight1, tight_back)), (tight, tight_back))
check("half closed", (got(d), got(d), got(c), put(d, b"z"), c.recv(9), put(c, b"z")), (b"last words", b"", b"answer", 1, b"z", "EPIPE"))
check("half closed", (got(e), got(f)), (b"more", b"")); f.send(b"late"); check("late", e.recv(9), b"late"); f.close(); check("closed", e.recv(9), b"")
check("stuck", (patterned(stuck_f, stuck), stuck_f.recv(9)), (stuck, b""))
check("closed", (got(g), got(g), put(g, b"z")), (b"left", b"", 1)); time.sleep(0.02); check("then", put(g, b"z"), "EPIPE")
check("closed too", (got(j), got(j), put(j, b"z")), (b"left too", b"", 1))
check("ended", (got(k), got(k), put(k, b"z")), (b"bye", b"", "EPIPE"))
check("deaf", got(n), b""); o.send(b"heard"); check("deaf", (got(n), put(n, b"z"), o.recv(9)), (b"heard", 1, b"z"))
check("families", (got(q), got(s), got(t), got(x)), (b"mapped", b"six", b"both mapped", b"from 7"))
check("no listener", (got(y), got(z2), got(z4), got(z4)), (b"no listener", b"nor here", b"end", b""))
cork.setsockopt(IPPROTO_TCP, socket.TCP_CORK, 0); check("corked", uncork.recv(9), b"corked")
for left, right in [(p, q), (r, s), (t, u), (v, x), (y, z), (y2, z2), (same1, same2)]:
    left.settimeout(9); right.settimeout(9)
    left.send(b"1"); right.send(b"2"); check("goes on", (left.recv(9), right.recv(9)), (b"2", b"1"))
for one, at, family in [(l, "127.0.0.1", AF_INET), (w, "::1", AF_INET6), (six, "::1", AF_INET6)]:
    new, met = pair(one, family, at); new.send(b"new"); check("a new one", met.recv(9), b"new")
"#;

#[test]
fn connections() {
    survives(&program(CONNECTIONS));
}

#[test]
fn connections_of_a_tree() {
    survives_as_tree(&program(SERVER_AND_CLIENTS));
}

/// A server and its clients, each a process; they talk before and after.
const SERVER_AND_CLIENTS: &str = r#"
l = socket.socket(); l.bind(("0.0.0.0", 0)); l.listen(10)
port = l.getsockname()[1]
box = socket.socket(AF_INET, SOCK_DGRAM); box.bind(("127.0.0.1", port)); box.setblocking(False)
def talks(k):
    l.close(); box.close()
    s = socket.socket(); s.connect(("127.0.0.1", port)); u = socket.socket(AF_INET, SOCK_DGRAM); u.connect(("127.0.0.1", port))
    total = 0
    for n in range(400):
        s.sendall(struct.pack("ii", k, n)); u.send(struct.pack("ii", k, n))
        total += struct.unpack("i", s.recv(4, socket.MSG_WAITALL))[0]
        if n % 20 == 0: time.sleep(0.005)
    s.shutdown(socket.SHUT_WR)
    os._exit(7 if total == sum(range(400)) * k and s.recv(9) == b"" else 8)
children = []
for k in range(1, 4):
    child = os.fork()
    if child == 0: talks(k)
    children.append(child)
ep = select.epoll(); ep.register(l, select.EPOLLIN); ep.register(box, select.EPOLLIN)
met, ended, turns, mail = {}, 0, 0, 0
while ended < 3:
    for fd, _ in ep.poll(5):
        if fd == l.fileno():
            s, _ = l.accept(); met[s.fileno()] = s; ep.register(s, select.EPOLLIN)
        elif fd == box.fileno():
            mail += len(box.recv(99)) == 8
        else:
            data = met[fd].recv(8, socket.MSG_WAITALL)
            if data: k, n = struct.unpack("ii", data); met[fd].sendall(struct.pack("i", k * n))
            else: ep.unregister(fd); met.pop(fd).close(); ended += 1
        turns += 1
        if turns == 100: pause()
check("children", [os.waitpid(child, 0)[1] for child in children], [7 << 8] * 3)
while True:
    data = got(box, 99)
    if data == "EAGAIN": break
    mail += len(data) == 8
check("mail", mail > 1100, True)
"#;

/// Connections that nobody has accepted; options of connections.
const WAITING: &str = r#"
def listener(at="127.0.0.1", more=lambda l: None, backlog=9):
    l = socket.socket(); l.bind((at, 0)); more(l); l.listen(backlog); return l
def client(l, at="127.0.0.1"):
    c = socket.socket(); c.connect((at, l.getsockname()[1])); time.sleep(0.02); return c
l = listener(); w = listener("0.0.0.0", backlog=1); d = listener(more=lambda l: l.setsockopt(IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 60))
c1 = client(l); c2 = client(l); c3 = client(l); c3.shutdown(socket.SHUT_WR); c2.setblocking(False)
w1 = client(w, "127.0.0.5"); w2 = client(w, "127.0.0.6"); d1 = client(d)
a = client(l); b = client(l)
def options(s, t):
    for level, name, value in [(IPPROTO_TCP, socket.TCP_NODELAY, 1), (IPPROTO_TCP, socket.TCP_KEEPIDLE, 71), (IPPROTO_TCP, socket.TCP_KEEPINTVL, 8), (IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
        (IPPROTO_TCP, socket.TCP_SYNCNT, 3), (IPPROTO_TCP, socket.TCP_LINGER2, 11), (IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 90000), (IPPROTO_TCP, 25, 4096), (IPPROTO_TCP, socket.TCP_QUICKACK, 0),
        (IPPROTO_IP, socket.IP_TOS, 16), (IPPROTO_IP, socket.IP_TTL, 33), (IPPROTO_IP, 10, 0), (SOL_SOCKET, socket.SO_KEEPALIVE, 1), (SOL_SOCKET, socket.SO_OOBINLINE, 1), (SOL_SOCKET, socket.SO_REUSEADDR, 1),
        (SOL_SOCKET, socket.SO_PRIORITY, 5), (SOL_SOCKET, socket.SO_RCVLOWAT, 3), (SOL_SOCKET, socket.SO_SNDBUF, 77777), (SOL_SOCKET, socket.SO_RCVBUF, 66666)]:
        s.setsockopt(level, name, value)
    s.setsockopt(IPPROTO_TCP, socket.TCP_CONGESTION, b"reno"); t.setsockopt(SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 6)); t.setsockopt(SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("qq", 4, 0))
x = listener(); y = client(x); z, _ = x.accept(); options(y, z)
small = socket.socket(); small.setsockopt(IPPROTO_TCP, socket.TCP_MAXSEG, 1000); small.connect(x.getsockname()); small2, _ = x.accept()
linger = client(x); linger.setsockopt(SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)); linger2, _ = x.accept()
all = dict(l=l, w=w, d=d, c1=c1, c2=c2, c3=c3, w1=w1, w2=w2, d1=d1, y=y, z=z, small=small, small2=small2, linger=linger)
before = {n: (look_at(s), options_of(s)) for n, s in all.items()}
pause()
for n, s in all.items():
    check(n, look_at(s), before[n][0])
    # What the kernel adjusts by itself: buffers, the segment, whether it waits with acknowledging; of multicast, the last packet.
    if n in ("y", "z", "small", "l", "d"): 
        loose = [(1, 7), (1, 8), (6, 12), (0, 32), (0, 33)] if n != "y" else [(6, 12), (0, 32), (0, 33)]
        if n != "small": loose.append((6, 2))
        check_options(n, {k: v for k, v in before[n][1].items() if k not in loose}, options_of(s))
met = [l.accept() for _ in range(5)]
check("in their order", [name for _, name in met], [s.getsockname() for s in (c1, c2, c3, a, b)])
for (s, _), c in zip(met, (c1, c2, c3, a, b)):
    s.settimeout(9); s.send(b"hello"); c.settimeout(9); check("a word", c.recv(9), b"hello")
    if c is not c3: c.send(b"you"); check("an answer", s.recv(9), b"you")
    else: check("the end", s.recv(9), b"")
check("from where", [w.accept()[1] for _ in range(2)], [w1.getsockname(), w2.getsockname()])
check("deferred", (events(d), tcp(d1)), ([], 1)); d1.send(b"now"); check("deferred", d.accept()[0].recv(9), b"now")
y.send(b"12"); check("too little", events(z)[0] & 1, 1); z.send(b"12"); time.sleep(0.02); check("low water", events(y)[0] & 1, 0); z.send(b"3"); time.sleep(0.5); check("low water", events(y)[0] & 1, 1)
linger.close(); check("reset", got(linger2), "ECONNRESET")
"#;

#[test]
fn waiting_and_options() {
    survives(&program(WAITING));
}

/// Looked at many times, the sockets of a process that goes on are as they were.
#[test]
fn connections_go_on_after_a_dump() {
    if !can_run("connections_go_on_after_a_dump") || !installed("connections_go_on_after_a_dump", "python3") {
        return;
    }
    let case = Case::new();
    let mut running = prepared(&case, &program(CONNECTIONS));
    let (pid, image) = (running.pid().to_string(), case.path("img"));
    for _ in 0..20 {
        let done = run(&["dump", &pid, "--to", image.to_str().expect("UTF-8"), "--leave-running"]);
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }
    std::fs::write(case.path("go"), b"").expect("lets it go on");
    assert!(running.end().success());
    assert_eq!(case.output(), "as it was\n");
}

/// An address that somebody else has by now.
#[test]
fn a_taken_address() {
    if !can_run("a_taken_address") || !installed("a_taken_address", "python3") {
        return;
    }
    let case = Case::new();
    let program = "l = socket.socket(); l.bind(('127.0.0.1', 0)); l.listen(); print(l.getsockname()[1], flush=True)\npause()";
    let mut running = prepared(&case, &format!("{SOCKETS}{program}"));
    let (pid, image) = (running.pid().to_string(), case.path("img"));
    assert!(run(&["dump", &pid, "--to", image.to_str().expect("UTF-8")]).status.success());
    running.end();
    let address = format!("127.0.0.1:{}", case.output().trim());
    let mut other = std::process::Command::new("python3")
        .args([
            "-c",
            &format!(
                "import socket,time; l = socket.create_server(('127.0.0.1', {})); time.sleep(60)",
                case.output().trim()
            ),
        ])
        .spawn()
        .expect("starts");
    std::thread::sleep(std::time::Duration::from_millis(500));
    let done = run(&["restore", image.to_str().expect("UTF-8")]);
    let _ = (other.kill(), other.wait());
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(
        said.contains(&format!("the TCP address {address} of one of its sockets is taken by process")),
        "{said}"
    );
    std::fs::write(case.path("go"), b"").expect("lets it go on");
    let mut restored = case.restore();
    assert!(restored.end().success());
}
