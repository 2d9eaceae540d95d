//! Which system calls of a guest are not for its host node to answer.
//!
//! Away, a guest computes and uses files; what is left out here is native. Listed is what would
//! change who the guest is or whom it knows, what needs a process, descriptor or memory that cannot
//! come home yet, what acts on the whole machine, and what would silently give a wrong answer on
//! another node. The deputy keeps its own credentials, limits, nice value, scheduling policy, affinity
//! and personality, so these are changed at home too. What is done to a process of the same subtree is done
//! here, as it is here too. What a program finds only in memory (paths, structures) a filter cannot see.

/// When a call is told to the supervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// Always.
    Always,
    /// Unless any of these bits are set in the argument.
    UnlessBits(u8, u32),
    /// If the argument is one of these.
    In(u8, &'static [u32]),
    /// Unless the argument is the guest's own PID.
    UnlessSelf(u8),
    /// Unless the argument is 0 or the guest's own PID.
    UnlessSelfOrZero(u8),
    /// Unless the argument is this.
    UnlessIs(u8, u32),
    /// Unless the first argument is this (what the second one names) and the second is 0 or the
    /// guest's own PID.
    UnlessOwnProcess(u32),
    /// prlimit(2): of others, or if it sets one (a limit set here would be lost at homecoming).
    Prlimit,
    /// mmap(2): writable, shared, of a file.
    SharedWritable,
    /// ioctl(2): what asks the terminal, the file system or the block device behind a file.
    DeviceRequest,
}

/// What the supervisor does with a call it is told of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// Home: it is made there, natively.
    Retreat,
    /// getppid(2).
    ParentPid,
    /// getpgrp(2), or getpgid(2) of the first argument.
    ProcessGroup,
    /// getsid(2) of the first argument.
    Session,
    /// clone3(2): native for a thread, else [`What::Retreat`].
    Clone3,
    /// Native if the argument is one of the guest's threads (and, for [`When::UnlessOwnProcess`], names
    /// a thread at all), else [`What::Retreat`].
    OwnThread(u8),
    /// Native if the first argument is a process of the same subtree, else [`What::Retreat`].
    Relative,
    /// A request of a file: see [`super::device`].
    Ioctl,
}

/// One call.
#[derive(Debug, Clone, Copy)]
pub struct Rule {
    /// Its number (x86-64).
    pub nr: i64,
    /// Its name.
    pub name: &'static str,
    /// When the supervisor hears of it.
    pub when: When,
    /// And what it does.
    pub what: What,
}

/// Record and open-file-description locks, owners and signals of a file, leases and notices, sizes
/// of pipes, seals: 5 to 8 GETLK, SETLK, SETLKW, SETOWN; 10 SETSIG; 15 SETOWN_EX; 36 to 38 OFD locks;
/// 1024 to 1026 SETLEASE, GETLEASE, NOTIFY; 1031, 1032 SETPIPE_SZ, GETPIPE_SZ; 1033 ADD_SEALS.
const FCNTL: &[u32] = &[5, 6, 7, 8, 10, 15, 36, 37, 38, 1024, 1025, 1026, 1031, 1032, 1033];
/// What changes identity, rights or what a restore in the deputy does not carry: PDEATHSIG, DUMPABLE, KEEPCAPS, SECCOMP,
/// CAPBSET_DROP, TSC, SECUREBITS, MM, CHILD_SUBREAPER, NO_NEW_PRIVS, CAP_AMBIENT, SPECULATION,
/// IO_FLUSHER, SYSCALL_USER_DISPATCH, SCHED_CORE, MDWE, PTRACER.
const PRCTL: &[u32] = &[1, 4, 8, 22, 24, 26, 28, 35, 36, 38, 47, 53, 57, 59, 62, 65, 0x5961_6d61];
/// CPUID faulting, permission for large register state (AMX), shadow stacks.
const ARCH_PRCTL: &[u32] = &[0x1012, 0x1022, 0x1023, 0x1024, 0x1025, 0x5001, 0x5002, 0x5003, 0x5004, 0x5005];

// Not in the libc crate yet (include/uapi/asm-generic/unistd.h).
const SYS_MAP_SHADOW_STACK: i64 = 453;
const SYS_STATMOUNT: i64 = 457;
const SYS_LISTMOUNT: i64 = 458;
const SYS_LSM_SET_SELF_ATTR: i64 = 460;
const SYS_OPEN_TREE_ATTR: i64 = 467;
const SYS_FILE_GETATTR: i64 = 468;
const SYS_FILE_SETATTR: i64 = 469;

