//! `migckpt dump`, `inspect` and `verify`, as a user types them.

mod victim;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};
use victim::Victim;

const COUNTER: &str = "import signal\nsignal.signal(signal.SIGUSR1, lambda *a: None)\n\
                       x = bytearray(b'abc' * 1000000); tell('ready')\nn = 0\n\
                       while True: n += 1; tell(n); time.sleep(0.01)\n";

fn migckpt(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_migckpt")).args(arguments).stdin(Stdio::null()).output().expect("runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[track_caller]
fn done(output: &Output) -> String {
    assert!(output.status.success(), "{}", text(&output.stderr));
    text(&output.stdout)
}

#[track_caller]
fn failed(output: &Output, code: i32, why: &str) {
    let errors = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{errors}");
    assert!(errors.contains(why), "{errors}");
    assert!(errors.contains("why:") && errors.contains("next:"), "{errors}");
}

fn path(place: &Path) -> &str {
    place.to_str().expect("a path")
}

#[test]
fn leaves_it_running_and_tells_what_it_did() {
    let victim = Victim::python(COUNTER);
    assert_eq!(victim.line(), "ready");
    let place = tempfile::tempdir().expect("a directory");
    let image = place.path().join("a/b");
    let pid = victim.pid().to_string();
    let maps = victim.maps();
    for _ in 0..5 {
        let told = done(&migckpt(&["dump", &pid, "--to", path(&image), "--leave-running", "--json"]));
        let told: serde_json::Value = serde_json::from_str(&told).expect("JSON");
        assert_eq!(
            (told["pid"].as_i64(), told["left"].as_str()),
            (Some(victim.pid().into()), Some("running"))
        );
        assert!(told["bytes"].as_u64() > Some(3_000_000));
    }
    assert_eq!(maps, victim.maps());
    assert_eq!(victim.status("TracerPid"), "0");
    for n in 1..30 {
        assert_eq!(victim.line(), n.to_string());
    }
    let file = image.join("process.img");
    assert_eq!(fs::metadata(&file).expect("there").permissions().mode() & 0o777, 0o600);
    assert_eq!(fs::read_dir(&image).expect("lists").count(), 1, "something was left");
    assert!(done(&migckpt(&["verify", path(&image)])).contains("is whole"));
    let shown: serde_json::Value =
        serde_json::from_str(&done(&migckpt(&["inspect", path(&image), "--json"]))).expect("JSON");
    assert_eq!(shown["pid"].as_i64(), Some(victim.pid().into()));
    assert!(shown["signals_handled"].as_array().expect("a list").contains(&10.into()));
    assert!(done(&migckpt(&["inspect", path(&image)])).contains("threads (1):"));
    assert!(done(&migckpt(&["inspect", "--pid", &pid])).contains("it can be saved"));
}

#[test]
fn ends_it_or_stops_it() {
    use std::os::unix::process::ExitStatusExt;
    let mut victim = Victim::python(COUNTER);
    assert_eq!(victim.line(), "ready");
    let place = tempfile::tempdir().expect("a directory");
    let pid = victim.pid().to_string();
    let output = migckpt(&["dump", &pid, "--to", "-", "--leave-stopped"]);
    assert!(text(&output.stderr).contains("stopped"), "{}", text(&output.stderr));
    victim.wait_for_state('T');
    let file = place.path().join("by-stream");
    fs::write(&file, &output.stdout).expect("writes");
    assert!(done(&migckpt(&["verify", path(&file)])).contains("is whole"));
    let again = place.path().join("again");
    assert!(done(&migckpt(&["dump", &pid, "--to", path(&again)])).contains("ended"));
    assert_eq!(victim.end().signal(), Some(9));
    let shown = done(&migckpt(&["inspect", path(&again)]));
    assert!(shown.contains("stopped    by signal 19"), "{shown}");
}

#[test]
fn refuses_by_name_and_changes_nothing() {
    let ours = std::net::TcpListener::bind("127.0.0.1:0").expect("listens");
    let at = ours.local_addr().expect("its address");
    let victim = Victim::python(&format!(
        "import socket\nc = socket.create_connection(('127.0.0.1', {}))\n\
         n = socket.socket(16, socket.SOCK_RAW, 0); tell('ready'); time.sleep(60)\n",
        at.port()
    ));
    assert_eq!(victim.line(), "ready");
    let place = tempfile::tempdir().expect("a directory");
    let image = place.path().join("image");
    let before = victim.settled();
    let output = migckpt(&["dump", &victim.pid().to_string(), "--to", path(&image)]);
    failed(&output, 4, &format!("established TCP connection to {at}"));
    failed(&output, 4, "NETLINK");
    assert!(!image.exists());
    assert_eq!(victim.settled(), before);
}

#[test]
fn bad_input_is_a_clear_error() {
    let place = tempfile::tempdir().expect("a directory");
    let here = path(place.path());
    failed(&migckpt(&["dump", "4194304", "--to", here]), 1, "there is no process 4194304");
    failed(&migckpt(&["inspect", here]), 1, "process.img");
    failed(&migckpt(&["verify", "-"]), 1, "damaged");
    for bad in
        [&["dump", "0", "--to", here][..], &["dump", "x", "--to", here], &["dump", "1"], &["frobnicate"], &[]]
    {
        assert_eq!(migckpt(bad).status.code(), Some(2), "{bad:?}");
    }
    let victim = Victim::python("tell('ready'); time.sleep(60)\n");
    assert_eq!(victim.line(), "ready");
    let pid = victim.pid().to_string();
    failed(&migckpt(&["dump", &pid, "--to", "/dev/null/x"]), 1, "Not a directory");
    assert_eq!(victim.status("TracerPid"), "0");
    // A full disk: the process goes on.
    let full = Command::new(env!("CARGO_BIN_EXE_migckpt"))
        .args(["dump", &pid, "--to", "-"])
        .stdout(fs::OpenOptions::new().write(true).open("/dev/full").expect("opens"))
        .output()
        .expect("runs");
    failed(&full, 1, "No space left on device");
    victim.wait_for_state('S');
    assert_eq!(victim.status("TracerPid"), "0");
}

#[test]
fn damaged_images_are_refused() {
    let victim = Victim::python("tell('ready'); time.sleep(60)\n");
    assert_eq!(victim.line(), "ready");
    let place = tempfile::tempdir().expect("a directory");
    let image = place.path().join("image");
    done(&migckpt(&["dump", &victim.pid().to_string(), "--to", path(&image)]));
    let file = image.join("process.img");
    let whole = fs::read(&file).expect("reads");
    for cut in [0, 1, 31, 32, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(&file, &whole[..cut]).expect("writes");
        failed(&migckpt(&["verify", path(&image)]), 1, "damaged");
    }
    for at in (0..whole.len()).step_by(whole.len() / 13) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        fs::write(&file, &bytes).expect("writes");
        failed(&migckpt(&["verify", path(&image)]), 1, "cannot read the image");
    }
    fs::write(&file, &whole).expect("writes");
    done(&migckpt(&["verify", path(&image)]));
}

