# A parent and its child write the same file through memory, in turns, and by a descriptor. What the one writes the
# other sees at once: it waits for it. See tests/tests/mapped_files.rs.
import hashlib, mmap, os, struct, sys, time

ROUNDS = int(sys.argv[1])
PAGES, PAGE = 300, 4096
SIZE = PAGES * PAGE + 123
PATIENCE = 100

file = os.open("mapped", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
os.ftruncate(file, SIZE)
memory = mmap.mmap(file, SIZE)
reading = mmap.mmap(file, SIZE, prot=mmap.PROT_READ)

def fail(*what):
    print(os.getpid(), *what, flush=True)
    os._exit(1)

def check(what, got, wanted):
    if got != wanted:
        fail(what, got[:16], "instead of", wanted[:16])

def turn():
    return struct.unpack_from("<Q", memory)[0]

def await_turn(wanted):
    until = time.monotonic() + PATIENCE
    while turn() != wanted:
        if turn() > wanted or time.monotonic() > until:
            fail("waits for turn", wanted, "and sees", turn())
        time.sleep(0.0005)

def pattern(turn):
    return hashlib.sha256(str(turn).encode()).digest() * 96

def place(turn):
    # Not at the beginning of a page, and over the end of one.
    return PAGE + turn * 7919 % (PAGES - 3) * PAGE + 1500

def write(turn):
    at, data = place(turn), pattern(turn)
    if turn % 7 == 0:
        os.pwrite(file, data, at)
    else:
        memory[at:at + len(data)] = data
    if turn % 5 == 0:
        check("by its descriptor", os.pread(file, len(data), at), data)
    memory[8:16] = struct.pack("<Q", turn * 3)

def look(turn):
    at, data = place(turn), pattern(turn)
    check("through memory", memory[at:at + len(data)], data)
    check("through memory that is only read", reading[at:at + len(data)], data)
    check("the word beside", memory[8:16], struct.pack("<Q", turn * 3))
    if turn % 3 == 0:
        check("the other's, by the descriptor", os.pread(file, len(data), at), data)

child = os.fork()
for round in range(ROUNDS):
    own, others = (2 * round + 1, 2 * round) if child else (2 * round + 2, 2 * round + 1)
    await_turn(others)
    if others:
        look(others)
    write(own)
    memory[:8] = struct.pack("<Q", own)
    time.sleep(0.003)
if child == 0:
    os._exit(0)
await_turn(2 * ROUNDS)
print("ended", os.waitpid(child, 0)[1], hashlib.sha256(memory).hexdigest(), flush=True)
