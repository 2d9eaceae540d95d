//! Explicit huge pages (hugetlb). The pages are counted: a hole is none that was made, what processes had in
//! common is not there twice, and what fails gives all of them back.

use super::harness::{Case, can_run, descendants, exists, run, victim};
use super::huge_pool::Pool;
use super::victims::survives_saved;
use checkpoint::image::objects::{ObjectImage, ObjectKind};
use checkpoint::image::{Backing, ProcessImage, Vma, VmaFlags};
use checkpoint::inventory::{Rules, inspect};
use std::fs;

const KILOBYTES: u64 = 2048;

#[test]
fn huge_pages() {
    let test = "huge_pages";
    if !can_run(test) {
        return;
    }
    if let Some(pool) = Pool::reserve(test, KILOBYTES, 17) {
        survives_saved("huge-pages", 3, &[]);
        pool.await_free(17);
    }
}

#[test]
fn huge_pages_of_a_family() {
    let test = "huge_pages_of_a_family";
    if !can_run(test) {
        return;
    }
    // One copied more, and there are not enough.
    if let Some(pool) = Pool::reserve(test, KILOBYTES, 15) {
        survives_saved("huge-family", 3, &["--tree"]);
        pool.await_free(15);
    }
}

#[test]
fn huge_pages_of_a_gibibyte() {
    let test = "huge_pages_of_a_gibibyte";
    if !can_run(test) {
        return;
    }
    if let Some(pool) = Pool::reserve(test, 1 << 20, 1) {
        survives_saved("huge-gigabyte", 2, &[]);
        pool.await_free(1);
    }
}

/// A victim that is saved; its PID.
fn saved(case: &Case, name: &str) -> i32 {
    let dir = case.dir.path().to_str().expect("UTF-8");
    let mut running = case.start(victim().to_str().expect("UTF-8"), &[name, dir]);
    case.await_file("ready");
    case.dump(&mut running);
    running.pid()
}

/// A restore that must fail, and leave nothing.
fn refused(case: &Case, image: &str, pid: i32, what: &str) -> String {
    let path = case.path(image);
    let done = run(&["restore", "--dry-run", path.to_str().expect("UTF-8")]);
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(matches!(done.status.code(), Some(1 | 4)), "{what}: {}: {said}", done.status);
    assert!(said.contains("why:") && !said.contains("panicked"), "{what}: {said}");
    assert!(!exists(pid), "{what}: a process is left: {said}");
    said
}

fn goes_on(case: &Case, name: &str) {
    let mut restored = case.restore();
    fs::write(case.path("go"), b"").expect("lets it go on");
    assert!(restored.end().success(), "{}", case.output());
    assert!(case.output().contains(&format!("PASS {name}")), "{}", case.output());
}

#[test]
fn too_few_huge_pages() {
    let test = "too_few_huge_pages";
    if !can_run(test) {
        return;
    }
    let Some(pool) = Pool::reserve(test, KILOBYTES, 17) else { return };
    let case = Case::new();
    let pid = saved(&case, "huge-pages");
    pool.await_free(17);
    // Before anything is made; where an object is filled; where it is mapped.
    for free in [0, 9, 15, 16] {
        pool.set_free(free);
        let said = refused(&case, "img", pid, &format!("with {free}"));
        assert!(said.contains("huge pages of 2 MiB") && said.contains("vm.nr_hugepages"), "{free}: {said}");
        pool.await_free(free);
    }
    pool.set_free(17);
    goes_on(&case, "huge-pages");
    // Those that nothing was reserved for are missed when they are filled.
    let case = Case::new();
    let pid = saved(&case, "huge-unreserved");
    pool.set_free(2);
    let said = refused(&case, "img", pid, "unreserved");
    assert!(said.contains("more huge pages of 2 MiB than it gets"), "{said}");
    pool.await_free(2);
    pool.set_free(3);
    goes_on(&case, "huge-unreserved");
    pool.await_free(3);
}

/// Saving takes no page from those that are free: neither for a hole nor for what parents and children share.
#[test]
fn a_dump_makes_no_huge_pages() {
    let test = "a_dump_makes_no_huge_pages";
    if !can_run(test) {
        return;
    }
    for (name, pages) in [("huge-pages", 17), ("huge-family", 15)] {
        let Some(pool) = Pool::reserve(test, KILOBYTES, pages + 4) else { return };
        let case = Case::new();
        let dir = case.dir.path().to_str().expect("UTF-8");
        let mut running = case.start(victim().to_str().expect("UTF-8"), &[name, dir]);
        case.await_file("ready");
        let free = pool.free();
        let (image, pid) = (case.path("img"), running.pid().to_string());
        let what = ["dump", &pid, "--leave-running", "--tree", "--to", image.to_str().expect("UTF-8")];
        let done = run(&what);
        assert!(done.status.success(), "dump: {}", String::from_utf8_lossy(&done.stderr));
        assert_eq!(pool.free(), free, "{name}");
        fs::write(case.path("go"), b"").expect("lets it go on");
        assert!(running.end().success(), "{}", case.output());
        pool.await_free(pages + 4);
    }
}

