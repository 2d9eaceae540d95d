//! Credentials of one thread: the order is what makes it work (capabilities(7), credentials(7)).

use super::RestoreError;
use crate::image::CredsImage;
use crate::proc::status::Status;
use crate::tracee::Call;

/// Highest capability there is (CAP_CHECKPOINT_RESTORE) plus one.
const CAPABILITIES: u64 = 41;
/// Most groups that a batch's arguments have room for.
const MAX_GROUPS: usize = 16_384;

/// Those of thread `tid` of process `pid`, whose secure bits are known. `None`: they cannot be read.
pub fn of(pid: i32, tid: i32, securebits: u32) -> Option<CredsImage> {
    Status::of_thread(pid, tid).ok()?.credentials(securebits)
}

/// What a thread must call to get these credentials, with at most the capabilities `allowed`.
pub fn calls(creds: &CredsImage, allowed: u64) -> Result<Vec<Call>, RestoreError> {
    let [inheritable, permitted, effective, bounding, ambient] = creds.caps.map(|caps| caps & allowed);
    let mut calls = vec![set_groups(creds)?];
    let [real, current, saved, files] = creds.gids.map(u64::from);
    calls.push(Call::must("setresgid", libc::SYS_setresgid, [real, current, saved, 0, 0, 0]));
    calls.push(Call::must("setfsgid", libc::SYS_setfsgid, [files, 0, 0, 0, 0, 0]));
    for capability in (0..CAPABILITIES).filter(|n| bounding >> n & 1 == 0) {
        calls.push(prctl("PR_CAPBSET_DROP", libc::PR_CAPBSET_DROP, capability));
    }
    // Keeps the permitted set over the change of ids; capset(2) below makes it what it was.
    calls.push(prctl("PR_SET_KEEPCAPS", libc::PR_SET_KEEPCAPS, 1));
    let [real, current, saved, files] = creds.uids.map(u64::from);
    calls.push(Call::must("setresuid", libc::SYS_setresuid, [real, current, saved, 0, 0, 0]));
    calls.push(Call::must("setfsuid", libc::SYS_setfsuid, [files, 0, 0, 0, 0, 0]));
    if creds.securebits != 0 {
        // Needs CAP_SETPCAP, which is still there.
        calls.push(prctl("PR_SET_SECUREBITS", libc::PR_SET_SECUREBITS, creds.securebits.into()));
    } else {
        calls.push(prctl("PR_SET_KEEPCAPS", libc::PR_SET_KEEPCAPS, 0));
    }
    calls.push(capset(effective, permitted, inheritable));
    for capability in (0..CAPABILITIES).filter(|n| ambient >> n & 1 == 1) {
        let args = [libc::PR_CAP_AMBIENT as u64, libc::PR_CAP_AMBIENT_RAISE as u64, capability, 0, 0, 0];
        calls.push(Call::must("PR_CAP_AMBIENT", libc::SYS_prctl, args));
    }
    if creds.no_new_privs {
        calls.push(prctl("PR_SET_NO_NEW_PRIVS", libc::PR_SET_NO_NEW_PRIVS, 1));
    }
    Ok(calls)
}

fn set_groups(creds: &CredsImage) -> Result<Call, RestoreError> {
    if creds.groups.len() > MAX_GROUPS {
        return Err(RestoreError::Unfit(format!("it is in {} groups", creds.groups.len())));
    }
    let bytes: Vec<u8> = creds.groups.iter().flat_map(|group| group.to_le_bytes()).collect();
    let args = [creds.groups.len() as u64, 0, 0, 0, 0, 0];
    Ok(Call::must("setgroups", libc::SYS_setgroups, args).input(1, &bytes))
}

fn prctl(operation: &'static str, option: i32, value: u64) -> Call {
    Call::must(operation, libc::SYS_prctl, [option as u64, value, 0, 0, 0, 0])
}

fn capset(effective: u64, permitted: u64, inheritable: u64) -> Call {
    /// `_LINUX_CAPABILITY_VERSION_3`.
    const VERSION: u32 = 0x2008_0522;
    let low = [effective, permitted, inheritable].map(|caps| caps as u32);
    let high = [effective, permitted, inheritable].map(|caps| (caps >> 32) as u32);
    let bytes = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    Call::must("capset", libc::SYS_capset, [0; 6])
        .input(0, &bytes(&[VERSION, 0]))
        .input(1, &bytes(&[low, high].concat()))
}
