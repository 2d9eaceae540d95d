//! A background job's terminal reads stop its group at home.

mod homefs_support;

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use homefs_support::{Join, mounted};
use migd::homefs::HandleKind;

/// A session on a terminal of its own: `bash -m` in the foreground, and a job in the background that
/// stands for a deputy. The job's first line of output is its process id.
const SESSION: &str = "import os,sys,time,fcntl,termios,signal\n\
    os.setsid()\n\
    fcntl.ioctl(0,termios.TIOCSCTTY,0)\n\
    job=os.fork()\n\
    if job==0:\n\
    \x20 os.setpgid(0,0)\n\
    \x20 while True: time.sleep(1)\n\
    os.setpgid(job,job)\n\
    print(job,flush=True)\n\
    while True:\n\
    \x20 pid,st=os.waitpid(job,os.WUNTRACED|os.WCONTINUED)\n\
    \x20 if os.WIFSTOPPED(st):\n\
    \x20  print('stopped',os.WSTOPSIG(st),flush=True)\n\
    \x20  signal.signal(signal.SIGTTOU,signal.SIG_IGN)\n\
    \x20  time.sleep(.3)\n\
    \x20  os.tcsetpgrp(0,job)\n\
    \x20  os.kill(-job,signal.SIGCONT)\n\
    \x20 if not os.WIFSTOPPED(st) and not os.WIFCONTINUED(st): break\n";

#[test]
fn a_background_read_stops_the_job_at_home() {
    mounted(Join::Memory, |m| {
        let pty = nix::pty::openpty(None, None).expect("pty");
        let mut master = File::from(pty.master);
        let mut session = Command::new("python3")
            .args(["-c", SESSION])
            .stdin(Stdio::from(pty.slave.try_clone().expect("dup")))
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3");
        let mut said = std::io::BufReader::new(session.stdout.take().expect("piped"));
        let mut line = || {
            let mut text = String::new();
            std::io::BufRead::read_line(&mut said, &mut text).expect("a line");
            text.trim().to_string()
        };
        let job: i32 = line().parse().expect("a process id");
        m.home.set_deputy(job).expect("deputy");
        let slave: OwnedFd = pty.slave;
        let handle = m.home.add_handle(slave, HandleKind::Stream).expect("handed over");
        let path = m.path(m.home.handle_path(handle));
        let mut away = OpenOptions::new().read(true).write(true).open(path).expect("open");
        master.write_all(b"typed\n").expect("type");
        // Output from the background is free without TOSTOP.
        away.write_all(b"out").expect("write");
        let reader = thread::spawn(move || {
            let mut buffer = [0; 64];
            let n = away.read(&mut buffer).expect("read");
            (away, buffer[..n].to_vec())
        });
        assert_eq!(line(), format!("stopped {}", libc::SIGTTIN));
        thread::sleep(Duration::from_millis(100));
        assert!(!reader.is_finished(), "waits until it is in the foreground");
        let (mut away, got) = reader.join().expect("reader");
        assert_eq!(got, b"typed\n");
        // /dev/tty is the deputy's terminal.
        let mut tty = OpenOptions::new().write(true).open(m.path("/dev/tty")).expect("/dev/tty");
        tty.write_all(b"by name").expect("write");
        master.write_all(b"again\n").expect("type");
        let mut buffer = [0; 64];
        assert_eq!(away.read(&mut buffer).expect("foreground now"), 6);
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(job), nix::sys::signal::Signal::SIGKILL)
            .expect("kill");
        session.wait().expect("wait");
        let mut echoed = [0; 256];
        let n = master.read(&mut echoed).expect("read");
        assert!(String::from_utf8_lossy(&echoed[..n]).contains("by name"));
    });
}
