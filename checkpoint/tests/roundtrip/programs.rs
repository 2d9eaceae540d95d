//! Works of shells, saved and restored in the middle, several times: the output is that of an
//! undisturbed run. More programs are in `tests/programs.rs`.

use super::harness::{Case, PROGRAMS, can_run, run};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// Writes some mebibytes of lines that are the same every time, and neither random nor constant.
fn input(path: &Path, lines: u32) {
    let mut text = String::with_capacity(lines as usize * 40);
    let mut state = 12345u64;
    for n in 0..lines {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        text.push_str(&format!("{:08x} line {n} {} word{}\n", state >> 32, state % 97, (state >> 40) % 1000));
    }
    fs::write(path, text).expect("writes the input");
}

/// A shell's work in its own words, five times: the output is the same. With options of `migckpt dump`.
pub fn same_output_with(
    options: &[&str],
    name: &str,
    program: &str,
    arguments: &[&str],
    lines: u32,
    least_moves: u32,
) {
    if !can_run(name) {
        return;
    }
    let case = Case::new();
    input(&case.path("input"), lines);
    let plain = Command::new(program)
        .args(arguments)
        .env("PATH", PROGRAMS)
        .current_dir(case.dir.path())
        .stdin(std::process::Stdio::null())
        .output()
        .expect("runs undisturbed");
    assert!(plain.status.success(), "{}", String::from_utf8_lossy(&plain.stderr));
    let mut running = case.start(program, arguments);
    let pid = running.pid();
    let (mut moves, deadline) = (0, Instant::now() + Duration::from_secs(100));
    let status = loop {
        std::thread::sleep(Duration::from_millis(60));
        if moves >= 5 || Instant::now() > deadline {
            break running.end();
        }
        if fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe.ends_with("migckpt")) {
            // Its restore has hardly begun.
            continue;
        }
        let image = case.path("img");
        let (pid, to) = (pid.to_string(), image.to_str().expect("UTF-8"));
        let done = run(&[&["dump", &pid, "--to", to], options].concat());
        if !done.status.success() {
            let why = String::from_utf8_lossy(&done.stderr).into_owned();
            if why.contains("is traced by") || why.contains("(vfork or clone)") {
                // Its restore is not over yet; or it is just starting a program.
                continue;
            }
            let status = running.end();
            assert!(why.contains("ended") || why.contains("no process"), "dump: {why}");
            break status;
        }
        running.end();
        let check = run(&["verify", image.to_str().expect("UTF-8")]);
        assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stderr));
        running = case.restore();
        moves += 1;
    };
    assert!(
        status.success(),
        "{status}: {}",
        String::from_utf8_lossy(&fs::read(case.path("errors")).unwrap_or_default())
    );
    assert!(moves >= least_moves, "it was moved {moves} times only");
    let moved = fs::read(case.path("out")).expect("the output");
    assert!(
        moved == plain.stdout,
        "the output differs after {moves} moves; its end: {}",
        String::from_utf8_lossy(&moved[moved.len().saturating_sub(600)..])
    );
}
