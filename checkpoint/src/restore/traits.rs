//! Settings of prctl(2) and arch_prctl(2), memory policies, control groups.
//!
//! What a node or CPU cannot be asked for (a NUMA node, a way of speculation) is as it is there: it changes how fast
//! the process is, and not what it does. What changes that must succeed.

use super::RestoreError;
use crate::image::traits::{MAX_NODE, NODE_WORDS, PolicyImage, ProcessTraits, ThreadTraits};
use crate::image::{MmImage, ProcessImage};
use crate::tracee::{Call, Reply, Tracee};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// linux/prctl.h.
const PR_SET_SPECULATION_CTRL: u64 = 53;
const PR_SET_IO_FLUSHER: u64 = 57;
const PR_SET_MDWE: u64 = 65;
const PR_SET_MEMORY_MERGE: u64 = 67;
/// arch/x86/include/uapi/asm/prctl.h.
const ARCH_SET_CPUID: u64 = 0x1012;
const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
/// The last part of the extended state that has to be asked for (AMX tile data, APX is given to all).
const TILE_DATA: u64 = 18;

fn prctl(option: u64, value: u64) -> [u64; 6] {
    [option, value, 0, 0, 0, 0]
}

/// What a thread must call for itself, while it has the right to. `has`: what it has been asked for ([`told`]).
pub fn of_thread(traits: &ThreadTraits, has: Option<&ThreadTraits>) -> Vec<Call> {
    let mut calls = Vec::new();
    if has.is_none_or(|has| has.personality != traits.personality) {
        let args = [traits.personality.into(), 0, 0, 0, 0, 0];
        calls.push(Call::must("personality", libc::SYS_personality, args));
    }
    if has.is_none_or(|has| has.policy != traits.policy) {
        let args = [traits.policy.mode.into(), 0, MAX_NODE, 0, 0, 0];
        let call = Call::may("set_mempolicy", libc::SYS_set_mempolicy, args);
        calls.push(call.input(1, &nodes(&traits.policy)));
    }
    if has.is_none_or(|has| has.tsc_faults != traits.tsc_faults) {
        let tsc = if traits.tsc_faults { libc::PR_TSC_SIGSEGV } else { libc::PR_TSC_ENABLE };
        calls.push(Call::must("PR_SET_TSC", libc::SYS_prctl, prctl(libc::PR_SET_TSC as u64, tsc as u64)));
    }
    if traits.cpuid_faults {
        // A program that interprets cpuid itself does not run where it cannot.
        calls.push(Call::must("ARCH_SET_CPUID", libc::SYS_arch_prctl, prctl(ARCH_SET_CPUID, 0)));
    }
    if has.is_none_or(|has| has.memory_failure != traits.memory_failure) {
        let args =
            [libc::PR_MCE_KILL as u64, libc::PR_MCE_KILL_SET as u64, traits.memory_failure.into(), 0, 0, 0];
        calls.push(Call::may("PR_MCE_KILL", libc::SYS_prctl, args));
    }
    if traits.io_flusher {
        calls.push(Call::must("PR_SET_IO_FLUSHER", libc::SYS_prctl, prctl(PR_SET_IO_FLUSHER, 1)));
    }
    for (which, &state) in (0..).zip(&traits.speculation) {
        /// Settings that are not the kernel's own: disabled, for ever, until exec (linux/prctl.h).
        const SETTINGS: u8 = 4 | 8 | 16;
        /// It can be set for a thread.
        const PER_THREAD: u8 = 1;
        if state & PER_THREAD != 0 && state & SETTINGS != 0 {
            let args = [PR_SET_SPECULATION_CTRL, which, (state & SETTINGS).into(), 0, 0, 0];
            calls.push(Call::may("PR_SET_SPECULATION_CTRL", libc::SYS_prctl, args));
        }
    }
    calls
}

