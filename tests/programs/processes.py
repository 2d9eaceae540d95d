"""A pool of processes (semaphores in shared memory, pipes), a queue, and shared values under a lock."""
import hashlib
import multiprocessing
import multiprocessing.shared_memory


def chain(n):
    digest = hashlib.sha256(b"%d" % n)
    for _ in range(60_000):
        digest.update(digest.digest())
    return digest.hexdigest()


def count(total, queue, n):
    for i in range(400):
        with total.get_lock():
            total.value += i
        chain_of = hashlib.sha256(b"%d %d" % (n, i)).hexdigest()
        queue.put((n, i, chain_of))
    queue.put(None)


def square(name, n):
    shared = multiprocessing.shared_memory.SharedMemory(name=name)
    for i in range(n, 4000, 4):
        shared.buf[i] = i * i % 251
    shared.close()


if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    with context.Pool(3) as pool:
        for n, digest in enumerate(pool.imap(chain, range(36), chunksize=2)):
            print(n, digest, flush=True)
    total = context.Value("q", 0)
    queue = context.Queue()
    counters = [context.Process(target=count, args=(total, queue, n)) for n in range(3)]
    [counter.start() for counter in counters]
    ended, got = 0, []
    while ended < 3:
        item = queue.get()
        if item is None:
            ended += 1
        else:
            got.append(item)
    [counter.join() for counter in counters]
    got.sort()
    print(total.value, len(got), hashlib.sha256(repr(got).encode()).hexdigest())
    shared = multiprocessing.shared_memory.SharedMemory(create=True, size=4000)
    writers = [context.Process(target=square, args=(shared.name, n)) for n in range(4)]
    [writer.start() for writer in writers]
    [writer.join() for writer in writers]
    print(hashlib.sha256(bytes(shared.buf[:4000])).hexdigest(), [writer.exitcode for writer in writers])
    shared.close()
    shared.unlink()
