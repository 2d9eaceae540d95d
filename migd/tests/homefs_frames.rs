//! Frames no kernel would send: neither side may panic, hang, or touch what it was not told to.

mod homefs_support;

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use homefs_support::{Join, TOKEN, mounted, unavailable};
use migd::homefs::abi::{self, OutHeader, op};
use migd::homefs::{HandleKind, HomeView, Wire};
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use proptest::prelude::*;

struct Collect(Mutex<Sender<Vec<u8>>>);

impl Wire for Collect {
    fn send(&self, frame: &[u8]) -> std::io::Result<()> {
        let _ = self.0.lock().expect("not poisoned").send(frame.to_vec());
        Ok(())
    }
}

fn request(opcode: u32, unique: u64, node: u64, body: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    frame.extend_from_slice(&((abi::IN_HEADER + body.len()) as u32).to_le_bytes());
    frame.extend_from_slice(&opcode.to_le_bytes());
    frame.extend_from_slice(&unique.to_le_bytes());
    frame.extend_from_slice(&node.to_le_bytes());
    frame.extend_from_slice(&65534u32.to_le_bytes()); // uid: nothing of value is writable
    frame.extend_from_slice(&65534u32.to_le_bytes());
    frame.extend_from_slice(&[0; 8]);
    frame.extend_from_slice(body);
    frame
}

fn home_of(root: &Path) -> (Arc<HomeView>, u64, Receiver<Vec<u8>>) {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let tree: OwnedFd = nix::fcntl::open(root, flags, Mode::empty()).expect("root");
    let home = HomeView::new(tree, vec![], TOKEN).expect("home view");
    let (send, receive) = channel();
    let connection = home.connect(Arc::new(Collect(Mutex::new(send))));
    (home, connection, receive)
}

/// Fails the test process if a thread of a view panics: the views go on without it.
fn no_panics() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            usual(info);
            let thread = std::thread::current();
            if thread.name().is_some_and(|n| n.starts_with("home-") || n.starts_with("fuse-")) {
                std::process::abort();
            }
        }));
    });
}

/// An answer still comes: nothing hangs and no worker is lost.
fn alive(home: &HomeView, connection: u64, answers: &Receiver<Vec<u8>>) {
    home.deliver(connection, &request(op::GETATTR, u64::MAX, 1, &[0; 16]));
    loop {
        let frame = answers.recv_timeout(Duration::from_secs(20)).expect("an answer");
        let (header, _) = OutHeader::parse(&frame).expect("well formed");
        assert!(header.error <= 0 && header.error > -512);
        if header.unique == u64::MAX {
            assert_eq!(header.error, 0);
            return;
        }
    }
}

#[test]
fn home_survives_anything() {
    if let Some(why) = unavailable() {
        eprintln!("skipped: {why}");
        return;
    }
    no_panics();
    let base = tempfile::tempdir().expect("temporary directory");
    std::fs::write(base.path().join("a"), "text").expect("write");
    std::fs::create_dir(base.path().join("d")).expect("mkdir");
    let (home, connection, answers) = home_of(base.path());
    let (r, _w) = nix::unistd::pipe().expect("pipe");
    let pipe = home.add_handle(r, HandleKind::Stream).expect("handle");
    let file = std::fs::File::open(base.path().join("a")).expect("open");
    let file = home.add_handle(file.into(), HandleKind::Regular { shared_position: false }).expect("handle");
    let small = prop_oneof![Just(pipe), Just(file), 0u64..8, any::<u64>()];
    let word = prop_oneof![
        small.prop_map(|w| w.to_le_bytes().to_vec()),
        any::<[u8; 8]>().prop_map(|b| b.to_vec()),
        Just(b"a\0".to_vec()),
        Just(b"d\0".to_vec()),
        Just(b"../x\0".to_vec()),
    ];
    let body = proptest::collection::vec(word, 0..14).prop_map(|w| w.concat());
    let frame = prop_oneof![
        8 => (0u32..56, any::<u64>(), 0u64..9, body).prop_map(|(o, u, n, b)| request(o, u, n, &b)),
        1 => proptest::collection::vec(any::<u8>(), 0..200),
    ];
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 4000,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    runner
        .run(&frame, |frame| {
            home.deliver(connection, &frame);
            Ok(())
        })
        .expect("no panic");
    alive(&home, connection, &answers);
    assert!(base.path().join("a").exists() && base.path().join("d").is_dir());
    home.disconnect(connection);
    let again = home.connect(Arc::new(Collect(Mutex::new(channel().0))));
    assert_ne!(again, connection);
    home.deliver(connection, &request(op::GETATTR, 1, 1, &[0; 16]));
    home.release_all();
    assert_eq!(home.counts(), (0, 0));
}

