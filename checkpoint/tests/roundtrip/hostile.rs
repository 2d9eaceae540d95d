//! Images that are well-formed and lie: each gives an error that says why, no process, and nothing bound.
//! What is in no field, and fields that nobody has thought of, is for the fuzzer (`fuzz/`).

use super::harness::{Case, can_run, exists, installed, migckpt, run};
use super::open_files::prepared;
use super::sockets::SOCKETS;
use checkpoint::image::shares::ApartImage;
use checkpoint::image::sockets::{Ids, Listening, Peer, SocketImage, SocketOption};
use checkpoint::image::{EpollTarget, FileKind, PosixTimer, ProcessImage, ZombieImage};
use std::fs;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};

/// One of each, and a child.
const PROGRAM: &str = r#"
a, b = socket.socketpair(); c, d = socket.socketpair(AF_UNIX, SOCK_DGRAM); spare = os.open("/dev/null", os.O_RDONLY)
rights(a, b"with a file", [spare]); os.close(spare); c.send(b"datagram")
listening = socket.socket(AF_UNIX); listening.bind("name"); listening.listen(3)
abstract = socket.socket(AF_UNIX, SOCK_DGRAM); abstract.bind("\0lies-%d" % os.getpid())
tcp = socket.socket(); tcp.bind(("127.0.0.1", 0)); tcp.listen(4)
near = socket.create_connection(tcp.getsockname()); far, _ = tcp.accept(); near.send(b"over tcp")
waiting = socket.create_connection(tcp.getsockname())
udp = socket.socket(type=SOCK_DGRAM); udp.bind(("127.0.0.1", 0)); udp.sendto(b"to itself", udp.getsockname())
ep = select.epoll(); ep.register(a, select.EPOLLIN)
timer = ctypes.create_string_buffer(8); libc.timer_create(1, None, timer)
memfd = os.memfd_create("m"); os.write(memfd, b"x" * 5000)
master, slave = os.openpty()
child = os.fork()
if child == 0: time.sleep(1000)
open("ports", "w").write("%d %d" % (tcp.getsockname()[1], udp.getsockname()[1]))
pause()
check("rights", message(b)[0], b"with a file"); check("datagram", got(d), b"datagram"); check("tcp", got(far), b"over tcp")
check("accepted", tcp.accept()[1], waiting.getsockname()); check("udp", got(udp), b"to itself")
os.kill(child, 9); os.waitpid(child, 0)
"#;

type Lie = Box<dyn Fn(&mut Vec<ProcessImage>)>;

/// A lie about the first socket for which something holds.
fn of_socket(which: fn(&SocketImage) -> bool, lie: impl Fn(&mut SocketImage) + 'static) -> Lie {
    Box::new(move |images| {
        let found = images[0].files.sockets.iter_mut().find(|socket| which(socket));
        lie(found.expect("the image has one"));
    })
}

/// A lie about the first open file for which something holds.
fn of_file(which: fn(&FileKind) -> bool, lie: impl Fn(&mut FileKind) + 'static) -> Lie {
    Box::new(move |images| {
        let found = images[0].files.files.iter_mut().find(|file| which(&file.kind));
        lie(&mut found.expect("the image has one").kind);
    })
}

fn is_pair(socket: &SocketImage) -> bool {
    socket.family == libc::AF_UNIX && matches!(socket.peer, Peer::Socket(_))
}

fn is_connection(socket: &SocketImage) -> bool {
    socket.family == libc::AF_INET && matches!(socket.peer, Peer::Socket(_))
}

fn listens(socket: &SocketImage) -> bool {
    socket.family == libc::AF_INET && socket.listening.is_some()
}

fn is_udp(socket: &SocketImage) -> bool {
    socket.family == libc::AF_INET && socket.kind == libc::SOCK_DGRAM
}

fn has_files(socket: &SocketImage) -> bool {
    socket.queue.iter().any(|message| !message.descriptors.is_empty())
}

/// Another one like it.
fn twin(which: fn(&SocketImage) -> bool, change: impl Fn(&mut SocketImage) + 'static) -> Lie {
    Box::new(move |images| {
        let sockets = &mut images[0].files.sockets;
        let mut twin = sockets.iter().find(|socket| which(socket)).expect("one").clone();
        change(&mut twin);
        sockets.push(twin);
    })
}

