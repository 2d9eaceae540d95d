//! System calls run inside the frozen process, and the stub they run from.

use super::stub::{self, Journal, Phase};
use super::{MAX_THREADS, Stub, Tracee, TraceeError, tasks};
use crate::sys::kcmp;
use crate::sys::ptrace::{self, Regs, Stop};
use nix::errno::Errno;

/// Stops an injected call may take: a forgotten rseq registration makes them endless.
const MAX_STOPS: u32 = 200;
/// Lowest address tried for a stub (`vm.mmap_min_addr`).
const LOWEST: u64 = 0x1_0000;
/// Nothing is put above this.
const HIGHEST: u64 = 0x7fff_f000_0000;

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
        self.stub.map_or(Ok(None), |stub| self.journal_of(stub))
    }

    fn journal_of(&self, stub: Stub) -> Result<Option<Journal>, TraceeError> {
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
    pub(super) fn find_stub(&self, maps: &str) -> Option<Stub> {
        let ranges: Vec<(u64, u64, &str)> = maps.lines().filter_map(parse_range).collect();
        let is_code = |(start, end, perms): &(u64, u64, &str)| {
            let mut magic = [0; 16];
            end - start == stub::PAGE
                && perms.contains('x')
                && self.read_mem(start + stub::MAGIC_AT, &mut magic).is_ok()
                && &magic == stub::MAGIC
        };
        let pairs = ranges.windows(2).filter(|pair| is_code(&pair[0]) && pair[1].0 == pair[0].1);
        pairs
            .map(|pair| Stub { at: pair[0].0, len: pair[1].1 - pair[0].0, gate: None })
            .find(|&stub| !self.is_of_a_sharer(stub))
    }

    /// Whether a stub is that of another process, which has the same memory.
    fn is_of_a_sharer(&self, stub: Stub) -> bool {
        let first = self.journal_of(stub).ok().flatten().and_then(|journal| Some(journal.threads.first()?.0));
        first.is_some_and(|tid| {
            let of = crate::proc::status::Status::read(tid).ok().and_then(|status| status.decimal("Tgid"));
            of.is_some_and(|group| group != self.process() as u64)
                && kcmp::shared(self.pid, tid, kcmp::Shared::Memory) == Ok(true)
        })
    }

    /// Unmaps the stub. The last instruction runs from the vDSO; the threads then stand there until
    /// they get registers.
    pub fn remove_stub(&mut self) -> Result<(), TraceeError> {
        let Some(stub) = self.stub.take() else { return Ok(()) };
        let gate = match stub.gate {
            Some(gate) => gate,
            None => self.vdso_syscall(&self.maps()?)?,
        };
        let got = self.call_at(0, gate, libc::SYS_munmap, [stub.at, stub.len, 0, 0, 0, 0])?;
        if got != 0 {
            let (tid, errno) = (self.pid, Errno::from_raw(-got as i32));
            return Err(TraceeError::Inside { operation: "unmapping the stub", tid, errno });
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

    /// Runs a call that waits, with an interrupt pending that ends the wait at once. What the kernel
    /// keeps of it for the task, and its result, are those of a call that a stop has interrupted.
    pub fn interrupted_call(&mut self, i: usize, nr: i64, args: [u64; 6]) -> Result<i64, TraceeError> {
        let Some(stub) = self.stub else {
            return Err(TraceeError::Unfit { pid: self.pid, what: "there is no stub in it" });
        };
        self.prepare_call(i, stub.at + stub::CODE_SYSCALL, nr, args)?;
        self.run_to_exit(self.tid(i), nr, true)
    }

    /// Lets threads sleep on in the calls of which the kernel has kept a restart block, calls
    /// `meanwhile`, and interrupts them again. Gives their results: `ERESTART_RESTARTBLOCK`, or that of
    /// a call that has ended.
    pub fn sleep_on(
        &mut self,
        threads: &[usize],
        meanwhile: &mut dyn FnMut(),
    ) -> Result<Vec<i64>, TraceeError> {
        let Some(stub) = self.stub else {
            return Err(TraceeError::Unfit { pid: self.pid, what: "there is no stub in it" });
        };
        let nr = libc::SYS_restart_syscall;
        for &i in threads {
            self.prepare_call(i, stub.at + stub::CODE_SYSCALL, nr, [0; 6])?;
            self.run_to_entry(self.tid(i), nr)?;
        }
        let at = |operation, tid| move |errno| TraceeError::kernel(operation, tid, errno);
        for &i in threads {
            let tid = self.tid(i);
            ptrace::cont_to_syscall(tid, 0).map_err(at("PTRACE_SYSCALL", tid))?;
        }
        for &i in threads {
            await_sleep(self.tid(i));
        }
        meanwhile();
        let mut results = Vec::with_capacity(threads.len());
        for &i in threads {
            let tid = self.tid(i);
            ptrace::interrupt(tid).map_err(at("PTRACE_INTERRUPT", tid))?;
            results.push(self.await_exit(tid, nr)?);
        }
        Ok(results)
    }

    fn run_to_entry(&mut self, tid: i32, nr: i64) -> Result<(), TraceeError> {
        ptrace::cont_to_syscall(tid, 0).map_err(|e| TraceeError::kernel("PTRACE_SYSCALL", tid, e))?;
        self.await_syscall_stop(tid, nr)
    }

    pub(super) fn await_exit(&mut self, tid: i32, nr: i64) -> Result<i64, TraceeError> {
        self.await_syscall_stop(tid, nr)?;
        let regs = ptrace::regs(tid).map_err(|e| TraceeError::kernel("reading registers", tid, e))?;
        Ok(regs.rax() as i64)
    }

    /// Waits for the next system-call stop of a thread that runs.
    pub(super) fn await_syscall_stop(&mut self, tid: i32, nr: i64) -> Result<(), TraceeError> {
        for _ in 0..MAX_STOPS {
            match ptrace::wait(tid, true).map_err(|e| TraceeError::kernel("waitpid", tid, e))? {
                Some(Stop::Syscall) => return Ok(()),
                Some(Stop::Gone(_)) => return Err(TraceeError::Died { tid }),
                Some(Stop::Signal(signal)) if i32::from(signal) == libc::SIGSTOP => self.stop_owed = true,
                _ => {}
            }
            ptrace::cont_to_syscall(tid, 0).map_err(|e| TraceeError::kernel("PTRACE_SYSCALL", tid, e))?;
        }
        Err(TraceeError::Runaway { tid, nr, stops: MAX_STOPS })
    }

    pub(super) fn call_at(
        &mut self,
        i: usize,
        at: u64,
        nr: libc::c_long,
        args: [u64; 6],
    ) -> Result<i64, TraceeError> {
        self.prepare_call(i, at, nr, args)?;
        self.run_to_exit(self.tid(i), nr, false)
    }

    pub(super) fn prepare_call(
        &mut self,
        i: usize,
        at: u64,
        nr: libc::c_long,
        args: [u64; 6],
    ) -> Result<(), TraceeError> {
        let mut regs = self.injection_regs(i)?;
        let tid = self.tid(i);
        regs.set_rip(at);
        regs.set_rax(nr as u64);
        let [a, b, c, d, e, f] = args;
        regs.set_rdi(a);
        regs.set_rsi(b);
        regs.set_rdx(c);
        regs.set_r10(d);
        regs.set_r8(e);
        regs.set_r9(f);
        ptrace::set_regs(tid, &regs).map_err(|e| TraceeError::kernel("setting registers", tid, e))
    }

    /// Registers to run stub code with in thread `i`, which counts as changed from now on; all its
    /// signals are blocked.
    pub(super) fn injection_regs(&mut self, i: usize) -> Result<Regs, TraceeError> {
        let thread = &mut self.threads[i];
        if !thread.masked {
            tasks::block_all(thread.found.tid)?;
            thread.masked = true;
        }
        thread.touched = true;
        thread.at_event_stop = false;
        let mut regs = thread.found.regs;
        // Not in a system call: or the kernel would "restart" the one it was stopped in.
        regs.set_orig_rax(u64::MAX);
        // Not on the program's stack, which nothing here uses: sigaltstack(2) refuses to change the stack that its
        // caller is on.
        regs.set_rsp(0);
        // No trap flag of a debugger's.
        regs.set_eflags(regs.eflags() & !0x100);
        Ok(regs)
    }

    /// Two system-call stops: entry, exit. With `interrupt` it cannot sleep in between.
    fn run_to_exit(&mut self, tid: i32, nr: i64, interrupt: bool) -> Result<i64, TraceeError> {
        let mut entered = false;
        for _ in 0..MAX_STOPS {
            ptrace::cont_to_syscall(tid, 0).map_err(|e| TraceeError::kernel("PTRACE_SYSCALL", tid, e))?;
            match ptrace::wait(tid, true).map_err(|e| TraceeError::kernel("waitpid", tid, e))? {
                Some(Stop::Syscall) if entered => {
                    let regs =
                        ptrace::regs(tid).map_err(|e| TraceeError::kernel("reading registers", tid, e))?;
                    return Ok(regs.rax() as i64);
                }
                Some(Stop::Syscall) => {
                    entered = true;
                    if interrupt {
                        ptrace::interrupt(tid)
                            .map_err(|e| TraceeError::kernel("PTRACE_INTERRUPT", tid, e))?;
                    }
                }
                Some(Stop::Gone(_)) => return Err(TraceeError::Died { tid }),
                Some(Stop::Clone) => self.made = ptrace::event_message(tid).ok().map(|made| made as i32),
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

    /// Whoever moves the vDSO says so: it is remembered where it is.
    pub fn vdso_moves(&mut self) {
        if let Some(stub) = &mut self.stub {
            stub.gate = None;
        }
    }

    /// The vDSO with this code is at this address: what is to run there need not be looked for.
    pub fn vdso_is_at(&mut self, code: &[u8], at: u64) {
        if let (Some(stub), Some(offset)) = (&mut self.stub, syscall_in(code)) {
            stub.gate = Some(at + offset);
        }
    }

    /// Start, end and permissions (as text) of every mapping.
    pub fn ranges(&self) -> Result<Vec<(u64, u64, String)>, TraceeError> {
        let range = |line| parse_range(line).map(|(start, end, perms)| (start, end, perms.to_string()));
        Ok(self.maps()?.lines().filter_map(range).collect())
    }

    pub(super) fn maps(&self) -> Result<String, TraceeError> {
        Ok(String::from_utf8_lossy(&self.maps_as_told()?).into_owned())
    }

    /// The same with names as they are, which may be no text.
    pub(super) fn maps_as_told(&self) -> Result<Vec<u8>, TraceeError> {
        crate::proc::read(self.pid, "maps").map_err(|e| tasks::io_error("reading maps", self.pid, &e))
    }

    pub(super) fn free_range(&self, maps: &str, len: u64, avoid: &[(u64, u64)]) -> Result<u64, TraceeError> {
        let range = |line| parse_range(line).map(|(start, end, _)| (start, end));
        let mut taken: Vec<(u64, u64)> = maps.lines().filter_map(range).collect();
        taken.extend_from_slice(avoid);
        taken.sort_unstable();
        // With a page free on each side: a neighbour must not become one mapping with the stub's pages.
        let room = len + 2 * stub::PAGE;
        let mut at = LOWEST;
        for (start, end) in taken {
            if start >= at && start - at >= room {
                break;
            }
            at = at.max(end);
        }
        if at + room > HIGHEST {
            return Err(TraceeError::Unfit { pid: self.pid, what: "no free address range for the stub" });
        }
        Ok(at + stub::PAGE)
    }

    /// Address of a `syscall` instruction in the vDSO: no code of the program has to be changed.
    pub(super) fn vdso_syscall(&self, maps: &str) -> Result<u64, TraceeError> {
        let missing = TraceeError::Unfit { pid: self.pid, what: "no system-call instruction in its vDSO" };
        let Some((start, end, _)) = maps.lines().find(|line| line.ends_with("[vdso]")).and_then(parse_range)
        else {
            return Err(missing);
        };
        let mut code = vec![0; (end - start) as usize];
        self.read_mem(start, &mut code)?;
        Ok(start + syscall_in(&code).ok_or(missing)?)
    }
}

/// Where in code a `syscall` instruction is.
fn syscall_in(code: &[u8]) -> Option<u64> {
    code.windows(2).position(|pair| pair == [0x0f, 0x05]).map(|at| at as u64)
}

/// Until a thread that was let go into a call sleeps in it, or has come out; on a busy machine it has to
/// wait for its turn.
fn await_sleep(tid: i32) {
    const LOOKS: u32 = 4000;
    const PAUSE: std::time::Duration = std::time::Duration::from_micros(50);
    let runs = || {
        let stat = crate::proc::status::Stat::read(tid);
        stat.is_ok_and(|stat| stat.field(3) == Some("R"))
    };
    for _ in 0..LOOKS {
        if !runs() {
            break;
        }
        std::thread::sleep(PAUSE);
    }
}

fn parse_range(line: &str) -> Option<(u64, u64, &str)> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let perms = words.next()?;
    Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?, perms))
}
