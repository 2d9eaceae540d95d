//! Memory that is not one process' own: shared between processes of a tree, or with a file.

use super::harness::{PROGRAMS, skip};
use super::open_files::{survives, survives_as_tree};
use std::process::{Command, Stdio};

/// `address`: of an mmap object; `shown`: what the kernel shows of mappings of a name, without inode numbers.
const MEMORY: &str = r#"
import mmap
def address(m):
    return ctypes.addressof(ctypes.c_char.from_buffer(m))
def shown(name):
    found = []
    for line in open("/proc/self/maps"):
        words = line.split(None, 5)
        if len(words) > 5 and words[5].strip().endswith(name):
            blocks = os.stat("/proc/self/map_files/" + words[0]).st_blocks
            found.append((words[0], words[1], words[2], blocks))
    return found
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
def protect(at, length, how):
    return 0 if libc.mprotect(at, length, how) == 0 else ctypes.get_errno()
def wait_until(what):
    deadline = time.time() + 100
    while not what() and time.time() < deadline:
        time.sleep(0.005)
"#;

fn with_memory(program: &str) -> String {
    format!("{MEMORY}{program}")
}

/// Three generations; the middle one maps only parts, with another protection.
const SHARED: &str = r#"
large = mmap.mmap(-1, 64 << 20)
small = mmap.mmap(-1, 4096)
code = mmap.mmap(-1, 8192, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
alone = mmap.mmap(-1, 1 << 20)
libc.madvise(address(alone), 1 << 20, mmap.MADV_DONTFORK)
large[0:5] = b"begin"; large[(40 << 20):(40 << 20) + 4] = b"deep"; large[-1:] = b"!"
code[0:4] = b"code"; alone[5:10] = b"alone"
large[(1 << 20):(1 << 20) + 6] = b"hidden"
large[(2 << 20):(2 << 20) + 6] = b"closed"
small[0] = 1
PAGE = 4096
def ended(me, wanted):
    if shown("/dev/zero (deleted)") != wanted:
        return 10
    if (large[0:5], large[(40 << 20):(40 << 20) + 4], code[0:4]) != (b"begin", b"deep", b"code"):
        return 11
    small[me] = 1
    wait_until(lambda: small[100] == 1)
    return 0 if small[100] == 1 else 12
middle = os.fork()
if middle == 0:
    last = os.fork()
    if last == 0:
        # What nobody else maps: gone from the others' memory, it is still one with this one's.
        mine = mmap.mmap(-1, 3 * PAGE)
        mine[PAGE:PAGE + 4] = b"mine"
        before = shown("/dev/zero (deleted)")
        small[1] = 1
        wait_for("go")
        os._exit(ended(11, before) or (0 if mine[PAGE:PAGE + 4] == b"mine" else 13))
    libc.munmap(address(large) + (1 << 20), 1 << 20)
    protect(address(large) + (2 << 20), PAGE, 0)
    protect(address(large) + (4 << 20), PAGE, mmap.PROT_READ)
    before = shown("/dev/zero (deleted)")
    small[2] = 1
    wait_for("go")
    status = ended(12, before)
    os._exit(status or os.waitstatus_to_exitcode(os.waitpid(last, 0)[1]))
wait_until(lambda: small[1] and small[2])
before = shown("/dev/zero (deleted)")
pause()
check("mappings", shown("/dev/zero (deleted)"), before)
wait_until(lambda: small[11] and small[12])
check("told by both", (small[11], small[12]), (1, 1))
check("contents", (large[0:5], large[-1:], code[0:4], alone[5:10]), (b"begin", b"!", b"code", b"alone"))
check("under the hole", large[(1 << 20):(1 << 20) + 6], b"hidden")
check("under no access", large[(2 << 20):(2 << 20) + 6], b"closed")
small[100] = 1
check("children", os.waitstatus_to_exitcode(os.waitpid(middle, 0)[1]), 0)
"#;

#[test]
fn between_processes_of_a_tree() {
    survives_as_tree(&with_memory(SHARED));
}

/// Written while the process is away, too: the file is what it is.
const FILE: &str = r#"
def mapped(name, length, size, **more):
    fd = os.open(name, os.O_RDWR | os.O_CREAT, 0o600)
    os.truncate(fd, size)
    m = mmap.mmap(fd, length, **more)
    os.close(fd)
    return m
PAGE = 4096
plain = mapped("plain", 3 * PAGE, 3 * PAGE)
plain[5:10] = b"plain"
grown = mapped("grown", 2 * PAGE, 2 * PAGE)
os.truncate("grown", 8 * PAGE)
cut = mapped("cut", 4 * PAGE, 4 * PAGE)
cut[0:3] = b"cut"; cut[2 * PAGE:2 * PAGE + 4] = b"gone"
os.truncate("cut", PAGE + 100)
closed = mapped("closed", PAGE, PAGE)
closed[0:6] = b"closed"
protect(address(closed), PAGE, mmap.PROT_READ)
posix = mapped(POSIX, 1 << 20, 1 << 20)
posix[1000:1005] = b"posix"
plain.flush()
names = ["/plain", "/grown", "/cut", "/closed", POSIX]
before = [shown(name) for name in names]
pause()
check("mappings", [shown(name) for name in names], before)
check("contents", (plain[5:10], cut[0:3], closed[0:6], posix[1000:1005]), (b"plain", b"cut", b"closed", b"posix"))
plain[20:23] = b"new"; grown[PAGE:PAGE + 4] = b"more"; posix[0:1] = b"p"
check("protection", protect(address(closed), PAGE, mmap.PROT_READ | mmap.PROT_WRITE), 0)
closed[0:1] = b"C"
def at(name, offset, length):
    fd = os.open(name, os.O_RDONLY)
    got = os.pread(fd, length, offset)
    os.close(fd)
    return got
check("in the files", (at("plain", 20, 3), at("grown", PAGE, 4), at("closed", 0, 6), at(POSIX, 0, 1)),
      (b"new", b"more", b"Closed", b"p"))
fd = os.open("plain", os.O_WRONLY); os.pwrite(fd, b"file", 30); os.close(fd)
check("from the file", plain[30:34], b"file")
os.truncate("cut", 4 * PAGE)
check("grown again", cut[2 * PAGE:2 * PAGE + 4], bytes(4))
"#;

#[test]
fn with_files() {
    let posix = tempfile::NamedTempFile::new_in("/dev/shm").expect("shared memory's file system");
    survives(&with_memory(&format!("POSIX = {:?}\n{FILE}", posix.path())));
}

/// Memory that the kernel may drop, and advice on shared memory.
const ADVISED: &str = r#"
PAGE = 4096
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
droppable = libc.mmap(None, 4 * PAGE, 3, 0x08 | mmap.MAP_ANONYMOUS, -1, 0)
ctypes.memmove(droppable + PAGE, b"here", 4)
shared = mmap.mmap(-1, 8 << 20)
shared[0:6] = b"shared"
libc.madvise(address(shared), 8 << 20, 14)
libc.madvise(address(shared) + (4 << 20), 1 << 20, 15)
libc.madvise(address(shared) + (6 << 20), 1 << 20, 16)
def flags():
    found, where = {}, None
    for line in open("/proc/self/smaps"):
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            where = int(first.split("-")[0], 16)
        elif first == "VmFlags:":
            found[where] = line.split()[1:]
    ours = lambda at: at == droppable or address(shared) <= at < address(shared) + (8 << 20)
    return {at: words for at, words in found.items() if ours(at)}
before = flags()
check("droppable", "dp" in before[droppable], True)
check("advised", "hg" in before[address(shared)], True)
pause()
check("flags", flags(), before)
# The kernel may have dropped it, and only all of a page.
check("droppable", ctypes.string_at(droppable + PAGE, 4) in (b"here", bytes(4)), True)
check("shared", shared[0:6], b"shared")
"#;

#[test]
fn droppable_and_advised() {
    let probe = "import mmap, sys\nmmap.mmap(-1, 4096, flags=0x08 | mmap.MAP_ANONYMOUS)";
    if needs("droppable memory", "MAP_DROPPABLE (Linux 6.11)", probe) {
        survives(&with_memory(ADVISED));
    }
}

/// Sealed private memory, a sealed part of a mapping, and sealed memory without access.
const SEALED: &str = r#"
private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
def seal(at, length):
    return libc.syscall(ctypes.c_long(462), ctypes.c_void_p(at), ctypes.c_size_t(length), ctypes.c_ulong(0))
PAGE = 4096
whole = mmap.mmap(-1, 4 * PAGE, flags=private)
whole[0:5] = b"whole"
part = mmap.mmap(-1, 4 * PAGE, flags=private)
part[PAGE:PAGE + 4] = b"part"
closed = mmap.mmap(-1, PAGE, flags=private)
closed[0:6] = b"closed"
protect(address(closed), PAGE, 0)
shared = mmap.mmap(-1, PAGE)
shared[0:6] = b"shared"
kept = [(address(whole), 4 * PAGE), (address(part) + PAGE, PAGE), (address(closed), PAGE), (address(shared), PAGE)]
check("sealing", [seal(*place) for place in kept], [0] * 4)
pause()
check("sealed", [protect(at, length, 7) for at, length in kept], [errno.EPERM] * 4)
check("not sealed", protect(address(part), PAGE, 1), 0)
check("contents", (whole[0:5], part[PAGE:PAGE + 4], shared[0:6]), (b"whole", b"part", b"shared"))
memory = open("/proc/self/mem", "rb", buffering=0)
memory.seek(address(closed))
check("without access", memory.read(6), b"closed")
whole[0:1] = b"W"
"#;

#[test]
fn sealed() {
    let probe = "import ctypes, sys; libc = ctypes.CDLL(None, use_errno=True)\n\
                 sys.exit(0 if libc.syscall(ctypes.c_long(462), ctypes.c_void_p(0), ctypes.c_size_t(0), ctypes.c_ulong(0)) == 0 else 1)";
    if needs("sealed memory", "mseal (Linux 6.10)", probe) {
        survives(&with_memory(SEALED));
    }
}

/// Address spaces as Go, Java and sanitizers have them: terabytes, of which little is there; a stack that
/// grows; contents under no access; a file's private mapping beyond its end.
const SPARSE: &str = r#"
PAGE = 4096
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
shadow = libc.mmap(None, 16 << 40, 3, kind, -1, 0)
places = [0, 5 << 40, (16 << 40) - PAGE]
for n, at in enumerate(places):
    ctypes.memmove(shadow + at, b"at %d" % n, 4)
reserved = libc.mmap(None, 2 << 40, 0, kind, -1, 0)
arena = reserved + (1 << 40)
protect(arena, 16 * PAGE, 3)
ctypes.memmove(arena, b"arena", 5)
protect(arena, PAGE, 0)
stack = libc.mmap(None, 64 * PAGE, 3, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x100, -1, 0)
ctypes.memmove(stack, b"low", 3)
fd = os.open("short", os.O_RDWR | os.O_CREAT, 0o600)
os.truncate(fd, 2 * PAGE); os.pwrite(fd, b"file", 0)
window = mmap.mmap(fd, 2 * PAGE, flags=mmap.MAP_PRIVATE)
window[PAGE:PAGE + 3] = b"own"
os.truncate(fd, 100); os.truncate("short", PAGE)
os.close(fd)
check("shadow", shadow != 2**64 - 1, True)
pause()
check("places", [ctypes.string_at(shadow + at, 4) for at in places], [b"at 0", b"at 1", b"at 2"])
check("between", ctypes.string_at(shadow + (7 << 40), 4), bytes(4))
memory = open("/proc/self/mem", "rb", buffering=0)
memory.seek(arena)
check("under no access", memory.read(5), b"arena")
protect(arena, PAGE, 1)
check("allowed again", ctypes.string_at(arena, 5), b"arena")
check("stack", ctypes.string_at(stack, 3), b"low")
check("window", window[0:4], b"file")
"#;

#[test]
fn sparse_terabytes() {
    survives(&with_memory(SPARSE));
}

/// Whether Python can do something here; records that a test did not run otherwise.
fn needs(test: &str, what: &str, probe: &str) -> bool {
    let done =
        Command::new("python3").env("PATH", PROGRAMS).args(["-c", probe]).stderr(Stdio::null()).status();
    let can = done.is_ok_and(|status| status.success());
    if !can {
        skip(test, &format!("needs python3 and {what}"));
    }
    can
}