fn of_sockets(others_port: u16) -> Vec<(&'static str, Lie)> {
    let port = others_port.to_be_bytes();
    vec![
        ("a peer that is not there", of_socket(is_pair, |s| s.peer = Peer::Socket(1))),
        (
            "a peer of another family",
            Box::new(|images| {
                let sockets = &mut images[0].files.sockets;
                let far = sockets.iter().find(|s| is_connection(s)).expect("one").ino;
                sockets.iter_mut().find(|s| is_pair(s)).expect("one").peer = Peer::Socket(far);
            }),
        ),
        ("a connection to itself", of_socket(is_connection, |s| s.peer = Peer::Socket(s.ino))),
        ("one that waits nowhere", of_socket(is_connection, |s| s.peer = Peer::Waiting(s.ino))),
        (
            "one that waits twice",
            of_socket(listens, |s| {
                let listening = s.listening.as_mut().expect("it listens");
                listening.waiting.push(s.ino);
            }),
        ),
        (
            "a listener with a peer",
            of_socket(is_connection, |s| {
                s.listening = Some(Listening { backlog: 1, waiting: Vec::new() });
            }),
        ),
        ("two with one number", twin(is_pair, |_| ())),
        (
            "two listeners at one port",
            twin(listens, |s| {
                s.ino += 1 << 40;
                s.listening = Some(Listening { backlog: 1, waiting: Vec::new() });
            }),
        ),
        ("two with one port", twin(is_udp, |s| s.ino += 1 << 40)),
        ("somebody's port", of_socket(listens, move |s| s.name[2..4].copy_from_slice(&port))),
        ("somebody's port of UDP", of_socket(is_udp, move |s| s.name[2..4].copy_from_slice(&port))),
        (
            "an address of another machine",
            of_socket(listens, |s| s.name[4..8].copy_from_slice(&[192, 0, 2, 1])),
        ),
        (
            "a connection to another machine",
            of_socket(is_connection, |s| {
                s.peer_name[4..8].copy_from_slice(&[192, 0, 2, 1]);
            }),
        ),
        (
            "a datagram to another machine",
            of_socket(is_udp, |s| {
                s.queue[0].packet.as_mut().expect("it has come").to = vec![192, 0, 2, 1];
            }),
        ),
        ("a datagram from nowhere", of_socket(is_udp, |s| s.queue[0].from = vec![1])),
        (
            "a queue of one that never connected",
            of_socket(is_connection, |s| {
                (s.peer, s.peer_name) = (Peer::None, Vec::new());
            }),
        ),
        ("a message to one that listens", of_socket(listens, |s| s.queue.push(Default::default()))),
        ("a family that is not carried", of_socket(is_pair, |s| s.family = libc::AF_PACKET)),
        ("a kind that is not carried", of_socket(is_udp, |s| s.kind = libc::SOCK_RAW)),
        ("a protocol of another kind", of_socket(is_udp, |s| s.protocol = libc::IPPROTO_TCP)),
        ("a short address", of_socket(is_udp, |s| s.name.truncate(5))),
        ("a long address", of_socket(is_pair, |s| s.name.resize(200, b'x'))),
        (
            "an option that is none",
            of_socket(is_pair, |s| {
                s.options.push(SocketOption { level: 1, name: 77_777, value: vec![1; 4] });
            }),
        ),
        ("a filter that is none", of_socket(is_pair, |s| s.filter = vec![0xff; 12])),
        (
            "made by one of another namespace",
            of_socket(is_pair, |s| {
                s.peer_ids = Some(Ids { pid: -5, uid: 0, gid: 0 });
            }),
        ),
        ("made by one that lives", of_socket(is_pair, |s| s.peer_ids = Some(Ids { pid: 1, uid: 0, gid: 0 }))),
        (
            "a file in flight that is not there",
            of_socket(has_files, |s| {
                s.queue.iter_mut().for_each(|message| message.descriptors = vec![u32::MAX]);
            }),
        ),
        (
            "more files in flight than can be",
            of_socket(has_files, |s| {
                s.queue.iter_mut().for_each(|message| message.descriptors = vec![0; 300]);
            }),
        ),
        (
            "a file in flight that is a socket which is not there",
            Box::new(|images| {
                images[0].files.in_flight[0].kind = FileKind::Socket { what: String::new() };
            }),
        ),
        ("no sockets at all", Box::new(|images| images[0].files.sockets.clear())),
        (
            "the sockets of another process",
            Box::new(|images| {
                let sockets = std::mem::take(&mut images[0].files.sockets);
                images[1].files.sockets = sockets;
            }),
        ),
    ]
}

