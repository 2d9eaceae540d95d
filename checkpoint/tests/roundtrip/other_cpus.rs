//! CPUs that lack something, and programs of another architecture.

use super::harness::{Case, can_run, installed, run, skip};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

#[test]
fn a_cpu_that_lacks_instructions() {
    if !can_run("a_cpu_that_lacks_instructions") {
        return;
    }
    let case = Case::new();
    let mut running = case.start("sleep", &["2"]);
    std::thread::sleep(Duration::from_millis(200));
    case.dump(&mut running);
    let image = case.path("img");
    let image = image.to_str().expect("UTF-8");
    // AMD's 3DNow!, which no CPU has that can run this.
    case.change(|image| {
        let cpu = &mut image.misc.cpu;
        cpu.model = "one of long ago".into();
        match cpu.leaves.iter_mut().find(|leaf| leaf.0 == 0x8000_0001) {
            Some((_, _, registers)) => registers[3] |= 3 << 30,
            None => cpu.leaves.push((0x8000_0001, 0, [0, 0, 0, 3 << 30])),
        }
    });
    let refused = run(&["restore", image]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(4), "{said}");
    assert!(said.contains("lacks: 3dnowext, 3dnow (it ran on one of long ago)"), "{said}");
    assert!(!Path::new(&format!("/proc/{}", running.pid())).exists());
    let done = run(&["restore", image, "--other-cpu"]);
    assert_eq!(done.status.code(), Some(0), "{}", String::from_utf8_lossy(&done.stderr));
}

/// exit(nanosleep(100 s)) by the system calls of i386.
const PROGRAM: &str = ".globl _start\n.text\n_start:\n  mov $162, %eax\n  mov $time, %ebx\n  xor %ecx, %ecx\n  \
    int $0x80\n  mov $1, %eax\n  xor %ebx, %ebx\n  int $0x80\n.data\ntime: .long 100, 0\n";

#[test]
fn a_32_bit_program() {
    let test = "a_32_bit_program";
    if !can_run(test) || !installed(test, "as") || !installed(test, "ld") {
        return;
    }
    let case = Case::new();
    fs::write(case.path("program.s"), PROGRAM).expect("written");
    for command in ["as --32 program.s -o program.o", "ld -m elf_i386 program.o -o program"] {
        let built = Command::new("sh").args(["-c", command]).current_dir(case.dir.path()).status();
        if !built.is_ok_and(|status| status.success()) {
            return skip(test, "as and ld know no i386");
        }
    }
    let Ok(child) = Command::new(case.path("program")).spawn() else {
        return skip(test, "this kernel runs no 32-bit programs");
    };
    let running = super::harness::Running(child);
    std::thread::sleep(Duration::from_millis(200));
    let refused =
        run(&["dump", &running.pid().to_string(), "--to", case.path("img").to_str().expect("UTF-8")]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(4), "{said}");
    assert!(said.contains("it is a 32-bit program"), "{said}");
    let status = fs::read_to_string(format!("/proc/{}/status", running.pid())).expect("it runs on");
    assert!(status.contains("State:\tS") && status.contains("TracerPid:\t0"), "{status}");
}
