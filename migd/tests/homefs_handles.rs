//! Open files of the deputy used from a host: regular files, directories, and the way from host to
//! host and home.

mod homefs_support;

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use homefs_support::{Join, Mounted, TOKEN, mounted, second};
use migd::homefs::{HandleKind, handle_of, inode_path};
use nix::fcntl::{FcntlArg, OFlag, fcntl};

const REGULAR: HandleKind = HandleKind::Regular { shared_position: false };
const SHARED: HandleKind = HandleKind::Regular { shared_position: true };

/// A temporary directory of home and the mount of all of home.
fn with_dir(test: fn(&Mounted, &Path)) {
    for join in [Join::Memory, Join::Tcp] {
        mounted(join, move |m| test(m, &m.scratch));
    }
}

fn hand_over(m: &Mounted, file: &File, kind: HandleKind) -> (u64, PathBuf) {
    let fd = OwnedFd::from(file.try_clone().expect("dup"));
    let handle = m.home.add_handle(fd, kind).expect("handed over");
    (handle, m.path(m.home.handle_path(handle)))
}

fn read_write() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    options
}

#[test]
fn a_file_is_the_same_by_its_handle_and_by_its_path() {
    with_dir(|m, dir| {
        let path = dir.join("f");
        fs::write(&path, "0123456789").expect("write");
        let at_home = read_write().open(&path).expect("open");
        let (handle, token) = hand_over(m, &at_home, REGULAR);
        let away = read_write().open(token).expect("open");
        assert_eq!(handle_of(away.as_fd()).expect("handle"), handle);
        let by_path = File::open(m.path(&path)).expect("open");
        assert_ne!(handle_of(by_path.as_fd()).expect("handle"), handle);
        assert_eq!(away.metadata().expect("stat").ino(), by_path.metadata().expect("stat").ino());
        assert_eq!(away.metadata().expect("stat").ino(), at_home.metadata().expect("stat").ino());
        away.write_at(b"AB", 3).expect("write");
        let mut buffer = [0; 10];
        by_path.read_exact_at(&mut buffer, 0).expect("read");
        assert_eq!(&buffer, b"012AB56789");
        at_home.write_at(b"home", 0).expect("write");
        by_path.read_exact_at(&mut buffer, 0).expect("read");
        assert_eq!(&buffer, b"homeB56789");
        // After a stat of the handle, an open by path is not of the handle.
        let (_, other) = hand_over(m, &at_home, REGULAR);
        fs::metadata(&other).expect("stat");
        let by_path = File::open(m.path(&path)).expect("open");
        assert!(handle_of(by_path.as_fd()).expect("handle") > handle + 1);
        assert!(handle_of(at_home.as_fd()).is_err(), "no file of a home file system");
    });
}

#[test]
fn an_unlinked_file_lives_on() {
    with_dir(|m, dir| {
        let path = dir.join("f");
        fs::write(&path, "gone").expect("write");
        let at_home = File::open(&path).expect("open");
        fs::remove_file(&path).expect("unlink");
        let (_, token) = hand_over(m, &at_home, REGULAR);
        let mut text = String::new();
        File::open(token).expect("open").read_to_string(&mut text).expect("read");
        assert_eq!(text, "gone");
        assert!(File::open(m.path(&path)).is_err());
    });
}

#[test]
fn a_shared_position_is_shared() {
    with_dir(|m, dir| {
        // { away; home; away; } > out
        let path = dir.join("out");
        let mut at_home = File::create(&path).expect("create");
        at_home.write_all(b"start ").expect("write");
        let (_, token) = hand_over(m, &at_home, SHARED);
        let mut away = OpenOptions::new().write(true).open(token).expect("open");
        away.seek(SeekFrom::Start(6)).expect("as the shepherd does");
        away.write_all(b"away ").expect("write");
        at_home.write_all(b"home ").expect("write");
        away.write_all(b"away2 ").expect("write");
        at_home.write_all(b"home2 ").expect("write");
        assert_eq!(fs::read_to_string(&path).expect("read"), "start away home away2 home2 ");
        away.seek(SeekFrom::Start(0)).expect("seek");
        away.write_all(b"S").expect("write");
        at_home.write_all(b"T").expect("write");
        assert_eq!(fs::read_to_string(&path).expect("read"), "STart away home away2 home2 ");

        // { read here; read there; } < in
        let path = dir.join("in");
        fs::write(&path, "abcdefghij").expect("write");
        let mut at_home = File::open(&path).expect("open");
        let (_, token) = hand_over(m, &at_home, SHARED);
        let mut away = File::open(token).expect("open");
        let mut two = [0; 2];
        let mut seen = Vec::new();
        for n in 0..5 {
            let from: &mut File = if n % 2 == 0 { &mut away } else { &mut at_home };
            from.read_exact(&mut two).expect("read");
            seen.extend_from_slice(&two);
        }
        assert_eq!(seen, b"abcdefghij");
        assert_eq!(away.read(&mut two).expect("end"), 0);
    });
}