macro_rules! rules {
    ($($name:literal $nr:expr, $when:expr, $what:expr;)*) => {
        &[$(Rule { nr: $nr as i64, name: $name, when: $when, what: $what }),*]
    };
}

use What::{Clone3, Ioctl, OwnThread, ParentPid, ProcessGroup, Relative, Retreat, Session};
use When::{
    Always, DeviceRequest, In, Prlimit, SharedWritable, UnlessBits, UnlessIs, UnlessOwnProcess, UnlessSelf,
    UnlessSelfOrZero,
};

/// All of them, by rising number.
pub const RULES: &[Rule] = rules! {
    "mmap" libc::SYS_mmap, SharedWritable, Retreat;
    "ioctl" libc::SYS_ioctl, DeviceRequest, Ioctl;
    "pipe" libc::SYS_pipe, Always, Retreat;
    "shmget" libc::SYS_shmget, Always, Retreat;
    "shmat" libc::SYS_shmat, Always, Retreat;
    "shmctl" libc::SYS_shmctl, Always, Retreat;
    "socket" libc::SYS_socket, Always, Retreat;
    "socketpair" libc::SYS_socketpair, Always, Retreat;
    "clone" libc::SYS_clone, UnlessBits(0, libc::CLONE_THREAD as u32), Retreat;
    "fork" libc::SYS_fork, Always, Retreat;
    "vfork" libc::SYS_vfork, Always, Retreat;
    "execve" libc::SYS_execve, Always, Retreat;
    "kill" libc::SYS_kill, UnlessSelf(0), Relative;
    "semget" libc::SYS_semget, Always, Retreat;
    "semop" libc::SYS_semop, Always, Retreat;
    "semctl" libc::SYS_semctl, Always, Retreat;
    "shmdt" libc::SYS_shmdt, Always, Retreat;
    "msgget" libc::SYS_msgget, Always, Retreat;
    "msgsnd" libc::SYS_msgsnd, Always, Retreat;
    "msgrcv" libc::SYS_msgrcv, Always, Retreat;
    "msgctl" libc::SYS_msgctl, Always, Retreat;
    "fcntl" libc::SYS_fcntl, In(1, FCNTL), Retreat;
    "flock" libc::SYS_flock, Always, Retreat;
    "ptrace" libc::SYS_ptrace, Always, Retreat;
    "syslog" libc::SYS_syslog, Always, Retreat;
    "setuid" libc::SYS_setuid, Always, Retreat;
    "setgid" libc::SYS_setgid, Always, Retreat;
    "setpgid" libc::SYS_setpgid, Always, Retreat;
    "getppid" libc::SYS_getppid, Always, ParentPid;
    "getpgrp" libc::SYS_getpgrp, Always, ProcessGroup;
    "setsid" libc::SYS_setsid, Always, Retreat;
    "setreuid" libc::SYS_setreuid, Always, Retreat;
    "setregid" libc::SYS_setregid, Always, Retreat;
    "setgroups" libc::SYS_setgroups, Always, Retreat;
    "setresuid" libc::SYS_setresuid, Always, Retreat;
    "setresgid" libc::SYS_setresgid, Always, Retreat;
    "getpgid" libc::SYS_getpgid, Always, ProcessGroup;
    "setfsuid" libc::SYS_setfsuid, Always, Retreat;
    "setfsgid" libc::SYS_setfsgid, Always, Retreat;
    "getsid" libc::SYS_getsid, Always, Session;
    "capset" libc::SYS_capset, Always, Retreat;
    "rt_sigqueueinfo" libc::SYS_rt_sigqueueinfo, UnlessSelf(0), Relative;
    "personality" libc::SYS_personality, UnlessIs(0, u32::MAX), Retreat;
    "ustat" libc::SYS_ustat, Always, Retreat;
    "getpriority" libc::SYS_getpriority, UnlessOwnProcess(0), OwnThread(1);
    "setpriority" libc::SYS_setpriority, Always, Retreat;
    "sched_setparam" libc::SYS_sched_setparam, Always, Retreat;
    "sched_getparam" libc::SYS_sched_getparam, UnlessSelfOrZero(0), OwnThread(0);
    "sched_setscheduler" libc::SYS_sched_setscheduler, Always, Retreat;
    "sched_getscheduler" libc::SYS_sched_getscheduler, UnlessSelfOrZero(0), OwnThread(0);
    "sched_rr_get_interval" libc::SYS_sched_rr_get_interval, UnlessSelfOrZero(0), OwnThread(0);
    "vhangup" libc::SYS_vhangup, Always, Retreat;
    "modify_ldt" libc::SYS_modify_ldt, Always, Retreat;
    "pivot_root" libc::SYS_pivot_root, Always, Retreat;
    "prctl" libc::SYS_prctl, In(0, PRCTL), Retreat;
    "arch_prctl" libc::SYS_arch_prctl, In(0, ARCH_PRCTL), Retreat;
    "adjtimex" libc::SYS_adjtimex, Always, Retreat;
    "setrlimit" libc::SYS_setrlimit, Always, Retreat;
    "chroot" libc::SYS_chroot, Always, Retreat;
    "sync" libc::SYS_sync, Always, Retreat;
    "acct" libc::SYS_acct, Always, Retreat;
    "settimeofday" libc::SYS_settimeofday, Always, Retreat;
    "mount" libc::SYS_mount, Always, Retreat;
    "umount2" libc::SYS_umount2, Always, Retreat;
    "swapon" libc::SYS_swapon, Always, Retreat;
    "swapoff" libc::SYS_swapoff, Always, Retreat;
    "reboot" libc::SYS_reboot, Always, Retreat;
    "sethostname" libc::SYS_sethostname, Always, Retreat;
    "setdomainname" libc::SYS_setdomainname, Always, Retreat;
    "iopl" libc::SYS_iopl, Always, Retreat;
    "ioperm" libc::SYS_ioperm, Always, Retreat;
    "init_module" libc::SYS_init_module, Always, Retreat;
    "delete_module" libc::SYS_delete_module, Always, Retreat;
    "quotactl" libc::SYS_quotactl, Always, Retreat;
    "tkill" libc::SYS_tkill, UnlessSelf(0), OwnThread(0);
    "sched_setaffinity" libc::SYS_sched_setaffinity, Always, Retreat;
    "sched_getaffinity" libc::SYS_sched_getaffinity, UnlessSelfOrZero(0), OwnThread(0);
    "io_setup" libc::SYS_io_setup, Always, Retreat;
    "remap_file_pages" libc::SYS_remap_file_pages, Always, Retreat;
    "semtimedop" libc::SYS_semtimedop, Always, Retreat;
    "clock_settime" libc::SYS_clock_settime, Always, Retreat;
    "tgkill" libc::SYS_tgkill, UnlessSelf(0), Relative;
    "mq_open" libc::SYS_mq_open, Always, Retreat;
    "mq_unlink" libc::SYS_mq_unlink, Always, Retreat;
    "kexec_load" libc::SYS_kexec_load, Always, Retreat;
    "add_key" libc::SYS_add_key, Always, Retreat;
    "request_key" libc::SYS_request_key, Always, Retreat;
    "keyctl" libc::SYS_keyctl, Always, Retreat;
    "ioprio_set" libc::SYS_ioprio_set, Always, Retreat;
    "ioprio_get" libc::SYS_ioprio_get, UnlessOwnProcess(1), OwnThread(1);
    "inotify_init" libc::SYS_inotify_init, Always, Retreat;
    "migrate_pages" libc::SYS_migrate_pages, UnlessSelfOrZero(0), OwnThread(0);
    "unshare" libc::SYS_unshare, Always, Retreat;
    "get_robust_list" libc::SYS_get_robust_list, UnlessSelfOrZero(0), OwnThread(0);
    "splice" libc::SYS_splice, Always, Retreat;
    "tee" libc::SYS_tee, Always, Retreat;
    "vmsplice" libc::SYS_vmsplice, Always, Retreat;
    "move_pages" libc::SYS_move_pages, UnlessSelfOrZero(0), OwnThread(0);
    "pipe2" libc::SYS_pipe2, Always, Retreat;
    "inotify_init1" libc::SYS_inotify_init1, Always, Retreat;
    "rt_tgsigqueueinfo" libc::SYS_rt_tgsigqueueinfo, UnlessSelf(0), Relative;
    "perf_event_open" libc::SYS_perf_event_open, Always, Retreat;
    "fanotify_init" libc::SYS_fanotify_init, Always, Retreat;
    "prlimit64" libc::SYS_prlimit64, Prlimit, Retreat;
    "name_to_handle_at" libc::SYS_name_to_handle_at, Always, Retreat;
    "open_by_handle_at" libc::SYS_open_by_handle_at, Always, Retreat;
    "clock_adjtime" libc::SYS_clock_adjtime, Always, Retreat;
    "syncfs" libc::SYS_syncfs, Always, Retreat;
    "setns" libc::SYS_setns, Always, Retreat;
    "process_vm_readv" libc::SYS_process_vm_readv, UnlessSelf(0), Retreat;
    "process_vm_writev" libc::SYS_process_vm_writev, UnlessSelf(0), Retreat;
    "kcmp" libc::SYS_kcmp, Always, Retreat;
    "finit_module" libc::SYS_finit_module, Always, Retreat;
    "sched_setattr" libc::SYS_sched_setattr, Always, Retreat;
    "sched_getattr" libc::SYS_sched_getattr, UnlessSelfOrZero(0), OwnThread(0);
    "seccomp" libc::SYS_seccomp, Always, Retreat;
    "kexec_file_load" libc::SYS_kexec_file_load, Always, Retreat;
    "bpf" libc::SYS_bpf, Always, Retreat;
    "execveat" libc::SYS_execveat, Always, Retreat;
    "userfaultfd" libc::SYS_userfaultfd, Always, Retreat;
    "pkey_alloc" libc::SYS_pkey_alloc, Always, Retreat;
    "pkey_free" libc::SYS_pkey_free, Always, Retreat;
    "pidfd_send_signal" libc::SYS_pidfd_send_signal, Always, Retreat;
    "io_uring_setup" libc::SYS_io_uring_setup, Always, Retreat;
    "open_tree" libc::SYS_open_tree, Always, Retreat;
    "move_mount" libc::SYS_move_mount, Always, Retreat;
    "fsopen" libc::SYS_fsopen, Always, Retreat;
    "fsconfig" libc::SYS_fsconfig, Always, Retreat;
    "fsmount" libc::SYS_fsmount, Always, Retreat;
    "fspick" libc::SYS_fspick, Always, Retreat;
    "pidfd_open" libc::SYS_pidfd_open, Always, Retreat;
    "clone3" libc::SYS_clone3, Always, Clone3;
    "pidfd_getfd" libc::SYS_pidfd_getfd, Always, Retreat;
    "process_madvise" libc::SYS_process_madvise, Always, Retreat;
    "mount_setattr" libc::SYS_mount_setattr, Always, Retreat;
    "quotactl_fd" libc::SYS_quotactl_fd, Always, Retreat;
    "landlock_create_ruleset" libc::SYS_landlock_create_ruleset, Always, Retreat;
    "landlock_restrict_self" libc::SYS_landlock_restrict_self, Always, Retreat;
    "memfd_secret" libc::SYS_memfd_secret, Always, Retreat;
    "process_mrelease" libc::SYS_process_mrelease, Always, Retreat;
    "map_shadow_stack" SYS_MAP_SHADOW_STACK, Always, Retreat;
    "statmount" SYS_STATMOUNT, Always, Retreat;
    "listmount" SYS_LISTMOUNT, Always, Retreat;
    "lsm_set_self_attr" SYS_LSM_SET_SELF_ATTR, Always, Retreat;
    "mseal" libc::SYS_mseal, Always, Retreat;
    "open_tree_attr" SYS_OPEN_TREE_ATTR, Always, Retreat;
    "file_getattr" SYS_FILE_GETATTR, Always, Retreat;
    "file_setattr" SYS_FILE_SETATTR, Always, Retreat;
};

/// The rule for a system call, if there is one.
pub fn rule(nr: i64) -> Option<&'static Rule> {
    RULES.binary_search_by_key(&nr, |rule| rule.nr).ok().map(|index| &RULES[index])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sorted_and_unique() {
        for pair in RULES.windows(2) {
            assert!(pair[0].nr < pair[1].nr, "{} must come after {}", pair[0].name, pair[1].name);
        }
        assert_eq!(rule(libc::SYS_fork).map(|rule| rule.name), Some("fork"));
        assert!(rule(libc::SYS_read).is_none());
    }
}
