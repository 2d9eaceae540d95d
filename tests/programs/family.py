"""Makes a tree with one of everything, says that it is `ready`, waits for `go`, and looks whether all
is as it was. What differs is printed."""
import os, signal, socket, struct, sys, time
def wait_for(name):
    while not os.path.exists(name):
        time.sleep(0.01)
def stat(pid):
    """State and parent from /proc; group and session by asking, as they are home's."""
    tail = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()
    return tail[0], int(tail[1]), os.getpgid(pid), os.getsid(pid)
wrong = []
def check(what, got, wanted):
    if got != wanted:
        wrong.append(f"{what}: {got} instead of {wanted}")
shared = os.open("shared", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
os.write(shared, b"0123456789")
down_r, down_w = os.pipe()
up_r, up_w = os.pipe()
os.write(down_w, b"in the pipe")
children = {}
def child(name, work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(name, repr(error), flush=True)
            os._exit(99)
        os._exit(0)
    children[name] = pid
def worker():
    wait_for("go")
    got = os.read(down_r, 100)
    os.lseek(shared, 3, os.SEEK_SET)
    os.write(up_w, got + b"|" + str(os.getppid() == root).encode())
    os._exit(7)
def leader():
    os.setsid()
    grandchild = os.fork()
    if grandchild == 0:
        wait_for("go")
        time.sleep(0.3)
        os._exit(11)
    open("grandchild", "w").write(str(grandchild))
    os.rename("grandchild", "grandchild.done")
    wait_for("go")
    got = os.waitpid(grandchild, 0)
    os._exit(12 if got == (grandchild, 11 << 8) and os.getsid(0) == os.getpid() else 13)
def group():
    os.setpgid(0, 0)
    wait_for("go")
def stopped():
    wait_for("go")
    os._exit(21)
def threads():
    import threading
    out = []
    ts = [threading.Thread(target=lambda n=n: (wait_for("go"), out.append(n))) for n in range(5)]
    [t.start() for t in ts]; [t.join() for t in ts]
    os._exit(31 if sorted(out) == list(range(5)) else 32)
root = os.getpid()
child("worker", worker)
child("leader", leader)
child("group", group)
child("threads", threads)
wait_for("grandchild.done")
member = os.fork()
if member == 0:
    wait_for("go")
    os._exit(0)
while stat(children["group"])[2] != children["group"]:
    time.sleep(0.01)
os.setpgid(member, children["group"])
child("stopped", stopped)
os.kill(children["stopped"], signal.SIGSTOP)
os.waitpid(children["stopped"], os.WUNTRACED)
zombie = os.fork()
if zombie == 0:
    os._exit(42)
killed = os.fork()
if killed == 0:
    os.kill(os.getpid(), signal.SIGTERM)
while stat(zombie)[0] != "Z" or stat(killed)[0] != "Z":
    time.sleep(0.01)
before = {name: stat(pid) for name, pid in children.items()}
before["member"] = stat(member)
before["zombie"] = stat(zombie)
chld = []
signal.signal(signal.SIGCHLD, lambda *a: chld.append(1))
open("ready", "w").close()
wait_for("restored")
for name, old in before.items():
    pid = dict(children, member=member, zombie=zombie)[name]
    new = stat(pid)
    check(name + " state", new[0] == "T", old[0] == "T")
    check(name + " parent", new[1], old[1])
    if name != "zombie":
        own = old[2] != before["worker"][2]
        check(name + " group", new[2], old[2] if own else os.getpgid(0))
        check(name + " session", new[3], old[3] if name == "leader" else os.getsid(0))
os.close(down_r)
open("go", "w").close()
check("zombie", os.waitpid(zombie, 0)[1], 42 << 8)
check("killed", os.waitpid(killed, 0)[1], signal.SIGTERM)
check("pipe", os.read(up_r, 100), b"in the pipe|True")
check("worker", os.waitpid(children["worker"], 0)[1], 7 << 8)
check("shared position", os.lseek(shared, 0, os.SEEK_CUR), 3)
check("leader", os.waitpid(children["leader"], 0)[1], 12 << 8)
check("group", os.waitpid(children["group"], 0)[1], 0)
check("member", os.waitpid(member, 0)[1], 0)
check("threads", os.waitpid(children["threads"], 0)[1], 31 << 8)
os.kill(children["stopped"], signal.SIGCONT)
check("stopped", os.waitpid(children["stopped"], 0)[1], 21 << 8)
os.close(up_w)
check("end of the pipe", os.read(up_r, 100), b"")
check("handler", len(chld) >= 1, True)
print("\n".join(wrong) if wrong else "as it was", flush=True)
