//! System calls run inside the frozen process, and the stub they run from.

use super::stub::{self, Journal, Phase};
use super::{MAX_THREADS, Stub, Thread, ThreadState, Tracee, TraceeError, tasks};
use crate::sys::ptrace::{self, Stop};
use nix::errno::Errno;
use std::fs;

/// Stops an injected call may take: a forgotten rseq registration makes them endless.
const MAX_STOPS: u32 = 200;
/// Lowest address tried for a stub (`vm.mmap_min_addr`).
const LOWEST: u64 = 0x1_0000;
/// Nothing is put above this.
const HIGHEST: u64 = 0x7fff_f000_0000;

const CLONE_FLAGS: u64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM) as u64;

impl Tracee {
    /// Length of the scratch area, bytes.
    pub const SCRATCH_LEN: usize = stub::SCRATCH_LEN;

    /// Address of the scratch area; 0 without a stub.
    pub fn scratch(&self) -> u64 {
        self.stub.map_or(0, |stub| stub.at + stub::SCRATCH)
    }

    /// Where the stub is: start and length.
    pub fn stub_range(&self) -> Option<(u64, u64)> {
        self.stub.map(|stub| (stub.at, stub.len))
    }

    /// Maps the stub at a free address outside `avoid` (ranges of start and end).
    ///
    /// Does nothing if there is one already.
    pub fn install_stub(&mut self, avoid: &[(u64, u64)]) -> Result<(), TraceeError> {
        if self.stub.is_some() {
            return Ok(());
        }
        // Room for some threads more, as a deputy may get them when its guest comes home.
        let len = stub::stub_len(self.threads.len() + 64);
        let at = self.free_range(len, avoid)?;
        let gate = self.vdso_syscall()?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let prot = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        let args = [at, len, prot as u64, flags as u64, u64::MAX, 0];
        let got = self.call_at(0, gate, libc::SYS_mmap, args)?;
        if got != at as i64 {
            return Err(self.inside("mapping the stub", got));
        }
        let mut page = stub::CODE.to_vec();
        page.resize(stub::MAGIC_AT as usize, 0xcc);
        page.extend_from_slice(stub::MAGIC);
        self.write_mem(at, &page)?;
        self.write_mem(at + stub::SIGSET, &u64::MAX.to_le_bytes())?;
        self.stub = Some(Stub { at, len });
        self.write_journal(Phase::Frozen)?;
        for (from, bytes, prot) in [
            (at, stub::PAGE, libc::PROT_READ | libc::PROT_EXEC),
            (at + stub::PAGE, len - stub::PAGE, libc::PROT_READ | libc::PROT_WRITE),
        ] {
            let got = self.syscall(0, libc::SYS_mprotect, [from, bytes, prot as u64, 0, 0, 0])?;
            if got != 0 {
                return Err(self.inside("protecting the stub", got));
            }
        }
        Ok(())
    }

    /// Writes the journal: what every thread must get back.
    pub fn write_journal(&mut self, phase: Phase) -> Result<(), TraceeError> {
        let Some(stub) = self.stub else { return Ok(()) };
        let room = ((stub.len - stub::ENTRIES) / stub::ENTRY_LEN) as usize;
        let threads =
            self.threads.iter().take(room).map(|t| (t.found.tid, t.found.sigmask, t.found.regs)).collect();
        let journal = Journal { phase, threads };
        self.write_mem(stub.at + stub::ENTRIES, &journal.entries())?;
        self.write_mem(stub.at + stub::JOURNAL, &journal.header())
    }

    pub(super) fn read_journal(&self) -> Result<Option<Journal>, TraceeError> {
        let Some(stub) = self.stub else { return Ok(None) };
        let room = ((stub.len - stub::ENTRIES) / stub::ENTRY_LEN) as usize;
        let mut header = [0; 16];
        self.read_mem(stub.at + stub::JOURNAL, &mut header)?;
        let Some((phase, count)) = Journal::parse_header(&header, room.min(MAX_THREADS)) else {
            return Ok(None);
        };
        let mut entries = vec![0; count * stub::ENTRY_LEN as usize];
        self.read_mem(stub.at + stub::ENTRIES, &mut entries)?;
        Ok(Some(Journal::parse_entries(phase, &entries)))
    }

    /// Whether it stands as a parked deputy.
    pub fn is_parked(&self) -> Result<bool, TraceeError> {
        Ok(self.read_journal()?.is_some_and(|journal| journal.phase == Phase::Parked))
    }

    /// A stub that an earlier tracer left.
    pub(super) fn find_stub(&self) -> Option<Stub> {
        let ranges = self.ranges().ok()?;
        let code = ranges.iter().position(|&(start, end, _)| {
            let mut magic = [0; 16];
            end - start == stub::PAGE
                && self.read_mem(start + stub::MAGIC_AT, &mut magic).is_ok()
                && &magic == stub::MAGIC
        })?;
        let (at, end, _) = ranges[code];
        let &(data, data_end, _) = ranges.get(code + 1)?;
        (data == end).then_some(Stub { at, len: data_end - at })
    }