/// What [`of_thread`] would set anyway, in the order in which [`told`] takes the replies.
pub fn questions() -> [Call; 4] {
    [
        Call::may("personality", libc::SYS_personality, prctl(u32::MAX.into(), 0)),
        Call::may("get_mempolicy", libc::SYS_get_mempolicy, [0, 0, MAX_NODE, 0, 0, 0])
            .output(0, 8)
            .output(1, NODE_WORDS * 8),
        Call::may("PR_GET_TSC", libc::SYS_prctl, prctl(libc::PR_GET_TSC as u64, 0)).output(1, 8),
        Call::may("PR_MCE_KILL_GET", libc::SYS_prctl, prctl(libc::PR_MCE_KILL_GET as u64, 0)),
    ]
}

/// What a thread has told. What it has not is taken for something that no thread has: then it is set.
pub fn told(replies: &[Reply]) -> ThreadTraits {
    let word = |bytes: &[u8]| u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
    let [personality, policy, tsc, memory_failure] = replies else { return ThreadTraits::default() };
    let mut nodes = [0; NODE_WORDS];
    nodes.iter_mut().zip(policy.answer(1).chunks_exact(8)).for_each(|(to, from)| *to = word(from));
    let mode = if policy.value == 0 { word(policy.answer(0)) as u32 } else { u32::MAX };
    ThreadTraits {
        personality: u32::try_from(personality.value).unwrap_or(u32::MAX),
        policy: PolicyImage { mode, nodes },
        tsc_faults: tsc.value != 0 || word(tsc.answer(0)) as i32 == libc::PR_TSC_SIGSEGV,
        memory_failure: u8::try_from(memory_failure.value).unwrap_or(u8::MAX),
        ..ThreadTraits::default()
    }
}

