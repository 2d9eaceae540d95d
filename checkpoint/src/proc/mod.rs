//! Parsers of `/proc/PID/*`, as bytes: a path may be anything. They never panic.

pub mod elf;
pub mod fdinfo;
pub mod maps;
pub mod status;
pub mod timer_list;
pub mod vm_flags;

use nix::fcntl::{OFlag, openat, readlinkat};
use nix::sys::stat::Mode;
use std::fs;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;

/// Reads `/proc/PID/NAME` whole.
pub fn read(pid: i32, name: &str) -> io::Result<Vec<u8>> {
    read_all(fs::File::open(format!("/proc/{pid}/{name}"))?)
}

fn read_all(mut file: fs::File) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    // The kernel tells no length, so there is no use in asking for it, and gives a page at a time.
    let mut page = [0; 8 << 10];
    loop {
        match file.read(&mut page) {
            Ok(0) => return Ok(bytes),
            Ok(n) => bytes.extend_from_slice(&page[..n]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// The target of `/proc/PID/NAME`, as bytes.
pub fn link(pid: i32, name: &str) -> io::Result<Vec<u8>> {
    Ok(fs::read_link(format!("/proc/{pid}/{name}"))?.into_os_string().into_vec())
}

/// A directory of `/proc`, opened once: of a process with a thousand threads, finding the way to each file
/// of each thread again costs as much as what is read there.
pub struct Dir(OwnedFd);

impl Dir {
    /// `/proc/PID/NAME`.
    pub fn open(pid: i32, name: &str) -> io::Result<Dir> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let path = format!("/proc/{pid}/{name}");
        Ok(Dir(nix::fcntl::open(path.as_str(), flags, Mode::empty())?))
    }

    /// A directory in it.
    pub fn dir(&self, name: &str) -> io::Result<Dir> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Ok(Dir(openat(&self.0, name, flags, Mode::empty())?))
    }

    /// Reads a file in it whole.
    pub fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        read_all(openat(&self.0, name, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?.into())
    }

    /// The target of a link in it, as bytes.
    pub fn link(&self, name: &str) -> io::Result<Vec<u8>> {
        Ok(readlinkat(&self.0, name)?.into_vec())
    }
}

/// The number behind `key` (up to the first blank) in text of `key: value` or `key value` lines.
pub fn number(text: &str, key: &str, radix: u32) -> Option<u64> {
    let line = lines_after(text, key).find(|rest| rest.starts_with([':', ' ', '\t']))?;
    let word = line.trim_start_matches(':').split_ascii_whitespace().next()?;
    u64::from_str_radix(word.trim_start_matches("0x"), radix).ok()
}

/// What is left of each line that begins with `key`. Most lines are far from the one that is wanted, and
/// a process may have a thousand threads: they are not looked at one by one.
fn lines_after<'a, 'k>(text: &'a str, key: &'k str) -> impl Iterator<Item = &'a str> + use<'a, 'k> {
    let begins = move |at: &usize| *at == 0 || text.as_bytes()[at - 1] == b'\n';
    let places = memchr::memmem::find_iter(text.as_bytes(), key).filter(begins);
    places.filter_map(|at| text.get(at + key.len()..)?.split('\n').next())
}

/// The process' threads.
pub fn tids(pid: i32) -> io::Result<Vec<i32>> {
    let dir = fs::read_dir(format!("/proc/{pid}/task"))?;
    let mut tids: Vec<i32> = dir.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    tids.sort_by_key(|&tid| (tid != pid, tid));
    Ok(tids)
}

/// How many threads a process has, 0 if there is none: nothing is looked up in a directory of which the kernel would
/// keep every entry until the thread ends.
pub fn thread_count(pid: i32) -> usize {
    let directories = fs::metadata(format!("/proc/{pid}/task")).map_or(0, |meta| meta.nlink());
    // Beside those of the threads its own, twice (`proc_task_getattr`, fs/proc/base.c).
    directories.saturating_sub(2) as usize
}

/// By which number `/proc` tells what the threads of a process have: its PID, or the TID of its first thread
/// that lives, where the leader has ended (pthread_exit(3)) and has nothing any more.
pub fn face(pid: i32) -> i32 {
    let has_ended = |tid: i32| {
        let stat = status::Stat::read(tid);
        stat.is_ok_and(|stat| matches!(stat.field(3), Some("Z" | "X")))
    };
    if !has_ended(pid) {
        return pid;
    }
    let mut others = tids(pid).unwrap_or_default().into_iter().filter(|&tid| tid != pid);
    others.find(|&tid| !has_ended(tid)).unwrap_or(pid)
}

/// All processes of this `/proc`.
pub fn pids() -> Vec<i32> {
    let Ok(dir) = fs::read_dir("/proc") else { return Vec::new() };
    dir.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect()
}
