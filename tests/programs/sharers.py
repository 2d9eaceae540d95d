# A parent and two children share memory of every kind; see tests/tests/shared_memory.rs.
import fcntl, hashlib, mmap, os, struct, sys, time

F_ADD_SEALS, F_GET_SEALS, SHRINK, GROW, WRITE, FUTURE = 1033, 1034, 2, 4, 8, 16
SIZE = 1 << 20
PATTERN = 64 << 10

def deleted(path, size):
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o604)
    os.unlink(path)
    os.ftruncate(fd, size)
    return fd

anonymous = mmap.mmap(-1, SIZE)
memfd = os.memfd_create("a name", os.MFD_ALLOW_SEALING)
os.ftruncate(memfd, SIZE)
posix = deleted(f"/dev/shm/sharers{os.getpid()}", SIZE)
disk = deleted("on-disk", SIZE + 100)
future = os.memfd_create("future", os.MFD_ALLOW_SEALING)
os.ftruncate(future, SIZE)
maps = [anonymous] + [mmap.mmap(fd, SIZE) for fd in (memfd, posix, disk, future)]
fcntl.fcntl(future, F_ADD_SEALS, FUTURE | SHRINK)
os.pwrite(disk, b"the end", SIZE + 90)
sealed = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
os.write(sealed, b"never again" * 1000)
fcntl.fcntl(sealed, F_ADD_SEALS, SHRINK | GROW | WRITE)
reader = os.open(f"/proc/self/fd/{sealed}", os.O_RDONLY)
os.lseek(reader, 6, os.SEEK_SET)
# One position for all of them. Opened anew: the description that memfd_create(2) gives lacks FMODE_ATOMIC_POS, and
# loses writes of several processes that come at the same time, wherever they run (do_dentry_open in fs/open.c sets it).
made = os.memfd_create("log")
log = os.open(f"/proc/self/fd/{made}", os.O_RDWR)
os.close(made)
# Not shared, and never touched but here.
sparse = os.memfd_create("sparse")
os.ftruncate(sparse, 1 << 40)
os.pwrite(sparse, b"far", 1 << 39)
private = mmap.mmap(memfd, SIZE, flags=mmap.MAP_PRIVATE)
private[SIZE - 4096:SIZE - 4093] = b"own"
alone = mmap.mmap(-1, 1 << 16)
alone[100:105] = b"alone"

def fail(*what):
    print(os.getpid(), *what, flush=True)
    os._exit(1)

def check(what, got, wanted):
    if got != wanted:
        fail(what, got, wanted)

def pattern(who, round):
    seed = hashlib.sha256(f"{who} {round}".encode()).digest()
    return seed * (PATTERN // len(seed))

def at(who):
    return 4096 + who * 2 * PATTERN

def work(who):
    seen = [[0] * 3 for _ in maps]
    round, own, made = 0, None, 0
    while not os.path.exists("stop"):
        round += 1
        for n, memory in enumerate(maps):
            memory[at(who):at(who) + PATTERN] = pattern(who, round)
            memory[8 * who:8 * who + 8] = struct.pack("<Q", round)
            for other in range(3):
                now = struct.unpack_from("<Q", memory, 8 * other)[0]
                if now < seen[n][other]:
                    fail("memory", n, "of", other, "went back from", seen[n][other], "to", now)
                seen[n][other] = now
        # What is written through a descriptor shows in memory, and the other way round.
        for fd, memory in ((memfd, maps[1]), (posix, maps[2]), (disk, maps[3])):
            place = SIZE - 8192 + 8 * who
            os.pwrite(fd, struct.pack("<Q", round * 3), place)
            check("through a descriptor", struct.unpack_from("<Q", memory, place)[0], round * 3)
            check("through memory", os.pread(fd, 8, 8 * who), struct.pack("<Q", round))
        # Made wherever it is just now.
        if round % 10 == 0:
            if own is not None:
                check("its own memfd", os.pread(own, PATTERN, 0) == pattern(who, made), True)
                os.close(own)
            own, made = os.memfd_create(f"own{who}"), round
            os.write(own, pattern(who, made))
        if round % 20 == 0:
            os.write(log, b"%d" % who)
        time.sleep(0.005)
    return round

def last(who, round):
    for n, memory in enumerate(maps):
        check(f"counter of {who} in {n}", struct.unpack_from("<Q", memory, 8 * who)[0], round)
        check(f"pattern of {who} in {n}", memory[at(who):at(who) + PATTERN] == pattern(who, round), True)

children = []
for who in (1, 2):
    ends = os.pipe()
    pid = os.fork()
    if pid == 0:
        round = work(who)
        os.write(ends[1], struct.pack("<Q", round))
        check("private", private[SIZE - 4096:SIZE - 4093], b"own")
        check("alone", alone[100:105], b"alone")
        os._exit(0)
    children.append((pid, ends[0]))
open("ready", "w").close()
rounds = [work(0)]
for pid, end in children:
    rounds.append(struct.unpack("<Q", os.read(end, 8))[0])
    check("a child", os.waitpid(pid, 0)[1], 0)
for who in range(3):
    last(who, rounds[who])
check("seals", (fcntl.fcntl(sealed, F_GET_SEALS), fcntl.fcntl(future, F_GET_SEALS)), (SHRINK | GROW | WRITE, FUTURE | SHRINK))
check("sealed", os.pread(sealed, 20000, 0), b"never again" * 1000)
check("reader", (os.read(reader, 5), fcntl.fcntl(reader, fcntl.F_GETFL) & os.O_ACCMODE), (b"again", os.O_RDONLY))
try:
    os.pwrite(future, b"a", 0)
    fail("a write to a sealed file")
except PermissionError:
    pass
check("the end on disk", os.pread(disk, 100, SIZE), b"\0" * 90 + b"the end\0\0\0")
stat = os.fstat(disk)
check("the file on disk", (stat.st_size, stat.st_mode & 0o777, stat.st_nlink), (SIZE + 100, 0o604, 0))
check("sparse", (os.fstat(sparse).st_size, os.pread(sparse, 3, 1 << 39), os.fstat(sparse).st_blocks < 100), (1 << 40, b"far", True))
written = sum(round // 20 for round in rounds)
check("the log", (os.fstat(log).st_size, os.lseek(log, 0, os.SEEK_CUR)), (written, written))
check("the name", os.readlink(f"/proc/self/fd/{memfd}"), "/memfd:a name (deleted)")
print("as it should be", flush=True)
