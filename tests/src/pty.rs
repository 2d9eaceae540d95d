//! A person at a terminal: a pseudo-terminal, keys to press, and text to wait for.

use crate::lab::PATIENCE;
use nix::fcntl::OFlag;
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Ctrl-C.
pub const INTERRUPT: &str = "\x03";
/// Ctrl-Z.
pub const SUSPEND: &str = "\x1a";
/// Ctrl-D.
pub const END: &str = "\x04";

/// A terminal with a program on it.
#[derive(Debug)]
pub struct Terminal {
    child: Child,
    keys: File,
    screen: Arc<Mutex<String>>,
    /// How much of the screen has been matched already.
    seen: usize,
}

impl Terminal {
    /// Runs a command as the leader of a new session on a new terminal.
    pub fn run(command: &Command) -> Terminal {
        let (master, slave) = pair().expect("a pseudo-terminal");
        let side = || Stdio::from(slave.try_clone().expect("a descriptor"));
        // setsid(1) makes the terminal the controlling one, which needs code between fork and exec.
        let mut session = Command::new("setsid");
        session.args(["--ctty", "--wait"]).arg(command.get_program()).args(command.get_args());
        session.env("TERM", "dumb").env_remove("CARGO");
        let child = session.stdin(side()).stdout(side()).stderr(side()).spawn().expect("setsid runs");
        drop(slave);
        let keys = master;
        let mut output = keys.try_clone().expect("a descriptor");
        let screen = Arc::new(Mutex::new(String::new()));
        let shared = Arc::clone(&screen);
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            // The last program's end is EIO.
            while let Ok(count @ 1..) = output.read(&mut bytes) {
                let text = String::from_utf8_lossy(&bytes[..count]);
                shared.lock().unwrap_or_else(PoisonError::into_inner).push_str(&text);
            }
        });
        Terminal { child, keys, screen, seen: 0 }
    }

    /// Types.
    pub fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).expect("the terminal takes keys");
    }

    /// Waits until the text appears after what was matched before; returns what stands before it.
    #[track_caller]
    pub fn expect(&mut self, text: &str) -> String {
        let until = Instant::now() + PATIENCE;
        loop {
            {
                let screen = self.screen.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(at) = screen[self.seen..].find(text) {
                    let before = screen[self.seen..self.seen + at].to_string();
                    self.seen += at + text.len();
                    return before;
                }
                assert!(
                    Instant::now() < until,
                    "{text:?} does not appear on the terminal, which shows: {}",
                    &*screen
                );
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Both ends, closed on exec from the first moment: openpty(3) cannot do that, and a job that held the
/// master end of its own terminal could not be moved.
fn pair() -> std::io::Result<(File, File)> {
    let master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let slave =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOCTTY).open(ptsname_r(&master)?)?;
    Ok((File::from(OwnedFd::from(master)), slave))
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