/// For another node, and without those who share them, they are named.
#[test]
fn huge_pages_that_cannot_be_carried() {
    let test = "huge_pages_that_cannot_be_carried";
    if !can_run(test) {
        return;
    }
    let Some(pool) = Pool::reserve(test, KILOBYTES, 15) else { return };
    let case = Case::new();
    let dir = case.dir.path().to_str().expect("UTF-8");
    let running = case.start(victim().to_str().expect("UTF-8"), &["huge-family", dir]);
    case.await_file("ready");
    let named = |pid: i32, rules: Rules, what: &str| {
        let found = inspect(pid, rules).expect("looks").blockers;
        assert!(found.iter().any(|blocker| blocker.what.contains(what)), "{found:?} do not tell {what}");
    };
    named(running.pid(), Rules::Homed, ": explicit huge pages (hugetlb)");
    named(running.pid(), Rules::Homed, "a memfd of huge pages (MFD_HUGETLB)");
    let last = *descendants(running.pid()).last().expect("its grandchild");
    named(last, Rules::Standalone, "it shares anonymous memory with process");
    named(last, Rules::Standalone, "it shares a mapped file without a name with process");
    drop(running);
    pool.await_free(15);
}

type Lie = fn(&mut Vma);
type LieOfObject = fn(&mut ObjectImage);

fn first(images: &mut [ProcessImage], is_one: impl Fn(&Vma) -> bool) -> &mut Vma {
    images[0].mm.vmas.iter_mut().find(|vma| is_one(vma)).expect("the image has one")
}

const LIES: [(&str, Lie); 12] = [
    ("a gibibyte", |vma| vma.page_shift = 30),
    ("ordinary pages", |vma| vma.page_shift = 12),
    ("no pages", |vma| vma.page_shift = 0),
    ("more than an address has", |vma| vma.page_shift = 64),
    ("the largest number", |vma| vma.page_shift = u8::MAX),
    ("a size without huge pages", |vma| vma.flags.remove(VmaFlags::HUGETLB)),
    ("half a page", |vma| vma.end -= 4096),
    ("a page's second half", |vma| vma.start += 4096),
    ("shared by nobody", |vma| vma.shared = true),
    ("memory that is in no object", |vma| vma.backing = Backing::SharedAnon { id: 1, offset: 0 }),
    ("an object that is not there", |vma| {
        vma.backing = Backing::Object { key: (1, 1), offset: 0, may_write: true }
    }),
    ("the vDSO", |vma| vma.backing = Backing::Vdso),
];

const LIES_OF_OBJECTS: [(&str, LieOfObject); 7] = [
    ("ordinary pages", |object| object.page_shift = 12),
    ("a gibibyte", |object| object.page_shift = 30),
    ("no pages", |object| object.page_shift = 0),
    ("the largest number", |object| object.page_shift = u8::MAX),
    ("no length", |object| object.size = 0),
    ("more than there is", |object| object.size = i64::MAX as u64),
    ("a deleted file", |object| {
        object.kind = ObjectKind::Deleted { path: b"/tmp/x".to_vec(), temporary: None }
    }),
];

#[test]
fn huge_pages_that_lie() {
    let test = "huge_pages_that_lie";
    if !can_run(test) {
        return;
    }
    let Some(pool) = Pool::reserve(test, KILOBYTES, 17) else { return };
    let case = Case::new();
    let pid = saved(&case, "huge-pages");
    fs::create_dir(case.path("lie")).expect("made");
    pool.await_free(17);
    for (what, lie) in LIES {
        let private = |vma: &Vma| vma.is_huge() && vma.backing == Backing::Anon;
        case.rewrite("img", "lie", |images| lie(first(images, private)));
        refused(&case, "lie", pid, what);
        pool.await_free(17);
    }
    let enormous = |images: &mut Vec<ProcessImage>| {
        let vma = first(images, Vma::is_huge);
        vma.start = 1 << 30;
        vma.end = 1 << 44;
        images[0].mm.vmas.retain(|other| other.is_huge() && other.end == 1 << 44);
    };
    case.rewrite("img", "lie", enormous);
    refused(&case, "lie", pid, "more than there is");
    for (what, lie) in LIES_OF_OBJECTS {
        case.rewrite_with(
            "img",
            "lie",
            |_| (),
            |object| {
                if object.is_huge() {
                    lie(object);
                }
            },
        );
        refused(&case, "lie", pid, what);
        pool.await_free(17);
    }
    goes_on(&case, "huge-pages");
    pool.await_free(17);
}
