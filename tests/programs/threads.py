"""Four threads, each with a hash chain and a dictionary that grows."""
import hashlib
import threading

STEPS = 400_000
out = [None] * 4


def work(n):
    chain = hashlib.sha256(b"%d" % n)
    seen = {}
    for i in range(STEPS):
        chain.update(chain.digest())
        seen[i] = chain.hexdigest()[:8]
    out[n] = chain.hexdigest() + str(len(seen)) + "".join(seen[k] for k in range(0, STEPS, 9999))


threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print("\n".join(out))