#[test]
fn names_cannot_leave_the_tree() {
    if let Some(why) = unavailable() {
        eprintln!("skipped: {why}");
        return;
    }
    let base = tempfile::tempdir().expect("temporary directory");
    std::os::unix::fs::symlink("/etc", base.path().join("link")).expect("symlink");
    let (home, connection, answers) = home_of(base.path());
    for name in [&b"..\0"[..], b".\0", b"/etc\0", b"a/../../etc\0", b"\0", b"unended"] {
        home.deliver(connection, &request(op::LOOKUP, 5, 1, name));
        let frame = answers.recv_timeout(Duration::from_secs(5)).expect("answer");
        assert_eq!(OutHeader::parse(&frame).expect("frame").0.error, -libc::EINVAL);
    }
    home.deliver(connection, &request(op::LOOKUP, 5, 1, b"link\0"));
    let frame = answers.recv_timeout(Duration::from_secs(5)).expect("answer");
    let (header, body) = OutHeader::parse(&frame).expect("frame");
    assert_eq!(header.error, 0);
    let node = u64::from_le_bytes(body[..8].try_into().expect("8"));
    home.deliver(connection, &request(op::LOOKUP, 6, node, b"passwd\0"));
    let frame = answers.recv_timeout(Duration::from_secs(5)).expect("answer");
    assert_eq!(OutHeader::parse(&frame).expect("frame").0.error, -libc::ENOTDIR);
}

#[test]
fn the_host_survives_anything() {
    no_panics();
    mounted(Join::Memory, |m| {
        let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
            cases: 3000,
            failure_persistence: None,
            ..ProptestConfig::default()
        });
        let frame = prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..200),
            (any::<i32>(), 0u64..64, proptest::collection::vec(any::<u8>(), 0..300)).prop_map(
                |(error, unique, body)| {
                    let error = if unique % 3 == 0 { error % 12 } else { error };
                    let mut frame = ((16 + body.len()) as u32).to_le_bytes().to_vec();
                    frame.extend_from_slice(&error.to_le_bytes());
                    frame.extend_from_slice(&unique.to_le_bytes());
                    frame.extend_from_slice(&body);
                    frame
                }
            ),
        ];
        let host = m.host.clone();
        let at = m.path("/usr/bin");
        // Answers nobody asked for come in between those of a busy guest.
        let guest = std::thread::spawn(move || {
            for _ in 0..20 {
                let _ = std::fs::read_dir(&at).map(|d| d.count());
            }
        });
        runner
            .run(&frame, |frame| {
                let _ = host.deliver(&frame);
                Ok(())
            })
            .expect("no panic");
        guest.join().expect("ends");
        assert!(std::fs::metadata(m.path("/etc/passwd")).is_ok());
    });
}

/// A home that answers every request with the right number and the wrong bytes.
struct Liar(Mutex<Option<std::sync::Weak<migd::homefs::HostView>>>, Mutex<u64>);

impl Wire for Liar {
    fn send(&self, frame: &[u8]) -> std::io::Result<()> {
        let Some((header, _)) = abi::InHeader::parse(frame) else { return Ok(()) };
        if matches!(header.opcode, op::FORGET | op::BATCH_FORGET) {
            return Ok(());
        }
        let mut seed = self.1.lock().expect("not poisoned");
        *seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let (error, length) = match *seed >> 60 {
            0 => (5, 0),
            1 => (-1000, 0),
            2 => (-2, 0),
            3 => (-5, 32),
            4 => (0, 0),
            _ => (0, [16, 104, 128, 144, 4096][(*seed >> 40) as usize % 5]),
        };
        let mut body = vec![0u8; length];
        let mut x = *seed;
        for byte in &mut body {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1);
            *byte = if x >> 63 == 0 { 0 } else { (x >> 56) as u8 };
        }
        let mut out = ((16 + length) as u32).to_le_bytes().to_vec();
        out.extend_from_slice(&i32::to_le_bytes(error));
        out.extend_from_slice(&header.unique.to_le_bytes());
        out.extend_from_slice(&body);
        if let Some(host) = self.0.lock().expect("not poisoned").as_ref().and_then(|w| w.upgrade()) {
            let _ = host.deliver(&out);
        }
        Ok(())
    }
}

#[test]
fn a_lying_home_harms_nobody() {
    if let Some(why) = unavailable() {
        eprintln!("skipped: {why}");
        return;
    }
    no_panics();
    use migd::homefs::HostView;
    use std::os::fd::AsFd;
    let done = std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).expect("namespace");
        let none = None::<&str>;
        let flags = nix::mount::MsFlags::MS_REC | nix::mount::MsFlags::MS_PRIVATE;
        nix::mount::mount(none, "/", none, flags, none).expect("private");
        // Removed with rmdir only, which cannot reach into a mount.
        let at = std::env::temp_dir().join(format!("migd-lying-home-{}", std::process::id()));
        std::fs::create_dir(&at).expect("mkdir");
        let device = HostView::open_device().expect("/dev/fuse");
        HostView::mount(device.as_fd(), &at).expect("mount");
        let liar = Arc::new(Liar(Mutex::new(None), Mutex::new(42)));
        let host =
            HostView::start(device, liar.clone(), Arc::new(migd::homefs::host::NoHooks)).expect("host view");
        *liar.0.lock().expect("not poisoned") = Some(Arc::downgrade(&host));
        for n in 0..300 {
            let path = at.join(format!("f{}", n % 7));
            let _ = std::fs::read(&path);
            let _ = std::fs::write(&path, "x");
            let _ = std::fs::read_dir(&at).map(|d| d.take(1000).count());
        }
        host.stop();
        nix::mount::umount2(&at, nix::mount::MntFlags::MNT_DETACH).expect("umount");
        std::fs::remove_dir(&at).expect("rmdir");
    })
    .join();
    done.expect("no panic");
}
