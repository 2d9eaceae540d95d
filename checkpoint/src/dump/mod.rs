//! Reading a frozen process: its state ([`read_state`]) and its memory ([`for_each_run`]).
//!
//! What `/proc` and ptrace tell is read from outside; what only the process itself can ask is read by
//! system calls run inside it. Nothing of it changes but the stub, which the freeze's end removes.

mod aio;
mod huge;
mod inside;
mod loader;
mod membarrier;
pub mod objects;
mod pages;
mod parents;
mod pipes;
mod reports;
pub(crate) mod seccomp;
mod shared;
pub mod sockets;
mod terminals;
pub(crate) mod timers;
mod traits;
pub mod tree;
mod waits;
mod write_back;

pub use pages::{Run, for_each_run, for_each_run_of_child};
pub use waits::Waits;

use crate::image::cpu::CpuImage;
use crate::image::reports::ReportImage;
use crate::image::shares::{ApartImage, SharesImage};
use crate::image::traits::ProcessTraits;
use crate::image::{
    CredsImage, FilesImage, FsImage, MiscImage, MmImage, ProcessImage, RseqImage, SignalsImage, ThreadImage,
    Vma,
};
use crate::inventory::{self, family::Family, spread};
use crate::proc::{self, status::Stat, status::Status};
use crate::sys::bpf::threads::{self, Thread};
use crate::sys::kcmp::{self, Shared};
use crate::sys::pagemap_scan::Scanner;
use crate::sys::{ptrace, sched};
use crate::tracee::{Tracee, TraceeError, install_stubs};
use inside::{Asked, Inside};
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

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
    /// What was written into a mapped file could not be kept.
    #[error("{path}, which process {pid} writes through memory, cannot be written back: {errno}")]
    WriteBack {
        /// The file's name, as the process has it.
        path: String,
        /// Which process.
        pid: i32,
        /// Why.
        errno: nix::errno::Errno,
    },
}

/// Reads everything but memory. Maps the stub if there is none.
///
/// `waits` is what was seen before the freeze.
pub fn read_state(tracee: &mut Tracee, waits: &mut Waits) -> Result<ProcessImage, DumpError> {
    let alone = Family::of(vec![tracee.pid()]);
    let seen = threads::of_many(tracee.process());
    let mut images = read_states_of(vec![(tracee, seen)], &alone, waits)?;
    Ok(images.remove(0))
}

/// The same of processes that are carried together as `family`, in its order; with what the kernel has told of
/// their threads since they stand.
fn read_states_of(
    tracees: Vec<(&mut Tracee, Option<Vec<Thread>>)>,
    family: &Family,
    waits: &mut Waits,
) -> Result<Vec<ProcessImage>, DumpError> {
    waits.frozen();
    let (mut tracees, seen): (Vec<&mut Tracee>, Vec<Option<Vec<Thread>>>) = tracees.into_iter().unzip();
    let outsides = read_outsides(&tracees, seen, family)?;
    install_stubs(&mut tracees)?;
    for tracee in &mut tracees {
        waits.of_restart_blocks(tracee)?;
    }
    let asked = tracees.iter_mut().zip(&outsides).map(|(tracee, outside)| Asked {
        tracee,
        vmas: &outside.vmas,
        seen: &outside.seen,
    });
    let answers = inside::ask(asked.collect())?;
    let of_one = |((tracee, outside), answers)| read_state_of(Inside::new(tracee, answers), outside, waits);
    tracees.into_iter().zip(outsides).zip(answers).map(of_one).collect()
}