    /// Unmaps the stub. The last instruction runs from the vDSO; the threads then stand there until
    /// they get registers.
    pub fn remove_stub(&mut self) -> Result<(), TraceeError> {
        let Some(stub) = self.stub.take() else { return Ok(()) };
        let gate = self.vdso_syscall()?;
        let got = self.call_at(0, gate, libc::SYS_munmap, [stub.at, stub.len, 0, 0, 0, 0])?;
        if got != 0 {
            return Err(self.inside("unmapping the stub", got));
        }
        Ok(())
    }

    /// Runs one system call in thread `i`, from the stub; gives the kernel's raw result (a negative
    /// errno on failure).
    pub fn syscall(&mut self, i: usize, nr: libc::c_long, args: [u64; 6]) -> Result<i64, TraceeError> {
        let Some(stub) = self.stub else {
            return Err(TraceeError::Unfit { pid: self.pid, what: "there is no stub in it" });
        };
        self.call_at(i, stub.at + stub::CODE_SYSCALL, nr, args)
    }

    /// Like [`Tracee::syscall`], but a negative result is an error that names `operation`.
    pub fn must(
        &mut self,
        i: usize,
        operation: &'static str,
        nr: libc::c_long,
        args: [u64; 6],
    ) -> Result<i64, TraceeError> {
        let got = self.syscall(i, nr, args)?;
        if (-4095..0).contains(&got) {
            return Err(TraceeError::Inside {
                operation,
                tid: self.tid(i),
                errno: Errno::from_raw(-got as i32),
            });
        }
        Ok(got)
    }

    fn inside(&self, operation: &'static str, got: i64) -> TraceeError {
        TraceeError::Inside { operation, tid: self.pid, errno: Errno::from_raw(-got as i32) }
    }

    fn call_at(&mut self, i: usize, at: u64, nr: libc::c_long, args: [u64; 6]) -> Result<i64, TraceeError> {
        let thread = &mut self.threads[i];
        let tid = thread.found.tid;
        if !thread.masked {
            tasks::block_all(tid)?;
            thread.masked = true;
        }
        let mut regs = thread.found.regs;
        regs.set_rip(at);
        regs.set_rax(nr as u64);
        // Not in a system call: or the kernel would "restart" the one it was stopped in.
        regs.set_orig_rax(u64::MAX);
        // No trap flag of a debugger's.
        regs.set_eflags(regs.eflags() & !0x100);
        let [a, b, c, d, e, f] = args;
        regs.set_rdi(a);
        regs.set_rsi(b);
        regs.set_rdx(c);
        regs.set_r10(d);
        regs.set_r8(e);
        regs.set_r9(f);
        thread.touched = true;
        ptrace::set_regs(tid, &regs).map_err(|e| TraceeError::kernel("setting registers", tid, e))?;
        self.run_to_exit(tid, nr)
    }

    /// Two system-call stops: entry, exit.
    fn run_to_exit(&mut self, tid: i32, nr: i64) -> Result<i64, TraceeError> {
        let mut entered = false;
        for _ in 0..MAX_STOPS {
            ptrace::cont_to_syscall(tid, 0).map_err(|e| TraceeError::kernel("PTRACE_SYSCALL", tid, e))?;
            match ptrace::wait(tid, true).map_err(|e| TraceeError::kernel("waitpid", tid, e))? {
                Some(Stop::Syscall) if entered => {
                    let regs =
                        ptrace::regs(tid).map_err(|e| TraceeError::kernel("reading registers", tid, e))?;
                    return Ok(regs.rax() as i64);
                }
                Some(Stop::Syscall) => entered = true,
                Some(Stop::Gone(_)) => return Err(TraceeError::Died { tid }),
                // It cannot be blocked, and stopping now would hang the injected call.
                Some(Stop::Signal(signal)) if i32::from(signal) == libc::SIGSTOP => self.stop_owed = true,
                // Everything is blocked: what comes is an event, or a fault that will come again.
                _ => {}
            }
        }
        Err(TraceeError::Runaway { tid, nr, stops: MAX_STOPS })
    }

