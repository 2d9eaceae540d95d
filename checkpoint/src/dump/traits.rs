//! Settings that only a process itself can ask for ([`crate::image::traits`]).

use super::DumpError;
use super::inside::next;
use crate::image::traits::{MAX_NODE, MAX_POLICIES, NODE_WORDS, PolicyImage, ProcessTraits, ThreadTraits};
use crate::image::{Backing, Vma, VmaFlags};
use crate::proc::{self, maps, status::Status};
use crate::tracee::{Call, Reply, Tracee};

/// linux/prctl.h.
const PR_GET_MDWE: i32 = 66;
const PR_GET_MEMORY_MERGE: i32 = 68;
const PR_GET_IO_FLUSHER: i32 = 58;
const PR_GET_SPECULATION_CTRL: u64 = 52;
/// arch/x86/include/uapi/asm/prctl.h.
const ARCH_GET_CPUID: u64 = 0x1011;
const ARCH_GET_XCOMP_PERM: u64 = 0x1022;
const MPOL_F_ADDR: u64 = 2;
/// `KEYCTL_GET_KEYRING_ID` of a thread's and a process' keyring: neither is made by that.
const KEYCTL_GET_KEYRING_ID: u64 = 0;
const KEYRINGS: [i32; 2] = [-1, -2];

fn prctl_may(option: i32) -> Call {
    Call::may("prctl", libc::SYS_prctl, [option as u64, 0, 0, 0, 0, 0])
}

/// In the order in which [`process`] takes the replies.
pub fn process_questions() -> Vec<Call> {
    vec![
        prctl_may(PR_GET_MDWE),
        prctl_may(PR_GET_MEMORY_MERGE),
        // read_ldt in arch/x86/kernel/ldt.c: 0 bytes if there is none.
        Call::may("modify_ldt", libc::SYS_modify_ldt, [0, 0, 8, 0, 0, 0]).output(1, 8),
        Call::may("arch_prctl", libc::SYS_arch_prctl, [ARCH_GET_XCOMP_PERM, 0, 0, 0, 0, 0]).output(1, 8),
    ]
}

/// In the order in which [`thread`] takes the replies.
pub fn thread_questions() -> Vec<Call> {
    let mut calls = vec![
        Call::may("personality", libc::SYS_personality, [u32::MAX.into(), 0, 0, 0, 0, 0]),
        Call::may("get_mempolicy", libc::SYS_get_mempolicy, [0, 0, MAX_NODE, 0, 0, 0])
            .output(0, 8)
            .output(1, NODE_WORDS * 8),
        prctl_may(libc::PR_GET_TSC).output(1, 8),
        Call::may("arch_prctl", libc::SYS_arch_prctl, [ARCH_GET_CPUID, 0, 0, 0, 0, 0]),
        prctl_may(libc::PR_MCE_KILL_GET),
        prctl_may(PR_GET_IO_FLUSHER),
    ];
    calls.extend(
        (0..3).map(|which| Call::may("prctl", libc::SYS_prctl, [PR_GET_SPECULATION_CTRL, which, 0, 0, 0, 0])),
    );
    calls.extend(KEYRINGS.map(|which| {
        let args = [KEYCTL_GET_KEYRING_ID, which as u64, 0, 0, 0, 0];
        Call::may("keyctl", libc::SYS_keyctl, args)
    }));
    calls
}

/// The traits that the leader has told.
pub fn process(replies: &mut impl Iterator<Item = Reply>) -> ProcessTraits {
    let mut value = || next(replies).value;
    let (mdwe, memory_merge, ldt) = (value().max(0) as u32, value() == 1, value());
    let extended = next(replies);
    let extended_states = if extended.value == 0 { word(extended.answer(0)) } else { 0 };
    ProcessTraits { mdwe, memory_merge, has_ldt: ldt > 0, extended_states, ..ProcessTraits::default() }
}

/// The traits of a thread, and whether it has keys of its own.
pub fn thread(replies: &mut impl Iterator<Item = Reply>) -> (ThreadTraits, bool) {
    let personality = next(replies).value.max(0) as u32;
    let policy = next(replies);
    let policy =
        if policy.value == 0 { policy_of(policy.answer(0), policy.answer(1)) } else { Default::default() };
    let tsc = next(replies);
    let tsc_faults = tsc.value == 0 && word(tsc.answer(0)) as i32 == libc::PR_TSC_SIGSEGV;
    let mut value = || next(replies).value;
    let cpuid_faults = value() == 0;
    let memory_failure = u8::try_from(value()).unwrap_or(libc::PR_MCE_KILL_DEFAULT as u8);
    let io_flusher = value() == 1;
    let speculation = std::array::from_fn(|_| u8::try_from(value()).unwrap_or(0));
    let has_keyring = KEYRINGS.map(|_| value()).iter().any(|&serial| serial > 0);
    let traits = ThreadTraits {
        personality,
        policy,
        tsc_faults,
        cpuid_faults,
        speculation,
        memory_failure,
        io_flusher,
    };
    (traits, has_keyring)
}

