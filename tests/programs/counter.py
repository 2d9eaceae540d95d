"""Memory shared with children that live for a moment: who counts on it must find what they have counted."""
import mmap
import os
import struct

shared = mmap.mmap(-1, 4096)
for n in range(1200):
    child = os.fork()
    if child == 0:
        for _ in range(300):
            shared[0:8] = struct.pack("q", struct.unpack("q", shared[0:8])[0] + 1)
        os._exit(n % 100)
    _, status = os.waitpid(child, 0)
    counted = struct.unpack("q", shared[0:8])[0]
    if counted != 300 * (n + 1) or os.waitstatus_to_exitcode(status) != n % 100:
        raise SystemExit(f"{n}: counted {counted}, status {status}")
print(counted)
