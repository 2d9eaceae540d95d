//! What a process or a thread is and that no file of it says: settings of prctl(2), arch_prctl(2) and the
//! memory policies.

use serde::{Deserialize, Serialize};

/// Words of a set of NUMA nodes: 1024 nodes, as many as x86-64 has (`MAX_NUMNODES`).
pub const NODE_WORDS: usize = 16;
/// `maxnode` of get_mempolicy(2) and set_mempolicy(2), which count one more.
pub const MAX_NODE: u64 = NODE_WORDS as u64 * 64 + 1;
/// Bound on the ranges of a process that have a memory policy of their own.
pub const MAX_POLICIES: usize = 1 << 20;

/// A memory policy (set_mempolicy(2)).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyImage {
    /// `MPOL_*`, with its flags; 0: the default.
    pub mode: u32,
    /// The nodes, one bit each, of the first word the lowest.
    pub nodes: [u64; NODE_WORDS],
}

/// What one thread has.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThreadTraits {
    /// `personality`.
    pub personality: u32,
    /// Its memory policy.
    pub policy: PolicyImage,
    /// Reading the time-stamp counter is an error (`PR_SET_TSC`).
    pub tsc_faults: bool,
    /// The cpuid instruction is an error (`ARCH_SET_CPUID`).
    pub cpuid_faults: bool,
    /// `PR_GET_SPECULATION_CTRL` of store bypass, indirect branches, and the flush of the L1 cache.
    pub speculation: [u8; 3],
    /// `PR_MCE_KILL_GET`.
    pub memory_failure: u8,
    /// `PR_GET_IO_FLUSHER`.
    pub io_flusher: bool,
}

/// What the whole process has.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessTraits {
    /// `PR_GET_MDWE`: no memory both written and executed.
    pub mdwe: u32,
    /// `PR_GET_MEMORY_MERGE`: all its memory may be merged with what is alike.
    pub memory_merge: bool,
    /// `PR_GET_THP_DISABLE` as it is: 3 leaves transparent huge pages to advised memory.
    pub thp_disable: u32,
    /// What will be mapped is locked (mlockall(2)): `MCL_FUTURE`, and `MCL_ONFAULT` with it; 0: it is not.
    pub lock_future: u32,
    /// Starts, ends and policies of mappings that have one.
    pub policies: Vec<(u64, u64, PolicyImage)>,
    /// It has a local descriptor table (modify_ldt(2)).
    pub has_ldt: bool,
    /// It has keys of its own: a process or thread keyring (keyrings(7)).
    pub has_keyring: bool,
    /// Parts of the extended state that it has asked for (`ARCH_GET_XCOMP_PERM`).
    pub extended_states: u64,
    /// `/proc/PID/cgroup` as it is.
    pub cgroups: Vec<u8>,
    /// `/proc/PID/loginuid`; the largest number: none.
    pub login_uid: u32,
    /// Nice value of its session (`/proc/PID/autogroup`).
    pub session_nice: i32,
}
