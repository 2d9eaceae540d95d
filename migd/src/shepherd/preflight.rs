//! What is asked about a process before and during a move, without stopping it.

use crate::api::{Blocker, Explanation};
use checkpoint::image::{FileKind, ProcessImage};
use checkpoint::inventory::{self, InventoryError, Rules};
use checkpoint::proc::status::{Stat, Status};
use checkpoint::sys::time_namespace::{Offsets, clocks_ns};
use checkpoint::tracee::Tracee;
use std::fs;
use std::io;

/// Bytes a second that a move is taken to carry, for predictions: a plain stream over a fast link.
const ASSUMED_RATE: u64 = 600 << 20;
/// Freeze time that does not depend on the memory, ms.
const FIXED_MS: u64 = 15;
/// Pauses before a family with something in its way is looked at again, ms.
const LOOK_AGAIN_MS: [u64; 3] = [5, 20, 50];

fn named(blockers: Vec<inventory::Blocker>) -> Vec<Blocker> {
    blockers.into_iter().map(|b| Blocker { kind: b.kind.into(), what: b.what }).collect()
}

/// What each of a process and its descendants has.
type Found = Vec<(i32, inventory::Inventory)>;

/// What a process and its descendants have, which are to be moved together, and what blocks them. A
/// family in motion is never seen at one moment: what is in the way counts if it is there each time.
fn inspect(pid: i32) -> Result<(Found, Vec<Blocker>), InventoryError> {
    let mut found = inventory::inspect_tree(pid, Rules::Homed)?;
    let mut blockers = of_all(pid, &found);
    for pause_ms in LOOK_AGAIN_MS {
        if blockers.is_empty() || found.len() == 1 {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(pause_ms));
        found = inventory::inspect_tree(pid, Rules::Homed)?;
        let now = of_all(pid, &found);
        blockers.retain(|blocker| now.contains(blocker));
    }
    Ok((found, blockers))
}

/// All blockers; those of a descendant name it.
fn of_all(root: i32, found: &Found) -> Vec<Blocker> {
    let mut out = Vec::new();
    for (pid, inventory) in found {
        let blockers = named(inventory.blockers.clone()).into_iter();
        out.extend(blockers.map(|blocker| of_one(root, *pid, blocker)));
    }
    out
}

fn of_one(root: i32, pid: i32, blocker: Blocker) -> Blocker {
    if pid == root {
        return blocker;
    }
    Blocker { what: format!("its descendant {pid}: {}", blocker.what), ..blocker }
}

/// Why a process with its descendants cannot be moved; empty: it can.
pub fn blockers(pid: i32) -> Result<Vec<Blocker>, InventoryError> {
    Ok(inspect(pid)?.1)
}

/// The same of images that were just read.
pub fn blockers_of_images(images: &[ProcessImage]) -> Vec<Blocker> {
    let root = images.first().map_or(0, |image| image.pid);
    let mut out = Vec::new();
    for image in images {
        let mut blockers = named(inventory::image_blockers(image, Rules::Homed));
        if image.fs.cwd_deleted {
            let what =
                format!("its working directory {} has been removed", String::from_utf8_lossy(&image.fs.cwd));
            blockers.push(Blocker { kind: "fd".into(), what });
        }
        if image.files.files.iter().any(|file| file.shared != 0 && !carried_shared(&file.kind)) {
            let what = "it shares a kernel object (epoll) with another process".to_string();
            blockers.push(Blocker { kind: "fd".into(), what });
        }
        out.extend(blockers.into_iter().map(|blocker| of_one(root, image.pid, blocker)));
    }
    let tables: Vec<_> = images.iter().map(|image| (&image.files, image.mm.vmas.as_slice())).collect();
    for (image, blockers) in images.iter().zip(inventory::objects::open_as_well(&tables)) {
        out.extend(named(blockers).into_iter().map(|blocker| of_one(root, image.pid, blocker)));
    }
    out
}

/// What can be opened before the processes that inherit it. The kernel knows an epoll's targets by
/// their numbers in one table.
fn carried_shared(kind: &FileKind) -> bool {
    !matches!(kind, FileKind::Epoll { .. })
}

/// Blockers and a prediction, for `migrate --explain`.
pub fn explain(pid: i32, to: &str) -> Result<Explanation, InventoryError> {
    let (found, blockers) = inspect(pid)?;
    let bytes = found.iter().map(|(_, inventory)| inventory.bytes).sum::<u64>();
    let pids = found.iter().map(|(pid, _)| *pid).collect();
    let ms = bytes * 1000 / ASSUMED_RATE + FIXED_MS;
    Ok(Explanation {
        pid,
        pids,
        to: to.into(),
        blockers,
        predicted_bytes: bytes,
        predicted_ms: ms,
        // Stop and copy: it stands still all the while.
        predicted_freeze_ms: ms,
    })
}

