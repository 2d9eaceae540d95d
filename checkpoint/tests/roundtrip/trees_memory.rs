//! What parents and children have in common in memory stays one page for both.

use super::harness::{Case, can_run, run};
use std::fs;

/// A parent with 16 MiB, and children that have written to some of it; each looks by pagemap which of its
/// pages are its parent's, and whether all have the contents that they should have.
const FORKS: &str = r#"
import ctypes, mmap, os, struct, sys, time
PAGE, SIZE = 4096, 16 << 20
def wait_for(name):
    while not os.path.exists(name):
        time.sleep(0.01)
area = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
base = ctypes.addressof(ctypes.c_char.from_buffer(area))
for n in range(0, SIZE, PAGE):
    area[n:n + 8] = struct.pack("Q", n)
def frames(pid):
    with open(f"/proc/{pid}/pagemap", "rb") as f:
        f.seek(base // PAGE * 8)
        words = struct.unpack(f"{SIZE // PAGE}Q", f.read(SIZE // PAGE * 8))
    return [w & (1 << 55) - 1 if w >> 63 else 0 for w in words]
root = os.getpid()
wrong = []
def check(what, got, wanted):
    if got != wanted:
        wrong.append(f"{what}: {got} instead of {wanted}")
def contents(name, own, gone):
    for n in range(0, SIZE, PAGE):
        page = n // PAGE
        wanted = own.get(page, 0 if page in gone else n)
        if struct.unpack("Q", area[n:n + 8])[0] != wanted:
            check(f"{name}: page {page}", struct.unpack("Q", area[n:n + 8])[0], wanted)
            return
def common(a, b):
    return sum(1 for x, y in zip(frames(a), frames(b)) if x == y != 0)
def child(name, own, gone, extra=lambda: None):
    pid = os.fork()
    if pid:
        wait_for("at." + name)
        return pid
    for page, value in own.items():
        area[page * PAGE:page * PAGE + 8] = struct.pack("Q", value)
    libc = ctypes.CDLL(None)
    for page in gone:
        libc.madvise(ctypes.c_void_p(base + page * PAGE), PAGE, 4)
    keep = extra()
    open("at." + name, "w").close()
    wait_for("go")
    contents(name, own, gone)
    print("\n".join(wrong), end="", flush=True)
    os._exit(1 if wrong else 0)
def grandchild():
    global grand
    grand = child("grand", {9: 99, 1000: 5, 3: 33, 4: 44}, [7, 8])
    return grand
first = child("first", {3: 33, 4: 44}, [7, 8], lambda: (open("grand.pid", "w").write(str(grandchild()))))
second = child("second", {n: n + 1 for n in range(2000, 2100)}, [])
third = child("third", {}, [], lambda: mmap.mmap(-1, 1 << 20))
# The parent goes on as well.
area[5 * PAGE:5 * PAGE + 8] = struct.pack("Q", 555)
wait_for("grand.pid"); time.sleep(0.05)
grand = int(open("grand.pid").read())
def measure():
    return {"first": common(root, first), "second": common(root, second), "third": common(root, third), "grand": common(first, grand)}
def maps(pid):
    out = []
    for line in open(f"/proc/{pid}/maps"):
        words = line.split()
        start, end = (int(word, 16) for word in words[0].split("-"))
        # Neighbours that are one mapping but for what was written to them long ago.
        if out and out[-1][1] == start and out[-1][2:] == [words[1], "s" in words[1] or words[4]]:
            out[-1][1] = end
        else:
            out.append([start, end, words[1], "s" in words[1] or words[4]])
    return out
before = measure()
mapped = {pid: maps(pid) for pid in (root, first, second, third, grand)}
open("before", "w").write(repr(before))
open("ready", "w").close()
turn = 0
while True:
    turn += 1
    wait_for(f"look{turn}")
    after = measure()
    for name in before:
        # Each writes a few pages itself to look at them: its interpreter's, not the area's.
        check(f"{name}'s pages in common, time {turn}", after[name] >= before[name] - 1, True)
    for pid in mapped:
        if maps(pid) != mapped[pid]:
            check(f"mappings of {pid}", [m for m in maps(pid) if m not in mapped[pid]], [m for m in mapped[pid] if m not in maps(pid)])
    open(f"after{turn}", "w").write(repr(after))
    open(f"looked{turn}", "w").close()
    if turn == 2:
        break
open("go", "w").close()
contents("root", {5: 555}, [])
for pid in (first, second, third):
    check("status", os.waitpid(pid, 0)[1], 0)
print("\n".join(wrong) if wrong else "as it was", flush=True)
"#;

#[test]
fn copy_on_write_stays_shared() {
    if !can_run("copy-on-write") {
        return;
    }
    let case = Case::new();
    let mut running = case.start("python3", &["-c", FORKS]);
    case.await_file("ready");
    let image = case.path("img");
    let to = image.to_str().expect("UTF-8");
    // What the second dump meets is what the first restore made.
    for turn in [1, 2] {
        let pid = match turn {
            1 => running.pid(),
            _ => child_of(running.pid()),
        };
        let saved = run(&["dump", &pid.to_string(), "--to", to, "--tree", "--json"]);
        assert!(saved.status.success(), "{}", String::from_utf8_lossy(&saved.stderr));
        let told: serde_json::Value = serde_json::from_slice(&saved.stdout).expect("JSON");
        assert!(told["shared_pages"].as_u64().expect("a number") > 4 * 3900, "{told}");
        assert!(told["image_bytes"].as_u64().expect("a number") < 64 << 20, "{told}");
        running.end();
        running = case.restore();
        fs::write(case.path(&format!("look{turn}")), "").expect("written");
        case.await_file(&format!("looked{turn}"));
        fs::remove_dir_all(&image).expect("removed");
    }
    assert!(running.end().success(), "{}", case.output());
    let read = |name: &str| fs::read_to_string(case.path(name)).unwrap_or_default();
    println!("pages in common: before {}, after {}, {}", read("before"), read("after1"), read("after2"));
    assert_eq!(case.output(), "as it was\n");
}

/// What `migckpt restore` has restored.
pub fn child_of(pid: i32) -> i32 {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).expect("its children");
    children.split_ascii_whitespace().next().and_then(|child| child.parse().ok()).expect("a child")
}
