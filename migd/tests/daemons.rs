//! Several daemons on the loopback interface, each with its own folders, driven over their sockets.

use migd::api::{ErrorKind, JobSpec, MigrateRequest, NodeSwitch, Request, Response, Snapshot};
use migd::client::Client;
use migd::cluster_key;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

struct Node {
    daemon: Child,
    folder: PathBuf,
    port: u16,
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port").port()
}

impl Node {
    fn start(root: &Path, name: &str, port: u16, key: &Path, join: Option<u16>) -> Node {
        let folder = root.join(name);
        fs::create_dir_all(&folder).expect("a folder");
        let log = File::options().create(true).append(true).open(folder.join("log")).expect("a log");
        let mut command = Command::new(env!("CARGO_BIN_EXE_migd"));
        command
            .args(["--name", name, "--listen", &format!("127.0.0.1:{port}"), "--speed", "10000"])
            .arg("--socket")
            .arg(folder.join("sock"))
            .arg("--state-dir")
            .arg(folder.join("state"))
            .arg("--run-dir")
            .arg(folder.join("run"))
            .arg("--key")
            .arg(key)
            .args(["--stop-deadline-secs", "2"])
            .stdin(Stdio::null())
            .stderr(log);
        if let Some(port) = join {
            command.args(["--join", &format!("127.0.0.1:{port}")]);
        }
        Node { daemon: command.spawn().expect("starts"), folder, port }
    }