fn policy_of(mode: &[u8], nodes: &[u8]) -> PolicyImage {
    let mut words = [0; NODE_WORDS];
    words.iter_mut().zip(nodes.chunks_exact(8)).for_each(|(to, from)| *to = word(from));
    PolicyImage { mode: word(mode) as u32, nodes: words }
}

/// Mappings that have a policy.
fn with_policies(vmas: &[Vma]) -> impl Iterator<Item = &Vma> {
    vmas.iter()
        .filter(|vma| !matches!(vma.backing, Backing::Vdso | Backing::Vvar | Backing::Vsyscall))
        .filter(|vma| !vma.flags.intersects(VmaFlags::IO | VmaFlags::PFNMAP))
}

fn policy_at(vma: &Vma) -> [u64; 6] {
    [0, 0, 0, vma.start, MPOL_F_ADDR, 0]
}

/// In the order in which [`policies`] takes the replies.
pub fn policy_questions(vmas: &[Vma]) -> Vec<Call> {
    let mode = |vma| Call::may("get_mempolicy", libc::SYS_get_mempolicy, policy_at(vma)).output(0, 8);
    with_policies(vmas).map(mode).collect()
}

/// The policies of mappings, where they are others than the leader's own.
pub fn policies(
    tracee: &mut Tracee,
    vmas: &[Vma],
    modes: &[Reply],
    leaders: &PolicyImage,
) -> Result<Vec<(u64, u64, PolicyImage)>, DumpError> {
    let others: Vec<&Vma> = with_policies(vmas)
        .zip(modes)
        .filter(|(_, reply)| reply.value == 0 && (word(reply.answer(0)) != 0 || leaders.mode != 0))
        .map(|(vma, _)| vma)
        .take(MAX_POLICIES)
        .collect();
    if others.is_empty() {
        return Ok(Vec::new());
    }
    let whole = |vma: &&Vma| {
        let [_, _, _, addr, flags, _] = policy_at(vma);
        let args = [0, 0, MAX_NODE, addr, flags, 0];
        Call::may("get_mempolicy", libc::SYS_get_mempolicy, args).output(0, 8).output(1, NODE_WORDS * 8)
    };
    let replies = tracee.must_all(0, &others.iter().map(whole).collect::<Vec<Call>>())?;
    let found = others.iter().zip(&replies).filter(|(_, reply)| reply.value == 0);
    let found = found.map(|(vma, reply)| (vma.start, vma.end, policy_of(reply.answer(0), reply.answer(1))));
    Ok(found.filter(|(_, _, policy)| policy != leaders).collect())
}

/// What mlockall(2) has said of the mappings to come: the stub is one of them.
pub fn lock_future(tracee: &Tracee, vmas: &[Vma], status: &Status) -> Result<u32, DumpError> {
    let pid = tracee.pid();
    let Some((stub, length)) = tracee.stub_range() else { return Ok(0) };
    let locked = vmas.iter().filter(|vma| vma.flags.contains(VmaFlags::LOCKED));
    let known: u64 = locked.map(|vma| (vma.end - vma.start) >> 10).sum();
    if status.decimal("VmLck").unwrap_or(0) < known + (length >> 10) {
        // The usual case: the long list is not read again.
        return Ok(0);
    }
    let smaps = proc::read(pid, "smaps").map_err(|source| DumpError::Proc { what: "smaps", pid, source })?;
    let of_stub = maps::parse(&smaps).into_iter().find(|vma| vma.start <= stub && stub < vma.end);
    let flags = of_stub.map_or(VmaFlags::empty(), |vma| vma.flags);
    Ok(match (flags.contains(VmaFlags::LOCKED), flags.contains(VmaFlags::LOCKONFAULT)) {
        (false, _) => 0,
        (true, false) => libc::MCL_FUTURE as u32,
        (true, true) => (libc::MCL_FUTURE | libc::MCL_ONFAULT) as u32,
    })
}

/// What `/proc` tells.
pub fn from_outside(pid: i32, traits: &mut ProcessTraits) {
    let text = |name| String::from_utf8_lossy(&proc::read(pid, name).unwrap_or_default()).trim().to_string();
    traits.cgroups = proc::read(pid, "cgroup").unwrap_or_default();
    traits.login_uid = text("loginuid").parse().unwrap_or(u32::MAX);
    // "/autogroup-N nice M".
    traits.session_nice =
        text("autogroup").rsplit(' ').next().and_then(|nice| nice.parse().ok()).unwrap_or(0);
}

fn word(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"))
}