    /// Sends the SIGSTOP again that came during injection, unless a SIGCONT has come since: it is
    /// pending then, and a new stop would discard it (signal(7)).
    pub(super) fn deliver_owed_stop(&mut self) {
        if !std::mem::take(&mut self.stop_owed) {
            return;
        }
        let pending = crate::proc::status::Status::read(self.pid).ok().and_then(|s| s.mask("ShdPnd"));
        if pending.unwrap_or(0) >> (libc::SIGCONT - 1) & 1 == 0 {
            let pid = nix::unistd::Pid::from_raw(self.pid);
            // Only fails if the process has ended.
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP);
        }
    }

    /// Makes a thread more, standing in the stub's hold loop; with `set_tid` under that TID
    /// (clone3(2), needs CAP_CHECKPOINT_RESTORE inside), else under whatever TID comes, which the
    /// caller compares with [`Tracee::tid`]. Gives its index (always the last).
    pub fn add_thread(&mut self, tid: i32, set_tid: bool) -> Result<usize, TraceeError> {
        if self.threads.len() >= MAX_THREADS {
            return Err(TraceeError::Unfit { pid: self.pid, what: "it has too many threads" });
        }
        let leader = self.tid(0);
        let scratch = self.scratch();
        // struct clone_args: flags pidfd child_tid parent_tid exit_signal stack stack_size tls
        // set_tid set_tid_size cgroup
        let mut words = [0u64; 11];
        words[0] = CLONE_FLAGS;
        if set_tid {
            words[8] = scratch + 128;
            words[9] = 1;
        }
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.write_mem(scratch, &bytes)?;
        self.write_mem(scratch + 128, &tid.to_le_bytes())?;
        let options = ptrace::O_TRACESYSGOOD | ptrace::O_TRACECLONE;
        let at = |operation| move |errno| TraceeError::kernel(operation, leader, errno);
        ptrace::set_options(leader, options).map_err(at("PTRACE_SETOPTIONS"))?;
        let got = self.must(0, "making a thread", libc::SYS_clone3, [scratch, 88, 0, 0, 0, 0]);
        ptrace::set_options(leader, ptrace::O_TRACESYSGOOD).map_err(at("PTRACE_SETOPTIONS"))?;
        // The kernel answers with the TID in *its* namespace; the tracer's view comes by the event.
        got?;
        let new = self.newest_tid()?;
        match tasks::wait_for_stop(new, std::time::Instant::now() + super::STOP_LIMIT)? {
            None => return Err(TraceeError::Died { tid: new }),
            Some(_) => {
                // It inherited the option.
                ptrace::set_options(new, ptrace::O_TRACESYSGOOD)
                    .map_err(|e| TraceeError::kernel("PTRACE_SETOPTIONS", new, e))?;
            }
        }
        let found: ThreadState = tasks::read_thread(&self.mem, new)?;
        let mut thread = Thread::new(found);
        thread.masked = true;
        thread.touched = true;
        self.threads.push(thread);
        Ok(self.threads.len() - 1)
    }

    fn newest_tid(&self) -> Result<i32, TraceeError> {
        let known = |tid: &i32| self.threads.iter().any(|thread| thread.found.tid == *tid);
        tasks::list(self.pid)?
            .into_iter()
            .find(|tid| !known(tid))
            .ok_or(TraceeError::Unfit { pid: self.pid, what: "the thread just made is not there" })
    }

    /// Ends thread `i` (not the leader) by exit(2).
    pub fn end_thread(&mut self, i: usize) -> Result<(), TraceeError> {
        match self.syscall(i, libc::SYS_exit, [0; 6]) {
            Err(TraceeError::Died { .. }) => {
                self.threads.remove(i);
                Ok(())
            }
            Err(error) => Err(error),
            Ok(_) => Err(TraceeError::Unfit { pid: self.pid, what: "a thread does not exit" }),
        }
    }

    /// Start, end and permissions (as text) of every mapping.
    pub fn ranges(&self) -> Result<Vec<(u64, u64, String)>, TraceeError> {
        let maps = fs::read(format!("/proc/{}/maps", self.pid))
            .map_err(|e| tasks::io_error("reading maps", self.pid, &e))?;
        Ok(String::from_utf8_lossy(&maps).lines().filter_map(parse_range).collect())
    }

    fn free_range(&self, len: u64, avoid: &[(u64, u64)]) -> Result<u64, TraceeError> {
        let mut taken: Vec<(u64, u64)> = self.ranges()?.into_iter().map(|(s, e, _)| (s, e)).collect();
        taken.extend_from_slice(avoid);
        taken.sort_unstable();
        let mut at = LOWEST;
        for (start, end) in taken {
            if start >= at && start - at >= len {
                break;
            }
            at = at.max(end);
        }
        if at + len > HIGHEST {
            return Err(TraceeError::Unfit { pid: self.pid, what: "no free address range for the stub" });
        }
        Ok(at)
    }

    /// Address of a `syscall` instruction in the vDSO: no code of the program has to be changed.
    fn vdso_syscall(&self) -> Result<u64, TraceeError> {
        let missing = TraceeError::Unfit { pid: self.pid, what: "no system-call instruction in its vDSO" };
        let maps = fs::read(format!("/proc/{}/maps", self.pid))
            .map_err(|e| tasks::io_error("reading maps", self.pid, &e))?;
        let text = String::from_utf8_lossy(&maps);
        let Some((start, end, _)) = text.lines().find(|line| line.ends_with("[vdso]")).and_then(parse_range)
        else {
            return Err(missing);
        };
        let mut code = vec![0; (end - start) as usize];
        self.read_mem(start, &mut code)?;
        let offset = code.windows(2).position(|pair| pair == [0x0f, 0x05]).ok_or(missing)?;
        Ok(start + offset as u64)
    }
}

fn parse_range(line: &str) -> Option<(u64, u64, String)> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let perms = words.next()?.to_string();
    Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?, perms))
}