#[test]
fn appends_are_appends() {
    with_dir(|m, dir| {
        let path = dir.join("log");
        let mut at_home = OpenOptions::new().append(true).create(true).open(&path).expect("open");
        for kind in [REGULAR, SHARED] {
            let (_, token) = hand_over(m, &at_home, kind);
            let mut away = OpenOptions::new().append(true).open(token).expect("open");
            let mut by_path = OpenOptions::new().append(true).open(m.path(&path)).expect("open");
            for _ in 0..3 {
                at_home.write_all(b"h").expect("write");
                away.write_all(b"a").expect("write");
                by_path.write_all(b"p").expect("write");
            }
        }
        assert_eq!(fs::read_to_string(&path).expect("read"), "hap".repeat(6));
        assert_eq!(fs::read_to_string(m.path(&path)).expect("read"), "hap".repeat(6));
        // O_APPEND switched on and off by fcntl.
        let mut file = read_write().open(m.path(&path)).expect("open");
        fcntl(&file, FcntlArg::F_SETFL(OFlag::O_APPEND)).expect("F_SETFL");
        file.write_all(b"END").expect("write");
        fcntl(&file, FcntlArg::F_SETFL(OFlag::empty())).expect("F_SETFL");
        file.write_at(b"X", 0).expect("write");
        let text = fs::read_to_string(&path).expect("read");
        assert!(text.starts_with("Xap") && text.ends_with("hapEND"), "{text}");
    });
}

#[test]
fn shared_mappings_reach_home_even_beside_an_append() {
    with_dir(|m, dir| {
        let path = m.path(dir.join("mapped"));
        let script = "import mmap,os,sys\n\
            p=sys.argv[1]\n\
            f=os.open(p,os.O_RDWR|os.O_CREAT,0o644); os.ftruncate(f,20000)\n\
            a=os.open(p,os.O_WRONLY|os.O_APPEND)\n\
            os.write(a,b'appended')\n\
            v=mmap.mmap(f,20000); os.close(f)\n\
            v[0:5]=b'first'; v[15000:15004]=b'last'; v.flush()\n\
            v[9000:9003]=b'mid'\n\
            os.write(a,b'!')\n\
            v.close()\n";
        let status = Command::new("python3").args(["-c", script]).arg(&path).status().expect("python3");
        assert!(status.success());
        let data = fs::read(dir.join("mapped")).expect("read");
        assert_eq!(data.len(), 20009);
        assert_eq!(
            (&data[..5], &data[15000..15004], &data[9000..9003]),
            (&b"first"[..], &b"last"[..], &b"mid"[..])
        );
        assert_eq!(&data[20000..], b"appended!");
    });
}

#[test]
fn a_mapped_file_is_found_by_its_inode() {
    with_dir(|m, dir| {
        let path = dir.join("mapped");
        fs::write(&path, "mapped").expect("write");
        let at_home = read_write().open(&path).expect("open");
        let (handle, token) = hand_over(m, &at_home, REGULAR);
        let away = read_write().open(token).expect("open");
        let _reader = File::open(m.path(&path)).expect("open");
        // Whatever becomes of its name.
        fs::remove_file(&path).expect("unlink");
        let inode_path = inode_path(&TOKEN, away.metadata().expect("stat").ino());
        let again = read_write().open(m.path(&inode_path)).expect("opens by the inode");
        assert_eq!(handle_of(again.as_fd()).expect("handle"), handle);
        let file_at = |path: &Path| m.home.file_at(path.as_os_str().as_bytes()).map(File::from);
        let copy = file_at(&inode_path).expect("is open at home");
        assert_eq!(copy.metadata().expect("stat").ino(), at_home.metadata().expect("stat").ino());
        assert!(file_at(&m.home.handle_path(handle)).is_some());
        let told = format!("{} is lost", inode_path.display());
        assert_eq!(m.home.with_names(&told), format!("{} (deleted) is lost", path.display()));
        for lie in ["i", "i007", "i1", "x", "i18446744073709551616"] {
            let lie = inode_path.with_file_name(lie);
            assert!(file_at(&lie).is_none() && File::open(m.path(&lie)).is_err(), "{}", lie.display());
        }
        assert!(file_at(&path).is_none());
    });
}

