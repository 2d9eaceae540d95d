//! The table of features, `docs/features.md`: each line names the test that proves it, or the words
//! with which it is refused. A test that is gone, or words that have changed, fail here.
//!
//! ```sh
//! UPDATE_FEATURES=1 cargo test --release -p systest --test features     # writes the table
//! ```

use std::fs;
use std::path::{Path, PathBuf};

/// How a feature fares with one of the two commands.
enum Cell {
    /// Carried: this test (file, function) proves it.
    Yes(&'static str, &'static str),
    /// Carried by the same code as with the other command; no test of its own.
    Same,
    /// Refused, in these words of the inventory's (file, words).
    Refused(&'static str, &'static str),
    /// What is done instead.
    Instead(&'static str),
}
use Cell::{Instead, Refused, Same, Yes};

const VICTIMS: &str = "checkpoint/tests/roundtrip/victims.rs";
const TREES: &str = "checkpoint/tests/roundtrip/trees.rs";
const OUR_REFUSALS: &str = "checkpoint/tests/roundtrip/refusals.rs";
const JOBS: &str = "tests/tests/jobs.rs";
const PROGRAMS: &str = "tests/tests/programs.rs";
const TERMINAL: &str = "tests/tests/terminal.rs";
const FILES: &str = "checkpoint/src/inventory/files.rs";
const LOCKS: &str = "checkpoint/src/inventory/locks.rs";
const MAPPINGS: &str = "checkpoint/src/inventory/mappings.rs";
const INVENTORY: &str = "checkpoint/src/inventory/mod.rs";
const TREE: &str = "checkpoint/src/inventory/tree.rs";

const CHILDREN: Cell = Refused(TREE, "only a process without children moves");

/// Feature, `migckpt`, `migrate`, note.
const FEATURES: &[(&str, Cell, Cell, &str)] = &[
    (
        "heap, stack, private anonymous memory",
        Yes(VICTIMS, "memory"),
        Yes(JOBS, "a_gibibyte_goes_out_and_comes_back"),
        "",
    ),
    ("shared anonymous memory within the process", Yes(VICTIMS, "memory"), Same, ""),
    (
        "shared anonymous memory with another process",
        Refused(MAPPINGS, "it shares anonymous memory with process"),
        Refused(MAPPINGS, "it shares anonymous memory with process"),
        "",
    ),
    ("private file mappings with copied pages", Yes(VICTIMS, "memory"), Yes(PROGRAMS, "rustc"), ""),
    ("guard pages, PROT_NONE, advice, names", Yes(VICTIMS, "memory"), Same, ""),
    (
        "shared writable file mappings",
        Refused(MAPPINGS, "a file mapped shared and writable"),
        Refused(MAPPINGS, "a file mapped shared and writable"),
        "",
    ),
    ("memfd", Refused(MAPPINGS, "a memfd"), Refused(MAPPINGS, "a memfd"), ""),
    (
        "System V shared memory",
        Refused(MAPPINGS, "System V shared memory"),
        Refused(MAPPINGS, "System V shared memory"),
        "",
    ),
    (
        "hugetlb",
        Refused(MAPPINGS, "explicit huge pages (hugetlb)"),
        Refused(MAPPINGS, "explicit huge pages (hugetlb)"),
        "transparent huge pages and their advice are carried",
    ),
    (
        "sealed memory (mseal)",
        Refused(MAPPINGS, "sealed (mseal): it could not be given back"),
        Refused(MAPPINGS, "sealed (mseal): it could not be given back"),
        "",
    ),
    (
        "the program's own userfaultfd",
        Refused(MAPPINGS, "registered with the program's own userfaultfd"),
        Refused(MAPPINGS, "registered with the program's own userfaultfd"),
        "",
    ),
    (
        "AIO contexts",
        Refused(MAPPINGS, "an asynchronous I/O context"),
        Refused(MAPPINGS, "an asynchronous I/O context"),
        "",
    ),
    ("io_uring", Refused(MAPPINGS, "a kernel object"), Refused(MAPPINGS, "a kernel object"), ""),
    ("threads, their names and TIDs", Yes(VICTIMS, "threads"), Yes(PROGRAMS, "java"), ""),
    (
        "registers: general, x87, SSE, AVX, AVX-512",
        Yes(VICTIMS, "threads"),
        Same,
        "another node must have the same extended state",
    ),
    ("rseq, robust mutexes, futexes with waiters", Yes(VICTIMS, "threads"), Yes(PROGRAMS, "java"), ""),
    (
        "signal actions, masks, pending signals with siginfo",
        Yes(VICTIMS, "signals"),
        Yes(JOBS, "signals_sent_at_home_reach_the_job_away"),
        "",
    ),
    ("a handler on an alternate stack", Yes(VICTIMS, "a_handler_on_an_alternate_stack"), Same, ""),
    (
        "signals to single threads",
        Yes(VICTIMS, "signals"),
        Yes(JOBS, "a_signal_to_a_single_thread_reaches_it_away"),
        "",
    ),
    ("interval timers, POSIX timers, timerfd", Yes(VICTIMS, "timers"), Same, ""),
    (
        "interrupted system calls",
        Yes(VICTIMS, "interrupted_calls"),
        Yes(JOBS, "sleep_and_pipes_go_on_after_a_move"),
        "relative time-outs of poll and futex begin anew",
    ),
    (
        "regular files, positions, O_APPEND, directories",
        Yes(VICTIMS, "files"),
        Yes(PROGRAMS, "git"),
        "with migrate they stay open at home",
    ),
    (
        "deleted files, open",
        Refused(INVENTORY, "a deleted file, "),
        Same,
        "with migrate they stay open at home",
    ),
    (
        "pipes",
        Yes(VICTIMS, "files"),
        Yes(JOBS, "sleep_and_pipes_go_on_after_a_move"),
        "migckpt: within the image, or as standard streams",
    ),
    (
        "the terminal",
        Instead("that of the command that restores"),
        Yes(TERMINAL, "keys_typed_reach_the_job"),
        "",
    ),
    (
        "Ctrl-C, Ctrl-Z, fg",
        Yes(OUR_REFUSALS, "a_stopped_process_stays_stopped"),
        Yes(TERMINAL, "ctrl_z_stops_and_fg_continues"),
        "",
    ),
    ("eventfd, epoll (nested too), signalfd", Yes(VICTIMS, "files"), Yes(PROGRAMS, "node"), ""),
    (
        "sockets",
        Refused("checkpoint/src/inventory/sockets.rs", "socket"),
        Refused("checkpoint/src/inventory/sockets.rs", "socket"),
        "named with both ends",
    ),
    ("locks held (POSIX, OFD, flock), leases", Refused(LOCKS, "lock"), Refused(LOCKS, "lock"), ""),
    ("O_PATH descriptors", Same, Refused(INVENTORY, "an O_PATH descriptor"), ""),
    (
        "O_ASYNC, F_SETOWN",
        Refused(INVENTORY, "signal-driven (F_SETOWN, O_ASYNC)"),
        Refused(INVENTORY, "signal-driven (F_SETOWN, O_ASYNC)"),
        "",
    ),
    (
        "files of /proc",
        Refused(FILES, "a file of the process file system"),
        Refused(FILES, "a file of the process file system"),
        "",
    ),
    (
        "masters of pseudo-terminals",
        Refused(FILES, "the master side of a pseudo-terminal"),
        Refused(FILES, "the master side of a pseudo-terminal"),
        "",
    ),
    (
        "inotify, fanotify, pidfds and the like",
        Refused(FILES, "a kernel object of type"),
        Refused(FILES, "a kernel object of type"),
        "",
    ),
    (
        "credentials, capabilities, limits, umask, directory",
        Yes(VICTIMS, "identity"),
        Yes(JOBS, "ends_are_reported_as_they_are_after_a_move"),
        "a guest has at most the capabilities that a user needs",
    ),
    (
        "threads with credentials of their own",
        Refused(TREE, "has other credentials than the process"),
        Refused(TREE, "has other credentials than the process"),
        "",
    ),
    (
        "seccomp filters",
        Refused(TREE, "it has a seccomp filter of its own"),
        Refused(TREE, "it has a seccomp filter of its own"),
        "",
    ),
    ("32-bit programs", Refused(TREE, "it is a 32-bit program"), Refused(TREE, "it is a 32-bit program"), ""),
    (
        "containers, chroot",
        Refused(TREE, "namespace (a container?)"),
        Refused(TREE, "namespace (a container?)"),
        "",
    ),
    (
        "children, PIDs of a whole tree",
        Yes(TREES, "a_tree_with_one_of_everything"),
        CHILDREN,
        "migckpt dump --tree",
    ),
    (
        "sessions, process groups",
        Yes(TREES, "a_tree_with_one_of_everything"),
        Instead("the deputy stays in its own"),
        "a group or session whose leader is gone is a blocker",
    ),
    ("stopped and ended children", Yes(TREES, "a_tree_with_one_of_everything"), CHILDREN, ""),
    (
        "open files and positions shared between processes",
        Yes(TREES, "a_tree_with_one_of_everything"),
        Same,
        "with migrate they are shared at home",
    ),
    (
        "shells with pipelines and jobs, make -j4",
        Yes(TREES, "make_with_four_jobs"),
        CHILDREN,
        "their leaves move",
    ),
    (
        "memory shared copy-on-write between parent and child",
        Instead("carried, each with a copy of its own"),
        CHILDREN,
        "",
    ),
    (
        "a dump that leaves the process running",
        Yes("checkpoint/tests/roundtrip/traceless.rs", "a_dump_leaves_no_trace"),
        Instead("does not apply"),
        "",
    ),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_path_buf()
}

fn source(file: &str) -> String {
    fs::read_to_string(root().join(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
}

fn text(cell: &Cell) -> String {
    match cell {
        Yes(file, test) => {
            assert!(source(file).contains(&format!("fn {test}()")), "there is no test {test} in {file}");
            format!("yes (`{test}`)")
        }
        Same => "yes, the same code".into(),
        Refused(file, words) => {
            assert!(source(file).contains(words), "nothing is refused with \"{words}\" in {file}");
            format!("refused: {}", words.trim().trim_end_matches(','))
        }
        Instead(what) => (*what).to_string(),
    }
}

#[test]
fn the_table_tells_the_truth() {
    let mut table = "# Features\n\nMade by `tests/tests/features.rs`, which fails if a test named here is gone or a refusal's words \
        have changed.\n\"The same code\": carried by what the other command's test proves; no test of its own.\n\n\
        | feature | `migckpt` | `migrate` | note |\n|---|---|---|---|\n"
        .to_string();
    for (feature, saved, moved, note) in FEATURES {
        table.push_str(&format!("| {feature} | {} | {} | {note} |\n", text(saved), text(moved)));
    }
    let path = root().join("docs/features.md");
    if std::env::var_os("UPDATE_FEATURES").is_some() {
        fs::write(&path, &table).expect("written");
    }
    assert!(
        fs::read_to_string(&path).unwrap_or_default() == table,
        "docs/features.md is not what the tests say; UPDATE_FEATURES=1 writes it"
    );
}