    fn client(&self) -> Client {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match Client::connect(Some(&self.folder.join("sock"))) {
                Ok(client) => return client,
                Err(error) if Instant::now() > deadline => panic!("{error}: {}", self.log()),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    fn snapshot(&self) -> Snapshot {
        match self.client().call(&Request::Snapshot) {
            Ok(Response::Snapshot(snapshot)) => snapshot,
            other => panic!("{other:?}: {}", self.log()),
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }

    /// Names of the nodes in this state.
    fn nodes(&self, state: &str) -> Vec<String> {
        self.snapshot().nodes.into_iter().filter(|node| node.state == state).map(|node| node.name).collect()
    }

    fn wait_for(&self, state: &str, names: &[&str], limit: Duration) {
        let deadline = Instant::now() + limit;
        while self.nodes(state) != names {
            assert!(Instant::now() < deadline, "{:?} are not {names:?}: {}", self.nodes(state), self.log());
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

fn folder_and_key() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let key = folder.path().join("cluster.key");
    cluster_key::create(&key).expect("a key");
    (folder, key)
}

#[test]
fn three_nodes_meet_lose_one_and_meet_again() {
    let (folder, key) = folder_and_key();
    let root = folder.path();
    let ports = [free_port(), free_port(), free_port()];
    let one = Node::start(root, "n1", ports[0], &key, None);
    let two = Node::start(root, "n2", ports[1], &key, Some(ports[0]));
    let three = Node::start(root, "n3", ports[2], &key, Some(ports[0]));
    let soon = Duration::from_secs(15);
    for node in [&one, &two, &three] {
        node.wait_for("up", &["n1", "n2", "n3"], soon);
    }
    // Load is told as well.
    let deadline = Instant::now() + soon;
    while one.snapshot().nodes.iter().any(|node| node.cpus == 0.0) {
        assert!(Instant::now() < deadline, "no load: {:?}", one.snapshot().nodes);
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(one.snapshot().nodes.iter().map(|node| node.number).collect::<Vec<_>>(), [1, 2, 3]);

    // One is killed: the others see it, and a move there is refused by name.
    let port = three.port;
    drop(three);
    one.wait_for("down", &["n3"], Duration::from_secs(30));
    let mut sleeper = Command::new("sleep").arg("60").spawn().expect("sleeps");
    let pid = sleeper.id();
    let migrate = |to: &str| {
        let request = MigrateRequest {
            what: pid.to_string(),
            to: to.into(),
            dry_run: false,
            stop: false,
            no_wait: false,
            timeout_ms: Some(5000),
            progress: false,
        };
        one.client().call(&Request::Migrate(request)).map(|_| ()).expect_err("refused")
    };
    assert_eq!(migrate("n3").kind, ErrorKind::NodeDown);
    assert_eq!(migrate("n9").kind, ErrorKind::Failed);
    sleeper.kill().expect("killed");
    sleeper.wait().expect("gone");
    assert_eq!(migrate("n2").kind, ErrorKind::Failed, "a dead process");

    // It knows the others from its last life, without a seed.
    let three = Node::start(root, "n3", port, &key, None);
    for node in [&one, &two, &three] {
        node.wait_for("up", &["n1", "n2", "n3"], Duration::from_secs(30));
    }
    // A node that stops says good-bye.
    let mut two = two;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(two.daemon.id() as i32), nix::sys::signal::SIGTERM)
        .expect("signalled");
    assert!(two.daemon.wait().expect("ends").success(), "{}", two.log());
    one.wait_for("down", &["n2"], Duration::from_secs(5));
}

#[test]
fn strangers_get_nothing() {
    let (folder, key) = folder_and_key();
    let other_key = folder.path().join("other.key");
    cluster_key::create(&other_key).expect("a key");
    let one = Node::start(folder.path(), "n1", free_port(), &key, None);
    let stranger = Node::start(folder.path(), "n2", free_port(), &other_key, Some(one.port));
    one.client();
    stranger.client();

    let answer_to = |bytes: &[u8]| {
        let mut stream = TcpStream::connect(("127.0.0.1", one.port)).expect("connects");
        stream.set_read_timeout(Some(Duration::from_secs(10))).expect("set");
        stream.write_all(bytes).expect("written");
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        answer
    };
    assert_eq!(answer_to(b"GET / HTTP/1.1\r\nHost: migd\r\n\r\n"), b"");
    let mut session = b"migd/1\x01\0".to_vec();
    session.extend([7; 16]);
    assert_eq!(answer_to(&session), b"", "a session that nobody announced");
    assert_eq!(answer_to(&b"migd/1\x01"[..]), b"", "half a preamble");
    let mut peer = b"migd/1\0\0".to_vec();
    peer.extend([0; 16]);
    peer.extend(b"mgP1 in the clear, without TLS, for a while");
    let alert = answer_to(&peer);
    assert!(alert.len() < 16, "at most a TLS alert: {alert:?}");

    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(one.nodes("up"), ["n1"]);
    assert_eq!(stranger.nodes("up"), ["n2"]);
}

#[test]
fn jobs_are_known_and_survive_the_daemon() {
    let (folder, key) = folder_and_key();
    let port = free_port();
    let node = Node::start(folder.path(), "n1", port, &key, None);
    let mut client = node.client();
    let spec =
        JobSpec { name: Some("nap".into()), command: vec!["nap".into()], locked: true, ..JobSpec::default() };
    let started = Instant::now();
    let registered = client.call(&Request::Register(spec)).expect("registered");
    assert!(started.elapsed() < Duration::from_millis(50), "{:?}", started.elapsed());
    assert!(matches!(registered, Response::Registered { job: 1 }), "{registered:?}");
    let mut sleeper = Command::new("sleep").arg("60").spawn().expect("sleeps");
    let own = std::process::id() as i32;
    let child = sleeper.id() as i32;
    let deadline = Instant::now() + Duration::from_secs(10);
    let known = |node: &Node, pid: i32| node.snapshot().processes.into_iter().find(|p| p.pid == pid);
    while known(&node, child).is_none() {
        assert!(Instant::now() < deadline, "{:?}", node.snapshot().processes);
        std::thread::sleep(Duration::from_millis(100));
    }
    let process = known(&node, own).expect("we are a job");
    assert_eq!((process.job.as_str(), process.home.as_str(), process.node.as_str()), ("nap", "n1", "n1"));
    assert!(process.locked);
    client.call(&Request::Unpin { what: own.to_string() }).expect("unpinned");
    assert!(!known(&node, own).expect("there").locked);

    // A move home of what is at home is nothing; one that is asked for without a name is an error.
    let request = |what: &str| {
        Request::Migrate(MigrateRequest {
            what: what.into(),
            to: "home".into(),
            dry_run: false,
            stop: false,
            no_wait: false,
            timeout_ms: None,
            progress: true,
        })
    };
    assert!(matches!(client.call(&request(&child.to_string())), Ok(Response::Migrated { .. })));
    assert_eq!(client.call(&request("job:nix")).expect_err("unknown").kind, ErrorKind::Failed);
    assert_eq!(client.call(&request("x")).expect_err("no PID").kind, ErrorKind::Usage);
    client.call(&Request::NodeSwitch { switch: NodeSwitch::Block }).expect("root may");
    assert!(node.snapshot().nodes[0].blocked);
    let Ok(Response::Doctor { checks }) = client.call(&Request::Doctor) else { panic!("no doctor") };
    assert!(checks.len() > 8 && checks.iter().any(|check| check.name == "cluster key"));

    // The jobs are known again after a crash, and it is the same process.
    std::thread::sleep(Duration::from_millis(1500));
    drop(node);
    let node = Node::start(folder.path(), "n1", port, &key, None);
    let process = known(&node, child).expect("known again");
    assert_eq!(process.job, "nap");
    sleeper.kill().expect("killed");
    sleeper.wait().expect("gone");
    let deadline = Instant::now() + Duration::from_secs(10);
    while known(&node, child).is_some() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_second_daemon_and_a_bad_key_are_refused() {
    let (folder, key) = folder_and_key();
    let node = Node::start(folder.path(), "n1", free_port(), &key, None);
    node.client();
    let mut second = Node::start(folder.path(), "n1", free_port(), &key, None);
    assert!(!second.daemon.wait().expect("ends").success());
    assert!(node.log().contains("another migd"), "{}", node.log());
    let none = folder.path().join("none");
    let mut keyless = Node::start(folder.path(), "n3", free_port(), &none, None);
    assert!(!keyless.daemon.wait().expect("ends").success());
    assert!(keyless.log().contains("mosctl cluster init"), "{}", keyless.log());
}