fn of_processes() -> Vec<(&'static str, Lie)> {
    vec![
        ("a descriptor of no file", Box::new(|images| images[0].files.fds[3].file = u32::MAX)),
        (
            "one number for two files",
            Box::new(|images| images[0].files.fds[4].fd = images[0].files.fds[3].fd),
        ),
        ("a negative number", Box::new(|images| images[0].files.fds[3].fd = -7)),
        ("an absurd number", Box::new(|images| images[0].files.fds.last_mut().expect("one").fd = i32::MAX)),
        (
            "an epoll that watches nothing",
            of_file(
                |kind| matches!(kind, FileKind::Epoll { .. }),
                |kind| {
                    let at = (0, 9999);
                    let target = EpollTarget { fd: 9999, events: 1, data: 0, at, spent: false };
                    *kind = FileKind::Epoll { targets: vec![target] };
                },
            ),
        ),
        (
            "a terminal that is not there",
            of_file(
                |kind| matches!(kind, FileKind::PtyMaster { .. }),
                |kind| {
                    *kind = FileKind::PtyMaster { index: 70_000 };
                },
            ),
        ),
        (
            "two terminals with one number",
            Box::new(|images| {
                let twin = images[0].files.terminals[0].clone();
                images[0].files.terminals.push(twin);
            }),
        ),
        (
            "settings of a terminal that are none",
            Box::new(|images| images[0].files.terminals[0].termios.truncate(7)),
        ),
        (
            // It was written without an end in sight.
            "more output than a terminal holds",
            Box::new(|images| images[0].files.terminals[0].output = vec![b'x'; 4 << 20]),
        ),
        (
            "a pipe that is not there",
            of_file(
                |kind| *kind == FileKind::Memfd,
                |kind| {
                    *kind = FileKind::Pipe { internal: true };
                },
            ),
        ),
        (
            "an object that is not there",
            Box::new(|images| {
                let memfd = images[0].files.files.iter_mut().find(|file| file.kind == FileKind::Memfd);
                memfd.expect("one").stat.1 ^= 1 << 50;
            }),
        ),
        ("a timer with an absurd number", Box::new(|images| images[0].timers.posix[0].id = -1)),
        (
            "two timers with one number",
            Box::new(|images| {
                let twin: PosixTimer = images[0].timers.posix[0].clone();
                images[0].timers.posix.push(twin);
            }),
        ),
        ("a clock that is none", Box::new(|images| images[0].timers.posix[0].clock = 77)),
        (
            "a zombie that lives",
            Box::new(|images| {
                let (pid, pgid, sid) = (images[1].pid, images[0].pgid, images[0].sid);
                let zombie = ZombieImage { pid, pgid, sid, status: 0, exit_signal: 17, parent_tid: 0 };
                images[0].zombies.push(zombie);
            }),
        ),
        ("two with one PID", Box::new(|images| images[1].pid = images[0].pid)),
        ("its own parent", Box::new(|images| images[1].ppid = images[1].pid)),
        (
            "memory shared with one that comes later",
            Box::new(|images| images[0].shares.memory = images[1].pid),
        ),
        ("memory shared with itself", Box::new(|images| images[1].shares.memory = images[1].pid)),
        (
            "a table shared that is another",
            Box::new(|images| {
                images[1].shares.files = images[0].pid;
                images[1].files.fds.pop();
            }),
        ),
        (
            "a thread apart with nobody",
            Box::new(|images| {
                images[0].threads[0].apart = ApartImage { fs_with: 4_000_000, ..ApartImage::default() };
            }),
        ),
        ("no threads", Box::new(|images| images[1].threads.clear())),
    ]
}

#[test]
fn images_that_lie() {
    let test = "images_that_lie";
    if !can_run(test) || !installed(test, "python3") {
        return;
    }
    let case = Case::new();
    let mut running = prepared(&case, &format!("{SOCKETS}{PROGRAM}"));
    let pid = running.pid();
    let image = case.path("img");
    let done = run(&["dump", &pid.to_string(), "--tree", "--to", image.to_str().expect("UTF-8")]);
    assert!(done.status.success(), "dump: {}", String::from_utf8_lossy(&done.stderr));
    running.end();
    let ports = fs::read_to_string(case.path("ports")).expect("the ports");
    let ports: Vec<u16> = ports.split(' ').map(|port| port.parse().expect("a port")).collect();
    // What is left of the program. Without it, whatever is there was made by a restore.
    fs::remove_file(case.path("name")).expect("it was bound");
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    let others_port = taken.local_addr().expect("an address").port();
    let _taken = (taken, UdpSocket::bind((Ipv4Addr::LOCALHOST, others_port)).expect("it is free"));
    let lying = case.path("lie");
    fs::create_dir(&lying).expect("made");
    for (what, lie) in of_sockets(others_port).into_iter().chain(of_processes()) {
        case.rewrite("img", "lie", |images| lie(images));
        let restored = migckpt().args(["restore", "--dry-run"]).arg(&lying).output();
        let restored = restored.expect("runs");
        let said = String::from_utf8_lossy(&restored.stderr);
        assert!(matches!(restored.status.code(), Some(1 | 3 | 4)), "{what}: {}: {said}", restored.status);
        assert!(said.contains("why:") && !said.contains("panicked"), "{what}: {said}");
        assert!(!exists(pid), "{what}: a process is left: {said}");
        assert!(!case.path("name").exists(), "{what}: a name is left: {said}");
        let names = fs::read_to_string("/proc/net/unix").expect("the list");
        assert!(!names.contains(&format!("@lies-{pid}")), "{what}: a name is left: {said}");
        let free = (
            TcpListener::bind((Ipv4Addr::LOCALHOST, ports[0])),
            UdpSocket::bind((Ipv4Addr::LOCALHOST, ports[1])),
        );
        assert!(free.0.is_ok() && free.1.is_ok(), "{what}: an address is left: {free:?}: {said}");
    }
    // The truth is as good as it was.
    let mut restored = case.restore();
    fs::write(case.path("go"), b"").expect("lets it go on");
    assert!(restored.end().success(), "{}", case.output());
    assert_eq!(case.output(), "as it was\n");
}
