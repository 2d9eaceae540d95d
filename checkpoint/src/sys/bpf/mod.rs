//! bpf(2): a look at all threads or mappings of a process in one go, by a program that the kernel runs for each
//! of them (Documentation/bpf/bpf_iterators.rst).
//!
//! What `/proc` tells of a thread costs a dozen files of some microseconds each, and once more when the
//! thread ends and they are forgotten. Where the kernel lets us (CAP_BPF and CAP_PERFMON, and its own types
//! in `/sys/kernel/btf`), its structures are read instead: 0.3 µs a thread. They only answer whether a
//! thread is *like its leader*; of one that is not, and on every other kernel, `/proc` is asked as ever.

mod btf;
pub mod mappings;
mod program;
pub mod threads;

use btf::Btf;
use nix::errno::Errno;
use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

static MAY: AtomicBool = AtomicBool::new(true);
static PROGRAMS: OnceLock<Option<Programs>> = OnceLock::new();

/// The programs, loaded once for all processes that are looked at.
struct Programs {
    of_threads: OwnedFd,
    /// How deep our PID namespace is.
    level: usize,
    of_mappings: Option<OwnedFd>,
}

/// Whether the kernel's structures may be looked at; where they may not, or cannot be, nothing is told, and `/proc` is
/// asked. For tests, and for who trusts that more.
pub fn allow(may: bool) {
    MAY.store(may, Ordering::Relaxed);
}

/// Whether the kernel lets itself be looked at. The first time that takes two milliseconds, for which the
/// programs are loaded.
pub fn prepare() -> bool {
    programs().is_some()
}

/// Whether that has been done with success.
pub fn is_prepared() -> bool {
    MAY.load(Ordering::Relaxed) && PROGRAMS.get().is_some_and(Option::is_some)
}

fn programs() -> Option<&'static Programs> {
    if !MAY.load(Ordering::Relaxed) {
        return None;
    }
    let load = || {
        let loaded = Programs::load();
        loaded
            .inspect_err(|why| tracing::debug!(%why, "no look at the kernel's structures: /proc is asked"))
            .ok()
    };
    PROGRAMS.get_or_init(load).as_ref()
}

impl Programs {
    fn load() -> io::Result<Programs> {
        let btf = Btf::of_kernel()?;
        let load = |code: Option<Vec<u64>>, function| {
            let target = btf.function(function).ok_or(Errno::ENOTSUP)?;
            load_iterator(&code.ok_or(Errno::ENOTSUP)?, target)
        };
        let of_threads = load(threads::program(&btf), "bpf_iter_task")?;
        let of_mappings = load(program::assemble_mapping(&btf), "bpf_iter_task_vma").ok();
        let level = threads::own_level(&of_threads)?;
        Ok(Programs { of_threads, level, of_mappings })
    }
}

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_ITER_CREATE: libc::c_int = 33;
const BPF_PROG_TYPE_TRACING: u32 = 26;
const BPF_TRACE_ITER: u32 = 28;
/// The program calls helpers that are for such programs only (`gpl_only`, kernel/trace/bpf_trace.c).
const LICENSE: &[u8] = b"Dual MIT/GPL\0";

/// The beginning of `union bpf_attr` for `BPF_PROG_LOAD`.
#[repr(C)]
#[derive(Default)]
struct Load {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
    prog_btf_fd: u32,
    func_info_rec_size: u32,
    func_info: u64,
    func_info_cnt: u32,
    line_info_rec_size: u32,
    line_info: u64,
    line_info_cnt: u32,
    attach_btf_id: u32,
    attach_prog_fd: u32,
    padding: u32,
}

/// The same for `BPF_LINK_CREATE`.
#[repr(C)]
struct Link {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
    iter_info: u64,
    iter_info_len: u32,
    padding: u32,
}

/// `union bpf_iter_link_info`, of tasks.
#[repr(C)]
struct OfTasks {
    tid: u32,
    pid: u32,
    pid_fd: u32,
    padding: u32,
}

/// The same for `BPF_ITER_CREATE`.
#[repr(C)]
struct Iter {
    link_fd: u32,
    flags: u32,
}

const _: () = assert!(size_of::<Load>() == 120 && size_of::<Link>() == 32 && size_of::<OfTasks>() == 16);