/// The rest of one of them.
fn read_state_of(
    mut inside: Inside<'_>,
    outside: Outside,
    waits: &mut Waits,
) -> Result<ProcessImage, DumpError> {
    let Outside { vmas, files, creds_of_threads, plans, told, seen } = outside;
    let pid = inside.pid();
    let status = status(pid)?;
    let stat = Stat::read(pid).map_err(|source| DumpError::Proc { what: "stat", pid, source })?;
    let (lost, stopped_by) = (inside.lost_leader(), inside.group_stop());
    let misc = read_misc(&inside, &told)?;
    let of_system = told.traits.clone();
    let contexts = inside.contexts(&vmas)?;
    let mm = MmImage { contexts, ..read_mm(&inside, &stat, vmas, told)? };
    let mut timers = timers::read(&mut inside)?;
    // After the timers: what goes off meanwhile must not be lost.
    let pending = pending(pid, true)?;
    let creds = read_creds(pid, &status, inside.process.securebits)?;
    let (seccomp, filters) = seccomp::read(&inside, &status)?;
    let mut threads = read_threads(&mut inside, &creds, creds_of_threads, plans, waits)?;
    for (thread, filters) in threads.iter_mut().zip(filters) {
        thread.seccomp_filters = filters;
    }
    let of_threads = threads.iter().flat_map(|thread| &thread.pending);
    timers::disarm_gone_off(&mut timers, pending.iter().chain(of_threads));
    let fs = read_fs(pid, &status)?;
    read_apart(&inside, &fs, &seen, &mut threads)?;
    let traits = inside.traits_of_memory(&mm.vmas, &status, of_system)?;
    let (actions, limits) = (inside.process.actions, inside.process.limits);
    let number = |n| stat.number(n).ok_or(DumpError::Strange { what: "stat", pid });
    let mut image = ProcessImage {
        pid: status.inner_id().unwrap_or(pid),
        ppid: 0,
        zombies: Vec::new(),
        pgid: number(5)? as i32,
        sid: number(6)? as i32,
        exit_signal: number(38)? as i32,
        parent_tid: 0,
        mm,
        threads,
        signals: SignalsImage { actions, pending, stopped_by },
        timers,
        creds,
        seccomp,
        limits,
        fs,
        files,
        misc,
        shares: SharesImage::default(),
        report: ReportImage::default(),
        traits,
    };
    if let Some(leader) = lost {
        add_lost_leader(leader, &mut image)?;
    }
    Ok(image)
}

/// A leader that has ended before the others: it has a number, a name and a status.
fn add_lost_leader(pid: i32, image: &mut ProcessImage) -> Result<(), DumpError> {
    let strange = || DumpError::Strange { what: "stat of its leader", pid };
    let stat = Stat::read(pid).map_err(|source| DumpError::Proc { what: "stat", pid, source })?;
    let number = |n| stat.number(n).map(|number| number as i32).ok_or_else(strange);
    let first = image.threads.first().ok_or_else(strange)?;
    image.pid = status(pid)?.inner_id().unwrap_or(pid);
    // proc_pid_stat(5): exit_signal, exit_code.
    image.exit_signal = number(38)?;
    let leader = ThreadImage {
        tid: image.pid,
        regs: vec![0; first.regs.len()],
        wait_left_ns: None,
        sigmask: u64::MAX,
        rseq: RseqImage::default(),
        robust_list: (0, 0),
        clear_child_tid: 0,
        altstack: (0, libc::SS_DISABLE as u32, 0),
        pending: Vec::new(),
        comm: proc::read(pid, "comm").unwrap_or_default().trim_ascii_end().to_vec(),
        pdeathsig: 0,
        creds: None,
        apart: ApartImage { ended: Some(number(52)?), ..ApartImage::default() },
        ..first.clone()
    };
    image.threads.insert(0, leader);
    Ok(())
}

/// What of a frozen process is read from outside, before anything runs in it.
struct Outside {
    vmas: Vec<Vma>,
    files: FilesImage,
    /// Of the threads beside the leader, without their securebits; `None`: the leader's very ones.
    creds_of_threads: Vec<Option<CredsImage>>,
    /// Of all threads, the leader's first.
    plans: Vec<Plan>,
    told: Told,
    seen: Seen,
}

