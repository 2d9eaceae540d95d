//! Reading a frozen process: its state ([`read_state`]) and its memory ([`for_each_run`]).
//!
//! What `/proc` and ptrace tell is read from outside; what only the process itself can ask is read by
//! system calls run inside it. Nothing of it changes but the stub, which the freeze's end removes.

mod inside;
mod pages;
mod pipes;
mod shared;
mod timers;
pub mod tree;

pub use pages::{Run, for_each_run};

use crate::image::{CredsImage, FsImage, MiscImage, MmImage, ProcessImage, SignalsImage, ThreadImage};
use crate::inventory;
use crate::proc::{self, status::Stat, status::Status};
use crate::sys::pagemap_scan::Scanner;
use crate::sys::{ptrace, sched};
use crate::tracee::{Tracee, TraceeError, arrange_restart};
use inside::Inside;
use std::io;

/// Why the state could not be read. The process is as it was.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// A traced process could not be handled.
    #[error(transparent)]
    Tracee(#[from] TraceeError),
    /// A file of `/proc` could not be read.
    #[error("reading {what} of process {pid}: {source}")]
    Proc {
        /// Which file.
        what: &'static str,
        /// Which process.
        pid: i32,
        /// Why.
        source: io::Error,
    },
    /// A file of `/proc` does not say what it should.
    #[error("process {pid}: {what} is not as expected on this kernel")]
    Strange {
        /// Which file.
        what: &'static str,
        /// Which process.
        pid: i32,
    },
    /// Memory could not be read.
    #[error("reading memory of process {pid} at {addr:#x}: {errno}")]
    Memory {
        /// Which process.
        pid: i32,
        /// Where.
        addr: u64,
        /// Why.
        errno: nix::errno::Errno,
    },
}

/// Reads everything but memory. Maps the stub if there is none.
pub fn read_state(tracee: &mut Tracee) -> Result<ProcessImage, DumpError> {
    let alone = [tracee.pid()];
    read_state_of(tracee, &alone)
}

/// The same of a process that is carried with a family, itself among it.
fn read_state_of(tracee: &mut Tracee, family: &[i32]) -> Result<ProcessImage, DumpError> {
    let pid = tracee.pid();
    let mut vmas =
        inventory::mappings::read(pid).map_err(|source| DumpError::Proc { what: "smaps", pid, source })?;
    if let Some((at, len)) = tracee.stub_range() {
        // A stub that is there already is none of the process' mappings.
        vmas.retain(|vma| vma.end <= at || vma.start >= at + len);
    }
    timers::settle_timerfds(pid).map_err(|source| DumpError::Proc { what: "timerfds", pid, source })?;
    let files =
        inventory::files::read(pid, family).map_err(|source| DumpError::Proc { what: "fd", pid, source })?;
    tracee.install_stub(&[])?;
    let status = status(pid)?;
    let stat = Stat::read(pid).map_err(|source| DumpError::Proc { what: "stat", pid, source })?;
    let pending = pending(pid, true)?;
    let mut inside = Inside::new(tracee);
    let mm = read_mm(&mut inside, &stat, vmas)?;
    let actions = inside.actions()?;
    let timers = timers::read(&mut inside)?;
    let creds = read_creds(&mut inside, &status)?;
    let misc = read_misc(&mut inside)?;
    let limits = inside.limits()?;
    let threads = read_threads(&mut inside)?;
    let number = |n| stat.number(n).ok_or(DumpError::Strange { what: "stat", pid });
    Ok(ProcessImage {
        pid: status.inner_id().unwrap_or(pid),
        ppid: 0,
        zombies: Vec::new(),
        pgid: number(5)? as i32,
        sid: number(6)? as i32,
        mm,
        threads,
        signals: SignalsImage { actions, pending, stopped_by: tracee.group_stop() },
        timers,
        creds,
        limits,
        fs: read_fs(pid, &status)?,
        files,
        misc,
    })
}

fn status(pid: i32) -> Result<Status, DumpError> {
    Status::read(pid).map_err(|source| DumpError::Proc { what: "status", pid, source })
}

fn read_mm(inside: &mut Inside<'_>, stat: &Stat, vmas: Vec<crate::image::Vma>) -> Result<MmImage, DumpError> {
    let pid = inside.pid();
    let at = |what| move |source| DumpError::Proc { what, pid, source };
    let number = |n| stat.number(n).ok_or(DumpError::Strange { what: "stat", pid });
    // proc_pid_stat(5): the order of `struct prctl_mm_map` (linux/prctl.h).
    let layout = [
        number(26)?,
        number(27)?,
        number(45)?,
        number(46)?,
        number(47)?,
        inside.brk()?,
        number(28)?,
        number(48)?,
        number(49)?,
        number(50)?,
        number(51)?,
    ];
    let filter = proc::read(pid, "coredump_filter").unwrap_or_default();
    let filter = String::from_utf8_lossy(&filter);
    let mut scanner = Scanner::open(pid).map_err(at("pagemap"))?;
    let guards = scanner.guards().map_err(|errno| DumpError::Memory { pid, addr: 0, errno })?;
    let mut exe = proc::link(pid, "exe").map_err(at("exe"))?;
    if let Some(path) = exe.strip_suffix(b" (deleted)") {
        exe = path.to_vec();
    }
    Ok(MmImage {
        vmas,
        guards,
        layout,
        auxv: proc::read(pid, "auxv").map_err(at("auxv"))?,
        exe,
        coredump_filter: u32::from_str_radix(filter.trim(), 16).unwrap_or(0x33),
        thp_disable: inside.prctl_value(libc::PR_GET_THP_DISABLE)? == 1,
    })
}

