//! Contents without a name: memory shared by processes, memfds, deleted files, System V segments; and files
//! mapped shared. What is shared before is shared afterwards.

use super::harness::{Case, can_run, run};
use super::open_files::{prepared, survives, survives_as_tree};
use std::fs;

/// Two children and their parent write where the others read.
const SHARED_MEMORY: &str = r#"
import mmap
before = mmap.mmap(-1, 3 << 20)
before[:8] = b"original"; before[2 << 20:(2 << 20) + 4] = b"far!"
named = mmap.mmap(-1, 8192)
private = mmap.mmap(-1, 8192, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
private[:3] = b"own"
anon = os.memfd_create("a name", os.MFD_ALLOW_SEALING)
os.write(anon, b"in the memfd"); os.ftruncate(anon, 1 << 20)
through = mmap.mmap(anon, 1 << 20)
posix = os.open("/dev/shm/" + str(os.getpid()), os.O_RDWR | os.O_CREAT, 0o600)
os.unlink("/dev/shm/" + str(os.getpid())); os.ftruncate(posix, 8192)
shm = mmap.mmap(posix, 8192); shm[:5] = b"posix"
children = []
for n in range(2):
    pid = os.fork()
    if pid == 0:
        wait_for("go")
        ok = before[:8] == b"original" and before[2 << 20:(2 << 20) + 4] == b"far!" and private[:3] == b"own"
        ok = ok and through[:12] == b"in the memfd" and shm[:5] == b"posix" and before[4096:4099] == b"\0\0\0"
        before[100 + n] = 77 + n; through[5000 + n] = 33 + n; shm[10 + n] = 55 + n; private[:3] = b"???"
        named[n] = 11 + n
        os._exit(0 if ok else 1)
    children.append(pid)
maps = lambda: [l.split()[-1] if "[" in l else l.split(maxsplit=5)[5].strip() for l in open("/proc/self/maps")
                if any(w in l for w in ("/dev/zero", "memfd", "/dev/shm"))]
were = sorted(maps())
pause()
check("names of the mappings", sorted(maps()), were)
for pid in children:
    check("a child", os.waitpid(pid, 0)[1], 0)
check("written by the children", (before[100], before[101], through[5000], through[5001], shm[10], shm[11], named[0], named[1]),
      (77, 78, 33, 34, 55, 56, 11, 12))
check("private", private[:3], b"own")
check("through the descriptor", os.pread(anon, 2, 5000), b"\x21\x22")
check("position", os.lseek(anon, 0, os.SEEK_CUR), 12)
check("name", os.readlink(f"/proc/self/fd/{anon}"), "/memfd:a name (deleted)")
"#;

#[test]
fn memory_shared_by_a_tree() {
    survives_as_tree(SHARED_MEMORY);
}

/// Seals, modes, several descriptions, mappings read-only and private.
const MEMFDS: &str = r#"
import mmap
F_ADD_SEALS, F_GET_SEALS = 1033, 1034
SEAL, SHRINK, GROW, WRITE, FUTURE = 1, 2, 4, 8, 16
plain = os.memfd_create("plain", 0)
os.write(plain, b"x" * 10000)
sealed = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
os.write(sealed, b"never again"); fcntl.fcntl(sealed, F_ADD_SEALS, SHRINK | GROW | WRITE)
future = os.memfd_create("future", os.MFD_ALLOW_SEALING)
os.ftruncate(future, 8192)
window = mmap.mmap(future, 8192); window[:6] = b"window"
fcntl.fcntl(future, F_ADD_SEALS, FUTURE | SEAL)
reader = os.open(f"/proc/self/fd/{sealed}", os.O_RDONLY)
os.lseek(reader, 6, os.SEEK_SET)
os.fchmod(plain, 0o640)
private = mmap.mmap(plain, 8192, flags=mmap.MAP_PRIVATE); private[4096:4099] = b"own"
sparse = os.memfd_create("sparse", 0)
os.ftruncate(sparse, 1 << 40); os.pwrite(sparse, b"far", 1 << 39)
pause()
check("seals", (fcntl.fcntl(plain, F_GET_SEALS), fcntl.fcntl(sealed, F_GET_SEALS), fcntl.fcntl(future, F_GET_SEALS)),
      (SEAL, SHRINK | GROW | WRITE, FUTURE | SEAL))
check("plain", (os.pread(plain, 20000, 0), os.fstat(plain).st_mode & 0o777), (b"x" * 10000, 0o640))
check("private", (private[:3], private[4096:4099]), (b"xxx", b"own"))
check("reader", (os.read(reader, 100), fcntl.fcntl(reader, fcntl.F_GETFL) & 3), (b"again", 0))
try:
    os.pwrite(sealed, b"a", 0); check("a sealed write", "done", "refused")
except PermissionError: pass
window[:2] = b"!!"
check("window", os.pread(future, 6, 0), b"!!ndow")
try:
    os.pwrite(future, b"a", 0); check("a future write", "done", "refused")
except PermissionError: pass
check("sparse", (os.fstat(sparse).st_size, os.pread(sparse, 3, 1 << 39), os.fstat(sparse).st_blocks < 100), (1 << 40, b"far", True))
"#;

#[test]
fn memfds() {
    survives(MEMFDS);
}

/// Deleted while open and while mapped, replaced under the name, made without a name; holes are kept.
const DELETED: &str = r#"
import mmap
gone = os.open("gone", os.O_RDWR | os.O_CREAT, 0o604)
os.write(gone, b"0123456789"); os.ftruncate(gone, 64 << 20); os.pwrite(gone, b"end", (64 << 20) - 3)
os.utime(gone, (1234567, 7654321)); os.unlink("gone"); os.lseek(gone, 4, os.SEEK_SET)
also = os.dup(gone); second = os.open(f"/proc/self/fd/{gone}", os.O_RDONLY)
append = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
os.write(append, b"one "); os.rename("log", "log.1"); os.unlink("log.1")
replaced = os.open("name", os.O_RDWR | os.O_CREAT, 0o600)
os.write(replaced, b"the old one"); os.unlink("name"); open("name", "w").write("the new one")
tmp = os.open(".", os.O_RDWR | os.O_TMPFILE, 0o600); os.write(tmp, b"no name")
os.mkdir("dir"); lost = os.open("dir/file", os.O_RDWR | os.O_CREAT, 0o600); os.write(lost, b"lost")
os.unlink("dir/file"); os.rmdir("dir")
m = os.open("mapped", os.O_RDWR | os.O_CREAT, 0o600); os.write(m, b"m" * 12288)
shared = mmap.mmap(m, 12288); private = mmap.mmap(m, 12288, flags=mmap.MAP_PRIVATE)
private[4096:4099] = b"own"; os.unlink("mapped"); os.close(m)
moved = os.open("before", os.O_RDWR | os.O_CREAT, 0o600); os.write(moved, b"moved"); os.rename("before", "after")
pause()
check("gone", (os.read(also, 3), os.lseek(gone, 0, os.SEEK_CUR), os.pread(second, 3, (64 << 20) - 3)), (b"456", 7, b"end"))
stat = os.fstat(gone)
check("gone is", (stat.st_size, stat.st_nlink, stat.st_mode & 0o777, stat.st_mtime, stat.st_blocks < 64), (64 << 20, 0, 0o604, 7654321, True))
check("its name", os.readlink(f"/proc/self/fd/{gone}"), os.getcwd() + "/gone (deleted)")
os.write(append, b"two")
check("appended", open(f"/proc/self/fd/{append}").read(), "one two")
check("replaced", (os.pread(replaced, 20, 0), open("name").read()), (b"the old one", "the new one"))
check("without a name", os.pread(tmp, 20, 0), b"no name")
check("lost", os.pread(lost, 20, 0), b"lost")
check("mapped", (shared[:2], private[:2], private[4096:4099], shared[4096:4099]), (b"mm", b"mm", b"own", b"mmm"))
shared[:2] = b"SS"
check("still one file", private[:2], b"SS")
check("renamed", (os.pread(moved, 20, 0), os.path.exists("after"), os.readlink(f"/proc/self/fd/{moved}")), (b"moved", True, os.getcwd() + "/after"))
check("the directory", sorted(os.listdir(".")), ["after", "errors", "go", "img", "name", "out", "ready"])
"#;

#[test]
fn deleted_files() {
    survives(DELETED);
}

/// The file stays a file: what is written goes there, before and after.
const MAPPED: &str = r#"
import mmap
f = os.open("file", os.O_RDWR | os.O_CREAT, 0o600); os.ftruncate(f, 1 << 20)
a = mmap.mmap(f, 1 << 20); a[:5] = b"first"; a[500000] = 7
b = mmap.mmap(f, 4096, prot=mmap.PROT_READ)
grown = os.open("grown", os.O_RDWR | os.O_CREAT, 0o600); os.ftruncate(grown, 4096)
g = mmap.mmap(grown, 4096); os.ftruncate(grown, 8192)
cut = os.open("cut", os.O_RDWR | os.O_CREAT, 0o600); os.ftruncate(cut, 16384)
c = mmap.mmap(cut, 16384); c[0] = 1; os.ftruncate(cut, 4096)
os.close(f)
pause()
check("contents", (a[:5], b[:5], a[500000]), (b"first", b"first", 7))
a[:5] = b"later"
check("in the file", (open("file", "rb").read(5), b[:5]), (b"later", b"later"))
g[:2] = b"gg"; check("grown", (open("grown", "rb").read(2), os.path.getsize("grown")), (b"gg", 8192))
c[1] = 2; check("cut", open("cut", "rb").read(2), b"\x01\x02")
pid = os.fork()
if pid == 0:
    os.kill(os.getpid(), signal.SIGKILL) if c[9000] == 300 else os._exit(0)
check("beyond its end", os.waitpid(pid, 0)[1] & 127, signal.SIGBUS)
"#;

#[test]
fn files_mapped_shared() {
    survives(MAPPED);
}

/// Private and with a key, removed and not, attached read-only, and by two processes.
const SYSTEM_V: &str = r#"
libc.shmat.restype = ctypes.c_void_p; libc.shmat.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
IPC_CREAT, IPC_RMID, IPC_STAT, RDONLY = 0o1000, 0, 2, 0o10000
key = 0x5eed0000 + os.getpid() % 65536
kept = libc.shmget(key, 20000, IPC_CREAT | 0o640)
gone = libc.shmget(0, 1 << 20, IPC_CREAT | 0o600)
a, r, g = libc.shmat(kept, None, 0), libc.shmat(kept, None, RDONLY), libc.shmat(gone, None, 0)
ctypes.memmove(a, b"with a key", 10); ctypes.memmove(g + 500000, b"removed", 7)
libc.shmctl(gone, IPC_RMID, None)
child = os.fork()
if child == 0:
    wait_for("looked")
    ok = ctypes.string_at(g + 500000, 7) == b"removed"
    ctypes.memmove(g, b"child", 5)
    os._exit(0 if ok else 1)
def line(id):
    return [l.split() for l in open("/proc/sysvipc/shm").read().splitlines()[1:] if l.split()[1] == str(id)]
pause()
check("contents", (ctypes.string_at(a, 10), ctypes.string_at(r, 10)), (b"with a key", b"with a key"))
check("the segment", [(int(l[0]), l[2], int(l[3]), int(l[6])) for l in line(kept)], [(key, "640", 20000, 4)])
check("removed", [(l[2], int(l[3]), int(l[6])) for l in line(gone)], [("1600", 1 << 20, 2)])
open("looked", "w").close()
check("child", os.waitpid(child, 0)[1], 0)
check("by the child", ctypes.string_at(g, 5), b"child")
ctypes.memmove(a, b"W", 1)
check("one segment", ctypes.string_at(r, 4), b"with".replace(b"w", b"W"))
libc.shmctl(kept, IPC_RMID, None)
"#;

#[test]
fn system_v_segments() {
    survives_as_tree(SYSTEM_V);
}

/// What somebody else uses too would become two: it is named, and nothing is stopped.
#[test]
fn shared_with_others() {
    if !can_run("shared_with_others") {
        return;
    }
    for (program, words) in [
        (
            "import mmap\nm = mmap.mmap(-1, 4096)\nif os.fork() == 0:\n    pause(); os._exit(0)\ntime.sleep(60)",
            "it shares anonymous memory with process",
        ),
        (
            "f = os.memfd_create('x')\nif os.fork() == 0:\n    pause(); os._exit(0)\ntime.sleep(60)",
            "which process",
        ),
        (
            "f = os.open('two', os.O_RDWR | os.O_CREAT)\nos.link('two', 'names'); os.unlink('two')\npause()",
            "which has another name",
        ),
    ] {
        let case = Case::new();
        let running = prepared(&case, program);
        let child = format!("/proc/{0}/task/{0}/children", running.pid());
        let child = fs::read_to_string(child).expect("read");
        let pid = child.split_whitespace().next().map_or(running.pid().to_string(), str::to_string);
        let refused = run(&["dump", &pid, "--to", case.path("img").to_str().expect("UTF-8")]);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(refused.status.code() == Some(4) && said.contains(words), "{said}");
        fs::write(case.path("go"), "").expect("written");
    }
}