/// What the kernel tells of the threads by their TIDs, where there are many and it does.
type Seen = Arc<BTreeMap<i32, Thread>>;

/// What small files of `/proc` tell.
struct Told {
    guards: Vec<(u64, u64)>,
    auxv: Vec<u8>,
    exe: Vec<u8>,
    coredump_filter: u32,
    personality: u32,
    oom_score_adj: i32,
    /// Control groups, login, session.
    traits: ProcessTraits,
}

impl Told {
    fn read(pid: i32) -> Result<Told, DumpError> {
        let at = |what| move |source| DumpError::Proc { what, pid, source };
        let text = |name| {
            let bytes = proc::read(pid, name).unwrap_or_default();
            String::from_utf8_lossy(&bytes).trim().to_string()
        };
        let mut scanner = Scanner::open(pid).map_err(at("pagemap"))?;
        let guards = scanner.guards().map_err(|errno| DumpError::Memory { pid, addr: 0, errno })?;
        let mut exe = proc::link(pid, "exe").map_err(at("exe"))?;
        if let Some(path) = exe.strip_suffix(b" (deleted)") {
            exe = path.to_vec();
        }
        let mut of_system = ProcessTraits::default();
        traits::from_outside(pid, &mut of_system);
        Ok(Told {
            guards,
            auxv: proc::read(pid, "auxv").map_err(at("auxv"))?,
            exe,
            coredump_filter: u32::from_str_radix(&text("coredump_filter"), 16).unwrap_or(0x33),
            personality: u32::from_str_radix(&text("personality"), 16).unwrap_or(0),
            oom_score_adj: text("oom_score_adj").parse().unwrap_or(0),
            traits: of_system,
        })
    }
}

/// What is known of a frozen process: a tracee is its tracer thread's, and this is for all.
struct Known {
    seen: Seen,
    pid: i32,
    /// Threads beside the leader.
    tids: Vec<i32>,
    stub: Option<(u64, u64)>,
    /// What `maps` says.
    maps: Option<Vec<u8>>,
}

/// Of all of them, several at the same time.
fn read_outsides(
    tracees: &[&mut Tracee],
    seen: Vec<Option<Vec<Thread>>>,
    family: &Family,
) -> Result<Vec<Outside>, DumpError> {
    // A process that has the same memory as another one may have changed it since that stood still.
    let is_alone = tracees.len() == 1;
    let by_tid = |all: Vec<Thread>| Arc::new(all.into_iter().map(|thread| (thread.tid, thread)).collect());
    let known = |(tracee, seen): (&&mut Tracee, Option<Vec<Thread>>)| Known {
        seen: seen.map(by_tid).unwrap_or_default(),
        pid: tracee.pid(),
        tids: (1..tracee.thread_count()).map(|i| tracee.tid(i)).collect(),
        stub: tracee.stub_range(),
        maps: tracee.maps_at_freeze().filter(|_| is_alone).map(<[u8]>::to_vec),
    };
    let known: Vec<Known> = tracees.iter().zip(seen).map(known).collect();
    let places: Vec<usize> = (0..known.len()).collect();
    let read = |at: usize| read_outside(&known[at], family);
    spread::over(&places, read).into_iter().collect()
}