fn read_fs(pid: i32, status: &Status) -> Result<FsImage, DumpError> {
    let at = |what| move |source| DumpError::Proc { what, pid, source };
    let mut cwd = proc::link(pid, "cwd").map_err(at("cwd"))?;
    let mut cwd_deleted = false;
    if let Some(path) = cwd.strip_suffix(b" (deleted)")
        && std::fs::metadata(format!("/proc/{pid}/cwd")).is_ok_and(|meta| {
            use std::os::unix::fs::MetadataExt;
            meta.nlink() == 0
        })
    {
        cwd = path.to_vec();
        cwd_deleted = true;
    }
    let umask = status.line("Umask").and_then(|text| u32::from_str_radix(text, 8).ok());
    Ok(FsImage {
        cwd,
        cwd_deleted,
        root: proc::link(pid, "root").map_err(at("root"))?,
        umask: umask.ok_or(DumpError::Strange { what: "status (Umask)", pid })?,
    })
}

fn read_creds(inside: &mut Inside<'_>, status: &Status) -> Result<CredsImage, DumpError> {
    let pid = inside.pid();
    let four = |key| {
        <[u32; 4]>::try_from(status.numbers(key))
            .map_err(|_| DumpError::Strange { what: "status (ids)", pid })
    };
    let mask = |key| status.mask(key).ok_or(DumpError::Strange { what: "status (Cap)", pid });
    Ok(CredsImage {
        uids: four("Uid")?,
        gids: four("Gid")?,
        groups: status.numbers("Groups"),
        caps: [mask("CapInh")?, mask("CapPrm")?, mask("CapEff")?, mask("CapBnd")?, mask("CapAmb")?],
        securebits: inside.prctl_value(libc::PR_GET_SECUREBITS)? as u32,
        no_new_privs: status.decimal("NoNewPrivs") == Some(1),
    })
}

fn read_misc(inside: &mut Inside<'_>) -> Result<MiscImage, DumpError> {
    let pid = inside.pid();
    let text = |name| {
        let bytes = proc::read(pid, name).unwrap_or_default();
        String::from_utf8_lossy(&bytes).trim().to_string()
    };
    let uname = nix::sys::utsname::uname().map_err(|errno| DumpError::Proc {
        what: "uname",
        pid,
        source: errno.into(),
    })?;
    Ok(MiscImage {
        personality: u32::from_str_radix(&text("personality"), 16).unwrap_or(0),
        dumpable: inside.prctl_value(libc::PR_GET_DUMPABLE)? as u32,
        child_subreaper: inside.prctl_word(libc::PR_GET_CHILD_SUBREAPER)? as u32 != 0,
        oom_score_adj: text("oom_score_adj").parse().unwrap_or(0),
        utsname: inside.utsname()?,
        clocks_ns: inside.clocks()?,
        kernel: uname.release().to_string_lossy().into_owned(),
    })
}

fn read_threads(inside: &mut Inside<'_>) -> Result<Vec<ThreadImage>, DumpError> {
    (0..inside.thread_count()).map(|i| read_thread(inside, i)).collect()
}

fn read_thread(inside: &mut Inside<'_>, i: usize) -> Result<ThreadImage, DumpError> {
    let found = inside.original(i).clone();
    let tid = found.tid;
    let mut regs = found.regs;
    if regs.orig_rax() == libc::SYS_restart_syscall as u64
        && let Some(call) = inside.original_call(&regs)
    {
        regs.set_orig_rax(call as u64);
    }
    arrange_restart(&mut regs);
    let comm = proc::read(tid, "comm").unwrap_or_default();
    Ok(ThreadImage {
        tid: status(tid)?.inner_id().unwrap_or(tid),
        regs: regs.0.to_vec(),
        xstate: found.xstate,
        sigmask: found.sigmask,
        rseq: found.rseq,
        robust_list: sched::robust_list(tid).unwrap_or_default(),
        clear_child_tid: inside.thread_word(i, PR_GET_TID_ADDRESS)?,
        altstack: inside.altstack(i)?,
        pending: pending(tid, false)?,
        comm: comm.strip_suffix(b"\n").unwrap_or(&comm).to_vec(),
        sched: sched::attributes(tid).unwrap_or_default(),
        affinity: sched::affinity(tid).unwrap_or_default(),
        timer_slack_ns: inside.thread_value(i, libc::PR_GET_TIMERSLACK)? as u64,
        ioprio: sched::io_priority(tid).unwrap_or(0),
        pdeathsig: inside.thread_word(i, libc::PR_GET_PDEATHSIG)? as u32,
    })
}

/// `prctl(2)`: where the kernel clears and wakes at the thread's end.
const PR_GET_TID_ADDRESS: i32 = 40;

/// What is pending, oldest first.
fn pending(tid: i32, shared: bool) -> Result<Vec<Vec<u8>>, DumpError> {
    let mut out: Vec<Vec<u8>> = Vec::new();
    // Bounded by RLIMIT_SIGPENDING and by this.
    while out.len() < 65_536 {
        let batch = ptrace::peek_siginfo(tid, out.len() as u64, shared)
            .map_err(|errno| TraceeError::kernel("PTRACE_PEEKSIGINFO", tid, errno))?;
        if batch.is_empty() {
            break;
        }
        out.extend(batch.iter().map(|info| info.to_vec()));
    }
    Ok(out)
}