/// Owner's user id.
pub fn owner(pid: i32) -> Option<u32> {
    Status::read(pid).ok()?.numbers("Uid").first().copied()
}

/// Supplementary groups.
pub fn supplementary_groups(pid: i32) -> io::Result<Vec<u32>> {
    Ok(Status::read(pid)?.numbers("Groups"))
}

/// Its parent.
pub fn parent(pid: i32) -> Option<i32> {
    Some(Stat::read(pid).ok()?.number(4)? as i32)
}

/// Its process group.
pub fn process_group(pid: i32) -> Option<i32> {
    Some(Stat::read(pid).ok()?.number(5)? as i32)
}

/// Its session.
pub fn session(pid: i32) -> Option<i32> {
    Some(Stat::read(pid).ok()?.number(6)? as i32)
}

/// Path of its controlling terminal: `/dev/pts/N` or `/dev/ttyN`.
pub fn controlling_terminal(pid: i32) -> Option<String> {
    let device = Stat::read(pid).ok()?.number(7)?;
    let (major, minor) = (libc::major(device), libc::minor(device));
    match major {
        // Unix98 pseudo-terminals: eight majors of 256 (Documentation/admin-guide/devices.txt).
        136..=143 => Some(format!("/dev/pts/{}", (major - 136) * 256 + minor)),
        4 if minor < 64 => Some(format!("/dev/tty{minor}")),
        4 => Some(format!("/dev/ttyS{}", minor - 64)),
        _ => None,
    }
}

/// Its command line, for people.
pub fn command_line(pid: i32) -> String {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words: Vec<_> = bytes.split(|&b| b == 0).map(|word| String::from_utf8_lossy(word)).collect();
    words.join(" ").trim_end().to_string()
}

/// Host name and domain name here.
pub fn utsname() -> (Vec<u8>, Vec<u8>) {
    let host = nix::unistd::gethostname().map(|name| name.into_encoded_bytes()).unwrap_or_default();
    let domain = fs::read("/proc/sys/kernel/domainname").unwrap_or_default();
    let domain = domain.trim_ascii();
    (host, if domain == b"(none)" { Vec::new() } else { domain.to_vec() })
}

/// CLOCK_MONOTONIC and CLOCK_BOOTTIME now, ns, as process `pid` sees them, which may be in another time
/// namespace than we are.
pub fn clocks_of_ns(pid: i32) -> (u64, u64) {
    let offsets = |pid| Offsets::of(pid).unwrap_or_default();
    let (theirs, ours) = (offsets(pid), offsets(std::process::id() as i32));
    let (monotonic, boottime) = clocks_ns();
    (
        monotonic.saturating_add_signed(theirs.monotonic_ns.saturating_sub(ours.monotonic_ns)),
        boottime.saturating_add_signed(theirs.boottime_ns.saturating_sub(ours.boottime_ns)),
    )
}

/// `kernel.pid_max` here.
pub fn pid_max() -> i32 {
    let text = fs::read_to_string("/proc/sys/kernel/pid_max").unwrap_or_default();
    text.trim().parse().unwrap_or(32_768)
}

/// Where the TIDs begin that a guest's new threads get on a host: far from what home gives out next,
/// and different for different guests.
pub fn tid_base(pid: i32, pid_max: i32) -> i32 {
    let half = pid_max / 2;
    half + (i64::from(pid) * 256 % i64::from(half - 1024).max(1)) as i32
}

/// How a zombie ended: its raw wait status.
pub fn exit_status(pid: i32) -> Option<i32> {
    let stat = Stat::read(pid).ok()?;
    (stat.field(3)? == "Z").then_some(stat.number(52)? as i32)
}

/// CPU time used (ms), resident bytes, state.
pub fn usage(pid: i32) -> Option<(u64, u64, char)> {
    let stat = Stat::read(pid).ok()?;
    // USER_HZ is 100 on every x86-64 kernel.
    let cpu_ms = (stat.number(14)? + stat.number(15)?) * 10;
    let state = stat.field(3)?.chars().next()?;
    Some((cpu_ms, stat.number(24)? * 4096, state))
}

/// Index of the thread that has this TID in its own namespace.
pub fn index_inside(tracee: &Tracee, tid: i32) -> Option<usize> {
    (0..tracee.thread_count())
        .find(|&i| Status::read(tracee.tid(i)).ok().and_then(|status| status.inner_id()) == Some(tid))
}