/// With many threads, what is read of them and of all is read at the same time.
fn read_outside(known: &Known, family: &Family) -> Result<Outside, DumpError> {
    let (pid, tids) = (known.pid, known.tids.as_slice());
    const MANY: usize = 16;
    let seen = known.seen.clone();
    let leader = seen.get(&pid);
    let creds = || {
        let of_thread = |&tid: &i32| {
            if leader.zip(seen.get(&tid)).is_some_and(|(leader, thread)| thread.is_like(leader)) {
                return Ok(None);
            }
            let status = Status::of_thread(pid, tid).map_err(|source| DumpError::Proc {
                what: "status",
                pid: tid,
                source,
            })?;
            read_creds(tid, &status, 0).map(Some)
        };
        let creds: Result<Vec<Option<CredsImage>>, DumpError> = tids.iter().map(of_thread).collect();
        (creds, std::iter::once(&pid).chain(tids).map(|&tid| Plan::of(tid)).collect::<Vec<Plan>>())
    };
    let vmas = || match &known.maps {
        Some(maps) => inventory::mappings::read_knowing(pid, maps),
        None => inventory::mappings::read(pid),
    };
    let (vmas, (creds_of_threads, plans)) = match tids.len() < MANY {
        true => (vmas(), creds()),
        false => std::thread::scope(|scope| {
            let creds = scope.spawn(creds);
            (vmas(), creds.join().expect("who reads does not panic"))
        }),
    };
    let mut vmas = vmas.map_err(|source| DumpError::Proc { what: "smaps", pid, source })?;
    if let Some((at, len)) = known.stub {
        // A stub that is there already is none of the process' mappings.
        vmas.retain(|vma| vma.end <= at || vma.start >= at + len);
    }
    timers::settle_timerfds(pid).map_err(|source| DumpError::Proc { what: "timerfds", pid, source })?;
    let files =
        inventory::files::read(pid, family).map_err(|source| DumpError::Proc { what: "fd", pid, source })?;
    Ok(Outside { vmas, files, creds_of_threads: creds_of_threads?, plans, told: Told::read(pid)?, seen })
}

fn status(pid: i32) -> Result<Status, DumpError> {
    Status::read(pid).map_err(|source| DumpError::Proc { what: "status", pid, source })
}

