//! Images of a kernel with another vDSO.

use super::harness::{Case, Running, can_run, exists, run, victim};
use checkpoint::image::{Backing, ProcessImage};
use checkpoint::proc::elf::functions;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// Lets the symbols of a function, which the program does not use, lead elsewhere.
fn move_getcpu(image: &mut ProcessImage, to: impl Fn(&BTreeMap<Vec<u8>, u64>) -> u64) {
    let old = functions(&image.mm.vdso);
    let (at, moved) = (old[b"getcpu".as_slice()].to_le_bytes(), to(&old).to_le_bytes());
    let mut place = 0;
    while let Some(found) = image.mm.vdso[place..].windows(8).position(|eight| eight == at) {
        place += found;
        image.mm.vdso[place..place + 8].copy_from_slice(&moved);
    }
    assert_ne!(functions(&image.mm.vdso), old);
}

/// As if it were another build.
fn make_another(image: &mut ProcessImage) {
    move_getcpu(image, |old| old[b"getcpu".as_slice()] + 16);
}

/// Where its vDSO is.
fn vdso_of(image: &ProcessImage) -> u64 {
    let code = image.mm.vmas.iter().find(|vma| vma.backing == Backing::Vdso);
    code.expect("a vDSO").start
}

/// Whether a process has a jump at the beginning of a function of what was its vDSO.
fn has_jump(pid: i32, at: u64) -> bool {
    let mut code = [0; 6];
    let memory = File::open(format!("/proc/{pid}/mem")).expect("its memory");
    memory.read_exact_at(&mut code, at).expect("there is code");
    code == [0xff, 0x25, 0, 0, 0, 0]
}

fn maps(pid: i32) -> String {
    fs::read_to_string(format!("/proc/{pid}/maps")).expect("maps")
}

fn lines(case: &Case) -> usize {
    fs::read_to_string(case.path("times")).unwrap_or_default().lines().count()
}

fn await_lines(case: &Case, known: usize) {
    let mut looks = 0;
    while lines(case) < known + 3 {
        assert!(looks < 6000, "it does not go on: {}", case.output());
        looks += 1;
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn saved(case: &Case) -> Running {
    let dir = case.dir.path().to_str().expect("UTF-8");
    let mut running = case.start(victim().to_str().expect("UTF-8"), &["clocks", dir]);
    case.await_file("ready");
    case.dump(&mut running);
    running
}

/// Restored twice as if on another kernel each time, and once on the same.
#[test]
fn an_image_of_another_kernel() {
    if !can_run("an_image_of_another_kernel") {
        return;
    }
    let case = Case::new();
    let pid = saved(&case).pid();
    let mut running = None;
    for round in 0..3 {
        let place = std::cell::Cell::new((0, 0));
        case.change(|image| {
            let own = functions(&image.mm.vdso);
            place.set((vdso_of(image), own[b"clock_gettime".as_slice()]));
            if round < 2 {
                make_another(image);
            }
        });
        let known = lines(&case);
        let mut restored = case.restore();
        case.await_restored(pid);
        await_lines(&case, known);
        let (start, function) = place.get();
        let same_place = maps(pid).contains(&format!("{start:x}-"))
            && maps(pid)
                .lines()
                .any(|line| line.starts_with(&format!("{start:x}-")) && line.ends_with("[vdso]"));
        assert_eq!(same_place, round == 2, "round {round}: {}", maps(pid));
        assert_eq!(has_jump(pid, start + function), round < 2, "round {round}");
        assert_eq!(maps(pid).lines().filter(|line| line.ends_with("[vdso]")).count(), 1);
        if round < 2 {
            let image = case.path("img");
            let done = run(&["dump", &pid.to_string(), "--to", image.to_str().expect("UTF-8")]);
            assert!(done.status.success(), "dump: {}", String::from_utf8_lossy(&done.stderr));
            restored.end();
        }
        running = Some(restored);
    }
    fs::write(case.path("go"), b"").expect("lets it go on");
    let status = running.expect("restored").end();
    assert!(status.success() && case.output().contains("PASS clocks"), "{status}: {}", case.output());
}

#[test]
fn a_tree_of_another_kernel() {
    if !can_run("a_tree_of_another_kernel") {
        return;
    }
    let case = Case::new();
    let code = "import os, time\n\
        child = os.fork()\n\
        last = time.monotonic()\n\
        while not os.path.exists('go'):\n    \
            now = time.monotonic()\n    \
            assert now >= last and time.time() > 1e9\n    \
            last = now\n    \
            time.sleep(0.005)\n\
        if child == 0: os._exit(7)\n\
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7\n\
        print('PASS tree')\n";
    let mut running = case.start("python3", &["-c", code]);
    std::thread::sleep(Duration::from_millis(300));
    let pid = running.pid();
    let image = case.path("img");
    let done = run(&["dump", &pid.to_string(), "--tree", "--to", image.to_str().expect("UTF-8")]);
    assert!(done.status.success(), "dump: {}", String::from_utf8_lossy(&done.stderr));
    running.end();
    let all_have_one = std::cell::Cell::new(0);
    case.change(|image| {
        all_have_one.set(all_have_one.get() + i32::from(!image.mm.vdso.is_empty()));
        make_another(image);
    });
    assert_eq!(all_have_one.get(), 2);
    let mut restored = case.restore();
    case.await_restored(pid);
    std::thread::sleep(Duration::from_millis(100));
    fs::write(case.path("go"), b"").expect("lets it go on");
    let status = restored.end();
    assert!(status.success() && case.output().contains("PASS tree"), "{status}: {}", case.output());
}

#[test]
fn what_cannot_be_led_to_this_kernels() {
    if !can_run("what_cannot_be_led_to_this_kernels") {
        return;
    }
    let case = Case::new();
    let pid = saved(&case).pid();
    let image = case.path("img");
    let image = image.to_str().expect("UTF-8");
    let whole = fs::read(case.path("img/process.img")).expect("an image");
    let refused = |change: fn(&mut ProcessImage), wanted: &str| {
        fs::write(case.path("img/process.img"), &whole).expect("written");
        case.change(change);
        let output = run(&["restore", image, "--dry-run"]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(4), "{said}");
        assert!(said.contains(wanted) && !exists(pid), "{said}");
    };
    let stands_in_it = |image: &mut ProcessImage| {
        make_another(image);
        image.threads[0].regs[16] = vdso_of(image) + 0xb00;
    };
    refused(stands_in_it, "stands in it: save it once more");
    refused(|image| image.mm.vdso.truncate(4096), "has not the size of its mapping");
    refused(|image| image.mm.vdso.fill(0), "cannot be led to this kernel's");
    // No room for a jump between two of them.
    let crowded = |image: &mut ProcessImage| move_getcpu(image, |old| old[b"time".as_slice()] + 4);
    refused(crowded, "cannot be led to this kernel's");
    fs::write(case.path("img/process.img"), &whole).expect("written");
    fs::write(case.path("go"), b"").expect("lets it end");
    assert_eq!(run(&["restore", image]).status.code(), Some(0));
}
