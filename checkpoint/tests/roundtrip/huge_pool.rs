//! Huge pages for a test, of which the machine has none by itself: reserved for it, and given back whatever
//! becomes of it.

use super::harness::skip;
use nix::fcntl::{FcntlArg, fcntl};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Pages that nobody else uses until this is dropped.
///
/// Another program gives them back, for the case that this one is killed: it ends with its standard input. It
/// has the lock, too, so that the next test counts when they are back.
pub struct Pool {
    directory: String,
    keeper: Child,
}

impl Pool {
    /// So many free pages and no more. `None`: the machine does not have them, which is recorded.
    pub fn reserve(test: &str, kilobytes: u64, pages: u64) -> Option<Pool> {
        let directory = format!("/sys/kernel/mm/hugepages/hugepages-{kilobytes}kB");
        let Ok(file) = File::options().read(true).write(true).open(format!("{directory}/nr_hugepages"))
        else {
            skip(test, &format!("this kernel has no huge pages of {kilobytes} kB"));
            return None;
        };
        // The description's: it is the other program's as well, and free when both have closed it.
        let (l_type, l_whence) = (libc::F_WRLCK as i16, libc::SEEK_SET as i16);
        let whole = libc::flock { l_type, l_whence, l_start: 0, l_len: 0, l_pid: 0 };
        fcntl(&file, FcntlArg::F_OFD_SETLKW(&whole)).expect("nobody else's");
        let before = fs::read_to_string(format!("{directory}/nr_hugepages")).expect("read");
        let mut keeper = Command::new("sh");
        // Not by the keys of a terminal.
        keeper.process_group(0).args(["-c", r#"cat >/dev/null; echo "$1""#, "sh", before.trim()]);
        let keeper = keeper.stdin(Stdio::piped()).stdout(file).spawn().expect("runs");
        let pool = Pool { directory, keeper };
        pool.set_free(pages);
        if pool.free() != pages {
            skip(test, &format!("{pages} huge pages of {kilobytes} kB cannot be had"));
            return None;
        }
        Some(pool)
    }

    fn count(&self, name: &str) -> u64 {
        let text = fs::read_to_string(format!("{}/{name}_hugepages", self.directory)).expect("read");
        text.trim().parse().expect("a number")
    }

    pub fn free(&self) -> u64 {
        self.count("free")
    }

    /// As many free ones as told; none of those in use are taken away.
    pub fn set_free(&self, pages: u64) {
        let in_use = self.count("nr") - self.free();
        let mut file =
            File::options().write(true).open(format!("{}/nr_hugepages", self.directory)).expect("there");
        let _ = write!(file, "{}", in_use + pages);
    }

    /// Waits until so many are free: those of a process come back when it is gone.
    pub fn await_free(&self, pages: u64) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.free() != pages {
            assert!(Instant::now() < deadline, "{} huge pages are free, not {pages}", self.free());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        drop(self.keeper.stdin.take());
        let _ = self.keeper.wait();
    }
}
