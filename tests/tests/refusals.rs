//! What cannot be done is said, with the right exit code, and changes nothing.

use systest::lab::{Lab, Ran, wait_for};
use systest::require_labs;

/// A worker that has a TCP connection to somebody.
const CONNECTED: &str = r#"
import os, socket, time
listener = socket.socket()
listener.bind(("127.0.0.1", 0))
listener.listen()
client = socket.create_connection(listener.getsockname())
server, _ = listener.accept()
print("connected", flush=True)
while not os.path.exists("/srv/stop"):
    time.sleep(0.001)
"#;

#[test]
fn an_established_connection_is_refused_by_name_and_nothing_stops() {
    require_labs!();
    let lab = Lab::up_with(2, &["--cpus-per-node", "0"]);
    std::fs::write(lab.srv("node1", "connected.py"), CONNECTED).expect("written");
    let job = lab.start("node1", "mosrun -J tcp python3 /srv/connected.py > /srv/out");
    let pid = lab.await_job("node1", "tcp");
    let out = lab.srv("node1", "out");
    wait_for("the connection", || std::fs::read_to_string(&out).ok()?.contains("connected").then_some(()));
    let watching = lab.start(
        "node1",
        &format!("for i in $(seq 400); do grep TracerPid /proc/{pid}/status; sleep 0.002; done | sort -u"),
    );
    let refused = lab.sh("node1", &format!("migrate {pid} node2"));
    assert_eq!(refused.status, 4, "{}{}", refused.stdout, refused.stderr);
    assert!(refused.stderr.contains("fd ") && refused.stderr.contains("TCP"), "{}", refused.stderr);
    let explained = lab.sh("node1", &format!("migrate {pid} node2 --explain"));
    let said = format!("{}{}", explained.stdout, explained.stderr);
    assert!(said.contains("fd ") && said.contains("TCP"), "{said}");
    assert_eq!(watching.end().ok(), "TracerPid:\t0\n", "nobody traced it");
    std::fs::write(lab.srv("node1", "stop"), b"").expect("written");
    let ran = job.end();
    assert_eq!(ran.status, 0);
}

/// Exit code and a reason on standard error; standard output stays empty.
#[track_caller]
fn refused(ran: &Ran, code: i32, reason: &str) {
    assert_eq!(ran.status, code, "{}{}", ran.stdout, ran.stderr);
    let said = ran.stderr.to_lowercase();
    assert!(said.contains(&reason.to_lowercase()), "{reason:?} is not in: {}", ran.stderr);
    assert!(!said.contains("panicked"), "{}", ran.stderr);
}

#[test]
fn bad_input_has_its_exit_code() {
    require_labs!();
    let lab = Lab::up(2);
    let user = lab.user();
    let job = lab.start("node1", "mosrun -J mine sleep 1000");
    let pid = lab.await_job("node1", "mine");
    refused(&lab.sh("node1", &format!("migrate {pid} node77")), 1, "node77");
    refused(&lab.sh("node1", "migrate 4194000 node2"), 1, "4194000");
    refused(&lab.sh("node1", "migrate job:none node2"), 1, "none");
    refused(&lab.sh_as(&user, "node1", &format!("migrate {pid} node2")), 3, "");
    refused(&lab.sh_as(&user, "node1", &format!("mosctl pin {pid}")), 3, "");
    refused(&lab.sh_as(&user, "node1", "mosctl block"), 3, "");
    refused(&lab.sh("node1", "migrate"), 2, "usage");
    refused(&lab.sh("node1", "migrate --nonsense 1 node2"), 2, "");
    refused(&lab.sh("node1", "migrate --socket /none 1 node2"), 1, "/none");
    refused(&lab.sh("node1", "mosps --socket /none"), 1, "/none");
    refused(&lab.sh("node1", "mosrun --socket /none true"), 125, "/none");
    let plain = lab.sh("node1", "mosrun --socket /none --fallback echo ran");
    assert_eq!((plain.status, plain.stdout.as_str()), (0, "ran\n"), "{}", plain.stderr);
    assert!(!plain.stderr.is_empty(), "it warns");
    let process = lab.job("node1", "mine").expect("still there");
    assert_eq!((&process["node"], &process["migrations"]), (&"node1".into(), &0.into()), "nothing changed");
    drop(job);
}

#[test]
fn a_node_that_is_down_is_refused() {
    require_labs!();
    let lab = Lab::up(2);
    let _job = lab.start("node1", "mosrun -J mine sleep 1000");
    let pid = lab.await_job("node1", "mine");
    lab.verb("kill", &["node2"]).ok();
    refused(&lab.sh("node1", &format!("migrate {pid} node2")), 5, "node2");
    lab.await_up("node1", 1);
    refused(&lab.sh("node1", &format!("migrate {pid} node2")), 5, "node2");
}

#[test]
fn a_stranger_with_another_key_gets_nothing() {
    require_labs!();
    let lab = Lab::up(2);
    // The daemon comes up again with a key of its own making, as a node of another cluster would.
    let dir = format!("/var/lib/moslab/{}/node2/etc", lab.name());
    std::fs::remove_file(format!("{dir}/cluster.key")).expect("removed");
    migd::cluster_key::create(std::path::Path::new(&format!("{dir}/cluster.key"))).expect("a new key");
    // It cannot rejoin, so the restart cannot succeed.
    let mut restart = systest::lab::moslab();
    restart.args(["restart", "--daemon", "--name", lab.name(), "node2"]);
    let mut restart = restart.stderr(std::process::Stdio::null()).spawn().expect("runs");
    lab.await_up("node1", 1);
    lab.await_up("node2", 1);
    assert!(!restart.wait().expect("ends").success(), "a stranger was let in");
    lab.await_up("node1", 1);
}
