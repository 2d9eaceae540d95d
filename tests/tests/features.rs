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
const SHARED_MEMORY: &str = "checkpoint/tests/roundtrip/shared_memory.rs";
const HUGE_PAGES: &str = "checkpoint/tests/roundtrip/huge_pages.rs";
const AIO: &str = "checkpoint/tests/roundtrip/aio.rs";
const DUMPED_AIO: &str = "checkpoint/src/dump/aio.rs";
const IN_SUBMISSION: &str = "checkpoint/src/inventory/aio.rs";
const VDSO: &str = "checkpoint/tests/roundtrip/vdso.rs";
const CLOCKS: &str = "checkpoint/tests/roundtrip/clocks.rs";
const WAITS: &str = "checkpoint/tests/roundtrip/waits.rs";
const TERMINALS: &str = "checkpoint/tests/roundtrip/terminals.rs";
const SOCKETS: &str = "checkpoint/tests/roundtrip/sockets.rs";
const DESCRIBE: &str = "checkpoint/src/inventory/sockets/describe.rs";
const INET: &str = "checkpoint/tests/roundtrip/inet.rs";
const INTERNET: &str = "checkpoint/src/inventory/sockets/internet.rs";
const TREES: &str = "checkpoint/tests/roundtrip/trees.rs";
const TREES_MEMORY: &str = "checkpoint/tests/roundtrip/trees_memory.rs";
const SHARES: &str = "checkpoint/tests/roundtrip/shares.rs";
const TREES_EDGES: &str = "checkpoint/tests/roundtrip/trees_edges.rs";
const OPEN_FILES: &str = "checkpoint/tests/roundtrip/open_files.rs";
const WATCHING: &str = "checkpoint/tests/roundtrip/watching.rs";
const OUR_REFUSALS: &str = "checkpoint/tests/roundtrip/refusals.rs";
const OBJECTS: &str = "checkpoint/tests/roundtrip/objects.rs";
const OTHER_CPUS: &str = "checkpoint/tests/roundtrip/other_cpus.rs";
const JOBS: &str = "tests/tests/jobs.rs";
const MOVED_TREES: &str = "tests/tests/trees.rs";
const MOVED_MEMORY: &str = "tests/tests/shared_memory.rs";
const MAPPED_FILES: &str = "tests/tests/mapped_files.rs";
const PROGRAMS: &str = "tests/programs/list.rs";
const TERMINAL: &str = "tests/tests/terminal.rs";
const FILES: &str = "checkpoint/src/inventory/files.rs";
const LOCKS: &str = "checkpoint/src/inventory/locks.rs";
const MAPPINGS: &str = "checkpoint/src/inventory/mappings.rs";
const INVENTORY: &str = "checkpoint/src/inventory/mod.rs";
const TRAITS: &str = "checkpoint/src/inventory/traits.rs";
const INSTALL: &str = "checkpoint/src/tracee/install.rs";
const TREE: &str = "checkpoint/src/inventory/tree.rs";
const LIMITS: &str = "checkpoint/src/inventory/limits.rs";

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
        "anonymous memory shared by processes of a tree",
        Yes(OBJECTS, "memory_shared_by_a_tree"),
        Yes(MOVED_MEMORY, "memory_shared_by_a_subtree_stays_one"),
        "with a process outside the tree it is refused",
    ),
    ("private file mappings with copied pages", Yes(VICTIMS, "memory"), Yes(PROGRAMS, "rustc"), ""),
    ("guard pages, PROT_NONE, advice, names", Yes(VICTIMS, "memory"), Same, ""),
    (
        "shared writable file mappings",
        Yes(OBJECTS, "files_mapped_shared"),
        Yes(MAPPED_FILES, "files_mapped_shared_by_a_subtree_stay_one"),
        "with migrate they stay home's files: who reads them at home is about a second behind; with a host that is \
         lost, what was not written back is lost, as in a loss of power",
    ),
    (
        "shared writable file mappings that others map too, or have open to be written",
        Yes(OBJECTS, "files_mapped_shared"),
        Refused("checkpoint/src/inventory/mapped_files.rs", "a file mapped shared and writable, which"),
        "looked at when it moves, not while it is away",
    ),
    (
        "memfd: seals, modes, holes, descriptors and mappings",
        Yes(OBJECTS, "memfds"),
        Yes(MOVED_MEMORY, "memory_shared_by_a_users_subtree_stays_one"),
        "for `migrate`, of huge pages or with locks: refused",
    ),
    (
        "System V shared memory",
        Yes(OBJECTS, "system_v_segments"),
        Refused(MAPPINGS, "System V shared memory"),
        "a segment that is there still keeps what its other users wrote",
    ),
    (
        "explicit huge pages (hugetlb): private, shared, memfds, System V segments; of 2 MiB and 1 GiB",
        Yes(HUGE_PAGES, "huge_pages"),
        Refused(MAPPINGS, "explicit huge pages (hugetlb)"),
        "copy-on-write stays (`huge_pages_of_a_family`); too few free ones are an error (`too_few_huge_pages`); \
         transparent huge pages and their advice are carried by both",
    ),
    (
        "files of a mounted hugetlbfs",
        Refused(MAPPINGS, "a file of huge pages (hugetlbfs)"),
        Refused(MAPPINGS, "explicit huge pages (hugetlb)"),
        "",
    ),
    ("terabytes reserved, of which little is there", Yes(SHARED_MEMORY, "sparse_terabytes"), Same, ""),
    (
        "an address sanitizer's shadow memory",
        Yes(PROGRAMS, "lua_sanitized"),
        Yes(PROGRAMS, "lua_sanitized"),
        "",
    ),
    (
        "stacks that grow by themselves (MAP_GROWSDOWN), and the gap below them",
        Yes(VICTIMS, "stacks_that_grow"),
        Same,
        "",
    ),
    (
        "memory that may be dropped (MAP_DROPPABLE), advice on shared memory",
        Yes(SHARED_MEMORY, "droppable_and_advised"),
        Same,
        "",
    ),
    (
        "sealed memory (mseal)",
        Yes(SHARED_MEMORY, "sealed"),
        Refused(MAPPINGS, "sealed (mseal): it could not be given back"),
        "",
    ),
    (
        "protection keys, execute-only memory",
        Yes(VICTIMS, "protection_keys"),
        Same,
        "in a family too (`protection_keys_of_a_family`); a CPU without them refuses what uses them",
    ),
    (
        "mlockall of what is to come, PR_SET_MEMORY_MERGE, PR_SET_THP_DISABLE, memory policies (mbind, set_mempolicy)",
        Yes(VICTIMS, "settings"),
        Same,
        "a NUMA node that is not there is not asked for",
    ),
    (
        "no memory both written and executed (PR_SET_MDWE)",
        Yes(VICTIMS, "settings"),
        Refused(TRAITS, "it forbids itself memory that becomes executable (PR_SET_MDWE)"),
        "",
    ),
    (
        "personality of each thread, PR_SET_TSC, cpuid faulting, speculation control, PR_MCE_KILL, PR_SET_IO_FLUSHER",
        Yes(VICTIMS, "settings"),
        Same,
        "",
    ),
    (
        "control groups, login UID, nice value of the session (autogroup)",
        Instead("entered where they are allowed and exist; else those of the command that restores"),
        Instead("those of the node that it runs on"),
        "",
    ),
    (
        "System V semaphores, message queues",
        Instead("stay in the kernel, as files stay on the disk"),
        Instead("stay at home"),
        "what is to be undone at the end (SEM_UNDO) no interface of the kernel tells: it is undone when the image has been made",
    ),
    (
        "POSIX message queues",
        Refused(FILES, "a POSIX message queue, {name}"),
        Refused(FILES, "a POSIX message queue, {name}"),
        "",
    ),
    (
        "a local descriptor table (modify_ldt)",
        Refused(TRAITS, "it has a local descriptor table (modify_ldt), which is not carried"),
        Refused(TRAITS, "it has a local descriptor table (modify_ldt), which is not carried"),
        "",
    ),
    (
        "process and thread keyrings",
        Refused(TRAITS, "it has keys of its own (a process or thread keyring), which are not carried"),
        Refused(TRAITS, "it has keys of its own (a process or thread keyring), which are not carried"),
        "the session keyring is that of the command that restores",
    ),
    (
        "system calls that a program handles itself (PR_SET_SYSCALL_USER_DISPATCH)",
        Refused(INSTALL, "it handles its own system calls (PR_SET_SYSCALL_USER_DISPATCH)"),
        Refused(INSTALL, "it handles its own system calls (PR_SET_SYSCALL_USER_DISPATCH)"),
        "",
    ),
    (
        "limits of address space or data that leave less than 136 KiB, and 256 bytes a thread",
        Refused(LIMITS, "are needed in it while it is saved"),
        Refused(LIMITS, "are needed in it while it is saved"),
        "",
    ),
    (
        "AMX tiles in use",
        Refused(TRAITS, "it has something in AMX tiles, which is not carried"),
        Refused(TRAITS, "it has something in AMX tiles, which is not carried"),
        "the permission to use them is asked for again",
    ),
    (
        "the program's own userfaultfd",
        Refused(MAPPINGS, "registered with the program's own userfaultfd"),
        Refused(MAPPINGS, "registered with the program's own userfaultfd"),
        "",
    ),
    (
        "asynchronous I/O contexts (io_setup), with events that nobody has taken",
        Yes(AIO, "contexts"),
        Refused(MAPPINGS, "an asynchronous I/O context"),
        "made for as many events as before; what counts against fs.aio-max-nr is the least number of requests for that",
    ),
    (
        "asynchronous I/O requests in flight",
        Refused(DUMPED_AIO, "an asynchronous I/O context with requests in flight"),
        Refused(MAPPINGS, "an asynchronous I/O context"),
        "what ends within 200 ms is waited for (`direct_requests_under_way`)",
    ),
    (
        "a thread that io_submit lets wait (a pipe or an eventfd that is read)",
        Refused(IN_SUBMISSION, "waits in io_submit(2): a stop would end its request with EINTR"),
        Refused(MAPPINGS, "an asynchronous I/O context"),
        "",
    ),
    ("io_uring", Refused(MAPPINGS, "a kernel object"), Refused(MAPPINGS, "a kernel object"), ""),
    ("threads, their names and TIDs", Yes(VICTIMS, "threads"), Yes(PROGRAMS, "java"), ""),
    (
        "registers: general, x87, SSE, AVX, AVX-512",
        Yes(VICTIMS, "threads"),
        Same,
        "laid out anew for a CPU that has it elsewhere; what is in use and missing there is named",
    ),
    (
        "registrations of membarrier(2)",
        Yes(VICTIMS, "registrations_for_barriers"),
        Same,
        "on kernels before 6.3 without those for the global expedited barrier",
    ),
    ("rseq, robust mutexes, futexes with waiters", Yes(VICTIMS, "threads"), Yes(PROGRAMS, "java"), ""),
    (
        "locks in memory that processes share, with waiters: plain, with priority inheritance, robust; conditions",
        Yes(VICTIMS, "locks_shared_by_processes"),
        Same,
        "",
    ),
    (
        "of each thread: policy (real time and deadline too), nice value, CPUs, I/O priority, timer slack",
        Yes(VICTIMS, "schedules_of_threads"),
        Same,
        "a guest may use all CPUs of its node; clamps of utilisation are not carried",
    ),
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
    (
        "CLOCK_MONOTONIC and CLOCK_BOOTTIME, after any time and on other machines",
        Yes(CLOCKS, "clocks_go_on_after_a_reboot"),
        Yes("migd/tests/guest_house.rs", "a_process_lives_in_its_house_as_at_home"),
        "by a time namespace; without CAP_SYS_ADMIN migckpt says by how much they jump, and lets none go back",
    ),
    (
        "processes in a time namespace",
        Yes(CLOCKS, "clocks_go_on"),
        Same,
        "refused: a family with more than one (other clocks)",
    ),
    ("interval timers, POSIX timers, timerfd", Yes(VICTIMS, "timers"), Same, ""),
    (
        "timers set to a time: of day, of a clock that goes on, told when the clock is set; alarms",
        Yes(VICTIMS, "timers_and_their_clocks"),
        Same,
        "a POSIX timer that wakes the machine takes a real-time clock there too",
    ),
    (
        "POSIX timers: overruns, signals not taken yet, ids with gaps, CPU time of threads, SIGEV_THREAD",
        Yes(VICTIMS, "timers_and_their_clocks"),
        Same,
        "overruns not of timers on CPU time, and on CLOCK_REALTIME only if set to a time of day",
    ),
    (
        "POSIX timers on the CPU time of another process",
        Refused("checkpoint/src/inventory/timers.rs", "a timer of it counts the CPU time of process"),
        Refused("checkpoint/src/inventory/timers.rs", "a timer of it counts the CPU time of process"),
        "carried with that process",
    ),
    (
        "interrupted system calls, with what is left of their time-outs",
        Yes(VICTIMS, "interrupted_calls"),
        Yes(JOBS, "sleep_and_pipes_go_on_after_a_move"),
        "time-outs of sockets (SO_RCVTIMEO) begin anew",
    ),
    (
        "waits until a time of every clock; for locks (flock, F_OFD_SETLKW); futex_waitv",
        Yes(VICTIMS, "waits_until_a_time_and_for_locks"),
        Same,
        "sleeps until a time of a clock of CPU time wait longer: such clocks begin anew; migrate refuses locks",
    ),
    (
        "handlers that interrupt them, SA_RESTART or not",
        Yes(WAITS, "handlers_in_interrupted_calls"),
        Same,
        "",
    ),
    (
        "regular files, positions, O_APPEND, directories",
        Yes(VICTIMS, "files"),
        Yes(PROGRAMS, "git"),
        "with migrate they stay open at home",
    ),
    (
        "the device number of files (`st_dev`)",
        Instead("the file systems' own"),
        Instead("the home view's while it is away: another one than at home"),
        "a program moved between two looks that it compares (cp, tar) takes the file for another",
    ),
    (
        "files unlinked, renamed or replaced, open and mapped; O_TMPFILE, removed directories",
        Yes(OBJECTS, "deleted_files"),
        Same,
        "holes kept; with other hard links refused by migckpt; with migrate they stay open at home",
    ),
    (
        "pipes",
        Yes(VICTIMS, "files"),
        Yes(JOBS, "sleep_and_pipes_go_on_after_a_move"),
        "migckpt: within the image, or as standard streams",
    ),
    (
        "pipes: packets, sizes, several readers and writers; FIFOs in every mode",
        Yes("checkpoint/tests/roundtrip/pipes.rs", "fifos_in_every_mode"),
        Same,
        "migckpt: a FIFO to a process outside is refused; with migrate they stay at home",
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
        "epoll: edge-triggered, one-shot, exclusive; on everything",
        Yes(WATCHING, "epolls_of_every_kind"),
        Same,
        "where something else of it was ready, an edge may be told once more",
    ),
    (
        "epoll: a target closed under its number, one epoll in several processes",
        Yes(WATCHING, "an_epoll_of_two_processes"),
        Refused(INVENTORY, "an epoll that watches a file which was closed as fd"),
        "",
    ),
    (
        "Unix sockets between processes of the image, with what is in their queues",
        Yes(SOCKETS, "pairs"),
        Refused(DESCRIBE, "Unix {kind} socket"),
        "SO_PEERCRED stays; not a connection that waits to be accepted and has data in it",
    ),
    (
        "Unix sockets: named, abstract, hidden, listening with a backlog, datagrams of senders that are gone",
        Yes(SOCKETS, "names_and_connections"),
        Refused(DESCRIBE, "Unix {kind} socket"),
        "",
    ),
    (
        "descriptors and credentials in flight",
        Yes(SOCKETS, "descriptors_in_flight"),
        Refused(DESCRIBE, "Unix {kind} socket"),
        "",
    ),
    (
        "Unix sockets to other processes",
        Refused("checkpoint/src/inventory/sockets/mod.rs", "connected to {}"),
        Refused(DESCRIBE, "Unix {kind} socket"),
        "",
    ),
    (
        "UDP over loopback: bound, connected, datagrams with their senders, TTL, TOS and destinations",
        Yes(INET, "udp"),
        Refused(DESCRIBE, "{name} socket bound to {local}"),
        "a sender may be anybody, and gone; not what was sent to many (multicast, broadcast)",
    ),
    (
        "TCP sockets that listen, or are only bound",
        Yes(INET, "listeners"),
        Refused(DESCRIBE, "TCP socket listening on {local}"),
        "an address that is taken at the restore is named, and by whom",
    ),
    (
        "TCP connections within the tree, over loopback: data in both directions, ends shut and closed",
        Yes(INET, "connections"),
        Refused(DESCRIBE, "established TCP connection to {remote}"),
        "what is on its way behind a full queue needs CAP_NET_ADMIN",
    ),
    (
        "TCP: connections that wait to be accepted, in their order; options",
        Yes(INET, "waiting_and_options"),
        Refused(DESCRIBE, "established TCP connection to {remote}"),
        "not one that has data in it already",
    ),
    (
        "TCP and UDP to other processes, or not over loopback",
        Refused(INTERNET, "connected to {remote}"),
        Refused(DESCRIBE, "established TCP connection to {remote}"),
        "refused too: TLS of the kernel, signed segments, memberships of multicast groups, UDP_CORK, UDP_ENCAP, errors to be told",
    ),
    ("other sockets", Refused(DESCRIBE, "socket"), Refused(DESCRIBE, "socket"), ""),
    (
        "locks: flock, open file description locks",
        Yes(OPEN_FILES, "locks_and_leases"),
        Same,
        "migckpt: taken again, or refused if somebody else has them; with migrate they stay at home",
    ),
    (
        "POSIX locks, leases",
        Yes(OPEN_FILES, "locks_and_leases"),
        Refused(LOCKS, "which cannot be held for it at home"),
        "",
    ),
    (
        "O_PATH descriptors",
        Yes(WATCHING, "files_of_proc_and_places"),
        Refused(INVENTORY, "an O_PATH descriptor"),
        "of a deleted file: refused",
    ),
    (
        "O_ASYNC, F_SETOWN, F_SETSIG",
        Yes(OPEN_FILES, "owners_are_signalled"),
        Refused(INVENTORY, "signal-driven (F_SETOWN, O_ASYNC)"),
        "",
    ),
    (
        "files of /proc",
        Yes(WATCHING, "files_of_proc_and_places"),
        Refused(INVENTORY, "a file of the process file system"),
        "of the system, and of processes in the image",
    ),
    (
        "pseudo-terminals with both sides in the tree: modes, size, what waits, packet mode",
        Yes(TERMINALS, "a_pair_with_all_that_waits_in_it"),
        Refused(INVENTORY, "the master side of a pseudo-terminal"),
        "under the same number, or not at all",
    ),
    (
        "a session on such a terminal: controlling terminal, foreground group, /dev/tty",
        Yes(TERMINALS, "a_session_with_a_job_in_the_foreground"),
        Refused(INVENTORY, "the master side of a pseudo-terminal"),
        "",
    ),
    (
        "script(1) around a shell with job control",
        Yes(TERMINALS, "a_shell_inside_script"),
        Refused(INVENTORY, "the master side of a pseudo-terminal"),
        "",
    ),
    (
        "tmux: server, client, shells",
        Yes(TERMINALS, "tmux_with_client_and_shells"),
        Refused(INVENTORY, "the master side of a pseudo-terminal"),
        "",
    ),
    (
        "a pseudo-terminal that others have too",
        Refused("checkpoint/src/inventory/terminals.rs", "which process {pid} ({comm}) has too"),
        Refused(INVENTORY, "the master side of a pseudo-terminal"),
        "",
    ),
    (
        "inotify",
        Yes(WATCHING, "inotify"),
        Refused(INVENTORY, "a kernel object of type inotify"),
        "with unread events, or on a file without a name: refused",
    ),
    (
        "pidfds",
        Yes(WATCHING, "pidfds"),
        Refused(INVENTORY, "a kernel object of type pidfd"),
        "of processes in the image, and of those that have ended",
    ),
    (
        "fanotify and the like",
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
        Yes(VICTIMS, "credentials_of_threads"),
        Refused(TREE, "has other credentials than the process"),
        "",
    ),
    (
        "seccomp filters, of threads too; strict mode",
        Yes(VICTIMS, "seccomp_filters"),
        Refused(TREE, "it has a seccomp filter of its own"),
        "one that asks a supervisor is a blocker",
    ),
    (
        "the vDSO of a kernel of another build",
        Yes(VDSO, "an_image_of_another_kernel"),
        Refused("checkpoint/src/restore/vdso.rs", "the vDSO of this kernel is another one than that"),
        "a copy of the old one leads to this kernel's; refused: a thread that stood in it",
    ),
    (
        "a CPU that lacks what the program was told of (cpuid, AT_HWCAP2)",
        Yes(OTHER_CPUS, "a_cpu_that_lacks_instructions"),
        Same,
        "refused, by the features' names; `--other-cpu` restores it nevertheless; the way home is always open",
    ),
    (
        "threads with a directory and umask of their own (unshare)",
        Yes(SHARES, "threads_with_directories_of_their_own"),
        Refused(TREE, "has a working directory of its own (unshare)"),
        "",
    ),
    (
        "threads with a descriptor table of their own (unshare)",
        Refused(TREE, "has a descriptor table of its own (unshare)"),
        Refused(TREE, "has a descriptor table of its own (unshare)"),
        "",
    ),
    (
        "processes that share memory, descriptors, directory, signal actions (clone)",
        Yes(SHARES, "processes_that_share"),
        Refused(TREE, "it shares {} with"),
        "with a process outside the tree it is refused, and where neither parent nor sibling shares it",
    ),
    (
        "threads in a namespace of their own (unshare, setns)",
        Refused(TREE, "has left the {name} namespace of its process"),
        Refused(TREE, "has left the {name} namespace of its process"),
        "",
    ),
    ("32-bit programs", Refused(TREE, "it is a 32-bit program"), Refused(TREE, "it is a 32-bit program"), ""),
    ("containers", Refused(TREE, "namespace (a container?)"), Refused(TREE, "namespace (a container?)"), ""),
    (
        "another root (chroot)",
        Yes(OPEN_FILES, "another_root"),
        Refused(TREE, "its root is {} (chroot)"),
        "migckpt: not beside Unix sockets with names in the file system, nor one that processes share (CLONE_FS)",
    ),
    (
        "children, PIDs of a whole tree",
        Yes(TREES, "a_tree_with_one_of_everything"),
        Yes(MOVED_TREES, "children_that_compute_go_out_and_come_home"),
        "migckpt dump --tree; migrate moves a process with its descendants",
    ),
    (
        "sessions, process groups",
        Yes(TREES, "a_tree_with_one_of_everything"),
        Instead("the deputy stays in its own"),
        "one whose leader is gone is made by a temporary process with its number",
    ),
    (
        "stopped and ended children",
        Yes(TREES, "a_tree_with_one_of_everything"),
        Yes(MOVED_TREES, "a_family_with_one_of_everything"),
        "",
    ),
    (
        "stops of children that their parent has heard of, or not yet",
        Yes("checkpoint/tests/roundtrip/reports.rs", "stops_that_are_told_and_untold"),
        Instead("the deputies' are told at home"),
        "",
    ),
    (
        "a leader that has ended before the other threads (pthread_exit)",
        Yes(SHARES, "a_leader_that_has_ended"),
        Refused(TREE, "has ended, and the others run on"),
        "",
    ),
    (
        "vfork in progress",
        Yes(TREES_EDGES, "a_vfork_is_waited_for"),
        Refused(TREE, "is in vfork(2), until its child runs another program or ends"),
        "its child has two seconds to run another program; then it is refused by the same words",
    ),
    (
        "open files and positions shared between processes",
        Yes(TREES, "a_tree_with_one_of_everything"),
        Yes(MOVED_TREES, "a_family_with_one_of_everything"),
        "with migrate they stay open at home",
    ),
    (
        "shells with pipelines and jobs, make -j4",
        Yes(TREES, "make_with_four_jobs"),
        Yes(MOVED_TREES, "make_with_four_jobs"),
        "with migrate they come home for each fork and exec",
    ),
    (
        "memory shared copy-on-write between parent and child",
        Yes(TREES_MEMORY, "copy_on_write_stays_shared"),
        Instead("carried, each with a copy of its own"),
        "in the image once",
    ),
    (
        "images that lie",
        Yes("checkpoint/tests/roundtrip/hostile.rs", "images_that_lie"),
        Same,
        "an error that says why, no process, no socket's name and no System V segment left",
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
