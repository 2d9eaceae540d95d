"""Speaks with an interactive bash inside script(1), as hands would: jobs in the background, stopped, continued, ended."""
import re
import signal
import subprocess
import sys

PROMPT = b"ready> "
# Whoever was started in the background by a shell ignores the keys' signals, and so would all that a shell starts here.
for key in signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP:
    signal.signal(key, signal.SIG_DFL)
shell = subprocess.Popen(
    ["script", "-q", "-c", "bash --norc --noprofile -i", "/dev/null"],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    bufsize=0,
    env={"PATH": "/usr/bin:/bin", "PS1": PROMPT.decode(), "TERM": "dumb", "LC_ALL": "C"},
)


def until(mark, times=1):
    text = b""
    while text.count(mark) < times:
        got = shell.stdout.read(4096)
        if not got:
            sys.exit(f"script has ended after {text!r}")
        text += got
    return text


def show(text):
    # Numbers of processes are others in each run; when a job's end is reported is a matter of time.
    text = text.decode().replace("\r", "")
    text = re.sub(r"\[\d\][ +-]+(Done|Killed).*\n", "", text)
    print(re.sub(r"\[(\d)\] \d+", r"[\1] PID", text), end="", flush=True)


def say(line, mark=PROMPT, times=1):
    shell.stdin.write(line)
    show(until(mark, times))


COUNT = "i=0; while [ $i -lt %d ]; do i=$((i+1)); done; echo counted $i"
show(until(PROMPT))
for n in range(3):
    say(b"stty -echo; echo round %d\n" % n)
    say(b"sh -c '%s' > counted &\n" % (COUNT % 200_000).encode())
    # In the foreground, and stopped by the terminal.
    shell.stdin.write(b"sh -c 'echo begun; %s'\n" % (COUNT % 300_000).encode())
    show(until(b"begun"))
    say(b"\x1a")
    say(b"jobs %%\n")
    say(b"fg\n")
    say(b"wait; cat counted; echo status $?\n")
    # Interrupted by the terminal; then a pipeline, stopped and ended by signals.
    shell.stdin.write(b"sh -c 'trap \"echo interrupted; exit 3\" INT; echo begun; while :; do sleep 0.05; done'\n")
    show(until(b"begun"))
    say(b"\x03")
    say(b"echo status $?\n")
    say(b"sleep 1000 | cat &\n")
    say(b"kill -KILL %1; wait %1 2>/dev/null; echo status $?\n")
    say(b"seq 1 200000 | sort -rn | cksum\n")
    say(b"stty size; tty | sed s/[0-9]*$//\n")
shell.stdin.write(b"exit 7\n")
show(shell.stdout.read())
print("script ended with", shell.wait())