#[test]
fn pages_behind_the_end_are_dropped() {
    with_dir(|m, dir| {
        fs::write(dir.join("cut"), vec![b'.'; 12288]).expect("write");
        let script = "import mmap,os,sys\n\
            f=os.open(sys.argv[1],os.O_RDWR)\n\
            v=mmap.mmap(f,12288)\n\
            v[10:14]=b'kept'; v[4090:4102]=b'in two parts'; v[9000:9004]=b'lost'\n\
            os.truncate(sys.argv[2],4096+3)\n\
            v.flush()\n";
        let (away, home) = (m.path(dir.join("cut")), dir.join("cut"));
        let status = Command::new("python3").args(["-c", script]).arg(&away).arg(&home).status();
        assert!(status.expect("python3").success());
        let data = fs::read(&home).expect("read");
        assert_eq!((data.len(), &data[10..14], &data[4090..]), (4099, &b"kept"[..], &b"in two pa"[..]));
    });
}

#[test]
fn a_directory_keeps_its_place() {
    with_dir(|m, dir| {
        for n in 0..50 {
            fs::write(dir.join(format!("file{n}")), "x").expect("write");
        }
        fs::create_dir(dir.join("sub")).expect("mkdir");
        let at_home = File::open(dir).expect("open");
        let (_, token) = hand_over(m, &at_home, HandleKind::Directory);
        let away = File::open(&token).expect("open");
        assert_eq!(fs::read_dir(&token).expect("readdir").count(), 51);
        assert_eq!(fs::read_to_string(token.join("file7")).expect("read"), "x");
        fs::write(token.join("sub/new"), "y").expect("write");
        assert_eq!(fs::read_to_string(m.path(dir.join("sub/new"))).expect("read"), "y");
        drop(away);
        // A large directory, read in pieces while it shrinks.
        let script = format!("cd {} && for f in *; do rm -r \"$f\"; done; ls | wc -l", m.path(dir).display());
        let out = Command::new("bash").args(["-c", &script]).output().expect("bash");
        assert_eq!(String::from_utf8_lossy(&out.stdout).trim(), "0");
    });
}

#[test]
fn the_table_of_handles_ends_with_the_opens() {
    with_dir(|m, dir| {
        let path = dir.join("f");
        fs::write(&path, "0123456789").expect("write");
        let before = m.home.counts().1;
        let away = File::open(m.path(&path)).expect("open");
        let handle = handle_of(away.as_fd()).expect("handle");
        assert!(m.home.handle_file(handle).is_some());
        let hold = m.home.hold();
        drop(away);
        std::thread::sleep(std::time::Duration::from_millis(100));
        let home_coming = File::from(m.home.handle_file(handle).expect("held"));
        let mut text = String::new();
        (&home_coming).read_to_string(&mut text).expect("read");
        assert_eq!(text, "0123456789");
        drop(hold);
        assert!(m.home.handle_file(handle).is_none());
        assert_eq!(m.home.counts().1, before);
    });
}

#[test]
fn from_host_to_host_with_the_same_files() {
    with_dir(|m, dir| {
        let path = dir.join("f");
        fs::write(&path, "0123456789").expect("write");
        let mut on_a = File::open(m.path(&path)).expect("open");
        on_a.read_exact(&mut [0; 4]).expect("read");
        let handle = handle_of(on_a.as_fd()).expect("handle");
        let hold = m.home.hold();
        drop(on_a);
        second(m, |b| {
            m.home.disconnect(m.connection);
            let mut on_b = File::open(b.path(m.home.handle_path(handle))).expect("open");
            drop(hold);
            on_b.seek(SeekFrom::Start(4)).expect("seek");
            let mut rest = String::new();
            on_b.read_to_string(&mut rest).expect("read");
            assert_eq!(rest, "456789");
            assert_eq!(handle_of(on_b.as_fd()).expect("handle"), handle);
            drop(on_b);
        });
        m.host.stop();
        let error = File::open(m.path(&path)).expect_err("the first host is cut off");
        assert_eq!(error.raw_os_error(), Some(libc::ENOTCONN));
    });
}

