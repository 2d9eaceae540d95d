//! Credentials of one thread: the order is what makes it work (capabilities(7), credentials(7)).

use super::RestoreError;
use crate::image::CredsImage;
use crate::tracee::Tracee;

/// Highest capability there is (CAP_CHECKPOINT_RESTORE) plus one.
const CAPABILITIES: u64 = 41;
/// Most groups that fit into the scratch area.
const MAX_GROUPS: usize = 500;

/// Sets the credentials of thread `i`, with at most the capabilities `allowed`.
pub fn set(tracee: &mut Tracee, i: usize, creds: &CredsImage, allowed: u64) -> Result<(), RestoreError> {
    let [inheritable, permitted, effective, bounding, ambient] = creds.caps.map(|caps| caps & allowed);
    set_groups(tracee, i, creds)?;
    let [real, current, saved, files] = creds.gids.map(u64::from);
    tracee.must(i, "setresgid", libc::SYS_setresgid, [real, current, saved, 0, 0, 0])?;
    tracee.must(i, "setfsgid", libc::SYS_setfsgid, [files, 0, 0, 0, 0, 0])?;
    for capability in (0..CAPABILITIES).filter(|n| bounding >> n & 1 == 0) {
        prctl(tracee, i, "PR_CAPBSET_DROP", libc::PR_CAPBSET_DROP, capability)?;
    }
    // Keeps the permitted set over the change of ids; capset(2) below makes it what it was.
    prctl(tracee, i, "PR_SET_KEEPCAPS", libc::PR_SET_KEEPCAPS, 1)?;
    let [real, current, saved, files] = creds.uids.map(u64::from);
    tracee.must(i, "setresuid", libc::SYS_setresuid, [real, current, saved, 0, 0, 0])?;
    tracee.must(i, "setfsuid", libc::SYS_setfsuid, [files, 0, 0, 0, 0, 0])?;
    if creds.securebits != 0 {
        // Needs CAP_SETPCAP, which is still there.
        prctl(tracee, i, "PR_SET_SECUREBITS", libc::PR_SET_SECUREBITS, creds.securebits.into())?;
    } else {
        prctl(tracee, i, "PR_SET_KEEPCAPS", libc::PR_SET_KEEPCAPS, 0)?;
    }
    capset(tracee, i, effective, permitted, inheritable)?;
    for capability in (0..CAPABILITIES).filter(|n| ambient >> n & 1 == 1) {
        let args = [libc::PR_CAP_AMBIENT as u64, libc::PR_CAP_AMBIENT_RAISE as u64, capability, 0, 0, 0];
        tracee.must(i, "PR_CAP_AMBIENT", libc::SYS_prctl, args)?;
    }
    if creds.no_new_privs {
        prctl(tracee, i, "PR_SET_NO_NEW_PRIVS", libc::PR_SET_NO_NEW_PRIVS, 1)?;
    }
    Ok(())
}

fn set_groups(tracee: &mut Tracee, i: usize, creds: &CredsImage) -> Result<(), RestoreError> {
    if creds.groups.len() > MAX_GROUPS {
        return Err(RestoreError::Unfit(format!("it is in {} groups", creds.groups.len())));
    }
    let bytes: Vec<u8> = creds.groups.iter().flat_map(|group| group.to_le_bytes()).collect();
    let scratch = tracee.scratch();
    tracee.write_mem(scratch, &bytes)?;
    let args = [creds.groups.len() as u64, scratch, 0, 0, 0, 0];
    tracee.must(i, "setgroups", libc::SYS_setgroups, args)?;
    Ok(())
}

fn prctl(
    tracee: &mut Tracee,
    i: usize,
    operation: &'static str,
    option: i32,
    value: u64,
) -> Result<(), RestoreError> {
    tracee.must(i, operation, libc::SYS_prctl, [option as u64, value, 0, 0, 0, 0])?;
    Ok(())
}

fn capset(
    tracee: &mut Tracee,
    i: usize,
    effective: u64,
    permitted: u64,
    inheritable: u64,
) -> Result<(), RestoreError> {
    /// `_LINUX_CAPABILITY_VERSION_3`.
    const VERSION: u32 = 0x2008_0522;
    let low = [effective, permitted, inheritable].map(|caps| caps as u32);
    let high = [effective, permitted, inheritable].map(|caps| (caps >> 32) as u32);
    let words = [[VERSION, 0].as_slice(), &low, &high].concat();
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let scratch = tracee.scratch();
    tracee.write_mem(scratch, &bytes)?;
    tracee.must(i, "capset", libc::SYS_capset, [scratch, scratch + 8, 0, 0, 0, 0])?;
    Ok(())
}
