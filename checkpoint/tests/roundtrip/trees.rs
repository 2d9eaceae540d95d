//! Processes with their descendants.

use super::harness::{Case, can_run, exists, installed, migckpt, run};
use super::programs::same_output_with;
use std::fs;
use std::time::{Duration, Instant};

const TREE: &[&str] = &["--tree"];

/// Makes a tree with one of everything, says that it is `ready`, waits for `go`, and looks whether all
/// is as it was. What differs is printed.
const FAMILY: &str = include_str!("../../../tests/programs/family.py");

/// Whether it comes true within some seconds.
fn soon(is_so: impl Fn() -> bool) -> bool {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !is_so() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

#[test]
fn a_tree_with_one_of_everything() {
    if !can_run("a tree") {
        return;
    }
    let case = Case::new();
    let mut running = case.start("python3", &["-c", FAMILY]);
    case.await_file("ready");
    let (pid, image) = (running.pid().to_string(), case.path("img"));
    let image = image.to_str().expect("UTF-8");
    let refused = run(&["dump", &pid, "--to", image]);
    assert_eq!(refused.status.code(), Some(4), "without --tree it is refused");
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(why.contains("child processes") && why.contains("--tree"), "{why}");
    let saved = run(&["dump", &pid, "--to", image, "--tree"]);
    assert!(saved.status.success(), "{}", String::from_utf8_lossy(&saved.stderr));
    assert!(!running.end().success());
    let shown = run(&["inspect", image, "--json"]);
    let shown: serde_json::Value = serde_json::from_slice(&shown.stdout).expect("JSON");
    let descendants = shown["descendants"].as_array().expect("a list");
    assert_eq!(descendants.len(), 9, "{descendants:#?}");
    for member in descendants {
        let pid = member["pid"].as_i64().expect("a PID") as i32;
        // Its parent's end has made it somebody else's, who has to take note of it.
        assert!(soon(|| !exists(pid)), "{member} is left");
    }
    assert!(run(&["verify", image]).status.success());
    let mut restored = case.restore();
    fs::write(case.path("restored"), "").expect("written");
    assert!(restored.end().success(), "{}", case.output());
    assert_eq!(case.output(), "as it was\n");
}

#[test]
fn a_tree_that_is_left_running() {
    if !can_run("a tree left running") {
        return;
    }
    let case = Case::new();
    let mut running = case.start("python3", &["-c", FAMILY]);
    case.await_file("ready");
    let (pid, image) = (running.pid().to_string(), case.path("img"));
    for _ in 0..5 {
        let _ = fs::remove_dir_all(&image);
        let to = image.to_str().expect("UTF-8");
        let saved = run(&["dump", &pid, "--to", to, "--tree", "--leave-running"]);
        assert!(saved.status.success(), "{}", String::from_utf8_lossy(&saved.stderr));
    }
    // The image cannot be used while its processes live, and nothing of them changes by that.
    let refused = run(&["restore", image.to_str().expect("UTF-8")]);
    assert_eq!(refused.status.code(), Some(4), "{}", String::from_utf8_lossy(&refused.stderr));
    fs::write(case.path("restored"), "").expect("written");
    assert!(running.end().success(), "{}", case.output());
    assert_eq!(case.output(), "as it was\n");
}

#[test]
fn a_failure_leaves_none_of_a_tree() {
    if !can_run("a tree's failure") {
        return;
    }
    let case = Case::new();
    let mut running = case.start("python3", &["-c", FAMILY]);
    case.await_file("ready");
    let (pid, image) = (running.pid().to_string(), case.path("img"));
    let image = image.to_str().expect("UTF-8");
    assert!(run(&["dump", &pid, "--to", image, "--tree"]).status.success());
    running.end();
    // A file that all of them have open is gone: found when the root's memory is there already.
    fs::rename(case.path("shared"), case.path("elsewhere")).expect("renamed");
    let failed = run(&["restore", image]);
    assert!(!failed.status.success());
    let shown: serde_json::Value =
        serde_json::from_slice(&run(&["inspect", image, "--json"]).stdout).expect("JSON");
    let descendants = shown["descendants"].as_array().expect("a list");
    for member in descendants {
        let pid = member["pid"].as_i64().expect("a PID") as i32;
        // Its parent's end has made it somebody else's, who has to take note of it.
        assert!(soon(|| !exists(pid)), "{member} is left");
    }
    assert!(!exists(pid.parse().expect("a PID")));
    // And the image is as good as before.
    fs::rename(case.path("elsewhere"), case.path("shared")).expect("renamed");
    let mut restored = case.restore();
    fs::write(case.path("restored"), "").expect("written");
    assert!(restored.end().success(), "{}", case.output());
    assert_eq!(case.output(), "as it was\n");
}

#[test]
fn whoever_would_stop_itself_is_refused() {
    if !can_run("a tree around migckpt") {
        return;
    }
    let case = Case::new();
    let script = format!("{} dump $$ --tree --to img; echo $?", migckpt().get_program().display());
    let mut running = case.start("sh", &["-c", &script]);
    assert!(running.end().success());
    assert!(
        case.output().contains("would stop itself") && case.output().ends_with("4\n"),
        "{}",
        case.output()
    );
}

#[test]
fn a_pipeline() {
    let script = "cat input input | sort -n -k 4 | awk '{ n[$5]++; s += $3 } END { for (k in n) print k, n[k]; print s }' | sort | tail -n 40";
    same_output_with(TREE, "a pipeline", "sh", &["-c", script], 200_000, 2);
}

#[test]
fn a_shell_with_jobs() {
    let script = "work() { i=0; while [ $i -lt $1 ]; do i=$((i + 1)); x=$(((x * 31 + i) % 65521)); done; echo $1 $x; return $2; }
        work 150000 3 > a & one=$!; work 200000 0 > b & two=$!; work 100 5 > c & three=$!
        wait $one; echo first $?; wait $two; echo second $?; wait $three; echo third $?
        cat a b c; for n in 1 2 3 4 5 6; do expr $n \\* 7; work 20000 0; done";
    same_output_with(TREE, "bash", "bash", &["-c", script], 10, 2);
}

#[test]
fn make_with_four_jobs() {
    if !installed("make -j4", "make") {
        return;
    }
    let makefile = "all: $(foreach n,1 2 3 4 5 6 7 8,o$n)\n\t@cat $^ | sort\n\
        o%:\n\t@awk 'BEGIN { x = $*; for (i = 0; i < 9000000; i++) x = (x * 48271) % 2147483647; print $*, x }' > $@\n";
    let script = "rm -f o? && printf '%s' \"$0\" > Makefile && make -s -j4 all";
    same_output_with(TREE, "make -j4", "sh", &["-c", script, makefile], 10, 2);
}