#[test]
fn a_user_has_his_rights_and_no_more() {
    with_dir(|m, dir| {
        let secret = dir.join("secret");
        fs::write(&secret, "s").expect("write");
        Command::new("chmod").args(["755"]).arg(dir).status().expect("chmod");
        let run = |script: &str| {
            let out = Command::new("setpriv")
                .args(["--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-c", script])
                .stdin(Stdio::null())
                .output()
                .expect("setpriv");
            String::from_utf8_lossy(&out.stdout).into_owned()
        };
        Command::new("chmod").arg("600").arg(&secret).status().expect("chmod");
        let open = m.at.as_path();
        let p = open.join(secret.strip_prefix("/").expect("absolute"));
        assert_eq!(run(&format!("cat {}", p.display())), "");
        fs::set_permissions(&secret, PermissionsExt::from_mode(0o644)).expect("chmod");
        assert_eq!(run(&format!("cat {}", p.display())), "s");
        assert_eq!(run(&format!("echo x > {} || echo refused", p.display())), "refused\n");
        // The job's supplementary groups are home's business: they are not in a request.
        let grouped = dir.join("grouped");
        fs::write(&grouped, "g").expect("write");
        std::os::unix::fs::chown(&grouped, None, Some(4000)).expect("chown");
        fs::set_permissions(&grouped, PermissionsExt::from_mode(0o640)).expect("chmod");
        let p = open.join(grouped.strip_prefix("/").expect("absolute"));
        assert_eq!(run(&format!("cat {}", p.display())), "g");
        // A write takes set-user-ID off.
        let suid = dir.join("suid");
        fs::write(&suid, "x").expect("write");
        std::os::unix::fs::chown(&suid, Some(65534), Some(65534)).expect("chown");
        fs::set_permissions(&suid, PermissionsExt::from_mode(0o6777)).expect("chmod");
        let p = open.join(suid.strip_prefix("/").expect("absolute"));
        assert_eq!(run(&format!("echo y > {0}; stat -c %a {0}", p.display())), "777\n");
        assert_eq!(fs::metadata(&suid).expect("stat").mode() & 0o7777, 0o777);
        // Root is not everybody once the deputy is known, and it is not root.
        let mut deputy = Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups", "sleep", "60"])
            .spawn()
            .expect("setpriv");
        std::thread::sleep(std::time::Duration::from_millis(200));
        m.home.set_deputy(deputy.id() as i32).expect("deputy");
        fs::set_permissions(&secret, PermissionsExt::from_mode(0o600)).expect("chmod");
        let refused = File::open(m.path(&secret)).expect_err("root away is the job's user at home");
        assert_eq!(refused.kind(), std::io::ErrorKind::PermissionDenied);
        assert!(File::open(m.path(&grouped)).is_err(), "the deputy has not that group");
        deputy.kill().expect("kill");
        deputy.wait().expect("wait");
    });
}

#[test]
fn more_nodes_than_descriptors() {
    with_dir(|m, dir| {
        let make = |name: &str| -> String {
            let script = format!(
                "mkdir {name} && cd {name} && for d in 0 1 2 3; do mkdir $d; for f in $(seq 200); do echo $d$f > $d/$f; done; ln -s 1 $d/link; done"
            );
            let out = Command::new("bash").args(["-c", &script]).current_dir(dir).output().expect("bash");
            assert!(out.status.success());
            name.to_string()
        };
        m.home.set_descriptor_limit(100);
        make("tree");
        let tree = m.path(dir.join("tree"));
        let first = File::open(tree.join("0/1")).expect("open");
        let run = |script: &str| {
            let out = Command::new("bash").args(["-c", script]).current_dir(&tree).output().expect("bash");
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
            String::from_utf8_lossy(&out.stdout).into_owned()
        };
        let all = run("cat */* 2>/dev/null | sort | md5sum; find . -type f | wc -l; ls -l | wc -l");
        assert_eq!(run("cat */* | sort | md5sum; find . -type f | wc -l; ls -l | wc -l"), all);
        assert!(m.home.descriptors() < 300, "{} descriptors", m.home.descriptors());
        assert!(m.home.counts().0 > 700, "{} nodes", m.home.counts().0);
        // Removed and made anew at home, with old inode numbers: never mistaken for the old ones.
        fs::remove_dir_all(dir.join("tree/1")).expect("remove");
        let script = "mkdir tree/1 && for f in $(seq 300); do echo new$f > tree/1/$f; done";
        Command::new("bash").args(["-c", script]).current_dir(dir).status().expect("bash");
        assert_eq!(run("cat 1/7 1/207; ls 1 | wc -l"), "new7\nnew207\n300\n");
        let mut text = String::new();
        (&first).read_to_string(&mut text).expect("read");
        assert_eq!(text, "01\n");
    });
}