/// Loads a program that is run for each object of an iterator, `target` being the number of its function.
/// Nothing of the kernel's log is asked for, which the verifier would write at length.
fn load_iterator(code: &[u64], target: u32) -> Result<OwnedFd, Errno> {
    let attr = Load {
        prog_type: BPF_PROG_TYPE_TRACING,
        insn_cnt: code.len() as u32,
        insns: code.as_ptr() as u64,
        license: LICENSE.as_ptr() as u64,
        prog_name: *b"checkpoint\0\0\0\0\0\0",
        expected_attach_type: BPF_TRACE_ITER,
        attach_btf_id: target,
        ..Load::default()
    };
    descriptor(BPF_PROG_LOAD, &attr)
}

/// Whom a program is run for.
#[derive(Debug, Clone, Copy)]
enum Target {
    /// The threads of a process.
    Threads(i32),
    /// A task alone, by its TID, with all that it has.
    Task(i32),
}

/// Binds a program to what it is run for.
fn link(program: &OwnedFd, target: Target) -> Result<OwnedFd, Errno> {
    let tasks = match target {
        Target::Threads(pid) => OfTasks { tid: 0, pid: pid as u32, pid_fd: 0, padding: 0 },
        Target::Task(tid) => OfTasks { tid: tid as u32, pid: 0, pid_fd: 0, padding: 0 },
    };
    let attr = Link {
        prog_fd: program.as_raw_fd() as u32,
        target_fd: 0,
        attach_type: BPF_TRACE_ITER,
        flags: 0,
        iter_info: &raw const tasks as u64,
        iter_info_len: size_of::<OfTasks>() as u32,
        padding: 0,
    };
    descriptor(BPF_LINK_CREATE, &attr)
}

/// Rows of a process, at most: more than it can have threads or mappings.
const MAX_ROWS: usize = 1 << 20;

/// Runs a program for each object, and gives the rows of so many words that it has written. `follows`: whether a
/// row can come after another one; what comes when it cannot is not taken. The mappings of a single task
/// begin again after the last one has been read, without end (`task_vma_seq_get_next`,
/// kernel/bpf/task_iter.c).
fn rows<const WORDS: usize>(
    program: &OwnedFd,
    target: Target,
    follows: impl Fn(&[u64; WORDS], &[u64; WORDS]) -> bool,
) -> io::Result<Vec<[u64; WORDS]>> {
    // A read gives what fits into eight pages (`bpf_seq_read`, kernel/bpf/bpf_iter.c), and no part of a row.
    let mut bytes = vec![0; 32 << 10];
    let mut file = File::from(open_iterator(&link(program, target)?)?);
    let mut rows: Vec<[u64; WORDS]> = Vec::new();
    let word = |row: &[u8], n: usize| {
        row.get(n * 8..n * 8 + 8).map_or(0, |word| u64::from_ne_bytes(word.try_into().expect("eight bytes")))
    };
    loop {
        let length = match file.read(&mut bytes) {
            Ok(0) => return Ok(rows),
            Ok(length) => length,
            // EAGAIN: the kernel has looked at a million of objects, and goes on.
            Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => continue,
            Err(error) => return Err(error),
        };
        for row in bytes[..length].chunks_exact(WORDS * 8) {
            let row = std::array::from_fn(|n| word(row, n));
            if rows.len() >= MAX_ROWS || rows.last().is_some_and(|last| !follows(last, &row)) {
                return Ok(rows);
            }
            rows.push(row);
        }
    }
}

/// A file that holds what the program writes for each object, made as it is read.
fn open_iterator(link: &OwnedFd) -> Result<OwnedFd, Errno> {
    descriptor(BPF_ITER_CREATE, &Iter { link_fd: link.as_raw_fd() as u32, flags: 0 })
}

/// A command of bpf(2) that makes a descriptor, which is closed by execve(2).
fn descriptor<T>(command: libc::c_int, attr: &T) -> Result<OwnedFd, Errno> {
    // SAFETY: the kernel reads the structure, and what it points to, which outlive the call.
    let got = unsafe { libc::syscall(libc::SYS_bpf, command, attr as *const T, size_of::<T>()) };
    let fd = Errno::result(got)?;
    // SAFETY: a descriptor that was just made, and is nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}