fn nodes(policy: &PolicyImage) -> Vec<u8> {
    policy.nodes.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// The policies of mappings, before there is anything in them; a child has those of `parent`'s so far.
pub fn set_policies(
    tracee: &mut Tracee,
    traits: &ProcessTraits,
    parent: Option<&ProcessTraits>,
) -> Result<(), RestoreError> {
    let bind = |&(start, end, ref policy): &(u64, u64, PolicyImage)| {
        let args = [start, end.saturating_sub(start), policy.mode.into(), 0, MAX_NODE, 0];
        Call::may("mbind", libc::SYS_mbind, args).input(3, &nodes(policy))
    };
    let none = |&(start, end, _): &(u64, u64, PolicyImage)| bind(&(start, end, PolicyImage::default()));
    let parents = parent.into_iter().flat_map(|parent| &parent.policies);
    let calls: Vec<Call> = parents.map(none).chain(traits.policies.iter().map(bind)).collect();
    tracee.must_all(0, &calls)?;
    Ok(())
}

/// What the process must have before its threads get their registers.
pub fn of_process(image: &ProcessImage) -> Vec<Call> {
    let traits = &image.traits;
    let mut calls = Vec::new();
    if traits.extended_states >> TILE_DATA & 1 == 1 {
        let args = [ARCH_REQ_XCOMP_PERM, TILE_DATA, 0, 0, 0, 0];
        calls.push(Call::must("asking for AMX", libc::SYS_arch_prctl, args));
    }
    if traits.memory_merge {
        let args = [PR_SET_MEMORY_MERGE, 1, 0, 0, 0, 0];
        calls.push(Call::may("PR_SET_MEMORY_MERGE", libc::SYS_prctl, args));
    }
    calls
}

/// What comes to its memory later is locked, when all of now is there.
pub fn lock_future(image: &ProcessImage) -> Vec<Call> {
    let args = [image.traits.lock_future.into(), 0, 0, 0, 0, 0];
    let lock = Call::must("mlockall", libc::SYS_mlockall, args);
    (image.traits.lock_future != 0).then_some(lock).into_iter().collect()
}

/// What would hinder the work on its memory.
pub fn at_last(image: &ProcessImage) -> Vec<Call> {
    let args = [PR_SET_MDWE, image.traits.mdwe.into(), 0, 0, 0, 0];
    let forbid = Call::must("PR_SET_MDWE", libc::SYS_prctl, args);
    (image.traits.mdwe != 0).then_some(forbid).into_iter().collect()
}

/// Transparent huge pages (`PR_SET_THP_DISABLE`): not at all, or where they are advised (Linux 6.18).
pub fn huge_pages(mm: &MmImage, traits: &ProcessTraits) -> Option<Call> {
    let flags = u64::from(traits.thp_disable) & !1;
    let args = [libc::PR_SET_THP_DISABLE as u64, 1, flags, 0, 0, 0];
    let how = if flags == 0 { Call::must } else { Call::may };
    mm.thp_disable.then(|| how("PR_SET_THP_DISABLE", libc::SYS_prctl, args))
}

/// Who it is to the machine: login, session, control groups. What is not allowed here stays as it is.
pub fn settle(pid: i32, image: &ProcessImage) {
    let traits = &image.traits;
    let write = |name: &str, text: String| drop(fs::write(format!("/proc/{pid}/{name}"), text));
    let now = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
    if now("loginuid").trim() != traits.login_uid.to_string() {
        write("loginuid", traits.login_uid.to_string());
    }
    // That of a session which is not its own is its leader's affair.
    if traits.session_nice != 0 && image.sid == image.pid {
        write("autogroup", traits.session_nice.to_string());
    }
    enter_groups(pid, &traits.cgroups);
}

/// The control groups that it was in and that are here too (cgroups(7)).
fn enter_groups(pid: i32, wanted: &[u8]) {
    let now = fs::read(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    if now == wanted {
        return;
    }
    let mounts = fs::read("/proc/self/mountinfo").unwrap_or_default();
    let now: Vec<&[u8]> = now.split(|&byte| byte == b'\n').collect();
    for line in wanted.split(|&byte| byte == b'\n').filter(|line| !now.contains(line)) {
        if let Some(directory) = group(line, &mounts) {
            let _ = fs::write(directory.join("cgroup.procs"), pid.to_string());
        }
    }
}

/// The directory of a line `N:controllers:path`.
fn group(line: &[u8], mounts: &[u8]) -> Option<PathBuf> {
    let mut parts = line.splitn(3, |&byte| byte == b':');
    let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
    let climbs = path.split(|&byte| byte == b'/').any(|name| name == b"..");
    if climbs || path.first() != Some(&b'/') {
        return None;
    }
    let mount = mounts.split(|&byte| byte == b'\n').find_map(|mount| mounted(mount, controllers))?;
    Some(mount.join(OsStr::from_bytes(path.strip_prefix(b"/")?)))
}

/// Where a line of mountinfo (proc_pid_mountinfo(5)) has the hierarchy with these controllers, from its root.
fn mounted<'a>(line: &'a [u8], controllers: &[u8]) -> Option<&'a Path> {
    let words: Vec<&[u8]> = line.split(|&byte| byte == b' ').collect();
    let dash = words.iter().position(|word| *word == b"-")?;
    let (kind, options) = (*words.get(dash + 1)?, *words.get(dash + 3)?);
    let is_it = match controllers.is_empty() {
        true => kind == b"cgroup2",
        false => {
            let has = |one: &[u8]| options.split(|&byte| byte == b',').any(|option| option == one);
            kind == b"cgroup" && controllers.split(|&byte| byte == b',').all(has)
        }
    };
    (is_it && *words.get(3)? == b"/").then(|| Path::new(OsStr::from_bytes(words[4])))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_of_both_kinds() {
        let mounts = b"30 29 0:26 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpuacct,cpu\n\
            31 29 0:27 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n\
            32 29 0:28 /a /part rw - cgroup2 cgroup2 rw\n\
            33 29 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let of = |line: &str| group(line.as_bytes(), mounts).map(|path| path.display().to_string());
        assert_eq!(of("4:cpu,cpuacct:/a/b").as_deref(), Some("/sys/fs/cgroup/cpu,cpuacct/a/b"));
        assert_eq!(of("9:name=systemd:/").as_deref(), Some("/sys/fs/cgroup/systemd/"));
        assert_eq!(of("0::/user.slice").as_deref(), Some("/sys/fs/cgroup/unified/user.slice"));
        for line in ["5:memory:/", "0::/../etc", "0::", "x", "", "0::relative"] {
            assert_eq!(of(line), None, "{line}");
        }
    }
}
