//! Files whose name is gone, has changed, or is another file's.

use super::harness::{Case, can_run, run};
use super::open_files::{prepared, survives, survives_as_tree};
use std::fs;

const FILES: &str = r#"
def create(name, flags=os.O_RDWR):
    return os.open(name, flags | os.O_CREAT | os.O_TRUNC, 0o640)
gone = create("gone"); os.write(gone, b"contents"); again = os.open("gone", os.O_RDONLY); os.read(again, 3)
append = os.open("gone", os.O_WRONLY | os.O_APPEND); os.unlink("gone")
os.fchown(gone, 1234, 4321); os.fchmod(gone, 0o4755); os.utime(gone, ns=(1000000000123456789, 1100000000987654321))
# Sparse: a hole, something in the middle, and a hole at the end; larger than any image.
sparse = create("sparse"); os.pwrite(sparse, b"middle", 1 << 30); os.ftruncate(sparse, 1 << 40); os.unlink("sparse")
blocks = os.fstat(sparse).st_blocks
renamed = create("old name"); os.write(renamed, b"renamed"); os.rename("old name", "new name")
replaced = create("replaced"); os.write(replaced, b"the old one")
with open("other", "w") as file: file.write("the new one")
os.rename("other", "replaced")
temporary = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o600); os.write(temporary, b"temporary")
writing = os.open(".", os.O_TMPFILE | os.O_WRONLY, 0o600); os.write(writing, b"never read")
os.mkdir("d"); os.mkdir("d/e")
deep = create("d/e/deep"); os.write(deep, b"deep"); os.unlink("d/e/deep"); os.rmdir("d/e"); os.rmdir("d")
os.mkdir("removed"); removed = os.open("removed", os.O_RDONLY); os.rmdir("removed")
beyond = create("beyond"); os.lseek(beyond, 1 << 33, os.SEEK_SET)
fcntl.flock(gone, fcntl.LOCK_EX)
direct = create("direct", os.O_RDWR | os.O_DIRECT | os.O_SYNC | os.O_NOATIME)
fds = (gone, again, append, sparse, renamed, replaced, temporary, writing, deep, removed, beyond, direct)
def link(fd):
    return os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
def look():
    stat = [os.fstat(fd) for fd in fds]
    return [(fcntl.fcntl(fd, fcntl.F_GETFL), os.lseek(fd, 0, os.SEEK_CUR), s.st_size, oct(s.st_mode), s.st_nlink, s.st_uid, s.st_gid)
            for fd, s in zip(fds, stat)]
before, links = look(), [link(fd) for fd in (gone, sparse, renamed, removed)]
times = os.fstat(gone).st_mtime_ns
pause()
check("descriptions", look(), before)
check("links", [link(fd) for fd in (gone, sparse, renamed, removed)], links)
check("time", os.fstat(gone).st_mtime_ns, times)
check("holes", os.fstat(sparse).st_blocks <= blocks, True)
check("sparse", (os.pread(sparse, 8, (1 << 30) - 1), os.lseek(sparse, 0, os.SEEK_DATA) >> 29), (b"\0middle\0", 2))
check("gone", os.pread(gone, 100, 0), b"contents")
os.write(append, b" and more"); check("the same file", os.read(again, 100), b"tents and more")
check("renamed", os.pread(renamed, 100, 0), b"renamed"); check("its name", os.fstat(renamed).st_ino, os.stat("new name").st_ino)
check("replaced", (os.pread(replaced, 100, 0), open("replaced").read()), (b"the old one", "the new one"))
check("nothing was left", sorted(name for name in os.listdir(".") if "replaced" in name or "gone" in name), ["replaced"])
libc.linkat(-100, f"/proc/self/fd/{temporary}".encode(), -100, b"found", 0x400)
check("a temporary file gets a name", open("found").read(), "temporary")
check("only written", os.pread(os.open(f"/proc/self/fd/{writing}", os.O_RDONLY), 100, 0), b"never read")
check("deep", os.pread(deep, 100, 0), b"deep")
check("removed", os.listdir(removed), [])
os.write(beyond, b"x"); check("beyond the end", os.fstat(beyond).st_size, (1 << 33) + 1)
check("lock", len(info(gone, "lock:")), 1)
"#;

#[test]
fn unlinked_renamed_and_replaced_files() {
    survives(FILES);
}

/// A shell's here-document and a file of a parent and a child with one position.
const SHARED: &str = r#"
fd = os.open("shared", os.O_RDWR | os.O_CREAT); os.write(fd, b"0123456789"); os.lseek(fd, 2, os.SEEK_SET); os.unlink("shared")
child = os.fork()
if child == 0:
    own = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    wait_for("ask")
    os.lseek(fd, 1, os.SEEK_CUR)
    os._exit(os.pwrite(own, b"XY", 3))
pause()
open("ask", "w").close()
check("child", os.waitpid(child, 0)[1], 2 << 8)
check("one position, one file", os.read(fd, 4), b"XY56")
"#;

#[test]
fn a_nameless_file_of_two_processes() {
    survives_as_tree(SHARED);
}

#[test]
fn nameless_files_that_are_not_carried() {
    if !can_run("nameless_files_that_are_not_carried") {
        return;
    }
    for (program, words) in [
        ("f = open('x', 'w'); os.link('x', 'y'); os.unlink('x')", "/x (deleted), which has another name"),
        ("f = open('x', 'w'); os.unlink('x') # held", "has open as well"),
    ] {
        let case = Case::new();
        let running = prepared(&case, &format!("{program}\npause()"));
        let other =
            program.ends_with("held").then(|| fs::File::open(format!("/proc/{}/fd/3", running.pid())));
        assert!(!matches!(other, Some(Err(_))));
        let done =
            run(&["dump", &running.pid().to_string(), "--to", case.path("img").to_str().expect("UTF-8")]);
        let text = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.code(), Some(4), "{program}: {text}");
        assert!(text.contains(words), "{program}: {text}");
    }
}
