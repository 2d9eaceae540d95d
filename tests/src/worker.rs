//! A job that works in memory and says at its end what it has computed.
//!
//! Its output depends on its arguments only, so an unmigrated twin tells what is right.

use crate::lab::Lab;

/// The program.
const SOURCE: &str = r#"
import hashlib, sys, time
mib, steps, pause = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
blocks = [bytearray(hashlib.shake_128(b"%d" % i).digest(1 << 20)) for i in range(mib)]
print("filled", mib, flush=True)
state = 1
for step in range(steps):
    state = (state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
    block = blocks[(state >> 33) % mib]
    at = (state >> 20) % ((1 << 20) - 64)
    block[at:at + 64] = hashlib.sha512(bytes(block[at:at + 64]) + b"%d" % step).digest()
    time.sleep(pause)
    if step % 50 == 49:
        print("step", step, flush=True)
total = hashlib.sha256()
for block in blocks:
    total.update(block)
print("sum", total.hexdigest(), flush=True)
"#;

/// Puts the program on a node.
pub fn install(lab: &Lab, node: &str) {
    std::fs::write(lab.srv(node, "worker.py"), SOURCE).expect("node's /srv is writable");
}

/// Its command line: so much memory, so many steps, so many seconds between two.
pub fn command(mib: u32, steps: u32, pause: f64) -> String {
    format!("python3 /srv/worker.py {mib} {steps} {pause}")
}

/// What it prints when nobody disturbs it.
pub fn expected(lab: &Lab, node: &str, mib: u32, steps: u32) -> String {
    // Without the pauses: they change nothing but the time.
    lab.sh(node, &command(mib, steps, 0.0)).ok()
}