fn read_mm(inside: &Inside<'_>, stat: &Stat, vmas: Vec<Vma>, told: Told) -> Result<MmImage, DumpError> {
    let pid = inside.pid();
    let number = |n| stat.number(n).ok_or(DumpError::Strange { what: "stat", pid });
    // proc_pid_stat(5): the order of `struct prctl_mm_map` (linux/prctl.h).
    let layout = [
        number(26)?,
        number(27)?,
        number(45)?,
        number(46)?,
        number(47)?,
        inside.process.brk,
        number(28)?,
        number(48)?,
        number(49)?,
        number(50)?,
        number(51)?,
    ];
    let vdso = inside.read_vdso(&vmas);
    Ok(MmImage {
        vmas,
        guards: told.guards,
        layout,
        auxv: told.auxv,
        exe: told.exe,
        coredump_filter: told.coredump_filter,
        vdso,
        thp_disable: inside.process.thp_disable > 0,
        pkeys: inside.process.pkeys,
        contexts: Vec::new(),
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

/// Working directories of threads that have their own.
fn read_apart(
    inside: &Inside<'_>,
    leaders: &FsImage,
    seen: &Seen,
    threads: &mut [ThreadImage],
) -> Result<(), DumpError> {
    let leader = inside.pid();
    let of_kernel = |tid: i32| seen.get(&tid).map(|thread| thread.shares.fs);
    let of_leader = of_kernel(leader);
    // Of each that is not the leader's: who was found to have it first, outside and inside.
    let mut apart: Vec<(i32, i32)> = Vec::new();
    for (i, thread) in threads.iter_mut().enumerate().skip(1) {
        let tid = inside.original(i).tid;
        let same = |other: i32| kcmp::shared(other, tid, Shared::Fs) == Ok(true);
        let is_leaders = of_leader.is_some() && of_kernel(tid) == of_leader;
        if is_leaders || kcmp::shared(leader, tid, Shared::Fs) != Ok(false) {
            continue;
        }
        if let Some(&(_, first)) = apart.iter().find(|&&(first, _)| same(first)) {
            thread.apart.fs_with = first;
            continue;
        }
        let own = read_fs(tid, &status(tid)?)?;
        if own.root != leaders.root {
            return Err(TraceeError::Unfit { pid: leader, what: "a thread of it has another root" }.into());
        }
        thread.apart.fs = Some(own);
        apart.push((tid, thread.tid));
    }
    Ok(())
}

fn read_creds(pid: i32, status: &Status, securebits: u32) -> Result<CredsImage, DumpError> {
    let found = status.credentials(securebits);
    found.ok_or(DumpError::Strange { what: "status (ids, capabilities)", pid })
}

fn read_misc(inside: &Inside<'_>, told: &Told) -> Result<MiscImage, DumpError> {
    let pid = inside.pid();
    let uname = nix::sys::utsname::uname().map_err(|errno| DumpError::Proc {
        what: "uname",
        pid,
        source: errno.into(),
    })?;
    Ok(MiscImage {
        personality: told.personality,
        dumpable: inside.process.dumpable,
        child_subreaper: inside.process.child_subreaper,
        oom_score_adj: told.oom_score_adj,
        utsname: inside.process.utsname.clone(),
        clocks_ns: inside.process.clocks,
        kernel: uname.release().to_string_lossy().into_owned(),
        cpu: CpuImage::here().clone(),
        membarrier: inside.process.membarrier,
    })
}

fn read_threads(
    inside: &mut Inside<'_>,
    leaders: &CredsImage,
    of_others: Vec<Option<CredsImage>>,
    plans: Vec<Plan>,
    waits: &mut Waits,
) -> Result<Vec<ThreadImage>, DumpError> {
    let mut plans = plans.into_iter();
    let mut next = |inside: &mut Inside<'_>, i: usize| {
        // There is one of each.
        read_thread(inside, i, plans.next().unwrap_or_default(), waits)
    };
    let mut threads = vec![next(inside, 0)?];
    for (i, own) in (1..inside.thread_count()).zip(of_others) {
        let securebits = inside.threads[i].securebits;
        let creds = own.map(|own| CredsImage { securebits, ..own }).filter(|own| own != leaders);
        threads.push(ThreadImage { creds, ..next(inside, i)? });
    }
    Ok(threads)
}

/// When and where a thread runs, and the list of its robust locks: what any thread may ask of any other.
#[derive(Default)]
struct Plan {
    robust_list: (u64, u64),
    sched: Vec<u8>,
    affinity: Vec<u8>,
    ioprio: u32,
}

impl Plan {
    fn of(tid: i32) -> Plan {
        Plan {
            robust_list: sched::robust_list(tid).unwrap_or_default(),
            sched: sched::attributes(tid).unwrap_or_default(),
            affinity: sched::affinity(tid).unwrap_or_default(),
            ioprio: sched::io_priority(tid).unwrap_or(0),
        }
    }
}

fn read_thread(
    inside: &mut Inside<'_>,
    i: usize,
    plan: Plan,
    waits: &mut Waits,
) -> Result<ThreadImage, DumpError> {
    let found = inside.original(i).clone();
    let tid = found.tid;
    let (regs, wait_left_ns) = inside.interrupted_call(i, waits);
    let asked = &inside.threads[i];
    Ok(ThreadImage {
        tid: asked.tid,
        regs: regs.0.to_vec(),
        wait_left_ns,
        xstate: found.xstate,
        sigmask: found.sigmask,
        rseq: found.rseq,
        robust_list: plan.robust_list,
        clear_child_tid: asked.clear_child_tid,
        altstack: asked.altstack,
        pending: pending(tid, false)?,
        comm: asked.comm.clone(),
        sched: plan.sched,
        affinity: plan.affinity,
        timer_slack_ns: asked.timer_slack_ns,
        ioprio: plan.ioprio,
        pdeathsig: asked.pdeathsig,
        creds: None,
        seccomp_mode: asked.seccomp_mode,
        seccomp_filters: Vec::new(),
        apart: ApartImage::default(),
        traits: asked.traits.clone(),
    })
}

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