/// A `migckpt dump` to a pipe that nobody reads: it stands with the process frozen.
fn stuck(victim: &Victim) -> Child {
    let dump = Command::new(env!("CARGO_BIN_EXE_migckpt"))
        .args(["dump", &victim.pid().to_string(), "--to", "-", "--leave-running", "--compress", "off"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("starts");
    let deadline = Instant::now() + Duration::from_secs(10);
    while victim.status("TracerPid") == "0" || !victim.maps().contains("r-xp 00000000 00:00 0 ") {
        assert!(Instant::now() < deadline, "it is not frozen");
        std::thread::sleep(Duration::from_millis(10));
    }
    std::thread::sleep(Duration::from_millis(300));
    dump
}

#[test]
fn a_signal_ends_the_dump_and_lets_the_process_go() {
    let victim = Victim::python(COUNTER);
    assert_eq!(victim.line(), "ready");
    let maps = victim.maps();
    let mut dump = stuck(&victim);
    let pid = nix::unistd::Pid::from_raw(dump.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("sends");
    assert_eq!(dump.wait().expect("waits").code(), Some(130));
    assert_eq!(victim.status("TracerPid"), "0");
    assert_eq!(victim.maps(), maps);
    for n in 1..30 {
        assert_eq!(victim.line(), n.to_string());
    }
}

#[test]
fn a_killed_dump_is_made_good() {
    let victim = Victim::python(COUNTER);
    assert_eq!(victim.line(), "ready");
    let maps = victim.maps();
    for again in 1..=3 {
        let mut dump = stuck(&victim);
        dump.kill().expect("kills");
        dump.wait().expect("waits");
        assert_ne!(victim.maps(), maps);
        assert!(done(&migckpt(&["recover", &victim.pid().to_string()])).contains("goes on where it was"));
        assert_eq!(victim.maps(), maps);
        for n in 1..30 {
            assert_eq!(victim.line(), (n + (again - 1) * 29).to_string());
        }
    }
    // The next dump does the same by itself.
    let mut dump = stuck(&victim);
    dump.kill().expect("kills");
    dump.wait().expect("waits");
    let place = tempfile::tempdir().expect("a directory");
    done(&migckpt(&["dump", &victim.pid().to_string(), "--to", path(place.path()), "--leave-running"]));
    assert_eq!(victim.maps(), maps);
    assert!(done(&migckpt(&["recover", &victim.pid().to_string()])).contains("needs nothing"));
}
